"""The generated clips, and the writers they use."""

import io
from collections import Counter

import numpy as np
import pytest

from titan_video.ingest.decode.video import decode, probe
from titan_video.ingest.files import shapes
from titan_video.ingest.files.shapes import COLORS, DIRECTIONS, generate, render, resolve_path
from titan_video.tools.video import write_gif_bytes, write_mp4


def centers(frames_FHWC):
    """Centre of what differs from the background, per frame, and its share of pixels."""
    inside = abs(frames_FHWC.astype(int) - shapes.BACKGROUND).sum(-1) > 60
    return [(xs.mean(), ys.mean(), len(xs)) for ys, xs in map(np.nonzero, inside)]


def test_combinations_are_equally_frequent():
    assert (
        set(Counter(map(shapes.combination, range(96))).values()) == {2}
        and len({shapes.combination(i) for i in range(48)}) == 48
    )
    assert len({shapes.combination(i)[::2] for i in range(16)}) == 16
    assert shapes.caption(0) == "a red circle moves left"


def test_render_shows_what_the_caption_says():
    for index in range(96):
        color, _, direction = shapes.combination(index)
        frames = render(index)
        assert frames.shape == (17, 64, 64, 3)
        where = centers(frames)
        dx, dy = where[-1][0] - where[0][0], where[-1][1] - where[0][1]
        wx, wy = DIRECTIONS[direction]
        assert 24 < dx * wx + dy * wy < 36 and abs(dx * wy) + abs(dy * wx) < 1
        assert max(n for *_, n in where) - min(n for *_, n in where) < 40  # never leaves the picture
        assert (abs(frames[0].reshape(-1, 3) - np.array(COLORS[color])).sum(1) == 0).sum() > 60
    assert (
        np.array_equal(render(7), render(7))
        and not np.array_equal(render(7), render(7, seed=1))
        and not np.array_equal(render(7), render(55))
    )


def test_large_shapes_cross_the_middle():
    for index in range(96):
        frames = render(index, is_large=True)
        where, edge = centers(frames), np.concatenate([frames[:, [0, -1]], frames[:, :, [0, -1]].swapaxes(1, 2)])
        dx, dy = where[-1][0] - where[0][0], where[-1][1] - where[0][1]
        wx, wy = DIRECTIONS[shapes.combination(index)[2]]
        assert 17 < dx * wx + dy * wy < 27 and abs(dx * wy) + abs(dy * wx) < 1
        assert abs(np.array(where[8][:2]) - 31.5).max() < 12 and min(n for *_, n in where) > 250
        assert abs(edge.astype(int) - shapes.BACKGROUND).max() < 170 and (edge == shapes.BACKGROUND).mean() > 0.95
        assert not np.array_equal(frames, render(index))


def test_shapes_differ():
    area = {}
    for i in range(3):
        columns = (abs(render(i)[0].astype(int) - shapes.BACKGROUND).sum(-1) > 60).any(0)
        area[shapes.combination(i)[1]] = centers(render(i))[0][2] / np.ptp(np.nonzero(columns)[0]) ** 2
    assert area["triangle"] < 0.62 < area["circle"] < 0.95 < area["square"]


def test_files_keep_the_colours(tmp_path):
    folder = resolve_path("embedded:shapes-4", tmp_path)
    for i in range(4):
        found = probe(str(folder / f"{i:05d}.mp4"))
        assert (len(found.pts), found.width, found.height, found.fps) == (17, 64, 64, 8)
        frames = decode(str(folder / f"{i:05d}.mp4"), found.pts, 64, 64, (17, 64, 64)).permute(1, 2, 3, 0).numpy()
        assert abs(frames.astype(int) - render(i)).mean() < 3
        core = (render(i) == COLORS[shapes.combination(i)[0]]).all(-1)
        assert (
            abs(frames[core].mean(0) - COLORS[shapes.combination(i)[0]]).max() < 12
        )  # the chroma of edge pixels is shared
        assert (folder / f"{i:05d}.txt").read_text().strip() == shapes.caption(i)


def test_generation_is_finished_kept_or_refused(tmp_path):
    folder = tmp_path / "s"
    generate(folder, 6)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    stamp = (folder / "00003.mp4").stat().st_mtime_ns
    (folder / "00005.mp4").unlink()
    (folder / "00002.txt").unlink()
    generate(folder, 6)
    assert not (folder / "00005.mp4").exists()  # a complete set is not looked into
    marker = folder / shapes.MARKER
    marker.write_text(marker.read_text().replace('"complete": true', '"complete": false'))
    (folder / ".00005.mp4.1.tmp").write_bytes(b"half")
    generate(folder, 6)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    assert (folder / "00003.mp4").stat().st_mtime_ns == stamp
    for count, seed in ((7, 0), (6, 1)):
        with pytest.raises(ValueError, match="other settings"):
            generate(folder, count, seed)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "film.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="not the generated shapes"):
        generate(tmp_path / "mine", 3)


def test_resolve_path(tmp_path):
    large, small = (resolve_path(f"embedded:{name}-2", tmp_path) for name in ("large-shapes", "shapes"))
    assert (large / "00001.mp4").read_bytes() != (small / "00001.mp4").read_bytes()
    assert (large / "00001.txt").read_text() == (small / "00001.txt").read_text()
    with pytest.raises(ValueError, match="other settings"):
        generate(large, 2)
    assert resolve_path("some/folder", tmp_path) == shapes.Path("some/folder")
    for bad in ("embedded:shapes", "embedded:shapes-0", "embedded:cats-4", "embedded:large-shapes-0", ""):
        with pytest.raises(ValueError, match="data.path"):
            resolve_path(bad, tmp_path)


def test_writers(tmp_path):
    from PIL import Image

    frames = render(1)
    write_mp4(tmp_path / "a.mp4", frames, 7.5)
    found = probe(str(tmp_path / "a.mp4"))
    assert (len(found.pts), found.fps) == (17, 7.5) and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    image = Image.open(io.BytesIO(write_gif_bytes(frames, 8)))
    assert image.n_frames == 17 and image.size == (64, 64) and image.info["duration"] in (120, 125, 130)
    assert abs(np.asarray(image.convert("RGB")).astype(int) - frames[0]).mean() < 8
    for bad in (frames.astype(float), frames[0], frames[:0], frames[:, :63]):
        with pytest.raises(ValueError):
            write_mp4(tmp_path / "bad.mp4", bad, 8)
    with pytest.raises(ValueError, match="fps"):
        write_gif_bytes(frames, 0)
