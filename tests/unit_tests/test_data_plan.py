"""Scanning folders and metadata, buckets, and the plan with its report."""

import json
import logging
import os

import pytest

from tests.unit_tests.data_clips import captioned, write_clip
from titan_video.ingest.bucketing import choose, cover
from titan_video.ingest.files.metadata import CAPTION_COLUMNS, MEDIA_COLUMNS
from titan_video.ingest.files.sources import scan
from titan_video.ingest.plan import probes
from titan_video.ingest.plan.build import make_plan


def reasons(records):
    return {os.path.basename(r.path): r.reason.partition(":")[0] for r in records if r.reason}


# ---- sources ----


def test_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in (
        "b.mp4",
        "A.MOV",
        "no_text.mkv",
        "empty.webm",
        "latin.avi",
        "deep/er/c.m4v",
        ".hidden/x.mp4",
        "._a.mp4",
        "notes.pdf",
    ):
        (tmp_path / name).write_bytes(b"x")
    for name, text in (
        ("b.txt", "a b\n"),
        ("A.txt", "\ufeffan A"),
        ("empty.txt", " \n"),
        ("deep/er/c.txt", "a c"),
        ("lonely.txt", "x"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    records = scan(tmp_path)
    assert {os.path.basename(r.path): r.caption for r in records if not r.reason} == {
        "b.mp4": "a b",
        "A.MOV": "an A",
        "c.m4v": "a c",
    }
    assert reasons(records) == {
        "no_text.mkv": "no caption",
        "empty.webm": "empty caption",
        "latin.avi": "unreadable caption",
        "lonely.txt": "caption without a clip",
    }
    assert "byte 3" in next(r.reason for r in records if "latin" in r.path)
    assert [r.path for r in records] == [r.path for r in scan(tmp_path)]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.mp4").write_bytes(b"x")
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    assert [r.caption for r in scan(tmp_path / "data")] == ["a"]


@pytest.mark.parametrize("path_column", MEDIA_COLUMNS)
@pytest.mark.parametrize("caption_column", CAPTION_COLUMNS)
def test_metadata_columns(tmp_path, caplog, path_column, caption_column):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text(f'{path_column},other,{caption_column}\nclips/a.mp4,1,"one, two"\n')
    with caplog.at_level(logging.INFO):
        (record,) = scan(tmp_path)
    assert (record.path, record.caption, record.reason) == (str(tmp_path / "clips" / "a.mp4"), "one, two", "")
    assert repr(path_column) in caplog.text and repr(caption_column) in caplog.text


def test_jsonl_rows(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    file = tmp_path / "any_name.jsonl"
    lines = [
        {"video": "a.mp4", "prompt": "good"},
        {"video": "gone.mp4", "prompt": "x"},
        {"video": "a.mp4"},
        {"video": "a.mp4", "prompt": " "},
        {"prompt": "x"},
        {"video": "a.mp4", "prompt": 3},
    ]
    file.write_bytes(
        "\n".join(map(json.dumps, lines)).encode()
        + b'\n\n{"video": \n[1]\n{"video": "\xe9"}\n'
        + json.dumps(lines[0]).encode()
    )
    records = scan(file)
    assert [r.reason.partition(":")[0] for r in records] == [
        "",
        "missing file",
        "no caption",
        "empty caption",
        "no clip named",
        "no caption",
        "bad line",
        "bad line",
        "bad line",
        "",
    ]
    assert (
        records[6].path == f"{file}:8"
        and "not JSON" in records[6].reason
        and records[8].path == f"{file}:10"
        and "UTF-8" in records[8].reason
    )


def test_csv_with_an_unquoted_comma(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text("path,caption\na.mp4,one, two\na.mp4,three\na.mp4\n")
    bad, good, short = scan(tmp_path)
    assert (
        "more fields" in bad.reason
        and bad.path.endswith("metadata.csv:2")
        and good.caption == "three"
        and short.reason.startswith("no caption")
    )


NO_COLUMNS = [
    ('{"clip": "a", "words": "b"}', ["clip, words", "file_name"]),
    ('{"video": "a", "label": "b"}', ["video, label", "prompt"]),
    ("", ["no rows"]),
]


@pytest.mark.parametrize("text, words", NO_COLUMNS)
def test_metadata_without_the_columns(tmp_path, text, words):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metadata.jsonl") as e:
        scan(tmp_path)
    assert all(w in str(e.value) for w in words)


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text("a,b\n")
    (tmp_path / "metadata.jsonl").write_text("{}")
    for path, words in ((tmp_path / "gone", "no such"), (tmp_path / "a.mp4", "another kind"), (tmp_path, "both")):
        with pytest.raises(ValueError, match=words):
            scan(path)
    (tmp_path / "metadata.csv").write_bytes(b"path,caption\na,\xe9\n")
    with pytest.raises(ValueError, match="metadata.csv: is not UTF-8"):
        scan(tmp_path / "metadata.csv")


# ---- buckets ----


def test_choose():
    buckets = [(81, 480, 832), (81, 832, 480), (81, 240, 416), (17, 480, 480), (1, 512, 512)]
    assert choose(100, 1920, 1080, buckets) == (81, 480, 832)  # larger area of equal aspect
    assert choose(81, 1080, 1920, buckets) == (81, 832, 480)
    assert choose(80, 1080, 1920, buckets) == (17, 480, 480)  # frames come first
    assert choose(3, 64, 64, buckets) == (1, 512, 512)
    assert choose(4, 64, 64, buckets[:4]) is None
    assert choose(9, 200, 100, [(9, 64, 64), (9, 64, 256)]) == choose(9, 200, 100, [(9, 64, 256), (9, 64, 64)])


@pytest.mark.parametrize("width, height", [(64, 48), (1920, 1080), (37, 51), (640, 360), (100, 1000)])
def test_cover(width, height):
    for bucket in ((1, 64, 64), (1, 480, 832), (1, 832, 480)):
        w, h, left, top = cover(width, height, bucket)
        assert w >= bucket[2] and h >= bucket[1] and (w == bucket[2] or h == bucket[1])
        assert abs(w / h / (width / height) - 1) < 0.05 or min(w, h) < 64
        assert 0 <= left <= w - bucket[2] and 0 <= top <= h - bucket[1] and abs((w - bucket[2]) - 2 * left) <= 1


# ---- the plan ----


@pytest.fixture
def folder(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    captioned(clips / "a.mp4", "a wide clip", count=60, fps=25, width=128, height=72)
    captioned(clips / "b.mkv", "a tall clip", count=30, fps=12, width=48, height=64)
    captioned(clips / "short.mp4", "short", count=20, fps=25)
    captioned(clips / "cut.mp4", "cut", count=60)
    (clips / "cut.mp4").write_bytes((clips / "cut.mp4").read_bytes()[:-300])
    (clips / "zero.mp4").write_bytes(b"")
    (clips / "zero.txt").write_text("nothing")
    write_clip(clips / "wordless.mp4")
    return clips


@pytest.mark.parametrize("num_workers", [0, 2])
def test_plan(folder, tmp_path, num_workers):
    plan = make_plan(folder, [[17, 32, 64], [17, 64, 48]], 8, num_workers, tmp_path / "cache")
    by_name = {os.path.basename(e.path): e for e in plan.entries}
    assert {n for n, e in by_name.items() if e.kept} == {"a.mp4", "b.mkv"}
    a, b = by_name["a.mp4"], by_name["b.mkv"]
    assert (a.width, a.height, a.source_frames, a.num_frames, a.bucket, len(a.pts)) == (
        128,
        72,
        60,
        20,
        (17, 32, 64),
        17,
    ) and a.source_fps == 25
    assert (b.source_frames, b.num_frames, b.bucket) == (30, 20, (17, 64, 48))
    assert by_name["short.mp4"].reason == "too short: 7 frames at 8 fps, the shortest bucket takes 17"
    summary = plan.summary()
    for line in (
        "6 found, 2 kept, 4 dropped",
        "17 x 32 x 64",
        "dropped, corrupt: 2",
        "dropped, too short: 1",
        "dropped, no caption: 1",
        "wordless.txt is missing",
        "cut.mp4: ",
        "zero.mp4: the file is empty",
    ):
        assert line in summary, summary
    assert plan.counts() == {
        "clips": 2,
        "dropped": 4,
        "dropped/corrupt": 2,
        "dropped/too short": 1,
        "dropped/no caption": 1,
    }
    plan.write_jsonl(tmp_path / "out" / "plan.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "plan.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and sum(r["kept"] for r in rows) == 2 and all(r["reason"] for r in rows if not r["kept"])


def test_upscaling_is_said(folder, tmp_path):
    summary = make_plan(folder, [[17, 64, 64]], 8, 0, tmp_path / "cache").summary()
    assert "2 clips, 1 of them smaller than that and upscaled" in summary and "cropped" not in summary


def test_a_hard_crop_is_said(tmp_path):
    captioned(tmp_path / "upright.mp4", width=48, height=96)
    captioned(tmp_path / "wide.mp4", width=96, height=48)
    plan = make_plan(tmp_path, [[17, 48, 96]], 12, 0, tmp_path / "cache")
    assert "bucket 17 x 48 x 96 (frames, height, width): 2 clips" in plan.summary()
    assert "upscaled, 1 of them cropped to less than half" in plan.summary()
    both = make_plan(tmp_path, [[17, 48, 96], [17, 96, 48]], 12, 0, tmp_path / "cache")
    assert "cropped" not in both.summary()


def test_no_usable_clip_says_what_to_do(folder, tmp_path):
    with pytest.raises(ValueError, match="too short: 3") as e:
        make_plan(folder, [[81, 64, 64]], 8, 0, tmp_path / "cache")
    assert "a bucket of 17 frames or fewer" in str(e.value) and "0 kept" in str(e.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="0 found"):
        make_plan(tmp_path / "none", [[81, 64, 64]], 8, 0, tmp_path / "cache")


def test_long_lists_are_cut(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text("x")
    captioned(tmp_path / "a.mp4")
    summary = make_plan(tmp_path, [[5, 32, 32]], 8, 0, tmp_path / "cache").summary()
    assert "19.txt" in summary and "20.txt" not in summary and "and 10 more" in summary


def test_drop_reports_what_failed_later(folder, tmp_path):
    plan = make_plan(folder, [[17, 32, 64]], 8, 0, tmp_path / "cache")
    path = plan.kept[0].path
    after = plan.drop({path: "corrupt: damaged"})
    assert [e.path for e in plan.kept if e.path != path] == [
        e.path for e in after.kept
    ] and f"{path}: damaged" in after.summary()


def test_probes_are_kept_until_the_file_changes(folder, tmp_path, monkeypatch):
    buckets, cache = [[17, 32, 64]], tmp_path / "cache"
    first = make_plan(folder, buckets, 8, 0, cache)
    probed = []
    real = probes.probe
    monkeypatch.setattr(probes, "probe", lambda path, *a: probed.append(os.path.basename(path)) or real(path, *a))
    assert make_plan(folder, buckets, 8, 0, cache) == first and probed == []
    captioned(folder / "b.mkv", "a tall clip", count=31, fps=12, width=48, height=64)
    again = make_plan(folder, buckets, 8, 0, cache)
    assert probed == ["b.mkv"] and again != first
    for file in (cache / "probes").rglob("*.columns"):
        file.write_bytes(file.read_bytes()[:40])  # truncated tables are ignored, the files are probed again
    assert make_plan(folder, buckets, 8, 0, cache) == again and len(set(probed)) > 3
