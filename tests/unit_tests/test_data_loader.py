"""Micro-batches: the same global batches for every layout, exact resumption, padding and caption dropout; and the data
commands.
"""

import gc
import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from tests.unit_tests.data_clips import captioned, flat_frames
from titan_video.data import loader as loader_module
from titan_video.data.batching import Batching, Work
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, EntryReader, LatentLoader
from titan_video.encoders.debug import DebugEncoders
from titan_video.flow.noise import drop_caption
from titan_video.ingest import __main__ as command
from titan_video.ingest.cache.cached_clips import cached_clips
from titan_video.ingest.cache.encode import encode_missing
from titan_video.ingest.plan.build import make_plan

NUM_CLIPS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    (folder / "clips").mkdir()
    for k in range(NUM_CLIPS):
        size = {"width": 64, "height": 32} if k % 3 else {"width": 32, "height": 64}
        frames = flat_frames(17, **size)[k:]  # another brightness each
        captioned(folder / "clips" / f"{k}.mp4", f"clip number {k}", frames=frames, fps=8, **size)
    encoders = DebugEncoders(6)
    cache = LatentCache(folder / "cache", encoders.video_id(), encoders.text_id())
    plan = make_plan(folder / "clips", [[5, 32, 64], [5, 64, 32]], 8, 0, folder / "cache")
    assert encode_missing(plan, encoders, cache, log=lambda _: None) == {}
    return cached_clips(plan, cache), cache


def make(data, clips_per_batch=2, total=4, budget=0, text_dim=64, **kwargs):
    """A loader of micro-batches of `clips_per_batch` clips and `total` clips a step (with a budget: micro-batches)."""
    clips, cache = data
    batching = Batching(total if budget else total // clips_per_batch, clips_per_batch, budget)
    dropout = kwargs.pop("caption_dropout", 0.3)

    def work(bucket):
        return Work(bucket[0] * bucket[1], bucket[1])

    draw_plan = DrawPlan(clips, cache.text_key(""), batching, work, seed=5, caption_dropout=dropout)
    reader = EntryReader(cache, 6, text_dim, keep=not kwargs.get("num_workers"))
    return LatentLoader(draw_plan, reader, **kwargs)


def samples(step):
    """{sample id: (latents, text, mask)} of a step's micro-batches."""
    return {
        int(i): (b.streams["video"][n], b.text_BLD[n], b.text_mask_BL[n])
        for b in step
        for n, i in enumerate(b.sample_ids_B)
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for i in a for x, y in zip(a[i], b[i], strict=True))


@pytest.mark.parametrize(
    "dp_size, local, num_workers", [(1, 1, 0), (1, 12, 2), (2, 3, 0), (3, 2, 1), (4, 3, 0), (12, 1, 0)]
)
def test_the_global_batch_is_the_same_for_every_layout(data, dp_size, local, num_workers):
    reference = [samples(s) for s in islice(make(data, clips_per_batch=4, total=12), 6)]
    ranks = [
        make(data, clips_per_batch=local, total=12, dp_rank=r, dp_size=dp_size, num_workers=num_workers)
        for r in range(dp_size)
    ]
    steps = [list(islice(loader, 6)) for loader in ranks]
    for n, wanted in enumerate(reference):
        union = {}
        for rank in range(dp_size):
            assert len(steps[rank][n]) == 12 // local // dp_size
            part = samples(steps[rank][n])
            assert not part.keys() & union.keys()
            union |= part
        assert same(union, wanted)


def test_the_place_of_a_draw(data):
    loader = make(data, clips_per_batch=2, total=8, dp_rank=1, dp_size=2)
    first = next(iter(loader))
    assert [b.sample_ids_B.tolist() for b in first] == [[2, 3], [6, 7]]


def test_contents(data):
    clips, cache = data
    by_latents = {cache.read("video", c.video_key).numpy().tobytes(): c for c in clips}
    encoders, dropped, seen = DebugEncoders(6), 0, set()
    for step in islice(make(data), 40):
        for batch in step:
            assert (
                batch.streams["video"].dtype == torch.float32
                and batch.text_mask_BL.dtype == torch.bool
                and batch.cond == {}
            )
        for sample_id, (latents, text, mask) in samples(step).items():
            clip = by_latents[latents.numpy().tobytes()]
            seen.add(clip.path)
            drop = drop_caption(5, sample_id, 0.3)
            dropped += drop
            (wanted,) = encoders.encode_text(["" if drop else clip.caption])
            assert mask.tolist() == [k < len(wanted) for k in range(6)]
            assert torch.equal(text[mask], wanted) and not text[~mask].any()
    assert len(seen) == NUM_CLIPS and 25 < dropped < 75


def test_a_micro_batch_has_one_bucket_and_a_reader_serves_chosen_clips(data):
    clips, cache = data
    shapes = {tuple(b.streams["video"].shape[1:]) for step in islice(make(data), 10) for b in step}
    assert shapes == {(16, 2, 4, 8), (16, 2, 8, 4)}
    tall = [c for c in clips if c.bucket == (5, 64, 32)]
    batch = EntryReader(cache, 6, 64).batch(tall, [7, 8, 9])
    assert batch.streams["video"].shape == (3, 16, 2, 8, 4) and batch.sample_ids_B.tolist() == [7, 8, 9]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 3, 10])
def test_resume_is_exact_and_ignores_what_was_prefetched(data, num_workers, done):
    whole = [samples(s) for s in islice(make(data), 16)]
    loader = make(data, num_workers=num_workers, prefetch_factor=4)
    steps = iter(loader)
    for _ in range(done):
        next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(data, num_workers=2 - num_workers)
    resumed.load_state_dict(state)
    for wanted, step in zip(whole[done:], resumed, strict=False):
        assert same(samples(step), wanted)
    assert same(samples(next(iter(loader))), whole[done])  # iterating again continues as well


DEGREES = (1, 2, 4, 8)
PAIRS = [(a, b) for a in DEGREES for b in DEGREES]


def drawn(data, degree, num_workers, state, count):
    """([(sample id, digest of its clip and text)] in the order of the run, the state after it) of all ranks, for
    `count` steps after `state`.
    """
    ranks = [
        make(data, total=8, budget=150, dp_rank=r, dp_size=degree, num_workers=num_workers, prefetch_factor=3)
        for r in range(degree)
    ]
    found = []
    for loader in ranks if state else ():
        loader.load_state_dict(state)
    for step in zip(*(loader.steps(count) for loader in ranks), strict=True):
        for micro_step in zip(*step, strict=True):
            for batch in micro_step:
                found += [
                    (i, hash((latents.numpy().tobytes(), text.numpy().tobytes())))
                    for i, (latents, text, _) in samples([batch]).items()
                ]
    assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)
    return found, json.loads(json.dumps(ranks[0].state_dict()))


@pytest.fixture(scope="module")
def uninterrupted(data):
    """Six steps of one rank.

    Every epoch of a bucket holds each of its clips once, and steps end in the middle of them.
    """
    (whole, last), clips = drawn(data, 1, 0, None, 6), Counter(clip.bucket for clip in data[0])
    plain = make(data, total=8, budget=150, caption_dropout=0.0)
    of_bucket = {bucket: [] for bucket in clips}
    for step in plain.steps(6):
        assert any(
            drawn % size for drawn, size in zip(plain.state_dict()["draws"], plain.draw_plan.sampler.sizes, strict=True)
        )
        for batch in step:
            bucket = 5, *(8 * size for size in batch.streams["video"].shape[3:])
            of_bucket[bucket] += [latents.numpy().tobytes() for latents in batch.streams["video"]]
    for bucket, size in clips.items():
        epochs = [of_bucket[bucket][i : i + size] for i in range(0, len(of_bucket[bucket]), size)]
        assert len(epochs) > 1 and all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert [i for i, _ in whole] == list(range(48))
    return whole, last


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "num_before, num_after",
    [(0, 0), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(0, 1), (1, 4), (4, 0)])],
)
def test_resume_on_another_number_of_ranks(data, uninterrupted, num_before, num_after):
    """All pairs of degrees: the samples are those of the uninterrupted run, in its order."""
    whole, last = uninterrupted
    for k, (before, after) in enumerate(PAIRS):
        first, state = drawn(data, before, num_before, None, 1 + k % 5)
        rest, end = drawn(data, after, num_after, state, 5 - k % 5)
        assert first + rest == whole and end == last, (before, after)


def test_resume_with_another_number_of_workers(data, uninterrupted):
    for before, after, num_before, num_after, done in ((1, 2, 1, 0, 2), (2, 1, 0, 4, 3), (1, 1, 4, 1, 5)):
        first, state = drawn(data, before, num_before, None, done)
        rest, end = drawn(data, after, num_after, state, 6 - done)
        assert first + rest == uninterrupted[0] and end == uninterrupted[1]


def test_repeated_clips_come_as_often_in_an_epoch(data):
    clips, cache = data
    clips = [replace(c, repeats=3) if c.bucket == (5, 64, 32) else c for c in clips]
    loader = make((clips, cache), clips_per_batch=1, total=1)
    count = sum(c.repeats for c in clips)
    shapes = [b.streams["video"].shape[3] for step in islice(loader, count) for b in step]
    assert count == 6 + 3 * 3 and shapes.count(8) == 9


def test_state_is_the_same_on_all_ranks(data):
    loaders = [make(data, clips_per_batch=1, dp_rank=r, dp_size=4) for r in range(4)]
    for loader in loaders:
        next(iter(loader))
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)


def test_memory_of_a_loader_without_workers_is_bounded(data, monkeypatch):
    loader = make(data)
    next(iter(loader))
    assert loader.reader.kept
    assert make(data, num_workers=1).reader.kept is None
    monkeypatch.setattr(loader_module, "MEMORY_LIMIT", 10_000)
    small = make(data)
    for _ in islice(small, 10):
        pass
    assert 0 < small.reader.kept_bytes < 10_000
    assert all(
        same(samples(a), samples(b)) for a, b in islice(zip(small, islice(make(data), 10, None), strict=False), 3)
    )


def num_reading_threads():
    return sum("_populate_queue" in t.name or "_apply_udf" in t.name for t in threading.enumerate())


def reading_threads_end():
    """They look every 0.1 s whether they should."""
    deadline = time.monotonic() + 20
    while num_reading_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return num_reading_threads() == 0


@pytest.mark.parametrize("prefetch_factor", [1, 2, 5])
def test_threads_end_with_the_iteration(data, prefetch_factor):
    reference = [samples(s) for s in islice(make(data), 3)]
    loader = make(data, num_workers=2, prefetch_factor=prefetch_factor)
    assert len(list(loader.steps(2))) == 2
    assert reading_threads_end()
    steps = iter(loader)
    assert same(samples(next(steps)), reference[2]) and num_reading_threads() >= 3
    steps.close()  # in the middle
    assert reading_threads_end()


def test_other_threads_keep_their_number_of_torch_threads(data):
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        steps = iter(make(data, num_workers=1))
        next(steps)
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_workers, prefetch_factor", [(0, 2), (2, 2), (2, 4)])
def test_a_damaged_shard_is_named_and_ends_the_iteration(data, tmp_path, num_workers, prefetch_factor):
    clips, cache = data
    shutil.copytree(cache.folder, tmp_path / "cache")
    copy = LatentCache(tmp_path / "cache", cache.video_id, cache.text_id)
    shard = max((tmp_path / "cache" / "shards").iterdir(), key=lambda path: path.stat().st_size)  # of latents
    os.truncate(shard, shard.stat().st_size - 40_000)
    steps = iter(make((clips, copy), num_workers=num_workers, prefetch_factor=prefetch_factor))
    with pytest.raises(ValueError, match=rf"{shard.name}: video/\w+ is damaged .*; delete this file"):
        for _ in range(20):
            next(steps)
    assert next(steps, None) is None and reading_threads_end()


def test_wrong_numbers_are_refused(data):
    with pytest.raises(ValueError, match="no multiple of data-parallel degree 2"):
        make(data, total=6, dp_size=2)
    with pytest.raises(ValueError, match="the run takes 6 x 32"):
        next(iter(make(data, text_dim=32)))


def test_a_draw_chooses_one_of_the_captions(data):
    clips, cache = data
    several = [
        replace(c, text_keys=(c.text_key, other.text_key), captions=(c.caption, other.caption))
        for c, other in zip(clips, clips[1:] + clips[:1], strict=True)
    ]
    chosen = []
    for kwargs in ({}, {"clips_per_batch": 4, "num_workers": 1}):
        draw_plan = make((several, cache), **kwargs).draw_plan
        keys = {}
        for step in islice(draw_plan.sampler, 30):
            for micro_batch in step:
                for clip, key, sample_id in draw_plan.spec(micro_batch):
                    assert key in (*clip.text_keys, cache.text_key(""))
                    keys[sample_id] = key, clip.text_keys.index(key) if key in clip.text_keys else None
        chosen.append(keys)
    assert chosen[0] == chosen[1] and len(chosen[0]) == 120
    counts = Counter(which for _, which in chosen[0].values())
    assert counts.keys() == {0, 1, None} and 0.5 < counts[0] / counts[1] < 2


def draws(draw_plan, num_steps=400):
    """{sample id: (clip, key)} of the first steps."""
    found = {}
    for step in islice(draw_plan.sampler, num_steps):
        for micro_batch in step:
            found |= {sample_id: (clip, key) for clip, key, sample_id in draw_plan.spec(micro_batch)}
    return found


def test_captions_and_images_are_dropped_apart(data):
    """As HunyuanVideo-I2V's training code does: the caption, the image that the text sees, both, or neither."""
    clips, cache = data
    apart = [replace(c, imageless_keys=(f"{c.path} alone", f"{c.path} black")) for c in clips]
    old, new = (make((some, cache), caption_dropout=0.3).draw_plan for some in (clips, apart))
    new.image_dropout = 0.2
    before, after = draws(old), draws(new)
    null, counts = cache.text_key(""), Counter()
    for sample_id, (clip, key) in after.items():
        drops_caption = before[sample_id][1] == null
        assert before[sample_id][0].path == clip.path  # the draws of a run do not move
        kinds = {clip.text_key: (0, 0), f"{clip.path} black": (0, 1), f"{clip.path} alone": (1, 0), null: (1, 1)}
        assert kinds[key][0] == drops_caption
        counts[kinds[key]] += 1
    total, captions, images = len(after), counts[1, 0] + counts[1, 1], counts[0, 1] + counts[1, 1]
    assert 0.25 < captions / total < 0.35 and 0.15 < images / total < 0.25
    assert counts[1, 1] / total == pytest.approx(captions * images / total**2, abs=0.02)
    seed, work, batching = new.seed, lambda bucket: Work(1, 1), new.batching
    assert DrawPlan(apart, null, batching, work, seed, image_dropout=-1).image_dropout == 0.1
    assert old.sampler.fingerprint == new.sampler.fingerprint  # an old run goes on


def test_so_many_steps_and_no_more(data):
    for num_workers in (0, 1):
        loader = make(data, num_workers=num_workers)
        assert len(list(loader.steps(3))) == 3 and len(list(loader.steps(0))) == 0
        reference = list(islice(make(data), 5))
        assert [samples(s).keys() for s in loader.steps(2)] == [samples(s).keys() for s in reference[3:]]


# ---- python -m titan_video.data ----


def config_file(tmp_path, path):
    file = tmp_path / "run.toml"
    data = f'[data]\npath = "{path}"\nbuckets = [[17, 64, 64]]\nfps = 8.0\nnum_workers = 0\n'
    file.write_text(f'[job]\ndump_folder = "{tmp_path}/out"\n[encoder]\nname = "debug"\n{data}')
    return str(file)


def test_commands(tmp_path, capsys):
    file = config_file(tmp_path, "embedded:shapes-16")
    command.main(["plan", file])
    assert "16 found, 16 kept, 0 dropped" in capsys.readouterr().out
    assert len((tmp_path / "out" / "data_plan.jsonl").read_text().splitlines()) == 16
    assert not (tmp_path / "out" / "cache" / "shards").exists()
    command.main(["encode", file])
    assert "16 clips in" in capsys.readouterr().out
    (made,) = [
        json.loads(line)
        for line in (tmp_path / "out" / "cache" / "manifest.jsonl").read_text().splitlines()
        if "video/" in line
    ]
    assert len(made["entries"]) == 16


def test_help_of_the_commands(capsys):
    for argv, words in (
        (["--help"], ["plan ", "encode ", "import ", "COMMAND --help"]),
        (["plan", "--help"], ["--export N", "--ranks N", "--decode", "--data.file", "example: python"]),
        (["plan", "x.toml", "-h"], ["--export N"]),
        (["encode", "--help"], ["torchrun", "data.cache_folder"]),
        (["import", "--help"], ["OUT.toml", "diffusion-pipe", "musubi-tuner", "--data.file OUT.toml"]),
    ):
        command.main(argv)
        text = capsys.readouterr().out
        assert text.startswith("usage: ") and all(word in text for word in words), text
        assert max(map(len, text.splitlines())) <= 120


def test_commands_end_with_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit, match="usage"):
        command.main(["plan"])
    with pytest.raises(SystemExit, match="no such file"):
        command.main(["encode", config_file(tmp_path, tmp_path / "gone")])
    with pytest.raises(SystemExit, match="data.fsp"):
        command.main(["plan", config_file(tmp_path, "embedded:shapes-16"), "--data.fsp", "8"])
