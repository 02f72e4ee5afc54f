"""The latent cache: keys, entries, filling it, and what happens to it when killed or damaged."""

import json
import os
import random
import time
from dataclasses import replace

import pytest
import torch

from tests.helpers import context
from tests.unit_tests.data_clips import captioned
from titan_video.data.dataset import PlanEntry, make_plan
from titan_video.data.latent_cache import LatentCache, cached_clips, encode_missing, split_holdout
from titan_video.data.shapes import resolve_path
from titan_video.data.video import decode
from titan_video.encoders.debug import DebugEncoders

BUCKETS = [[5, 32, 32]]


@pytest.fixture
def encoders():
    return DebugEncoders(16)


@pytest.fixture
def cache(tmp_path, encoders):
    return LatentCache(tmp_path / "cache", encoders.video_id(), encoders.text_id())


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for k, name in enumerate("abcd"):
        captioned(folder / f"{name}.mp4", f"clip {name}", count=20 + k, fps=10)
    return folder


def quiet(_):
    pass


def files(cache, kind):
    return sorted((cache.folder / kind).rglob("*"), key=str) if (cache.folder / kind).exists() else []


def entries(cache, kind):
    return [p for p in files(cache, kind) if p.suffix == ".safetensors"]


# ---- keys ----


def test_a_key_names_all_that_matters(cache):
    entry = PlanEntry("a.mp4", "a", sha256="ab" * 32, bucket=(5, 32, 32), pts=(0, 1, 2, 3, 4))
    key = cache.video_key(entry.content)
    assert key == cache.video_key(replace(entry, path="b.mp4", caption="b").content)
    changes = {"sha256": "cd" * 32}, {"bucket": (5, 32, 48)}, {"pts": (0, 1, 2, 3, 5)}
    others = [cache.video_key(replace(entry, **change).content) for change in changes]
    other_encoder = LatentCache(cache.folder, "another", "another")
    others.append(other_encoder.video_key(entry.content))
    texts = [cache.text_key("a"), cache.text_key("b"), other_encoder.text_key("a"), cache.text_key("")]
    assert len({key, *others, *texts}) == 9


def test_another_rate_is_encoded_anew(clips, cache, encoders):
    for count, fps in ((4, 10), (8, 5), (8, 10)):
        plan = make_plan(clips, BUCKETS, fps, 0, cache.folder)
        assert encode_missing(plan, encoders, cache, log=quiet) == {}
        assert len(entries(cache, "video")) == count and len(entries(cache, "text")) == 5


def test_content_counts_and_not_names(clips, cache, encoders):
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    keys = [(c.video_key, c.text_key) for c in cached_clips(plan, cache)]
    for name in "abcd":
        for suffix in (".mp4", ".txt"):
            (clips / (name + suffix)).rename(clips / (f"{9 - ord(name) % 9}{name}" + suffix))
    assert [(c.video_key, c.text_key) for c in cached_clips(make_plan(clips, BUCKETS, 10, 0, cache.folder), cache)] == keys


# ---- filling ----


@pytest.mark.parametrize("num_workers, world", [(0, 1), (2, 1), (0, 3)])
def test_the_cache_holds_what_the_encoders_give(clips, cache, encoders, num_workers, world):
    plan = make_plan(clips, BUCKETS, 10, num_workers, cache.folder)
    for rank in range(world):
        assert encode_missing(plan, encoders, cache, rank, world, num_workers, log=quiet) == {}
    found = cached_clips(plan, cache)
    assert len(found) == 4
    for clip in found:
        e = next(e for e in plan.kept if e.path == clip.path)
        frames = decode(e.path, e.pts, e.width, e.height, e.bucket)
        assert torch.equal(cache.read("video", clip.video_key), encoders.encode_video(frames[None])[0])
        assert torch.equal(cache.read("text", clip.text_key), encoders.encode_text([clip.caption])[0])
    assert cache.read("text", cache.text_key("")).shape == (1, 64)
    stamps = {p: p.stat().st_mtime_ns for p in entries(cache, "video")}
    encode_missing(plan, encoders, cache, log=quiet)
    assert stamps == {p: p.stat().st_mtime_ns for p in entries(cache, "video")}


def test_ranks_share_the_work(clips, cache, encoders):
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    counts = []
    for rank in range(3):
        before = len(entries(cache, "video"))
        encode_missing(plan, encoders, cache, rank, 3, log=quiet)
        counts.append(len(entries(cache, "video")) - before)
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_clips_that_do_not_decode_are_reported(clips, cache, encoders, num_workers):
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    (clips / "copy.mp4").write_bytes((clips / "b.mp4").read_bytes())
    (clips / "copy.txt").write_text("a copy")
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    for name in ("b.mp4", "copy.mp4"):  # gone bad after the plan was made
        (clips / name).write_bytes((clips / name).read_bytes()[:500])
    failures = encode_missing(plan, encoders, cache, num_workers=num_workers, log=quiet)
    assert set(failures) == {str(clips / "b.mp4"), str(clips / "copy.mp4")} and all(r.startswith("corrupt: ") for r in failures.values())
    assert [os.path.basename(c.path) for c in sorted(cached_clips(plan, cache, failures), key=lambda c: c.path)] == ["a.mp4", "c.mp4", "d.mp4"]


def test_latents_that_are_not_finite_are_refused(clips, cache, encoders):
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    encoders.std_C = torch.zeros(16)
    failures = encode_missing(plan, encoders, cache, log=quiet)
    assert len(failures) == 4 and not entries(cache, "video")
    with pytest.raises(ValueError, match="dropped, not finite: 4"):
        plan.drop(failures).require_clips()


def encode_shapes(folder):
    encoders = DebugEncoders(16)
    plan = make_plan(resolve_path("embedded:shapes-48", folder), [[17, 64, 64]], 8, 0, folder)
    encode_missing(plan, encoders, LatentCache(folder, encoders.video_id(), encoders.text_id()), log=quiet)


def test_killed_while_encoding(tmp_path):
    """kill -9 at random moments: no entry is ever half written, and the next start finishes."""
    resolve_path("embedded:shapes-48", tmp_path)
    encoders = DebugEncoders(16)
    cache, rng = LatentCache(tmp_path, encoders.video_id(), encoders.text_id()), random.Random(0)
    counts = []
    for _ in range(3):
        process = context().Process(target=encode_shapes, args=(tmp_path,))
        process.start()
        target, deadline = len(entries(cache, "video")) + rng.randint(2, 10), time.monotonic() + 60
        while len(entries(cache, "video")) < target and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        counts.append(len(entries(cache, "video")))
    assert 0 < counts[0] < counts[1] < counts[2] < 48
    for path in entries(cache, "video"):
        assert cache.read("video", path.stem).shape == (16, 5, 8, 8)
    (entries(cache, "video")[0].parent / ".rest.safetensors.1.tmp").write_bytes(b"half")
    encode_shapes(tmp_path)
    assert len(entries(cache, "video")) == 48 and len(entries(cache, "text")) == 49


# ---- entries ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_keep_type_and_tell_their_origin(cache, dtype):
    tensor = torch.randn(3, 4).to(dtype)
    cache.write("text", "ab" * 32, tensor, {"caption": "an é"})
    again = cache.read("text", "ab" * 32)
    assert again.dtype == dtype and torch.equal(again, tensor)
    raw = cache.path("text", "ab" * 32).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert header["caption"] == "an é" and header["encoder"] == cache.text_id and header["shape"] == "[3, 4]"
    assert [p.name for p in files(cache, "text")][-1] == "ab" * 32 + ".safetensors"


def test_an_entry_appears_whole_and_synced(cache, monkeypatch):
    path, calls = cache.path("text", "ab" * 32), []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("sync", path.exists())) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("rename", path.exists())) or rename(a, b))
    cache.write("text", "ab" * 32, torch.zeros(3), {})
    assert calls == [("sync", False), ("rename", False)] and path.exists()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.write("text", "cd" * 32, torch.zeros(3), {})
    assert [p for p in files(cache, "text") if p.is_file()] == [path]


def test_damaged_entries_are_named(cache):
    key, rng = "ab" * 32, random.Random(0)
    cache.write("video", key, torch.randn(16, 2, 4, 4), {"source": "x.mp4"})
    path = cache.path("video", key)
    data = path.read_bytes()
    for trial in range(60):
        broken = bytearray(data)
        if trial < 40:
            at = rng.randrange(len(data) - 16 * 2 * 4 * 4 * 4, len(data))
            broken[at] ^= 1 << rng.randrange(8)
        else:
            del broken[rng.randrange(len(data)) :]
        path.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match="delete this file") as e:
            cache.read("video", key)
        assert str(path) in str(e.value)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        cache.read("video", key)


def test_an_entry_under_a_wrong_name_is_refused(cache):
    cache.write("video", "ab" * 32, torch.zeros(2), {})
    target = cache.path("video", "cd" * 32)
    target.parent.mkdir(parents=True)
    target.write_bytes(cache.path("video", "ab" * 32).read_bytes())
    with pytest.raises(ValueError, match="does not match"):
        cache.read("video", "cd" * 32)
    with pytest.raises(ValueError, match="does not match"):
        LatentCache(cache.folder, "another encoder", "t").read("video", "ab" * 32)


# ---- held-out clips ----


def test_holdout_goes_by_content(clips, cache):
    one = cached_clips(make_plan(clips, BUCKETS, 10, 0, cache.folder), cache)[0]
    many = [replace(one, video_key=f"{i:064x}", path=str(i)) for i in range(100)]
    train, held = split_holdout(many, 0.05)
    assert len(held) == 5 and sorted(train + held, key=lambda c: c.video_key) == many and train == sorted(train, key=lambda c: c.video_key)
    shuffled = random.Random(0).sample(many, 100)
    assert {c.video_key for c in split_holdout(shuffled, 0.05)[1]} == {c.video_key for c in held}
    more = {c.video_key for c in split_holdout(many, 0.1)[1]}
    assert {c.video_key for c in held} < more and len(more) == 10
    assert split_holdout(many[:5], 0.05) == (many[:5], [])
