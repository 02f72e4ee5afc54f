"""Probing, frame counting and decoding, on clips with the frame number drawn into each frame."""

import random

import numpy as np
import pytest

from tests.unit_tests.data_clips import damaged, level, number, write_clip, write_sound
from titan_video.ingest.decode.video import UnusableClip, decode, frame_indices, probe

CONTAINERS = [
    ("a.mp4", "libx264"),
    ("a.mkv", "libx264"),
    ("a.mov", "libx264"),
    ("a.avi", "mpeg4"),
    ("x.avi", "libx264"),
    ("8.webm", "libvpx"),
    ("9.webm", "libvpx-vp9"),
]
RATES = [(25, 25, 40), (30, 15, 61), (24, 30, 48), (23.976, 8, 100), (8, 16, 17), (29.97, 16, 90), (60, 7.5, 61)]


def numbers(path, found, indices, bucket=None):
    bucket = bucket or (len(indices), found.height, found.width)
    frames = decode(str(path), [found.pts[i] for i in indices], found.width, found.height, bucket)
    assert frames.shape == (3, *((len(indices),) + tuple(bucket[1:])))
    return [number(f) for f in frames.permute(1, 2, 3, 0).numpy()]


# ---- the frame count ----


@pytest.mark.parametrize("source_fps, fps, count", RATES)
def test_frame_indices_follow_the_definition(source_fps, fps, count):
    times = [k / source_fps for k in range(count)]
    indices = frame_indices(times, count / source_fps, fps)
    assert abs(len(indices) - count / source_fps * fps) <= 1
    for k, i in enumerate(indices):
        assert times[i] <= k / fps + 0.0006
        assert i == count - 1 or times[i + 1] > k / fps + 0.0004


def test_equal_rate_is_identity_in_spite_of_rounded_times():
    times = [round(k / 30, 3) for k in range(300)]
    assert frame_indices(times, 10.0, 30) == list(range(300))
    assert frame_indices([t + 0.4 for t in times], 10.4, 30) == list(
        range(300)
    )  # a clip that starts late starts with its first frame


TABLE = [(60, 30, 15, 30, [0, 2, 4, 6]), (24, 24, 16, 16, [0, 1, 3, 4, 6]), (17, 8, 16, 34, [0, 0, 1, 1, 2, 2])]


@pytest.mark.parametrize("count, source, fps, total, head", TABLE)
def test_the_table_of_the_documentation(count, source, fps, total, head):
    indices = frame_indices([k / source for k in range(count)], count / source, fps)
    assert len(indices) == total and indices[: len(head)] == head


def test_variable_rate_and_ends():
    assert frame_indices([0.0, 0.1, 0.9], 1.0, 10) == [0, 1, 1, 1, 1, 1, 1, 1, 1, 2]
    assert frame_indices([0.0], 0.5, 10) == [0] * 5
    assert frame_indices([0.0], 0.0001, 10) == [0]
    assert frame_indices([], 0.0, 10) == []


def test_frame_indices_against_a_search_frame_by_frame():
    rng = random.Random(0)
    for _ in range(50):
        times = sorted(rng.uniform(0, 4) for _ in range(rng.randint(1, 30)))
        end, fps = times[-1] + rng.uniform(0.01, 0.5), rng.choice([3, 8, 16.5])
        slow, k = [], 0
        while times[0] + k / fps < end - 0.0005:
            slow.append(max(i for i, t in enumerate(times) if t <= times[0] + k / fps + 0.0005))
            k += 1
        assert frame_indices(times, end, fps) == slow


# ---- files ----


@pytest.mark.parametrize("name, codec", CONTAINERS)
def test_the_plan_counts_what_decodes(tmp_path, name, codec):
    path = write_clip(tmp_path / name, count=30, codec=codec)
    found = probe(str(path))
    assert found.reason == "" and (found.width, found.height, len(found.pts)) == (64, 48, 30)
    assert found.fps == pytest.approx(25, rel=0.02)
    assert numbers(path, found, range(30)) == list(range(30))
    indices = frame_indices(*found.seconds(), 8)
    assert numbers(path, found, indices) == indices and len(indices) == 10


def test_gif(tmp_path):
    path = write_clip(tmp_path / "a.gif", count=10, codec="gif", fps=10, pix_fmt="rgb8")
    found = probe(str(path))
    assert len(found.pts) == 10 and decode(str(path), found.pts, 64, 48, (9, 48, 64)).shape == (3, 10, 48, 64)


def test_variable_frame_rate(tmp_path):
    times = [0, 40, 80, 500, 540, 1000, 1040, 1080, 1500, 1999]
    path = write_clip(tmp_path / "vfr.mp4", count=10, times=times)
    found = probe(str(path))
    seconds, end = found.seconds()
    assert [round(t * 1000) for t in seconds] == times
    indices = frame_indices(seconds, end, 10)
    assert indices[:11] == [0, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]
    assert numbers(path, found, indices) == indices


def test_audio_does_not_matter(tmp_path):
    with_sound = probe(str(write_clip(tmp_path / "a.mp4", audio=True)))
    assert with_sound.reason == "" and len(with_sound.pts) == 40
    assert len(probe(str(write_clip(tmp_path / "b.mp4"))).pts) == 40


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_is_honoured(tmp_path, rotation):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 250  # bright top left of the stored picture
    path = write_clip(tmp_path / "r.mp4", frames=[image] * 5, rotation=rotation)
    found = probe(str(path))
    shown = np.rot90(image, rotation // 90)
    assert (found.height, found.width) == shown.shape[:2]
    frames = decode(str(path), found.pts, found.width, found.height, (5, found.height, found.width))
    assert abs(frames[:, 2].permute(1, 2, 0).numpy().astype(int) - shown).mean() < 6


def test_resize_covers_and_crops_the_centre(tmp_path):
    image = np.zeros((80, 200, 3), np.uint8)
    image[:, 60:140] = 200  # the middle square
    path = write_clip(tmp_path / "wide.mp4", frames=[image] * 5, width=200, height=80)
    found = probe(str(path))
    frames = decode(str(path), found.pts, 200, 80, (5, 32, 32))
    assert frames.shape == (3, 5, 32, 32) and frames[..., 1:-1].float().mean() > 190
    upscaled = decode(str(path), found.pts, 200, 80, (5, 160, 400))
    assert (
        upscaled.shape == (3, 5, 160, 400)
        and upscaled[..., 200].float().mean() > 190
        and upscaled[..., 10].float().mean() < 10
    )


def test_odd_sizes(tmp_path):
    path = write_clip(tmp_path / "odd.mp4", count=6, width=51, height=37, pix_fmt="yuv444p")
    found = probe(str(path))
    assert (found.width, found.height) == (51, 37)
    assert numbers(path, found, range(5), (5, 24, 24)) == [0, 1, 2, 3, 4]


def test_repeated_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", count=4, fps=4)
    found = probe(str(path))
    indices = frame_indices(*found.seconds(), 8)
    assert indices == [0, 0, 1, 1, 2, 2, 3, 3] and numbers(path, found, indices) == indices


# ---- broken files ----


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name, codec", [*CONTAINERS, ("fast.mp4", "libx264")])
def test_truncation_is_found_and_named(tmp_path, name, codec, share):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    path = write_clip(
        tmp_path / name, codec=codec, frames=noise, options={"movflags": "faststart"} if name == "fast.mp4" else None
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    reason = probe(str(path)).reason
    assert reason.startswith("corrupt: "), reason


def test_fast_start_mp4_cut_between_two_packets(tmp_path):
    import av

    path = write_clip(tmp_path / "a.mp4", options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        cut = [p.pos for p in container.demux(video=0) if p.size][20]
    path.write_bytes(path.read_bytes()[:cut])
    assert probe(str(path)).reason.startswith("corrupt: ")


def test_not_videos(tmp_path):
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is no video" * 100)
    assert probe(str(tmp_path / "zero.mp4")).reason == "corrupt: the file is empty"
    assert probe(str(tmp_path / "text.mp4")).reason.startswith("corrupt: ")
    assert probe(str(tmp_path / "gone.mp4")).reason.startswith("unreadable: ")
    write_sound(tmp_path / "sound.mp4")
    assert probe(str(tmp_path / "sound.mp4")).reason == "not a video: no video stream"


def test_damage_never_escapes_as_another_error(tmp_path):
    path = write_clip(
        tmp_path / "a.mp4", count=20, frames=np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), dtype=np.uint8)
    )
    outcomes = set()
    for broken in damaged(path.read_bytes(), 120):
        path.write_bytes(broken)
        found = probe(str(path))
        if found.reason:
            outcomes.add(found.reason.partition(":")[0])
            continue
        try:
            decode(str(path), found.pts[:5], found.width, found.height, (5, 32, 32))
            outcomes.add("read")
        except UnusableClip as e:
            outcomes.add(str(e).partition(":")[0])
    assert "corrupt" in outcomes and outcomes <= {"corrupt", "read", "not a video", "too large"}


def test_decode_names_missing_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", count=5)
    found = probe(str(path))
    with pytest.raises(UnusableClip, match="corrupt: 1 of 6 frames"):
        decode(str(path), [*found.pts, found.end], 64, 48, (6, 48, 64))


def test_levels_are_apart():
    assert len({level(k) for k in range(32)}) == 32
