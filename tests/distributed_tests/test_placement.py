"""Encoding before training, during it, and on ranks of its own: the same batches, bit for bit; what each side does when
the other is gone.
"""

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.helpers import free_port, run_ranks
from tests.unit_tests.data_clips import captioned, flat_frames
from titan_video.config.check import check
from titan_video.config.job_config import Comm, Data, Encoder, Job, JobConfig, Parallelism
from titan_video.config.manager import ConfigError
from titan_video.data.batching import Batching, Work
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, EntryReader, LatentLoader
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.encoders import build_encoders
from titan_video.ingest.cache import encode
from titan_video.ingest.decode.video import UnusableClip
from titan_video.ingest.prepare import open_cache, prepare_clips
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.wan import FLAVORS
from titan_video.online.setup import build_online_encoder, init_process_groups, run_encoder_rank

ALL = ConditioningSpec(num_cond_frames=1, form="mask_first", image_tokens=257, pooled_text=True)
COMM = Comm(init_timeout_seconds=90, train_timeout_seconds=60)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    (folder / "clips").mkdir()
    for k in range(7):
        size = {"width": 64, "height": 32} if k % 3 else {"width": 32, "height": 64}
        captioned(folder / "clips" / f"{k}.mp4", f"clip number {k}", frames=flat_frames(17, **size)[k:], fps=8, **size)
    return folder


def build_loader(folder, section, data, conditioning, dims, channel, cache_name):
    """As train.py builds it, without a model."""
    encoders = build_encoders(section, "", "cpu")
    cache = open_cache(folder / cache_name, encoders, conditioning, None)
    config = JobConfig(job=Job(dump_folder=str(folder / cache_name)), encoder=section, data=data, comm=COMM)
    clips = prepare_clips(config, FLAVORS["debug"], encoders, cache, None)

    def shape(bucket):
        return 16, (bucket[0] - 1) // 4 + 1, bucket[1] // 8, bucket[2] // 8

    online = build_online_encoder(config, encoders, cache, dims, channel, shape, 6)
    dp_rank = next(r for r, ranks in enumerate(dims.sample_groups()) if dist.get_rank() in ranks)
    draw_plan = DrawPlan(
        clips.training, cache.text_key(""), Batching(4, 2), lambda b: Work(b[0], 1.0), seed=5, caption_dropout=0.3
    )
    reader = EntryReader(online.cache if online else cache, 6, 64)
    loader = LatentLoader(
        draw_plan, reader, dp_rank=dp_rank, dp_size=dims.dp, num_workers=data.num_workers, online=online
    )
    return online, cache, loader


def get_batches(folder, section, cp=1, num_workers=0, cache_name="cache", stop_after=STEPS):
    """[[digest of each micro-batch] for each step] of this rank; None of an encoder rank."""
    world, buckets = int(os.environ["WORLD_SIZE"]), ((5, 32, 64), (5, 64, 32))
    data = Data(path=str(folder / "clips"), buckets=buckets, fps=8.0, num_workers=num_workers)
    num_training = section.num_training_ranks(world)
    if int(os.environ["RANK"]) >= num_training:
        run_encoder_rank(section, data, COMM, "", num_training)
        return None
    channel = init_process_groups(section, COMM, torch.device("cpu"), num_training)
    online, cache, loader = build_loader(
        folder, section, data, ALL, ParallelDims(dp_shard=num_training // cp, ulysses=cp), channel, cache_name
    )
    steps = loader.steps(STEPS)
    found = [[digest(batch) for batch in next(steps)] for _ in range(stop_after)]
    dist.barrier()  # as training's own collectives
    if online:
        online.close()
    dist.destroy_process_group()
    return found


def digest(batch):
    """Of all names, types, shapes and bytes, beside the sample ids."""
    assert set(batch.cond) == {"cond_latents_BCFHW", "image_BSD", "pooled_text_BD"}
    tensors = {
        "latents": batch.streams["video"],
        "text": batch.text_BLD,
        "mask": batch.text_mask_BL,
        "ids": batch.sample_ids_B,
        **batch.cond,
    }
    assert all(len(x) == 2 and x.any() for name, x in tensors.items())
    whole = [
        (name, str(x.dtype), list(x.shape), x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, x in sorted(tensors.items())
    ]
    return batch.sample_ids_B.tolist(), hashlib.sha256(repr(whole).encode()).hexdigest()


@dataclass(frozen=True)
class Case:
    """One program of several that the same processes run one after the other. kwargs: of `get_batches`."""

    training: int
    section: Encoder
    kwargs: dict

    @property
    def world(self):
        return self.training + self.section.num_ranks


def run_cases(folder, cases, store):
    """[(batches, clips encoded during training)] of this rank; None where it has no part.

    A case begins when all ranks have ended the one before, as a run does: its encoder ranks write to the cache last.
    """
    rank, found, make, made = int(os.environ["RANK"]), [], encode.ClipEncoder.entries, []
    num_ranks = max(case.world for case in cases)
    store = dist.FileStore(store, num_ranks)

    def entries(self, job, part, decoded):
        made.append("video" in part.kinds)
        return make(self, job, part, decoded)

    encode.ClipEncoder.entries = entries
    for i, case in enumerate(cases):
        made.clear()
        if store.add(f"ready for {i}", 1) == num_ranks:
            store.set(f"port of {i}", str(free_port()))  # one that was free long before may be taken
        port = store.get(f"port of {i}").decode()
        os.environ.update(WORLD_SIZE=str(case.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        found.append((get_batches(folder, case.section, **case.kwargs), sum(made)) if rank < case.world else None)
    return found


def on_ranks(folder, cases, run=run_cases):
    """[(batches of the training ranks, clips encoded during training)] of each case."""
    num_ranks = max(case.world for case in cases)
    with tempfile.TemporaryDirectory() as store:
        found = run_ranks(run, num_ranks, folder, cases, f"{store}/store", init=False, timeout=200)
    of_case = [[rank[i] for rank in found[: case.world]] for i, case in enumerate(cases)]
    return [
        ([batches for batches, _ in ranks[: case.training]], sum(made for _, made in ranks))
        for case, ranks in zip(cases, of_case, strict=True)
    ]


def section(placement="cached", **kwargs):
    return Encoder(name="debug", max_text_length=6, placement=placement, **kwargs)


@pytest.fixture(scope="module")
def whole(folder):
    """The batches of a single rank, from the cache."""
    (((steps,), made),) = on_ranks(folder, [Case(1, section(), {})])
    assert [i for step in steps for ids, _ in step for i in ids] == list(range(STEPS * 8)) and made == 0
    assert len({mark for step in steps for _, mark in step}) == STEPS * 4
    return steps


def shard(whole, training, cp, stop_after=STEPS):
    """The part of each of `training` ranks."""
    return [[step[rank // cp :: training // cp] for step in whole[:stop_after]] for rank in range(training)]


LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2)]
PLACED = {
    "cached": section(),
    "colocated": section("colocated"),
    "one": section("separate", num_ranks=1, queue_depth=3),
    "two": section("separate", num_ranks=2, queue_depth=1),
}


QUICK = [((2, 1), "colocated"), ((2, 1), "one"), ((4, 2), "cached"), ((4, 2), "colocated"), ((4, 2), "two")]
ALL_PAIRS = [(layout, name) for layout in LAYOUTS for name in PLACED]


@pytest.mark.parametrize("named", [QUICK, pytest.param(ALL_PAIRS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_batches_are_the_same(folder, whole, named):
    """Cached, colocated and on one or two encoder ranks; on two and four training ranks; with and without context
    parallel.
    """
    cases = [
        Case(training, PLACED[name], {"cp": cp, "cache_name": f"{name}-{training}-{cp}"})
        for (training, cp), name in named
    ]
    for (layout, name), (found, made) in zip(named, on_ranks(folder, cases), strict=True):
        assert found == shard(whole, *layout), (layout, name)
        assert made == (0 if name == "cached" else STEPS * 8), (layout, name)


def run_cases_on_a_slow_disk(*args):
    """The third rank, which encodes, takes its time to write: training has ended by then."""
    write = LatentCache.flush

    def flush(self):
        time.sleep(2 if self.waiting else 0)
        write(self)

    if os.environ["RANK"] == "2":
        LatentCache.flush = flush
    return run_cases(*args)


def test_workers_an_early_end_and_a_rolling_cache(folder, whole):
    """Decoding in workers; training that stops before the last step, with receives posted and sends under way; and what
    is encoded is written, and read in later epochs and by later runs."""
    colocated, separate = (
        section("colocated", write_cache=True),
        section("separate", num_ranks=1, queue_depth=5, write_cache=True),
    )
    early = [
        Case(1, colocated, {"num_workers": 1, "stop_after": 2, "cache_name": "early-colocated"}),
        Case(
            1,
            section("separate", num_ranks=2, queue_depth=5),
            {"num_workers": 1, "stop_after": 2, "cache_name": "early-separate"},
        ),
    ]
    rolling = [
        Case(2, placed, {"cp": 2, "cache_name": f"rolling-{placed.placement}"}) for placed in (colocated, separate)
    ]
    again = [
        Case(2, placed, {"cp": 2, "cache_name": f"rolling-{other.placement}"})
        for placed, other in ((colocated, separate), (separate, colocated), (section(), separate))
    ]
    found = on_ranks(folder, early + rolling + again, run_cases_on_a_slow_disk)
    for batches, _ in found[:2]:
        assert batches == shard(whole, 1, 1, 2)
    for batches, _ in found[2:]:
        assert batches == shard(whole, 2, 2)
    made = [made for _, made in found[2:]]
    assert made[1:] == [7, 0, 0, 0] and 7 <= made[0] < STEPS * 8, (
        made
    )  # two ranks may come upon one clip before either writes it


def batches_of_broken(folder, section, cp, name):
    """The messages for a clip that the plan accepts and that does not decode."""

    def read_frames(entry, *args, **kwargs):
        if entry.path.endswith("3.mp4"):
            raise UnusableClip("corrupt: the frame at 0.50 s is damaged")
        return read(entry, *args, **kwargs)

    read, encode.read_frames = encode.read_frames, read_frames
    try:
        get_batches(folder, section, cp, cache_name=name)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize(
    "placed, world", [(section("colocated"), 2), (section("separate", num_ranks=1, queue_depth=20), 3)]
)
def test_a_clip_that_cannot_be_encoded_is_named_on_all_ranks(folder, placed, world):
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = run_ranks(
        batches_of_broken, world, folder, placed, 2, f"broken {placed.placement}", init=False, env=env, timeout=100
    )
    for text in said:
        assert (
            text and "3.mp4: corrupt: the frame at 0.50 s is damaged" in text and "encoder.placement to cached" in text
        ), said


# ---- rules ----


@pytest.mark.parametrize(
    "options, world, words",
    [
        (
            {"placement": "separate"},
            4,
            "encoder.num_ranks: given 0 of 4 ranks, but encoder.placement separate needs at least one rank that "
            "encodes and one that trains; legal: 1 to 3",
        ),
        ({"placement": "separate", "num_ranks": 4}, 4, "legal: 1 to 3"),
        (
            {"placement": "separate", "num_ranks": 1},
            1,
            "start more (NGPU), or set encoder.placement to cached or colocated",
        ),
        ({"num_ranks": 1}, 4, "encoder.num_ranks: given 1, but encoder.placement is cached; set that to separate"),
        (
            {"placement": "colocated", "num_ranks": 1},
            4,
            "encoder.num_ranks: given 1, but encoder.placement is colocated",
        ),
        (
            {"queue_depth": 9},
            4,
            "encoder.queue_depth: given 9, but encoder.placement is cached; set that to separate, or leave this at 4",
        ),
        (
            {"offload_policy": "free"},
            4,
            "encoder.offload_policy: given free, but encoder.placement is cached; "
            "set that to colocated, or leave this at offload",
        ),
        ({"write_cache": True}, 4, "encoder.write_cache: true, but encoder.placement is cached"),
    ],
)
def test_what_does_not_fit_is_refused(options, world, words):
    with pytest.raises(ConfigError) as error:
        check(JobConfig(encoder=Encoder(name="debug", **options)), world, files=False)
    assert words in str(error.value), error.value


def test_degrees_are_of_the_training_ranks():
    config = JobConfig(encoder=section("separate", num_ranks=2), parallelism=Parallelism(context_parallel_degree=3))
    check(config, 5, files=False)
    assert config.encoder.num_training_ranks(5) == 3
    with pytest.raises(ConfigError, match="context_parallel_degree: given 3, which does not divide the 4 ranks"):
        check(config, 6, files=False)


def test_ranks_that_share_a_sample():
    dims = ParallelDims(pp=2, dp_replicate=2, dp_shard=1, ring=1, ulysses=1, tp=2)
    assert dims.sample_groups() == [[0, 1, 4, 5], [2, 3, 6, 7]]
