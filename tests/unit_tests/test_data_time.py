"""Containers that start late, store their end or no length at all: whole ones are kept, cut ones are not."""

from fractions import Fraction

import numpy as np
import pytest

from tests.unit_tests.data_clips import number, write_clip
from titan_video.ingest.decode.colour import MediaPolicy
from titan_video.ingest.decode.containers import cut_matroska
from titan_video.ingest.decode.video import decode, frame_indices, probe
from titan_video.ingest.files import media
from titan_video.ingest.plan.build import make_plan

DURATION = b"\x44\x89"  # of a Segment's Info


class Pipe:
    """A file that cannot seek, so that the muxer writes a stream: no length, no size of the Segment."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        return self.file.write(data)


def write_late(path, start, form=None, is_stream=False, sound=0.0, count=40):
    """Frames of noise at 20 fps from `start` seconds on. sound: seconds of silence."""
    import av

    rng, tick = np.random.default_rng(0), Fraction(1, 1000)
    with open(path, "wb") as f, av.open(Pipe(f) if is_stream else str(path), "w", format=form) as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", {"bf": "2", "g": "12"}
        stream.time_base = stream.codec_context.time_base = tick
        audio = container.add_stream("aac", rate=16000) if sound else None
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * start) + 50 * k, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * sound)), np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            container.mux(audio.encode(silence))
            container.mux(audio.encode(None))
    return path


def cut(path, share):
    other = path.with_name(f"cut{path.suffix}")
    data = path.read_bytes()
    other.write_bytes(data[: int(len(data) * share)])
    return other


def as_length(path, seconds):
    """The Matroska file with a Duration as mkvmerge writes it: a length."""
    data = path.read_bytes()
    at = data.index(DURATION) + 2
    assert data[at] == 0x88  # eight bytes
    path.write_bytes(data[: at + 1] + np.array(seconds * 1000, ">f8").tobytes() + data[at + 9 :])
    return path


def assert_whole_and_cut(path, start, count=40):
    found = probe(str(path))
    assert found.reason == "" and len(found.pts) == count
    times, end = found.seconds()
    assert times[0] == pytest.approx(start, abs=0.06) and end - times[0] == pytest.approx(count / 20, abs=0.06)
    for share in (0.3, 0.5, 0.8, 0.97):
        assert probe(str(cut(path, share))).reason.startswith(("corrupt: ", "not a video: ")), share
    return found


@pytest.mark.parametrize("start", [0, 0.2, 3, 100])
@pytest.mark.parametrize("is_length", [False, True])
def test_matroska_that_starts_late(tmp_path, start, is_length):
    """With the absolute end as FFmpeg stores it, or the length as mkvmerge does."""
    path = write_late(tmp_path / "a.mkv", start)
    if is_length:
        as_length(path, 2.0)
    found = assert_whole_and_cut(path, start)
    assert bool(found.formerly) == (start > 0 and not is_length)


@pytest.mark.parametrize("start", [0, 3])
def test_matroska_without_a_length(tmp_path, start):
    assert_whole_and_cut(write_late(tmp_path / "a.mkv", start, "matroska", is_stream=True), start)


@pytest.mark.parametrize("name, start", [("a.mp4", 3), ("a.mov", 0.2)])
def test_edit_lists_that_start_late(tmp_path, name, start):
    assert_whole_and_cut(write_late(tmp_path / name, start), start)


def test_mp4_that_starts_before_zero(tmp_path):
    """What is before 0 is not shown."""
    found = probe(str(write_late(tmp_path / "a.mp4", -1)))
    assert found.reason == "" and len(found.pts) == 20


@pytest.mark.parametrize("start", [0, 1.4, 10])
def test_transport_streams(tmp_path, start):
    """They have no length, so a cut is seen only where it damages a packet."""
    found = probe(str(write_late(tmp_path / "a.mp4", start, "mpegts")))
    assert found.reason == "" and len(found.pts) == 40


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_that_is_longer(tmp_path, name):
    found = assert_whole_and_cut(write_late(tmp_path / name, 0.2, sound=4.0), 0.2)
    assert len(frame_indices(*found.seconds(), 20)) == 40


def test_a_long_last_frame_of_variable_rate(tmp_path):
    path = write_clip(tmp_path / "a.mkv", count=6, times=[0, 100, 200, 1500, 3000, 9000])
    found = probe(str(path))
    assert found.reason == "" and len(found.pts) == 6
    assert probe(str(write_clip(tmp_path / "b.mkv", count=4, fps=1))).reason == ""


def test_the_frames_of_a_late_file_are_its_own(tmp_path):
    path = write_clip(tmp_path / "a.mkv", count=10, times=[7000 + 40 * k for k in range(10)])
    found = probe(str(path))
    frames = decode(str(path), found.pts[3:8], 64, 48, (5, 48, 64))
    assert [number(f) for f in frames.permute(1, 2, 3, 0).numpy()] == [3, 4, 5, 6, 7]


def test_bytes_behind_a_whole_matroska_do_not_matter(tmp_path):
    path = write_late(tmp_path / "a.mkv", 3)
    path.write_bytes(path.read_bytes() + b"\x81" * 7)
    assert probe(str(path)).reason == ""


def test_members_of_tars_too(tmp_path):
    path = write_late(tmp_path / "a.mkv", 3)
    data = path.read_bytes()
    (tmp_path / "a.tar").write_bytes(b"\0" * 512 + data + b"\0" * 512)
    inside = media.member(str(tmp_path / "a.tar"), "a.mkv", 512, len(data))
    assert probe(inside).reason == ""
    assert probe(media.member(str(tmp_path / "a.tar"), "a.mkv", 512, len(data) // 2)).reason.startswith("corrupt: ")


def test_hostile_sizes_end(tmp_path):
    for tail in (
        b"",
        b"\0" * 100,
        b"\xff" * 100,
        b"\x18\x53\x80\x67",
        b"\x18\x53\x80\x67\x01" + b"\xff" * 7,
        b"\x81\x80",
    ):
        path = tmp_path / "a.mkv"
        path.write_bytes(b"\x1a\x45\xdf\xa3\x80" + tail)
        assert isinstance(cut_matroska(str(path), path.stat().st_size), str)


# ---- short videos ----


def plan_in(folder, buckets, fps=25, **policy):
    return make_plan(folder, buckets, fps, 0, folder / "cache", policy=MediaPolicy(**policy))


def test_a_video_that_fills_no_longer_bucket_is_no_still(tmp_path):
    write_clip(tmp_path / "short.mp4", count=20)
    write_clip(tmp_path / "long.mp4", count=40)
    write_clip(tmp_path / "one.mp4", count=1)
    for name in ("short", "long", "one"):
        (tmp_path / f"{name}.txt").write_text(name)
    buckets = [[1, 32, 32], [33, 32, 32], [41, 32, 32]]
    plan = plan_in(tmp_path, buckets)
    long, one, short = plan.entries
    assert short.reason.startswith(
        "would be a still: 20 frames at 25 fps, the shortest bucket of more than one frame takes 33; add a shorter"
    )
    assert plan.counts() == {"clips": 2, "dropped": 1, "dropped/would be a still": 1}
    assert (long.bucket[0], one.bucket[0]) == (33, 1)  # a video of one frame is an image
    assert all(e.kept for e in plan_in(tmp_path, buckets, video_as_image=True).entries)
    assert all(e.kept for e in plan_in(tmp_path, buckets, rules=1).entries)
    assert all(e.kept for e in plan_in(tmp_path, [[1, 32, 32]]).entries)  # nothing else was asked for
    with pytest.raises(ValueError, match="add a bucket of 17 frames or fewer"):
        (tmp_path / "long.txt").unlink()
        (tmp_path / "one.txt").unlink()
        plan_in(tmp_path, buckets)
