"""The block diagram of the README: what a clip becomes on its way to a checkpoint, and the folders that do it.

    python benchmarks/diagram.py [--out docs/images/pipeline.svg]

The picture is SVG text. A test compares the committed file with what this script writes.
"""

import argparse
from dataclasses import dataclass
from html import escape
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "pipeline.svg"
WIDTH, HEIGHT = 1180, 300
BOX_WIDTH, BOX_HEIGHT, TOP, GAP = 160, 104, 96, 36
MARGIN = (WIDTH - 6 * BOX_WIDTH - 5 * GAP) // 2
FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, GREY = "#222222", "#666666"
INGEST, CORE, OPTIONAL = "#fdf0d5", "#dcebf7", "#777777"


@dataclass(frozen=True)
class Box:
    """One stage: its name, two lines of what it holds, the folders of titan_video/ that do it."""

    name: str
    lines: tuple[str, str]
    folders: str
    fill: str


BOXES = (
    Box("clips", ("videos, images,", "captions"), "ingest/", INGEST),
    Box("cache", ("VAE latents,", "text embeddings"), "ingest/  encoders/", INGEST),
    Box("batch", ("clips of one bucket,", "equal cost on all ranks"), "data/", CORE),
    Box("task", ("noise, velocity target,", "loss"), "tasks/  flow/", CORE),
    Box("model", ("noisy tokens in,", "velocity tokens out"), "models/  distributed/", CORE),
    Box("checkpoint", ("exact resume;", "public formats"), "checkpoint/  weights/", CORE),
)


def left(index: int) -> int:
    return MARGIN + index * (BOX_WIDTH + GAP)


def center(index: int) -> int:
    return left(index) + BOX_WIDTH // 2


def text(x: int, y: int, words: str, size: int = 13, color: str = INK, weight: str = "normal") -> str:
    return (
        f"<text x='{x}' y='{y}' {FONT} font-size='{size}' font-weight='{weight}' fill='{color}' "
        f"text-anchor='middle'>{escape(words)}</text>"
    )


def arrow(path: str, dashed: bool = False) -> str:
    dash = " stroke-dasharray='5 4'" if dashed else ""
    color = OPTIONAL if dashed else INK
    return f"<path d='{path}' fill='none' stroke='{color}' stroke-width='1.5'{dash} marker-end='url(#head)'/>"


def draw_box(index: int, box: Box) -> list[str]:
    middle = center(index)
    return [
        f"<rect x='{left(index)}' y='{TOP}' width='{BOX_WIDTH}' height='{BOX_HEIGHT}' rx='8' fill='{box.fill}' "
        f"stroke='{INK}'/>",
        text(middle, TOP + 26, box.name, size=17, weight="bold"),
        text(middle, TOP + 50, box.lines[0]),
        text(middle, TOP + 67, box.lines[1]),
        text(middle, TOP + 92, box.folders, size=12, color=GREY),
    ]


def svg() -> str:
    bottom, middle = TOP + BOX_HEIGHT, TOP + BOX_HEIGHT // 2
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'>",
        "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
        f"orient='auto-start-reverse'><path d='M0 0 L10 5 L0 10 z' fill='{INK}'/></marker></defs>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
    ]
    for index, box in enumerate(BOXES):
        parts += draw_box(index, box)
        if index:
            parts.append(arrow(f"M{left(index) - GAP} {middle} H{left(index)}"))
    # Online encoding: from the clips to the batch, past the cache.
    parts += [
        arrow(f"M{center(0)} {TOP} V52 H{center(2)} V{TOP}", dashed=True),
        text(center(1), 44, "online/: encode during training", color=GREY),
        # The prediction returns to the task, which computes the loss.
        arrow(f"M{center(4)} {bottom} V234 H{center(3)} V{bottom}"),
        text((center(3) + center(4)) // 2, 252, "prediction", color=INK),
        # What every step does with the gradients, and what validation does with the task.
        text(center(4), 44, "gradients: reduce-scatter, clip, optim/", color=GREY),
        arrow(f"M{center(4) - 20} {TOP} V54 H{center(4) + 20} V{TOP}"),
        text((left(0) + left(2) - GAP) // 2, 284, "once, before training", size=12, color=GREY),
        text((left(2) + left(5) - GAP) // 2, 284, "every step (train.py)", size=12, color=GREY),
        text(center(5), 284, "at checkpoint.interval", size=11, color=GREY),
        f"<path d='M{left(0)} 266 H{left(2) - GAP}' stroke='{GREY}'/>",
        f"<path d='M{left(2)} 266 H{left(5) - GAP}' stroke='{GREY}'/>",
        f"<path d='M{left(5)} 266 H{WIDTH - MARGIN}' stroke='{GREY}'/>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    path = parser.parse_args().out
    path.write_text(svg())
    print(path)


if __name__ == "__main__":
    main()
