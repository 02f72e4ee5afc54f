"""The embedded data sets: captioned clips of one coloured shape that moves, generated at first use.

Of small shapes anywhere in the picture (`embedded:shapes-N`), or of large ones that cross its middle
(`embedded:large-shapes-N`), which a small model learns in minutes.
"""

import json
import re
from pathlib import Path

import numpy as np

from titan_video.tools.files import atomic_write
from titan_video.tools.video import write_mp4

COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
COMBINATIONS = len(COLORS) * len(SHAPES) * len(DIRECTIONS)
BACKGROUND = 64
SIZE, FRAMES, FPS = 64, 17, 8
OFF_CENTRE = 6  # pixels, at most, from the middle of a large shape's way to that of the picture
VERSION = 1
MARKER = ".shapes.json"  # a name with a dot is not looked at as data


def combination(index: int) -> tuple[str, str, str]:
    """Colour, shape and direction of a clip.

    Any 48 consecutive clips hold each combination once; 16 hold each pair of colour and direction.
    """
    return list(COLORS)[index % 4], SHAPES[index % 3], list(DIRECTIONS)[index // 4 % 4]


def caption(index: int) -> str:
    color, shape, direction = combination(index)
    return f"a {color} {shape} moves {direction}"


def draw_way(rng: np.random.Generator, is_large: bool) -> tuple[float, float, float, float]:
    """(radius, travel, along, across) of a shape, in pixels. It moves from `along` to `along + travel` on one axis, or
    back, and is at `across` on the other. The whole shape stays in the picture.
    """
    if not is_large:
        radius, travel = rng.uniform(9, 14), rng.uniform(25, 35)
        return radius, travel, rng.uniform(radius, SIZE - radius - travel), rng.uniform(radius, SIZE - radius)
    radius, travel = rng.uniform(13, 18), rng.uniform(18, 26)
    free = (SIZE - travel) / 2 - radius  # from the middle of the way to that of the picture
    middle = SIZE / 2 + rng.uniform(-1, 1) * min(free, OFF_CENTRE)
    return radius, travel, middle - travel / 2, SIZE / 2 + rng.uniform(-OFF_CENTRE, OFF_CENTRE)


def render(index: int, seed: int = 0, is_large: bool = False) -> np.ndarray:
    """Frames uint8 [17, 64, 64, 3] of a clip: a pure function of (seed, index, is_large)."""
    color, shape, direction = combination(index)
    radius, travel, along, across = draw_way(np.random.Generator(np.random.Philox(key=[seed, index])), is_large)
    dx, dy = DIRECTIONS[direction]
    way_F = along + travel * np.linspace(0, 1, FRAMES)[:: dx + dy]
    x_F11, y_F11 = (
        a[:, None, None] for a in ((way_F, np.full(FRAMES, across)) if dx else (np.full(FRAMES, across), way_F))
    )

    pixel = np.arange(SIZE) + 0.5
    x_FHW, y_FHW = np.broadcast_arrays(pixel[None, None, :] - x_F11, pixel[None, :, None] - y_F11)
    if shape == "circle":
        inside_FHW = radius - np.hypot(x_FHW, y_FHW)
    elif shape == "square":
        inside_FHW = 0.9 * radius - np.maximum(abs(x_FHW), abs(y_FHW))
    else:  # apex on top, base and height 2 x radius
        inside_FHW = np.minimum(radius - y_FHW, (radius + y_FHW - 2 * abs(x_FHW)) / 5**0.5)
    cover_FHW1 = np.clip(inside_FHW + 0.5, 0, 1)[..., None]  # signed distance in pixels -> smooth edge
    return np.rint(BACKGROUND + cover_FHW1 * (np.array(COLORS[color]) - BACKGROUND)).astype(np.uint8)


def generate(folder: Path, count: int, seed: int = 0, is_large: bool = False) -> None:
    """Write clips 00000.mp4 ... and their .txt into `folder`. A complete set is kept, an interrupted one completed.

    ValueError: the folder holds anything else.
    """
    folder = Path(folder)
    generator = "titan_video large shapes" if is_large else "titan_video shapes"
    identity = {"generator": generator, "version": VERSION, "count": count, "seed": seed}
    marker = folder / MARKER
    if marker.is_file():
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict) or {k: found.get(k) for k in identity} != identity:
            raise ValueError(
                f"{marker}: was made with other settings than {identity}; delete the folder or choose another "
                f"data.cache_folder"
            )
        if found.get("complete"):
            return
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: holds files that are not the generated shapes; delete it or choose another data.cache_folder"
        )
    atomic_write(marker, json.dumps({**identity, "complete": False}), "generated clips")
    for partial in folder.glob(".*.tmp"):
        partial.unlink()
    for index in range(count):
        clip = folder / f"{index:05d}.mp4"
        text = clip.with_suffix(".txt")
        if not (clip.is_file() and text.is_file()):
            write_mp4(clip, render(index, seed, is_large), FPS, "generated clip")
            atomic_write(text, caption(index) + "\n", "caption")
    atomic_write(marker, json.dumps({**identity, "complete": True}), "generated clips")


def resolve_path(path: str, cache_folder: Path) -> Path:
    """The folder or file of `data.path`. An embedded data set is generated in `cache_folder` at first use."""
    if not path.startswith("embedded:"):
        if not path:
            raise ValueError(
                "data.path is empty: give a folder of clips, a metadata .jsonl or .csv file, or embedded:shapes-N"
            )
        return Path(path)
    match = re.fullmatch(r"embedded:(large-)?shapes-([1-9]\d{0,5})", path)
    if not match:
        raise ValueError(
            f"data.path {path!r}: the embedded data sets are embedded:shapes-N and embedded:large-shapes-N with N "
            f"clips, for example embedded:shapes-240"
        )
    folder = Path(cache_folder) / path.removeprefix("embedded:")
    generate(folder, int(match[2]), is_large=bool(match[1]))
    return folder
