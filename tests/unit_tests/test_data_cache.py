"""The latent cache: keys, shards, filling it over ranks, and what happens to it when killed, damaged or stale."""

import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, context, free_port, kill_with_children, start_program
from tests.unit_tests.data_clips import captioned
from titan_video.data import latent_cache
from titan_video.data.latent_cache import LatentCache
from titan_video.encoders.debug import DebugEncoders
from titan_video.ingest.__main__ import main
from titan_video.ingest.cache import cache_keys
from titan_video.ingest.cache.cache_keys import remove_partial_shards, video_key, write_manifest
from titan_video.ingest.cache.cached_clips import cached_clips, split_holdout
from titan_video.ingest.cache.encode import encode_missing, encode_share, missing_jobs, partition_jobs
from titan_video.ingest.decode.worker import set_up_worker
from titan_video.ingest.files.shapes import resolve_path
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import PlanEntry, read_frames

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


def entries(cache, kind):
    """Names of the entries of a kind that are on disk."""
    there = LatentCache(cache.folder, cache.video_id, cache.text_id)
    return sorted(name for name in there.where if name.startswith(f"{kind}/"))


def shards(cache):
    return sorted((cache.folder / "shards").glob("*")) if cache.folder.exists() else []


def contents(cache):
    """{entry: (its bytes, what its header says)}, over all shards; none is there twice."""
    found = {}
    for path in (cache.folder / "shards").glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        made = header.pop("__metadata__")
        for name, info in header.items():
            assert name not in found
            first, last = info.pop("data_offsets")
            found[name] = raw[start + first : start + last], info, made[name]
    return found


# ---- keys ----


def test_a_key_names_all_that_matters(cache):
    entry = PlanEntry("a.mp4", ("a",), sha256="ab" * 32, bucket=(5, 32, 32), pts=(0, 1, 2, 3, 4))
    key = video_key(cache, entry.content)
    assert key == video_key(cache, replace(entry, path="b.mp4", captions=("b",)).content)
    changes = {"sha256": "cd" * 32}, {"bucket": (5, 32, 48)}, {"pts": (0, 1, 2, 3, 5)}
    others = [video_key(cache, replace(entry, **change).content) for change in changes]
    other_encoder = LatentCache(cache.folder, "another", "another")
    others.append(video_key(other_encoder, entry.content))
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
    assert [
        (c.video_key, c.text_key) for c in cached_clips(make_plan(clips, BUCKETS, 10, 0, cache.folder), cache)
    ] == keys


# ---- filling ----


@pytest.mark.parametrize("num_workers, world", [(0, 1), (2, 1), (0, 3)])
def test_the_cache_holds_what_the_encoders_give(clips, cache, encoders, num_workers, world):
    plan = make_plan(clips, BUCKETS, 10, num_workers, cache.folder)
    found = cached_clips(plan, cache)
    jobs = missing_jobs(found, cache, log=quiet)
    for rank in range(world):
        other = LatentCache(cache.folder, cache.video_id, cache.text_id)
        assert encode_share(jobs, encoders, other, rank, world, num_workers, quiet) == {}
    cache.refresh()
    assert len(found) == 4
    for clip in found:
        assert torch.equal(cache.read("video", clip.video_key), encoders.encode_video(read_frames(clip.entry)[None])[0])
        assert torch.equal(cache.read("text", clip.text_key), encoders.encode_text([clip.caption])[0])
    assert cache.read("text", cache.text_key("")).shape == (1, 64)
    before = [p.name for p in shards(cache)]
    assert encode_missing(plan, encoders, cache, log=quiet) == {} and [p.name for p in shards(cache)] == before


def test_ranks_share_the_work_by_its_cost(clips, cache):
    long = replace(make_plan(clips, BUCKETS, 10, 0, cache.folder).kept[0], bucket=(17, 32, 32))
    jobs = missing_jobs(cached_clips(make_plan(clips, BUCKETS, 10, 0, cache.folder), cache), cache, log=quiet)[1]
    jobs = [replace(jobs[0], entry=long), *jobs]
    shares = [partition_jobs(jobs, rank, 3) for rank in range(3)]
    assert [len(part) for part in shares] == [1, 2, 2] and sorted(
        job.keys for part in shares for job in part
    ) == sorted(job.keys for job in jobs)


def test_every_caption_of_a_clip_is_encoded(clips, cache, encoders):
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    several = replace(
        plan, entries=tuple(replace(e, captions=(e.caption, f"more of {e.caption}")) for e in plan.entries)
    )
    assert encode_missing(several, encoders, cache, log=quiet) == {}
    for clip in cached_clips(several, cache):
        assert len(clip.text_keys) == 2
        for key, caption in zip(clip.text_keys, clip.captions, strict=True):
            assert torch.equal(cache.read("text", key), encoders.encode_text([caption])[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_clips_that_do_not_decode_are_reported(clips, cache, encoders, num_workers):
    (clips / "copy.mp4").write_bytes((clips / "b.mp4").read_bytes())
    (clips / "copy.txt").write_text("a copy")
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    for name in ("b.mp4", "copy.mp4"):  # gone bad after the plan was made
        (clips / name).write_bytes((clips / name).read_bytes()[:500])
    failures = encode_missing(plan, encoders, cache, num_workers=num_workers, log=quiet)
    assert set(failures) == {str(clips / "b.mp4"), str(clips / "copy.mp4")} and all(
        r.startswith("corrupt: ") for r in failures.values()
    )
    assert [os.path.basename(c.path) for c in sorted(cached_clips(plan, cache, failures), key=lambda c: c.path)] == [
        "a.mp4",
        "c.mp4",
        "d.mp4",
    ]


def test_latents_that_are_not_finite_are_refused(clips, cache, encoders):
    plan = make_plan(clips, BUCKETS, 10, 0, cache.folder)
    encoders.std_C = torch.zeros(16)
    failures = encode_missing(plan, encoders, cache, log=quiet)
    assert len(failures) == 4 and not entries(cache, "video")
    with pytest.raises(ValueError, match="dropped, not finite: 4"):
        plan.drop(failures).require_clips()


def test_stale_entries_are_named_with_the_reason(clips, cache, encoders, monkeypatch):
    def stale_report(fps=10, other=cache):
        lines = []
        missing_jobs(cached_clips(make_plan(clips, BUCKETS, fps, 0, cache.folder), other), other, log=lines.append)
        return "\n".join(lines)

    assert stale_report() == ""
    encode_missing(make_plan(clips, BUCKETS, 10, 0, cache.folder), encoders, cache, log=quiet)
    assert stale_report() == ""
    assert "4 stale entries are refused, and encoded anew: video: data.fps was 10, is 5, frames was" in stale_report(5)
    another = LatentCache(cache.folder, "another vae", cache.text_id)
    assert (
        f"4 stale entries are refused, and encoded anew: video: encoder was {cache.video_id}, is another vae"
        in stale_report(10, another)
    )
    for module in (latent_cache, cache_keys):
        monkeypatch.setattr(module, "CODE_VERSION", 99)
    assert "code version was" in stale_report() and "is 99" in stale_report()


def encode_options(folder):
    options = {
        "job.dump_folder": folder / "run",
        "data.cache_folder": folder,
        "data.path": folder.parent / "clips",
        "data.buckets": "[[5, 64, 64]]",
    }
    return [
        str(ROOT / "train_configs" / "debug.toml"),
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
    ]


def encode_shapes(folder, rank=0, port=0, per_shard=1000):
    """`python -m titan_video.data encode` on generated clips, as rank `rank` of two, or alone without a port."""
    latent_cache.SHARD_ENTRIES = per_shard
    if port:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    main(["encode", *encode_options(folder)])


class Forked:
    """Two ranks from the fork server."""

    def __init__(self, folder):
        port = free_port()
        self.ranks = [context().Process(target=encode_shapes, args=(folder, rank, port, 2)) for rank in range(2)]
        for p in self.ranks:
            p.start()

    def is_running(self):
        return all(p.is_alive() for p in self.ranks)

    def kill(self):
        for p in self.ranks:
            p.kill()

    def join(self):
        for p in self.ranks:
            p.join()
        return max(abs(p.exitcode) for p in self.ranks)


class Torchrun:
    """As people start it, with workers; but for shards of two entries, so that there is something to interrupt."""

    def __init__(self, folder):
        script = folder.parent / "encode.py"
        script.write_text(
            "import sys\nfrom titan_video.ingest import __main__\nfrom titan_video.data import latent_cache\n"
            "latent_cache.SHARD_ENTRIES = 2\n"
            "if __name__ == '__main__':\n    __main__.main(sys.argv[1:])\n"
        )
        self.log = open(folder.parent / "log", "w+")
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            script,
            "encode",
            *encode_options(folder),
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.run = start_program([*argv, "--data.num_workers", "1"], env=env, stdout=self.log, stderr=self.log)

    def is_running(self):
        return self.run.poll() is None

    def kill(self):
        """torchrun, ranks and their workers."""
        kill_with_children(self.run.pid)

    def join(self):
        code = self.run.wait(timeout=200)
        self.log.close()
        return code


def killed_again_and_again(tmp_path, kills, seed, start):
    """The cache of two ranks that are killed at random moments is that of one uninterrupted process, byte for byte per
    entry.
    """
    resolve_path("embedded:shapes-12", tmp_path / "made")
    (tmp_path / "clips").symlink_to(tmp_path / "made" / "shapes-12")
    encode_shapes(tmp_path / "whole")
    cache, rng, partial = (
        LatentCache(tmp_path / "killed", "debug-video-1", "debug-text-1-64-16"),
        random.Random(seed),
        0,
    )
    for kill in range(kills + 1):
        if (
            len(contents(cache)) == 25 and kill < kills
        ):  # begin again with a part, so that there is something to interrupt
            for path in rng.sample(shards(cache), len(shards(cache)) * 2 // 3):
                path.unlink()
        program, before = start(tmp_path / "killed"), len(shards(cache))
        if kill < kills:
            target, deadline = (
                before + rng.randint(0, 2),
                time.monotonic() + (rng.uniform(0, 3) if kill % 5 == 4 else 60),
            )
            while len(shards(cache)) <= target and program.is_running() and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.01))
            program.kill()
        code = program.join()
        partial += 0 < len(contents(cache)) < 25
    assert partial >= kills // 2 and code == 0, (partial, code)
    expected = contents(LatentCache(tmp_path / "whole", "", ""))
    assert len(expected) == 25 and contents(cache) == expected
    return cache


def test_killed_while_encoding(tmp_path):
    """kill -9 at random moments: no entry is lost, half written or there twice, and the next start finishes."""
    cache = killed_again_and_again(tmp_path, 3, 0, Forked)
    partial = cache.folder / "shards" / ".rest.safetensors.host.1.tmp"
    partial.write_bytes(b"half")
    remove_partial_shards(cache)
    assert partial.exists()  # it may be another run's, which is writing it
    os.utime(partial, (0, 0))
    remove_partial_shards(cache)
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_fifty_times(tmp_path):
    killed_again_and_again(tmp_path, 50, 1, Torchrun)
    time.sleep(1)
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if bytes(tmp_path / "encode.py") in line]


def worker(sender, is_early):
    """A worker of a parent that is killed before or after the worker is set up."""
    sender.send(os.getpid())
    if is_early:
        set_up_worker(0)
        sender.send("ready")
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.001)
    if is_early:
        time.sleep(1)
    else:
        set_up_worker(0)
    sender.send("alive")


def parent_of_worker(sender, is_early):
    fork = multiprocessing.get_context("fork")
    multiprocessing.set_start_method("fork", force=True)
    fork.Process(target=worker, args=(sender, is_early)).start()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("is_early", [True, False])
def test_a_worker_ends_with_its_parent(is_early):
    """Also if the parent is killed before the worker first looks for it: torch's own watchdog misses that case."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = context().Process(target=parent_of_worker, args=(sender, is_early))
    parent.start()
    sender.close()
    receiver.recv()
    assert not is_early or receiver.recv() == "ready"
    parent.kill()
    parent.join()
    with pytest.raises(EOFError):  # nobody holds the other end
        receiver.recv()


# ---- entries and shards ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_keep_type_and_tell_their_origin(cache, dtype):
    tensor = torch.randn(3, 4).to(dtype)
    cache.write("text", "ab" * 32, tensor, {"of": "an é"})
    assert torch.equal(cache.read("text", "ab" * 32), tensor) and not shards(cache)  # it waits
    cache.flush()
    again = LatentCache(cache.folder, cache.video_id, cache.text_id).read("text", "ab" * 32)
    assert again.dtype == dtype and torch.equal(again, tensor)
    made = json.loads(contents(cache)["text/" + "ab" * 32][2])
    assert made["of"] == "an é" and made["encoder"] == cache.text_id


def test_a_shard_is_written_when_full_or_old(cache, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 1000)

    def write(n):
        cache.write("text", f"{n:064x}", torch.full((100,), float(n)), {})

    write(0), write(1)
    assert not shards(cache)
    write(2)
    assert len(shards(cache)) == 1 and not cache.waiting
    write(3)
    monkeypatch.setattr(latent_cache, "SHARD_SECONDS", 0)
    write(4)
    assert len(shards(cache)) == 2 and [cache.read("text", f"{n:064x}")[0].item() for n in range(5)] == [0, 1, 2, 3, 4]


def test_no_entry_is_written_twice(cache):
    other = LatentCache(cache.folder, cache.video_id, cache.text_id)
    for n, c in ((1, cache), (1, other), (2, other)):
        c.write("text", f"{n:064x}", torch.ones(n), {})
    cache.flush(), other.flush()
    assert len(contents(cache)) == 2 and len(shards(cache)) == 2


def test_a_shard_appears_whole_and_synced(cache, monkeypatch):
    calls, there = [], lambda: bool(list(cache.folder.glob("shards/*.safetensors")))
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("sync", there())) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("rename", there())) or rename(a, b))
    cache.write("text", "ab" * 32, torch.zeros(3), {})
    cache.flush()
    assert calls == [("sync", False), ("rename", False), ("sync", True)]
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    cache.write("text", "cd" * 32, torch.zeros(3), {})
    with pytest.raises(OSError, match="disk full"):
        cache.flush()
    assert len(shards(cache)) == 1


def test_the_manifest_repeats_the_shards(cache):
    for n in range(3):
        cache.write("text", f"{n:064x}", torch.ones(n + 1), {})
        cache.flush()
    assert write_manifest(cache) == {"text": 3}
    again = LatentCache(cache.folder, cache.video_id, cache.text_id)
    assert again.where == cache.where and not again._headers  # no shard was opened
    shards(cache)[0].unlink()
    cache.folder.joinpath("shards", "new.safetensors").write_bytes(shards(cache)[-1].read_bytes())
    later = LatentCache(cache.folder, cache.video_id, cache.text_id)
    assert len(later.where) == 2 and len(later.shards) == 3
    (cache.folder / "manifest.jsonl").write_text('{"shard": 1}\nnonsense')
    assert LatentCache(cache.folder, cache.video_id, cache.text_id).where == later.where


def test_damaged_entries_are_named(cache):
    keys, rng = ["ab" * 32, "cd" * 32], random.Random(0)
    for key in keys:
        cache.write("video", key, torch.randn(16, 2, 4, 4), {"source": "x.mp4"})
    cache.flush()
    (path,) = shards(cache)
    data = path.read_bytes()
    for trial in range(60):
        broken = bytearray(data)
        if trial < 40:
            at = rng.randrange(len(data) - 2 * 16 * 2 * 4 * 4 * 4, len(data))
            broken[at] ^= 1 << rng.randrange(8)
        else:
            del broken[rng.randrange(len(data)) :]
        path.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match="delete this file") as e:
            there = LatentCache(cache.folder, cache.video_id, cache.text_id)
            for key in keys:
                there.read("video", key)
        assert str(path) in str(e.value)
    there = LatentCache(cache.folder, cache.video_id, cache.text_id) if path.write_bytes(data) else None
    path.unlink()
    there._headers.clear()
    with pytest.raises(ValueError, match="cannot be read"):
        there.read("video", keys[0])
    with pytest.raises(ValueError, match="holds no video/ef"):
        there.read("video", "ef" * 32)


def test_an_entry_of_another_encoder_or_version_is_refused(cache, monkeypatch):
    cache.write("video", "ab" * 32, torch.zeros(2), {})
    cache.flush()
    with pytest.raises(ValueError, match="is stale: its encoder was debug-video-1, is another"):
        LatentCache(cache.folder, "another", "t").read("video", "ab" * 32)
    monkeypatch.setattr(latent_cache, "CODE_VERSION", 99)
    with pytest.raises(ValueError, match="is stale: its code version was"):
        cache.read("video", "ab" * 32)


# ---- held-out clips ----


def test_holdout_goes_by_content(clips, cache):
    one = cached_clips(make_plan(clips, BUCKETS, 10, 0, cache.folder), cache)[0]
    many = [replace(one, video_key=f"{i:064x}", path=str(i)) for i in range(100)]
    train, held = split_holdout(many, 0.05)
    assert (
        len(held) == 5
        and sorted(train + held, key=lambda c: c.video_key) == many
        and train == sorted(train, key=lambda c: c.video_key)
    )
    shuffled = random.Random(0).sample(many, 100)
    assert {c.video_key for c in split_holdout(shuffled, 0.05)[1]} == {c.video_key for c in held}
    more = {c.video_key for c in split_holdout(many, 0.1)[1]}
    assert {c.video_key for c in held} < more and len(more) == 10
    assert [len(part) for part in split_holdout(many[:5], 0.05)] == [4, 1]  # at least one
