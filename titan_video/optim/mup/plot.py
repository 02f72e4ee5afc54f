"""The picture of a coordinate check, as SVG text: one panel a step, one line a layer, size over width, both in log2."""

import math
from html import escape

from titan_video.optim.mup.coordinate_check import BAR, Finding

PANEL, GAP, MARGIN, TOP = 220, 24, 56, 48
RIGHT, WRONG, INK = "#8aa9c9", "#c0392b", "#222222"


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "middle") -> str:
    style = f"font-family='Helvetica, Arial, sans-serif' font-size='{size}' fill='{INK}'"
    return f"<text x='{x:.0f}' y='{y:.0f}' {style} text-anchor='{anchor}'>{escape(words)}</text>"


def picture(found: Finding, title: str) -> str:
    """Layers whose slope is above the bar are red, and their lines carry the name on hovering."""
    widths, num_steps = list(found.sizes), len(next(iter(found.slopes.values())))
    points = {
        (layer, step): [math.log2(sizes[layer][step]) for sizes in found.sizes.values()]
        for layer, slopes in found.slopes.items()
        for step in range(num_steps)
        if not math.isnan(slopes[step])
    }
    low, high = (bound(value for line in points.values() for value in line) for bound in (min, max))
    left, right = math.log2(widths[0]), math.log2(widths[-1])
    full_width, full_height = 2 * MARGIN + num_steps * (PANEL + GAP), TOP + PANEL + MARGIN
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{full_width}' height='{full_height}'>",
        "<rect width='100%' height='100%' fill='white'/>",
        text(full_width / 2, 18, title, size=14),
    ]
    for step in range(num_steps):
        x0 = MARGIN + step * (PANEL + GAP)

        def place(width: float, value: float, x0: float = x0) -> tuple[float, float]:
            x = x0 + PANEL * (math.log2(width) - left) / (right - left)
            return x, TOP + PANEL * (high - value) / max(high - low, 1e-9)

        parts.append(f"<rect x='{x0}' y='{TOP}' width='{PANEL}' height='{PANEL}' fill='none' stroke='{INK}'/>")
        parts.append(text(x0 + PANEL / 2, TOP - 8, f"after step {step}" if step else "at the start"))
        parts += [text(place(width, low)[0], TOP + PANEL + 16, str(width)) for width in widths]
        for (layer, at), values in points.items():
            if at == step:
                slope = found.slopes[layer][step]
                line = " ".join("{:.1f},{:.1f}".format(*place(w, v)) for w, v in zip(widths, values, strict=True))
                color = WRONG if abs(slope) > BAR else RIGHT
                name = f"<title>{escape(layer)}: {slope:+.2f}</title>"
                parts.append(
                    f"<polyline points='{line}' fill='none' stroke='{color}' stroke-width='1.5'>{name}</polyline>"
                )
    parts += [text(MARGIN - 6, y, f"2^{v:.0f}", anchor="end") for v, y in ((high, TOP + 10), (low, TOP + PANEL))]
    parts.append(text(full_width / 2, full_height - 14, f"mean |{found.measure}| over the width"))
    return "\n".join([*parts, "</svg>", ""])
