"""Encoding before training, during it, and on ranks of its own: the same batches, bit for bit; what becomes of each side when the other is gone."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.helpers import free_port, run_ranks
from tests.unit_tests.data_clips import captioned, flat_frames
from titan_video.components.encoding import open_cache, prepare
from titan_video.components.placement import build_live, join, run_encoder_rank
from titan_video.config.check import check, training_ranks
from titan_video.config.job_config import Comm, Data, Encoder, JobConfig, Parallelism, Validation
from titan_video.config.manager import ConfigError
from titan_video.data import encode
from titan_video.data.bucket import Batching, Work
from titan_video.data.dataset import make_plan
from titan_video.data.loader import LatentLoader
from titan_video.data.video import UnusableClip
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.encoders import build_encoders
from titan_video.flow.conditions import Conditions

ALL = Conditions(num_given=1, form="mask_first", image_tokens=257, pooled_text=True)
COMM = Comm(init_timeout_seconds=60, train_timeout_seconds=60)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    (folder / "clips").mkdir()
    for k in range(7):
        size = {"width": 64, "height": 32} if k % 3 else {"width": 32, "height": 64}
        captioned(folder / "clips" / f"{k}.mp4", f"clip number {k}", frames=flat_frames(17, **size)[k:], fps=8, **size)
    return folder


def loader_of(folder, section, data, conditions, dims, wire, cache_name):
    """As train.py builds it, without a model."""
    encoders = build_encoders(section, "", "cpu")
    cache = open_cache(folder / cache_name, encoders, conditions, None)
    make = lambda path: make_plan(folder / "clips", [(5, 32, 64), (5, 64, 32)], 8, 0, folder / "cache")
    clips = prepare(make, section.placement == "cached", Validation(), folder / cache_name, encoders, cache, None, data.num_workers)
    shape = lambda bucket: (16, (bucket[0] - 1) // 4 + 1, bucket[1] // 8, bucket[2] // 8)
    live = build_live(section, data, COMM, encoders, cache, dims, wire, shape, 6)
    dp_rank = next(r for r, ranks in enumerate(dims.sample_groups()) if dist.get_rank() in ranks)
    return live, cache, LatentLoader(
        clips.training, cache, cache.text_key(""), Batching(4, 2), lambda b: Work(b[0], 1.0), max_text_length=6, text_dim=64, dp_rank=dp_rank,
        dp_size=dims.dp, seed=5, caption_dropout=0.3, num_workers=data.num_workers, live=live,
    )  # fmt: skip


def batches_of(folder, section, cp=1, conditions=ALL, num_workers=0, cache_name="cache", stop_after=STEPS):
    """The batches of this rank; None of an encoder rank."""
    world, data = int(os.environ["WORLD_SIZE"]), Data(num_workers=num_workers)
    num_training = training_ranks(section, world)
    if int(os.environ["RANK"]) >= num_training:
        run_encoder_rank(section, data, COMM, "", num_training)
        return None
    wire = join(section, COMM, torch.device("cpu"), num_training)
    live, cache, loader = loader_of(folder, section, data, conditions, ParallelDims(dp_shard=num_training // cp, ulysses=cp), wire, cache_name)
    steps = loader.steps(STEPS)
    found = [next(steps) for _ in range(stop_after)]
    dist.barrier()  # as training's own collectives
    if live:
        live.close()
    dist.destroy_process_group()
    return [[(b.latents_BCFHW, b.text_BLD, b.text_mask_BL, b.sample_ids_B, b.cond) for b in step] for step in found]


def on_ranks(world, folder, section, **kwargs):
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = run_ranks(batches_of, world, folder, section, init=False, env=env, timeout=100, **kwargs)
    return found[: training_ranks(section, world)]


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and torch.equal(a, b)


def section(placement="cached", **kwargs):
    return Encoder(name="debug", max_text_length=6, placement=placement, **kwargs)


@pytest.mark.parametrize("training, cp", [(2, 1), (2, 2), (4, 2)])
def test_batches_are_the_same(folder, training, cp):
    cached = on_ranks(training, folder, section(), cp=cp)
    assert set(cached[0][0][0][4]) == {"given_BCFHW", "image_BSD", "pooled_text_BD"}
    for ranks in zip(*[iter(cached)] * cp):
        assert all(same(ranks[0], rank) for rank in ranks)
    colocated = on_ranks(training, folder, section("colocated"), cp=cp, cache_name=f"colocated{training}{cp}")
    assert same(cached, colocated)
    num_encoders = 2 if training == 4 else 1
    separate = on_ranks(training + num_encoders, folder, section("separate", num_ranks=num_encoders, queue_depth=3), cp=cp,
                        cache_name=f"separate{training}{cp}")  # fmt: skip
    assert same(cached, separate)


def test_workers_and_an_early_end(folder):
    """Decoding in workers, and training that stops before the last step, with receives posted and sends under way."""
    cached = on_ranks(1, folder, section(), stop_after=2)
    for placed, world in ((section("colocated", write_cache=True), 1), (section("separate", num_ranks=2, queue_depth=5), 3)):
        assert same(cached, on_ranks(world, folder, placed, num_workers=1, stop_after=2, cache_name=f"{placed.placement}-workers"))


def batches_of_broken(folder, section, cp, name):
    """What is said when a clip does not decode that the plan thought good."""
    def read_frames(entry, *args, **kwargs):
        if entry.path.endswith("3.mp4"):
            raise UnusableClip("corrupt: the frame at 0.50 s is damaged")
        return read(entry, *args, **kwargs)

    read, encode.read_frames = encode.read_frames, read_frames
    try:
        batches_of(folder, section, cp, cache_name=name)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize("placed, world", [(section("colocated"), 2), (section("separate", num_ranks=1), 3)])
def test_a_clip_that_cannot_be_encoded_is_named_on_all_ranks(folder, placed, world):
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = run_ranks(batches_of_broken, world, folder, placed, 2, f"broken {placed.placement}", init=False, env=env, timeout=100)
    for text in said:
        assert text and "3.mp4: corrupt: the frame at 0.50 s is damaged" in text and "encoder.placement to cached" in text, said


# ---- rules ----


@pytest.mark.parametrize("options, world, words", [
    ({"placement": "separate"}, 4, "encoder.num_ranks: given 0 of 4 ranks, but encoder.placement separate needs some that encode and some that train; "
     "legal: 1 to 3"),
    ({"placement": "separate", "num_ranks": 4}, 4, "legal: 1 to 3"),
    ({"placement": "separate", "num_ranks": 1}, 1, "start more (NGPU), or set encoder.placement to cached or colocated"),
    ({"num_ranks": 1}, 4, "encoder.num_ranks: given 1, but encoder.placement is cached; set that to separate"),
    ({"placement": "colocated", "num_ranks": 1}, 4, "encoder.num_ranks: given 1, but encoder.placement is colocated"),
    ({"queue_depth": 9}, 4, "encoder.queue_depth: given 9, but encoder.placement is cached; set that to separate, or leave this at 4"),
    ({"idle": "free"}, 4, "encoder.idle: given free, but encoder.placement is cached; set that to colocated, or leave this at offload"),
    ({"write_cache": True}, 4, "encoder.write_cache: true, but encoder.placement is cached"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options, world, words):
    with pytest.raises(ConfigError) as error:
        check(JobConfig(encoder=Encoder(name="debug", **options)), world, files=False)
    assert words in str(error.value), error.value


def test_degrees_are_of_the_training_ranks():
    config = JobConfig(encoder=section("separate", num_ranks=2), parallelism=Parallelism(context_parallel_degree=3))
    check(config, 5, files=False)
    assert training_ranks(config.encoder, 5) == 3
    with pytest.raises(ConfigError, match="context_parallel_degree: given 3, which does not divide the 4 ranks"):
        check(config, 6, files=False)


def test_ranks_that_share_a_sample():
    dims = ParallelDims(pp=2, dp_replicate=2, dp_shard=1, ring=1, ulysses=1, tp=2)
    assert dims.sample_groups() == [[0, 1, 4, 5], [2, 3, 6, 7]]
