"""Sources other than a folder of clips: images, folders of frames, tars, tables, several at once.

Also declared metadata, and the clips that are cut from one file.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import ROOT
from tests.unit_tests.data_clips import captioned, level, number, write_clip
from titan_video.config.job_config import Data, Source
from titan_video.ingest.bucketing import ClipChoice, choose, starts
from titan_video.ingest.decode.colour import MediaPolicy
from titan_video.ingest.decode.video import decode, probe
from titan_video.ingest.files import media
from titan_video.ingest.files.metadata import CAPTION_COLUMNS, DECLARED_COLUMNS, MEDIA_COLUMNS
from titan_video.ingest.files.sources import scan
from titan_video.ingest.plan import probes
from titan_video.ingest.plan.build import build_plan, make_plan
from titan_video.ingest.plan.entries import read_frames


def numbers(entry):
    """Which source frames a training clip holds, mod 32."""
    return [number(f) for f in read_frames(entry).permute(1, 2, 3, 0).numpy()]


def write_tar(path, members):
    """members: {name: bytes or Path}."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("one") / "a.mp4", count=20, fps=10)


# ---- tars ----


@pytest.fixture
def shards(tmp_path, clip):
    (tmp_path / "shards").mkdir()
    other = write_clip(tmp_path / "b.mkv", count=12, fps=10, width=48, height=64)
    write_tar(
        tmp_path / "shards" / "s-000.tar",
        {
            "x/0001.mp4": clip,
            "x/0001.txt": b"the first\n",
            "x/0002.mkv": other,
            "x/0002.json": json.dumps(
                {"caption": ["the second", "a tall one"], "width": 48, "height": 64, "num_frames": 12, "fps": 10}
            ).encode(),
        },
    )
    write_tar(
        tmp_path / "shards" / "s-001.tar",
        {
            "0003.mp4": clip,
            "0004.txt": b"alone",
            "0005.mp4": clip,
            "0005.txt": b"\xe9",
            "0006.mp4": b"",
            "0006.txt": b"no",
        },
    )
    return tmp_path / "shards"


@pytest.mark.parametrize(
    "form",
    [
        "{folder}",
        "{folder}/s-*.tar",
        "{folder}/s-{{000..001}}.tar",
        "file://{folder}/s-{{000,001}}.tar",
        "file://{folder}/s-*.tar",
    ],
)
def test_tars(shards, tmp_path, form):
    if "://" in form:
        pytest.importorskip("fsspec")
    path = form.format(folder=shards)
    records = scan(path)
    assert [(r.captions, r.reason.partition(":")[0]) for r in records] == [
        (("the first",), ""),
        (("the second", "a tall one"), ""),
        ((), "no caption"),
        ((), "caption without a clip"),
        ((), "unreadable caption"),
        (("no",), ""),
    ]
    assert records[1].declared == (48, 64, 12, 10)
    plan = make_plan([Source(path=path)], [[5, 32, 64], [5, 64, 48]], 10, 0, tmp_path / "cache")
    first, second = plan.kept
    assert (
        first.bucket == (5, 32, 64)
        and second.bucket == (5, 64, 48)
        and numbers(first) == numbers(second) == [0, 1, 2, 3, 4]
    )
    assert (
        "shards" in first.path and "0001.mp4" in first.path and plan.entries[-1].reason == "corrupt: the file is empty"
    )
    assert make_plan([Source(path=path)], [[5, 32, 64], [5, 64, 48]], 10, 0, tmp_path / "cache") == plan


def test_a_member_is_the_file_it_was_made_of(shards, clip):
    path = next(r.path for r in scan(shards) if r.reason == "")
    assert probe(path) == probe(str(clip)) and not list(shards.glob("*.mp4"))
    found = probe(path)
    args = found.pts[3:9], found.width, found.height, (6, 48, 64)
    assert torch.equal(decode(path, *args), decode(str(clip), *args))


def test_a_tar_that_is_broken_off(shards, tmp_path, clip):
    whole = (shards / "s-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    records = scan(tmp_path / "cut.tar")
    assert records[-1].reason.startswith("corrupt: the tar is broken off") and records[-1].path == str(
        tmp_path / "cut.tar"
    )
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    assert [r.reason.partition(":")[0] for r in scan(tmp_path / "none.tar")] == ["corrupt"]


def test_workers_read_urls_and_members(shards, tmp_path):
    pytest.importorskip("fsspec")
    path = f"file://{shards}/s-{{000..001}}.tar"
    plans = [make_plan([Source(path=path)], [[5, 32, 64]], 10, n, tmp_path / f"cache{n}") for n in (0, 2)]
    assert plans[0] == plans[1] and len(plans[0].kept) == 2


def test_expand(tmp_path):
    assert media.expand("a/{08..10}/{x,yy}.tar") == [f"a/{n}/{x}.tar" for n in ("08", "09", "10") for x in ("x", "yy")]
    assert media.expand("plain") == ["plain"] and media.expand(str(tmp_path / "*.tar")) == []
    with pytest.raises(ValueError, match="nothing has such a name"):
        scan(tmp_path / "*.tar")


# ---- tables ----


@pytest.mark.parametrize("form", ["parquet", "arrow", "paths"])
def test_tables(tmp_path, clip, form):
    pa = pytest.importorskip("pyarrow")
    data = clip.read_bytes()
    videos = [{"bytes": None if form == "paths" else data, "path": str(clip)} for _ in range(4)] + [
        {"bytes": None, "path": "gone.mp4"}
    ]
    texts = ["one", ["two", "zwei"][0], "", "four", "five"]
    table = pa.table({"video": videos, "caption": texts, "label": [1, 2, 3, 4, 5]})
    (tmp_path / "set" / "data").mkdir(parents=True)
    if form == "arrow":
        with (
            pa.OSFile(str(tmp_path / "set" / "data" / "part.arrow"), "wb") as f,
            pa.ipc.new_stream(f, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=2)
    else:
        pytest.importorskip("pyarrow.parquet").write_table(
            table, tmp_path / "set" / "data" / "part.parquet", row_group_size=2
        )
    plan = make_plan(tmp_path / "set", [[5, 32, 64]], 10, 0, tmp_path / "cache")
    assert [e.caption for e in plan.kept] == ["one", "two", "four"]
    assert [e.reason.partition(":")[0] for e in plan.entries if not e.kept] == ["empty caption", "missing file"]
    assert all(numbers(e) == [0, 1, 2, 3, 4] for e in plan.kept)


# ---- images and frames ----


def picture(k, width=64, height=48):
    return Image.fromarray(np.full((height, width, 3), level(k), np.uint8))


def test_images_beside_clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    captioned(folder / "a.mp4", "a clip", count=20, fps=10)
    for k, name in enumerate(("b.png", "c.jpg", "d.webp", "e.bmp")):
        picture(k).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"picture {k}")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    picture(9).save(folder / "turned.jpg", exif=exif)
    (folder / "turned.txt").write_text("turned")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    (folder / "broken.txt").write_text("broken")
    plan = make_plan(folder, [[1, 32, 32], [9, 32, 64]], 60, 0, tmp_path / "cache")  # an image is one frame at any rate
    by_name = {os.path.basename(e.path): e for e in plan.entries}
    assert by_name["a.mp4"].bucket == (9, 32, 64) and by_name["broken.png"].reason.startswith("corrupt: ")
    assert [numbers(by_name[n]) for n in ("b.png", "c.jpg", "d.webp", "e.bmp")] == [[0], [1], [2], [3]]
    turned = by_name["turned.jpg"]
    assert (turned.width, turned.height, turned.num_frames, turned.status) == (48, 64, 1, "kept")
    short = make_plan(folder, [[9, 32, 64]], 60, 0, tmp_path / "cache")
    assert {e.reason for e in short.entries if e.path.endswith("b.png")} == {
        "too short: 1 frame at 60 fps, the shortest bucket takes 9; a bucket of one frame would take it"
    }


def test_folders_of_frames(tmp_path):
    folder = tmp_path / "set"
    for name in ("walk", "run", "odd", "images"):
        (folder / name).mkdir(parents=True)
        if name != "images":
            (folder / f"{name}.txt").write_text(name)
    for k in range(12):
        picture(k).save(folder / "walk" / f"frame{k}.png")  # 10 comes after 9
    for k in range(6):
        picture(k).save(folder / "run" / f"{k:03d}.jpg")
        picture(k, width=64 if k else 32).save(folder / "odd" / f"{k}.png")
    picture(3).save(folder / "images" / "a.png")
    (folder / "images" / "a.txt").write_text("an image")
    source = Source(path=str(folder), source_fps=12.0)
    buckets, short = [[1, 32, 32], [5, 32, 64]], MediaPolicy(video_as_image=True)
    plan = make_plan([source], buckets, 6, 0, tmp_path / "cache", policy=short)
    by_name = {os.path.basename(e.path): e for e in plan.entries}
    assert set(by_name) == {"walk", "run", "odd", "a.png"}
    assert (
        numbers(by_name["walk"]) == [0, 2, 4, 6, 8]
        and by_name["walk"].num_frames == 6
        and by_name["walk"].source_fps == 12
    )
    assert (
        by_name["run"].bucket[0] == 1
        and "differ in size" in by_name["odd"].reason
        and by_name["a.png"].caption == "an image"
    )
    unknown = make_plan(folder, [[1, 32, 32]], 6, 0, tmp_path / "cache")
    assert [e.reason.partition(":")[0] for e in unknown.entries if "walk" in e.path] == ["no rate"]
    picture(20).save(folder / "walk" / "frame4.png")
    changed = make_plan([source], buckets, 6, 0, tmp_path / "cache")
    assert numbers(next(e for e in changed.kept if e.path.endswith("walk"))) == [0, 2, 20, 6, 8]


# ---- trusted metadata ----


def test_json_metadata_with_several_captions(tmp_path, clip):
    rows = [
        {"video": str(clip), "caption": ["one", "two", "one", " "], "words": "other"},
        "no object",
        {"video": str(clip), "caption": []},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    good, bad, none = scan(tmp_path / "list.json")
    assert good.captions == ("one", "two") and bad.reason.startswith("bad line") and bad.path.endswith("list.json[1]")
    assert none.reason.startswith("no caption")
    assert scan(tmp_path / "list.json", "words")[0].captions == ("other",)
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match="one.json: holds no list"):
        scan(tmp_path / "one.json")


def test_declared_metadata(tmp_path, clip, monkeypatch):
    captioned(tmp_path / "slow.mp4", count=20, fps=5)
    lines = [
        "video,text,width,height,num_frames,fps",
        f"{clip},good,64,48,20,10",
        "slow.mp4,wrong rate,64,48,20,10",
        f"{clip},wrong size,32,48,20,10",
        f"{clip},too many,64,48,60,10",
        f"{clip},not all,64,48,,10",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    probed = []
    real = probes.probe
    monkeypatch.setattr(probes, "probe", lambda path, *args: probed.append(path) or real(path, *args))
    file = str(tmp_path / "metadata.csv")
    plan = make_plan([Source(path=file, trust_metadata=True)], [[5, 32, 64]], 5, 0, tmp_path / "cache")
    assert probed == [str(clip)]  # the row that does not state all
    good, slow, size, many, rest = plan.kept
    assert (
        numbers(good) == numbers(rest) == [0, 2, 4, 6, 8]
        and good.by_index
        and not rest.by_index
        and good.content != rest.content
    )
    for entry in (slow, size):
        with pytest.raises(ValueError, match="wrong metadata: .* are declared, the file has 64 x 48 at"):
            read_frames(entry)
    distrusting = make_plan(file, [[5, 32, 64]], 5, 0, tmp_path / "cache2")
    assert [e.num_frames for e in distrusting.kept] == [10, 20, 10, 10, 10]
    late = make_plan(
        [Source(path=file, trust_metadata=True, frame_extraction="chunk")], [[5, 32, 64]], 5, 0, tmp_path / "cache"
    )
    beyond = [e for e in late.kept if e.caption == "too many"][-1]
    with pytest.raises(ValueError, match="frames do not decode"):
        read_frames(beyond)


# ---- several sources ----


def test_sources_with_their_own_rules(tmp_path, clip):
    (tmp_path / "one").mkdir()
    captioned(tmp_path / "one" / "a.mp4", "a clip", count=40, fps=20)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"video": str(clip), "text": "x", "style": "painted"}))
    sources = (
        Source(path=str(tmp_path / "one"), num_repeats=3, caption_prefix="film, ", fps=20.0),
        Source(path=str(tmp_path / "rows.jsonl"), caption_column="style", frame_extraction="chunk"),
    )
    data = Data(source=sources, buckets=((9, 32, 64),), fps=10.0, num_workers=0)
    plan = build_plan(data, tmp_path / "cache", temporal_stride=4)
    a, *chunks = plan.kept
    assert (a.caption, a.repeats, a.fps, a.num_frames) == ("film, a clip", 3, 20.0, 40) and numbers(a) == list(range(9))
    assert [(c.caption, c.repeats, c.fps, c.start, c.num_clips) for c in chunks] == [
        ("painted", 1, 10.0, 0, 2),
        ("painted", 1, 10.0, 9, 2),
    ]
    assert [numbers(c) for c in chunks] == [list(range(9)), list(range(9, 18))] and len(
        {e.content for e in plan.kept}
    ) == 3
    assert {e.status for e in chunks} == {"split"} and a.status == "trimmed" and "1 trimmed, 1 split" in plan.summary()
    other = build_plan(data, tmp_path / "cache", temporal_stride=4, path=str(tmp_path / "one"))
    assert [(e.caption, e.repeats) for e in other.kept] == [("a clip", 1)]


# ---- which clips a file gives ----


@pytest.mark.parametrize(
    "choice, n, frames, expected",
    [
        (ClipChoice("head"), 100, 17, [0]),
        (ClipChoice("chunk"), 51, 17, [0, 17, 34]),
        (ClipChoice("chunk"), 50, 17, [0, 17]),
        (ClipChoice("slide", stride=10), 41, 17, [0, 10, 20]),
        (ClipChoice("slide", stride=100), 41, 17, [0]),
        (ClipChoice("uniform", count=3), 37, 17, [0, 10, 20]),
        (ClipChoice("uniform", count=1), 37, 17, [10]),
        (ClipChoice("uniform", count=9), 18, 17, [0, 1]),
        (ClipChoice("full"), 100, 17, [0]),
    ],
)
def test_starts(choice, n, frames, expected):
    assert starts(n, frames, choice) == expected


def test_full_length():
    whole = ClipChoice("full")
    assert choose(30, 64, 48, [(17, 32, 64), (81, 64, 32)], whole) == (29, 32, 64)
    assert choose(500, 64, 48, [(17, 32, 64), (81, 64, 32)], whole) == (81, 32, 64)
    assert choose(16, 64, 48, [(17, 32, 64)], whole) is None
    by_eight = ClipChoice("full", temporal_stride=8)
    assert choose(30, 64, 48, [(17, 32, 64), (81, 64, 32)], by_eight) == (25, 32, 64)


def test_a_late_clip_is_sought_and_is_the_same(tmp_path, monkeypatch):
    path = captioned(tmp_path / "long.mp4", count=80, fps=10).parent
    plan = make_plan([Source(path=str(path), frame_extraction="chunk")], [[9, 32, 64]], 10, 0, tmp_path / "cache")
    assert [numbers(e) for e in plan.kept] == [[k % 32 for k in range(s, s + 9)] for s in range(0, 72, 9)]
    sought = [read_frames(e) for e in plan.kept]
    monkeypatch.setattr("titan_video.ingest.decode.video.SEEK_FROM", 1e9)
    assert all(torch.equal(a, read_frames(e)) for a, e in zip(sought, plan.kept, strict=True))


def test_the_page_names_what_is_accepted():
    page = (ROOT / "docs" / "data.md").read_text()
    for names in (MEDIA_COLUMNS, CAPTION_COLUMNS, DECLARED_COLUMNS, media.VIDEO_SUFFIXES, media.IMAGE_SUFFIXES):
        assert " ".join(names) in page
