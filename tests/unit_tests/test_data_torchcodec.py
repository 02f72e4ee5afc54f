"""data.decoder = torchcodec beside PyAV, on the clips of test_data_video.

All but the first tests need torchcodec with FFmpeg's libraries.
"""

import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.unit_tests.data_clips import captioned, damaged, number, write_clip
from tests.unit_tests.test_data_video import CONTAINERS
from titan_video.ingest.decode.colour import MediaPolicy
from titan_video.ingest.decode.video import Reading, UnusableClip, decode, frame_indices, probe, require
from titan_video.ingest.files.media import member
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import read_frames

try:
    require("torchcodec")
    missing = ""
except ValueError as error:
    missing = str(error).splitlines()[-1]
needs_torchcodec = pytest.mark.skipif(bool(missing), reason=f"no torchcodec: {missing}")


def test_without_it_a_plan_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    captioned(tmp_path / "a.mp4")
    with pytest.raises(
        ValueError, match="(?s)data.decoder is torchcodec.*install the torchcodec.*or set pyav.*torchcodec"
    ):
        make_plan(tmp_path, [(5, 32, 32)], 16, 0, tmp_path / "cache", policy=MediaPolicy(decoder="torchcodec"))


def test_its_pixels_have_an_identity_of_their_own(tmp_path, monkeypatch):
    captioned(tmp_path / "a.mp4")
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    (tmp_path / "image.txt").write_text("an image")
    monkeypatch.setattr("titan_video.ingest.plan.build.require", lambda decoder: None)
    one, other = (
        make_plan(
            tmp_path, [(5, 32, 32), (1, 32, 32)], 16, 0, tmp_path / "cache", policy=MediaPolicy(decoder=name)
        ).kept
        for name in ("pyav", "torchcodec")
    )
    assert [e.decoder for e in one] == ["pyav", "pyav"] and [e.decoder for e in other] == ["torchcodec", "pyav"]
    assert one[0].content != other[0].content and one[1].content == other[1].content


def both(path, found, indices, bucket=None):
    """The frames by torchcodec, after a look at how near they are to PyAV's."""
    bucket = bucket or (len(indices), found.height, found.width)
    pts = [found.pts[i] for i in indices]
    one, other = (
        decode(str(path), pts, found.width, found.height, bucket, Reading(decoder=name))
        for name in ("pyav", "torchcodec")
    )
    assert one.shape == other.shape and (one.float() - other.float()).abs().mean() < 2
    return other.permute(1, 2, 3, 0).numpy()


@needs_torchcodec
@pytest.mark.parametrize("name, codec", CONTAINERS)
def test_the_same_frames(tmp_path, name, codec):
    path = write_clip(tmp_path / name, count=30, codec=codec)
    found = probe(str(path))
    for indices in (range(30), frame_indices(*found.seconds(), 8), [17, 17, 18, 29]):
        assert [number(f) for f in both(path, found, list(indices))] == list(indices)


@needs_torchcodec
def test_variable_rate_repeats_and_numbers(tmp_path):
    times = [0, 40, 80, 500, 540, 1000, 1040, 1080, 1500, 1999]
    path = write_clip(tmp_path / "vfr.mp4", count=10, times=times)
    found = probe(str(path))
    indices = frame_indices(*found.seconds(), 10)
    assert [number(f) for f in both(path, found, indices)] == indices
    by_number = decode(str(path), [1, 4, 4], 64, 48, (3, 48, 64), Reading(by_index=True, decoder="torchcodec"))
    assert [number(f) for f in by_number.permute(1, 2, 3, 0).numpy()] == [1, 4, 4]


@needs_torchcodec
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_and_resizing(tmp_path, rotation):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 250
    path = write_clip(tmp_path / "r.mp4", frames=[image] * 5, rotation=rotation)
    found = probe(str(path))
    both(path, found, range(5))
    both(path, found, range(5), (5, 32, 32))
    both(path, found, range(5), (5, 96, 160))


@needs_torchcodec
def test_odd_sizes(tmp_path):
    path = write_clip(tmp_path / "odd.mp4", count=6, width=51, height=37, pix_fmt="yuv444p")
    assert [number(f) for f in both(path, probe(str(path)), range(5), (5, 24, 24))] == [0, 1, 2, 3, 4]


@needs_torchcodec
def test_a_member_of_a_tar(tmp_path):
    path = write_clip(tmp_path / "a.mp4", count=12)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(path, "a.mp4")
    with tarfile.open(tmp_path / "t.tar") as tar:
        info = tar.getmember("a.mp4")
    name = member(str(tmp_path / "t.tar"), "a.mp4", info.offset_data, info.size)
    assert [number(f) for f in both(name, probe(name), range(12))] == list(range(12))


@needs_torchcodec
def test_damage_never_escapes_as_another_error(tmp_path):
    path = write_clip(
        tmp_path / "a.mp4", count=20, frames=np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), dtype=np.uint8)
    )
    outcomes = set()
    for broken in damaged(path.read_bytes(), 80):
        path.write_bytes(broken)
        found = probe(str(path))
        if found.reason:
            continue
        try:
            decode(str(path), found.pts[:5], found.width, found.height, (5, 32, 32), Reading(decoder="torchcodec"))
            outcomes.add("read")
        except UnusableClip as e:
            outcomes.add(str(e).partition(":")[0])
    assert "read" in outcomes and outcomes <= {"corrupt", "read", "too large"}


@needs_torchcodec
def test_a_frame_that_is_not_there_is_named(tmp_path):
    path = write_clip(tmp_path / "a.mp4", count=5)
    found = probe(str(path))
    with pytest.raises(UnusableClip, match="corrupt: "):
        decode(str(path), [*found.pts, found.end], 64, 48, (6, 48, 64), Reading(decoder="torchcodec"))
    with pytest.raises(UnusableClip, match="corrupt: 1 of 6 frames"):
        decode(str(path), sorted([*found.pts, found.pts[2] + 1]), 64, 48, (6, 48, 64), Reading(decoder="torchcodec"))


@needs_torchcodec
def test_a_plan_is_read(tmp_path):
    captioned(tmp_path / "a.mp4", count=30, fps=16)
    entry = make_plan(
        tmp_path, [(9, 48, 64)], 16, 0, tmp_path / "cache", policy=MediaPolicy(decoder="torchcodec")
    ).kept[0]
    assert [number(f) for f in read_frames(entry).permute(1, 2, 3, 0).numpy()] == list(range(9))
