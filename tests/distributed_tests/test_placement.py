"""Encoding before training, during it, and on ranks of its own: the same batches, bit for bit; what becomes of each side when the other is gone."""

import os

import pytest
import torch

from tests.helpers import free_port, run_ranks
from tests.unit_tests.data_clips import captioned, flat_frames
from titan_video.components.encoding import open_cache, prepare
from titan_video.components.placement import build_live, join, run_encoder_rank
from titan_video.config.check import training_ranks
from titan_video.config.job_config import Comm, Data, Encoder, Validation
from titan_video.data.bucket import Batching, Work
from titan_video.data.dataset import make_plan
from titan_video.data.loader import LatentLoader
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
    import torch.distributed as dist

    dp_rank = next(r for r, ranks in enumerate(dims.sample_groups()) if dist.get_rank() in ranks)
    return live, cache, LatentLoader(
        clips.training, cache, cache.text_key(""), Batching(4, 2), lambda b: Work(b[0], 1.0), max_text_length=6, text_dim=64, dp_rank=dp_rank,
        dp_size=dims.dp, seed=5, caption_dropout=0.3, num_workers=data.num_workers, live=live,
    )  # fmt: skip


def batches_of(folder, section, cp=1, conditions=ALL, num_workers=0, cache_name="cache", stop_after=None, resume=False):
    """The batches of this rank; None of an encoder rank."""
    import torch.distributed as dist

    world, data = int(os.environ["WORLD_SIZE"]), Data(num_workers=num_workers)
    num_training = training_ranks(section, world)
    if int(os.environ["RANK"]) >= num_training:
        run_encoder_rank(section, data, COMM, "", num_training)
        return None
    wire = join(section, COMM, torch.device("cpu"), num_training)
    live, cache, loader = loader_of(folder, section, data, conditions, ParallelDims(dp_shard=num_training // cp, ulysses=cp), wire, cache_name)
    if resume:
        first = next(loader.steps(1)) if not live else None
        state = {**loader.state_dict(), "draws": resume}
        loader.load_state_dict(state)
        del first
    steps = loader.steps(STEPS)
    found = [next(steps) for _ in range(stop_after or STEPS)]
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
