"""Plans, clips, probes and the cache's entries as columns: the rows of lists, few bytes a clip, few listings."""

import hashlib
import json
import os
import pickle
import random
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import clip_table as benchmark
from tests.helpers import free_port, run_ranks
from tests.unit_tests.data_clips import captioned, write_clip
from titan_video.config.job_config import Data
from titan_video.data import latent_cache
from titan_video.data.batching import Batching, Work
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, by_bucket
from titan_video.encoders.debug import DebugEncoders
from titan_video.ingest import columns
from titan_video.ingest.__main__ import main
from titan_video.ingest.bucketing import ClipChoice
from titan_video.ingest.cache import clip_table as clip_tables
from titan_video.ingest.cache import entry_index
from titan_video.ingest.cache.cache_keys import write_manifest
from titan_video.ingest.cache.cached_clips import cached_clips, split_holdout
from titan_video.ingest.cache.clip_table import ClipTable, clip_table
from titan_video.ingest.cache.encode import encode_missing
from titan_video.ingest.cache.entry_index import EntryIndex, holds, make_index
from titan_video.ingest.columns import Columns, ColumnWriter, SortedKeys, TimesWriter, decode_times, sort_keys
from titan_video.ingest.decode.video import Probe
from titan_video.ingest.files.media import DEFAULT_LIMITS
from titan_video.ingest.plan import planned, probes
from titan_video.ingest.plan.build import Planner, make_plan
from titan_video.ingest.plan.entries import Plan, PlanEntry
from titan_video.ingest.plan.plan_table import PlanTable, write_plan_table
from titan_video.ingest.plan.probes import ProbeStore
from titan_video.models.conditioning import ConditioningSpec
from titan_video.tools import files

BUCKETS = [[1, 32, 32], [5, 32, 32], [9, 32, 48]]
I2V = ConditioningSpec(num_cond_frames=1, form="mask_first", image_tokens=4)
SEES_IMAGES = ConditioningSpec(num_cond_frames=1, form="latent_concat", text_image_tokens=3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of many kinds of files, good and bad, with copies; and its plan in memory."""
    folder = tmp_path_factory.mktemp("mixed")
    for k in range(6):
        captioned(
            folder / f"{k}.mp4", f"clip {k} é 片", count=12 + 5 * k, fps=(8, 10, 24)[k % 3], width=64 + 16 * (k % 2)
        )
    times = [0, 40, 95, 130, 260, 300, 420, 500, 610, 700, 777, 801]
    captioned(folder / "variable.mkv", "times", count=12, times=times)
    captioned(folder / "short.mp4", "short", count=2, fps=8)
    (folder / "copy.mp4").write_bytes((folder / "1.mp4").read_bytes())
    (folder / "copy.txt").write_text("a copy")
    (folder / "again.mp4").write_bytes((folder / "1.mp4").read_bytes())
    (folder / "again.txt").write_text("clip 1 é 片")
    write_clip(folder / "wordless.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "empty.txt").write_text("nothing")
    (folder / "lost.txt").write_text("no clip")
    plans = {}
    for mode in ("head", "chunk"):
        plans[mode] = make_plan(folder, BUCKETS, 8.0, 0, folder / "cache", ClipChoice(mode))
    return folder, plans


@pytest.mark.parametrize("mode", ["head", "chunk"])
def test_a_table_has_the_entries_of_the_plan(mixed, tmp_path, mode):
    _, plans = mixed
    plan = plans[mode]
    changed = tuple(replace(e, repeats=1 + n % 3) for n, e in enumerate(plan.entries))
    plan = replace(plan, entries=changed, remarks=("a remark",))
    table = write_plan_table(tmp_path / "plan.columns", plan, DEFAULT_LIMITS, "key")
    assert tuple(table) == plan.entries == tuple(table[i] for i in range(len(table)))
    assert [e.content for e in table] == [e.content for e in plan.entries]
    again = pickle.loads(pickle.dumps(table))
    assert tuple(again) == plan.entries and table[-1] == plan.entries[-1]
    with pytest.raises(IndexError):
        table[len(table)]
    mapped = table.plan()
    assert (mapped.summary(), mapped.counts()) == (plan.summary(), plan.counts())
    mapped.write_jsonl(tmp_path / "a.jsonl"), plan.write_jsonl(tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    failed = {plan.kept[1].path: "corrupt: late"}
    assert mapped.drop(failed).summary() == plan.drop(failed).summary()
    assert tuple(mapped.drop(failed).entries) == plan.drop(failed).entries
    assert tuple(mapped.without_single_frames().entries) == plan.without_single_frames().entries


@pytest.mark.parametrize("conditioning, drop_apart", [(None, False), (I2V, False), (SEES_IMAGES, True)])
def test_a_table_has_the_clips_of_the_list(mixed, tmp_path, conditioning, drop_apart):
    """Row by row, in its order, with its split and its identity; so training draws the same clips."""
    plan = mixed[1]["chunk"]
    kept = [replace(e, repeats=1 + n % 3, captions=(*e.captions, "more")[: 1 + n % 2]) for n, e in enumerate(plan.kept)]
    kept += [replace(kept[0], path=f"{n}.mp4", captions=(f"of copy {n // 2}",)) for n in (5, 3, 1, 4, 0, 2)]
    plan = replace(plan, entries=tuple(kept))
    given = () if conditioning is None else ("image id", conditioning)
    cache = LatentCache(tmp_path / "cache", "video", "text", *given)
    rows = cached_clips(plan, cache, drop_apart=drop_apart)
    table = clip_table(write_plan_table(tmp_path / "p.columns", plan, DEFAULT_LIMITS), cache, drop_apart, tmp_path)
    assert list(table) == rows and [c.entry for c in table] == [c.entry for c in rows]
    for share, at_least in ((0.0, 1), (0.05, 1), (0.05, 0), (0.3, 1), (0.99, 1)):
        expected, found = split_holdout(rows, share, at_least), table.split(share, at_least)
        assert [list(part) for part in found] == list(expected)
        sizes, buckets, identity = by_bucket(expected[0])
        grouped = found[0].by_bucket(found[0].identity())
        assert grouped.identity == identity and grouped.sizes == sizes
        assert [list(bucket) for bucket in grouped.buckets] == buckets
    clips = expected[0], pickle.loads(pickle.dumps(grouped))
    draws = [DrawPlan(some, "null", Batching(4), lambda b: Work(b[0], 1.0), 3, True, 0.3) for some in clips]
    for _ in range(5):
        steps = [[d.spec(m) for m in next(d.sampler)] for d in draws]
        assert steps[0] == steps[1]
    paths = {rows[0].path, rows[-1].path}
    assert list(table.without_paths(paths)) == [c for c in rows if c.path not in paths]


def test_missing_entries_are_found_in_columns(mixed, tmp_path, monkeypatch):
    plan, encoders = mixed[1]["head"], DebugEncoders(16)
    ids = encoders.video_id(), encoders.text_id()
    cache = LatentCache(tmp_path / "cache", *ids)
    table = clip_table(write_plan_table(tmp_path / "p.columns", plan, DEFAULT_LIMITS), cache, False, tmp_path)
    rows = list(table)
    missing = table.missing(cache)
    assert {rows[r].video_key for r in missing.frames} == {c.video_key for c in rows}
    assert len(missing.frames) == len({c.video_key for c in rows}) < len(rows)  # copies are encoded once
    texts = [rows[r].text_keys[n] for r, n in zip(missing.texts, missing.number, strict=True)]
    assert sorted(texts) == sorted({c.text_key for c in rows})
    assert not table.cached(cache).any()
    monkeypatch.setattr(latent_cache, "SHARD_ENTRIES", 3)
    encode_missing(replace(plan, entries=tuple(plan.kept[:4])), encoders, cache, log=lambda _: None)
    indexed = LatentCache(cache.folder, *ids, known=EntryIndex(make_index(cache)))
    for there in (cache, indexed):
        has = np.array([there.has("video", c.video_key) and there.has("text", c.text_key) for c in rows])
        assert has.any() and not has.all() and (table.cached(there) == has).all()
        missing = table.missing(there)
        assert {rows[r].video_key for r in missing.frames} == {
            c.video_key for c in rows if not there.has("video", c.video_key)
        }
    name = next(iter(cache.where))
    assert torch.equal(indexed.read(*name.split("/")), cache.read(*name.split("/")))


# ---- the index of the cache ----


def test_the_index_holds_what_the_shards_hold(tmp_path):
    cache = LatentCache(tmp_path, "v", "t")
    assert make_index(cache) is None
    for n in range(7):
        cache.write("text", f"{n:064x}", torch.ones(n + 1), {})
        cache.write("video", f"{n:064x}", torch.zeros(2), {})
        if n % 2:
            cache.flush()
    cache.flush()
    for _ in range(2):  # by the headers, and by the manifest
        path = make_index(cache)
        index = EntryIndex(path)
        assert dict(index) == cache.where and index.shards == cache.shards and len(index) == 14
        assert index.counts() == {"text": 7, "video": 7}
        path.unlink()
        assert write_manifest(cache) == {"text": 7, "video": 7}
    later = LatentCache(tmp_path, "v", "t", known=EntryIndex(make_index(cache)))
    assert pickle.loads(pickle.dumps(later.identity))[-1].shards == cache.shards
    later.write("text", f"{9:064x}", torch.ones(1), {})
    later.flush()
    assert later.where.fresh.keys() == {f"text/{9:064x}"} and make_index(later) != path
    keys = np.frombuffer(bytes.fromhex("".join(f"{n:064x}" for n in (3, 9, 11))), np.uint8).reshape(3, 32)
    assert holds(later, "text", keys).tolist() == [True, True, False]
    assert write_manifest(later) == {"text": 8, "video": 7}
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert sorted(name for row in manifest for name in row["entries"]) == sorted(later.where)
    next((tmp_path / "shards").iterdir()).unlink()  # a shard less is another index
    assert len(EntryIndex(make_index(later))) < 15


def test_the_index_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Such as a cache of another user."""
    cache = LatentCache(tmp_path / "cache", "v", "t")
    cache.write("text", f"{1:064x}", torch.ones(1), {})
    cache.flush()
    real = entry_index._write

    def write(path, *others):
        if path.parent == cache.folder:
            raise PermissionError(13, "Permission denied")
        real(path, *others)

    monkeypatch.setattr(entry_index, "_write", write)
    assert make_index(cache) is None
    path = make_index(cache, tmp_path / "run/tables")
    assert path.parent == tmp_path / "run/tables" and f"text/{1:064x}" in EntryIndex(path)
    monkeypatch.setattr(entry_index, "_write", lambda *_: pytest.fail("it is written anew"))
    assert make_index(cache, tmp_path / "run/tables") == path


def test_the_folder_is_listed_a_bounded_number_of_times(tmp_path, monkeypatch):
    """Each flush listed the folder: as many names as the square of the shards."""
    listed = []
    glob = Path.glob

    def counted(folder, pattern):
        found = list(glob(folder, pattern))
        listed.append(len(found))
        return iter(found)

    monkeypatch.setattr(Path, "glob", counted)
    monkeypatch.setattr(files, "sync", lambda _: None)

    def names(num_shards, is_shared):
        listed.clear()
        cache = LatentCache(tmp_path / f"{num_shards}-{is_shared}", "v", "t")
        cache.is_shared = is_shared
        for n in range(num_shards):
            cache.write("text", f"{n:064x}", torch.ones(1), {})
            cache.flush()
        return sum(listed)

    assert names(10, False) == names(50, False) == 0  # as encoding does, whose ranks share no entry
    assert names(50, True) <= 10 * 50 and names(200, True) <= 10 * 200


# ---- columns ----


def test_columns_are_read_as_they_were_written(tmp_path):
    dtype = np.dtype([("n", "i8"), ("size", "i4", (3,))])
    with ColumnWriter(tmp_path, dtype, ("text",)) as writer:
        times = TimesWriter(writer)
        series = [(), (7,), (3, 5, 7, 9), (4, 4, 4), (0, 1, 3, 4, 6), (10, 11, 13, 14, 16), (-(2**62), 0, 2**62)]
        codes = [times.code(s) for s in series]
        for n in range(columns.ROWS_WAITING + 3):
            writer.append((n, (n, 2, 3)), b"x" * (n % 5))
        writer.write(tmp_path / "a.columns", {"of": "this"}, "table")
    found = pickle.loads(pickle.dumps(Columns(tmp_path / "a.columns")))
    assert found.note == {"of": "this"} and found.num_rows == columns.ROWS_WAITING + 3
    assert found["n"].tolist() == list(range(found.num_rows)) and found["size"][7].tolist() == [7, 2, 3]
    assert [found.blob("text", n) for n in (0, 4, 4098)] == [b"", b"xxxx", b"xxx"]
    assert [decode_times(found, *code) for code in codes] == series
    assert codes[4][2] == codes[5][2] >= 0 and codes[2][2] == codes[3][2] == -1  # shared; evenly spaced
    assert [p.name for p in tmp_path.iterdir()] == ["a.columns"]


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b[:40], lambda b: b"", lambda b: b[8:]])
def test_a_damaged_table_is_named(tmp_path, damage):
    path = tmp_path / "a.columns"
    with ColumnWriter(tmp_path, np.dtype([("n", "i8")])) as writer:
        for n in range(100):
            writer.append((n,))
        writer.write(path, {}, "table")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="a.columns: is no table of columns .*; delete this file"):
        Columns(path)


def test_keys_are_found_where_they_share_a_beginning():
    rng = random.Random(0)
    keys = sorted({bytes(8) + bytes([rng.randrange(3)] * 23) + bytes([rng.randrange(9)]) for _ in range(40)})
    raw = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    shuffled = raw[rng.sample(range(len(raw)), len(raw))]
    assert (shuffled[sort_keys(shuffled)] == raw).all()
    found = SortedKeys(raw, SortedKeys.prefixes_of(raw))
    assert [found.find(k) for k in keys] == list(range(len(keys))) == found.find_all(raw).tolist()
    assert found.find(bytes(31) + b"\xff") == -1 == found.find_all(np.full((1, 32), 7, np.uint8))[0]
    assert found.find_all(np.frombuffer(bytes(31) + b"\xff", np.uint8).reshape(1, 32)).tolist() == [-1]


# ---- probes ----


def test_probes_are_kept_in_few_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "TABLES_KEPT", 3)
    monkeypatch.setattr(probes, "KEPT_SECONDS", -1)
    made = {bytes([n]) * 32: Probe(f"{n}", 8, 8, "1/25", (0, 1, 2 + n % 2), 3) for n in range(1, 9)}
    for n, (key, found) in enumerate(made.items()):
        store = ProbeStore(tmp_path, DEFAULT_LIMITS)
        store.add(key, found)
        store.add(bytes(32), Probe("first", 1, 1, "1", (0,), 1))  # in every table
        store.flush()
        assert len(list(tmp_path.iterdir())) == n % 4 + 1 or n > 3
        store.merge()
    again = ProbeStore(tmp_path, DEFAULT_LIMITS)
    assert len(list(tmp_path.iterdir())) <= 4
    assert {key: again.get(key, "") for key in made} == made and again.get(bytes(32), "").sha256 == "first"
    again.add(b"x" * 32, Probe(reason="too large: beyond a limit"))
    again.flush()
    assert again.get(b"x" * 32, "") and ProbeStore(tmp_path, DEFAULT_LIMITS).get(b"x" * 32, "") is None


def test_a_process_has_one_table_that_is_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "PROBES_A_TABLE", 4)
    store = ProbeStore(tmp_path, DEFAULT_LIMITS)
    made = {bytes([n]) * 32: Probe(f"{n}", 8, 8, "1/25", (0, 1, 3), 4) for n in (5, 1, 4, 2, 3, 9)}
    for n, (key, found) in enumerate(made.items(), 1):
        store.add(key, found)
        store.flush()
        assert len(list(tmp_path.iterdir())) == 1 + (n > 4)
        there = ProbeStore(tmp_path, DEFAULT_LIMITS)
        assert all(s.get(k, "") == f for s in (store, there) for k, f in list(made.items())[:n])
    assert there.get(b"x" * 32, "") is None and not there.has(b"x" * 32, "") and there.has(key, "")


def test_probes_of_earlier_versions_are_read(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    clip = captioned(tmp_path / "clips" / "a.mp4")
    plan = make_plan(tmp_path / "clips", BUCKETS, 8, 0, tmp_path / "new")
    name = hashlib.sha256(str(clip).encode()).hexdigest()
    old = tmp_path / "old" / "probes" / name[:2] / f"{name}.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"of": probes.identity(str(clip)), "found": asdict(probes.probe(str(clip)))}))
    monkeypatch.setattr(probes, "probe", lambda *_: pytest.fail("it is probed again"))
    assert make_plan(tmp_path / "clips", BUCKETS, 8, 0, tmp_path / "old") == plan


# ---- memory ----


def many(count):
    for n in range(count):
        yield PlanEntry(
            path=f"a/folder/of/many/clips/{n:09d}.mp4",
            captions=(f"{n} " + "words of a caption " * 12,),
            sha256=f"{n:064x}",
            bucket=tuple(BUCKETS[1 + n % 2]),
            width=64,
            height=64,
            num_frames=81,
            source_frames=120,
            fps=16.0,
            source_fps=24.0,
            pts=tuple(n + i * 3 // 2 for i in range(81)),
        )


def test_a_rank_has_few_bytes_a_clip(tmp_path):
    """Memory of its own: rows of each bucket and the order of an epoch. Today's list took 4,400 bytes a clip."""
    plans, growth = [], []
    for count in (1000, 21_000):
        plan = Plan("many", 16.0, tuple(map(tuple, BUCKETS)), many(count))
        plans.append(write_plan_table(tmp_path / f"{count}.columns", plan, DEFAULT_LIMITS, f"{count}"))
    cache = LatentCache(tmp_path / "cache", "v", "t")
    tables = [clip_table(plan, cache, False, tmp_path) for plan in plans]
    paths = [(t.columns.path, t.plan.path) for t in tables]
    for path, _ in paths:
        tracemalloc.start()
        table = ClipTable(path, PlanTable(dict(paths)[path]))
        clips = table.split(0.05)[0]
        draw_plan = DrawPlan(clips.by_bucket("id"), "null", Batching(64), lambda b: Work(b[0], 1.0))
        drawn = [draw_plan.spec(m) for _ in range(3) for m in next(draw_plan.sampler)]
        assert len({draw.clip.path for spec in drawn for draw in spec}) > 100
        del drawn
        growth.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del draw_plan, clips, table
    assert (growth[1] - growth[0]) / 20_000 <= 40
    size = sum(os.path.getsize(p) for p in paths[1])
    assert size / 21_000 < 900


def test_a_bucket_keeps_the_clips_that_it_gave_last(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_tables, "CLIPS_KEPT", 2)
    path = write_plan_table(tmp_path / "p.columns", mixed[1]["head"], DEFAULT_LIMITS)
    table = clip_table(path, LatentCache(tmp_path / "cache", "v", "t"), False, tmp_path)
    bucket = max(table.by_bucket("id").buckets, key=len)
    assert len(bucket) >= 3
    for some in (bucket, pickle.loads(pickle.dumps(bucket))):
        first = some[0]
        assert some[1] is some[1] and some[0] is first
        some[1], some[2]
        assert some[0] is not first and some[0] == first


# ---- many ranks, many jobs ----


@pytest.fixture
def toml(tmp_path):
    (tmp_path / "clips").mkdir()
    for k in range(6):
        captioned(tmp_path / "clips" / f"{k}.mp4", f"clip {k}", count=9 + k, fps=8)
    file = tmp_path / "run.toml"
    data = f'[data]\npath = "{tmp_path}/clips"\nbuckets = [[5, 32, 32]]\nfps = 8.0\nnum_workers = 0\n'
    file.write_text(f'{data}[encoder]\nname = "debug"\n[job]\ndump_folder = "{tmp_path}/run"\n')
    return file


def counted_probes(monkeypatch):
    probed, real = [], probes.probe
    monkeypatch.setattr(probes, "probe", lambda path, *a: probed.append(os.path.basename(path)) or real(path, *a))
    return probed


def test_parts_of_a_plan_and_of_encoding_make_the_whole(toml, tmp_path, monkeypatch, capsys):
    probed = counted_probes(monkeypatch)
    for part in range(3):
        main(["plan", str(toml), "--part", f"{part}/3"])
    assert sorted(probed) == [f"{k}.mp4" for k in range(6)] and not (tmp_path / "run/data_plan.jsonl").exists()
    main(["plan", str(toml)])
    assert len(probed) == 6 and "6 found, 6 kept" in capsys.readouterr().out
    for part in range(3):
        main(["encode", str(toml), "--part", f"{part}/3"])
        cache = LatentCache(tmp_path / "run/cache", "v", "t")
        later = [name for name in cache.where if int(name[-64:][:16], 16) % 3 > part]
        assert len(later) <= 1  # the empty caption, which the first part has
    assert len(cache.where) == 13  # all of them, before the merge
    assert not (tmp_path / "run/cache/manifest.jsonl").exists()
    main(["encode", str(toml)])
    listed = map(json.loads, (tmp_path / "run/cache/manifest.jsonl").read_text().splitlines())
    assert sum(len(row["entries"]) for row in listed) == 13
    cache = LatentCache(tmp_path / "run/cache", "v", "t")
    assert sum(name.startswith("video/") for name in cache.where) == 6 and len(cache.where) == 13
    with pytest.raises(SystemExit):
        main(["plan", str(toml), "--part", "3/3"])
    assert "given 3/3; legal: I/N" in capsys.readouterr().err


def test_a_known_plan_is_taken_and_nothing_is_written_anew(toml, tmp_path, monkeypatch, capsys):
    main(["encode", str(toml)])
    capsys.readouterr()  # what was encoded
    main(["encode", str(toml)])
    report, printed = tmp_path / "run/data_plan.jsonl", capsys.readouterr().out
    stamp = report.stat().st_mtime_ns
    monkeypatch.setattr(planned.Planner, "entries", lambda *_: pytest.fail("it is decided anew"))
    monkeypatch.setattr(clip_tables, "_write", lambda *_: pytest.fail("keys are hashed anew"))
    main(["encode", str(toml)])
    assert report.stat().st_mtime_ns == stamp and capsys.readouterr().out == printed
    monkeypatch.undo()
    (tmp_path / "clips/0.txt").write_text("another caption")
    main(["encode", str(toml)])
    assert "another caption" in report.read_text()
    report.write_text(report.read_text().replace("another caption", "ANOTHER CAPTION"))
    main(["encode", str(toml)])
    assert "another caption" in report.read_text()


def test_the_report_of_a_run_with_checkpoints_stays(toml, tmp_path, capsys):
    """A resumed run reads there which clips it once left out."""
    main(["plan", str(toml)])
    report, new = tmp_path / "run/data_plan.jsonl", tmp_path / "run/data_plan.new.jsonl"
    before = report.read_bytes()
    (tmp_path / "run/checkpoint/step-3").mkdir(parents=True)
    (tmp_path / "clips/0.txt").write_text("another caption")
    for command in ("plan", "encode"):
        main([command, str(toml)])
        assert report.read_bytes() == before and "another caption" in new.read_text()
        assert str(new) in capsys.readouterr().out
        new.unlink()


def test_what_a_passing_failure_has_dropped_is_not_taken_later(toml, tmp_path, monkeypatch):
    """A clip that a worker did not survive once: the next plan has it, and so have the tables made of that plan."""
    real = probes.probe
    crash = lambda path, *a: Probe(reason="crashed: once") if path.endswith("0.mp4") else real(path, *a)  # noqa: E731
    monkeypatch.setattr(probes, "probe", crash)
    main(["encode", str(toml)])
    assert "crashed: once" in (tmp_path / "run/data_plan.jsonl").read_text()
    monkeypatch.undo()
    main(["encode", str(toml)])
    assert "crashed: once" not in (tmp_path / "run/data_plan.jsonl").read_text()
    cache = LatentCache(tmp_path / "run/cache", "v", "t")
    assert sum(name.startswith("video/") for name in cache.where) == 6
    expected = {e.content for e in make_plan(tmp_path / "clips", [[5, 32, 32]], 8.0, 0, tmp_path / "alone").entries}
    shards = [cache.header(shard)[0]["__metadata__"] for shard in cache.shards]
    made = [json.loads(found[name]) for found in shards for name in found if name.startswith("video/")]
    assert len(expected) == len({made["of"] for made in made}) == 6


def test_a_table_that_is_there_stays(tmp_path):
    """Another machine may have it mapped. One that holds something else, of the same sizes, is replaced."""

    def write(number):
        with ColumnWriter(tmp_path, np.dtype([("n", "i8")])) as writer:
            writer.append((number,))
            writer.write(tmp_path / "a.columns", {}, "table")
        return (tmp_path / "a.columns").stat().st_ino, Columns(tmp_path / "a.columns")["n"].tolist()

    first, same, other = write(7), write(7), write(8)
    assert first == same and other[1] == [8] and other[0] != first[0]
    (tmp_path / "a.columns").write_bytes((tmp_path / "a.columns").read_bytes()[:-1])
    assert write(8)[1] == [8] and [p.name for p in tmp_path.iterdir()] == ["a.columns"]


def test_what_killed_writers_left_is_deleted(tmp_path):
    with ColumnWriter(tmp_path, np.dtype([("n", "i8")])) as writer:
        writer.write(tmp_path / "plan-a.columns", {}, "table")
    kept = {"plan-a.columns", ".plan-c.columns.host.1.tmp", "clips-a.columns"}
    for name in (*kept, ".plan-b.columns.host.1.tmp", "plan-b.columns"):
        (tmp_path / name).touch()
    for name, days in ((".plan-b.columns.host.1.tmp", 2), ("plan-b.columns", 61), ("clips-a.columns", 61)):
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    columns.used(tmp_path / "plan-a.columns")
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_shares_are_whole_and_even():
    files = {hashlib.sha256(bytes([n, m])).digest(): f"{n}-{m}" for n in range(30) for m in range(30)}
    shares = [probes.share(files, rank, 3) for rank in range(3)]
    assert sum(map(len, shares)) == 900 and shares[0] | shares[1] | shares[2] == files
    assert min(map(len, shares)) > 250


def plan_on_rank(folder):
    """Which files this rank has probed, and the plan."""
    probed, real = [], probes.probe
    probes.probe = lambda path, *a: probed.append(os.path.basename(path)) or real(path, *a)
    planner = Planner.of(Data(path=f"{folder}/clips", buckets=((5, 32, 32),), fps=8.0), folder / "cache", 4)
    tables = planned.Tables.of(folder / "cache", folder / "run")
    plans = [planned.plan_on_ranks(planner, 0, tables) for _ in range(2)]  # the second one is known
    return probed, [tuple(plan.entries) for plan in plans], plans[0].entries.path


def test_all_ranks_look_at_the_files(toml, tmp_path):
    expected = make_plan(tmp_path / "clips", [[5, 32, 32]], 8.0, 0, tmp_path / "alone").entries
    (first, entries, path), (second, others, other) = run_ranks(plan_on_rank, 2, tmp_path)
    assert sorted(first + second) == [f"{k}.mp4" for k in range(6)]
    assert entries == others == [expected] * 2 and path == other


def test_the_benchmark_of_a_start(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the script sets is taken back
        monkeypatch.delenv(name)
    once = benchmark.prepare(tmp_path, 12, clips_per_file=2)
    benchmark.start(0, 1, free_port(), tmp_path, 2)
    found = json.loads((tmp_path / "rank-0.json").read_text())
    assert found["clips"] == 23 and found["cpu"] > 0  # and one is held out
    result = {"clips": 23, "once": once, "first": [found], "known": [found], "tables": 2300}
    shown = benchmark.table([result, {**result, "clips": 13}])
    assert "rank 0: own memory grows by 0.0 B a clip" in shown and "100 B a clip on disk" in shown


class Copies(ClipTable):
    """Clips of one file, of which the first and the last have the same conditioning frame; nothing is in the cache."""

    def __init__(self):
        keys = np.repeat(np.array([7, 1, 2], np.uint8), 32).reshape(3, 32)
        given = {"video": keys[[0, 0, 0]], "given": keys[[1, 2, 1]], "image": keys[:0], "texts": keys[:0].ravel()}
        self.columns, self.rows = given, np.arange(3)

    def _lack_frames(self, cache, rows):
        return np.ones(len(rows), bool)

    def _lack_texts(self, cache, rows):
        return rows[:0], rows[:0], rows[:0].astype(bool)

    def _text_places(self, owner, number):
        return owner


def test_copies_are_encoded_once_whatever_lies_between_them():
    assert Copies().missing(None).frames.tolist() == [0, 1]
