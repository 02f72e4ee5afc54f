"""plan.html: one page without references to anything outside it, from a plan's numbers.

    data = {
      "title", "config", "cluster", "hash": texts
      "step_seconds", "mfu": of the chosen plan
      "summary": [[name, value]]
      "parts": {part of the step: seconds, which sum to step_seconds}
      "memory": [{"ranks": text, "kinds": {kind: bytes}, "total": bytes, "usable": bytes, "capacity": bytes}]
      "layer", "step": [{"lane", "name", "start", "seconds"}]      time lines
      "plans": [{"name", "seconds", "bytes", "binding", "chosen", "in_plateau"}]
      "assumptions": [text]
    }

The same data is in the page, as JSON in the element `plan-data`: tests and other programs read it there. Figures are
drawn by matplotlib, which is loaded here alone.
"""

import html
import io
import json
from types import MappingProxyType
from typing import Any

GIB = 2**30
VISIBLE = 0.0003  # of a time line: shorter events are not drawn
LANES = ("compute", "all-to-all", "ring", "tensor parallel", "expert parallel", "gather", "reduce", "pipeline", "host")
COLOURS = MappingProxyType(  # of Paul Tol's muted scheme, which colour-blind readers can tell apart
    {
        "compute": "#4477aa",
        "recompute": "#88bbdd",
        "F": "#4477aa",
        "B": "#223f66",
        "backward": "#223f66",
        "bubble": "#e8e8e8",
        "all-to-all": "#cc6677",
        "ring": "#ddaa33",
        "tensor parallel": "#aa4499",
        "expert parallel": "#882255",
        "gather": "#117733",
        "reduce": "#44aa99",
        "pipeline": "#999933",
        "host": "#777777",
        "optimizer": "#332288",
    }
)
_KINDS = ("#332288", "#4477aa", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 0 auto;
  padding: 24px 32px 64px; }
h1 { font-size: 1.5em; margin: 0 0 4px; } h2 { font-size: 1.15em; margin: 40px 0 8px; }
p { margin: 6px 0; max-width: 78ch; } .quiet { color: #666; }
code { font-size: 0.92em; background: #f4f4f4; padding: 1px 4px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px 16px; min-width: 110px; }
.card b { display: block; font-size: 1.3em; font-weight: 600; } .card span { color: #666; font-size: 0.85em; }
table { border-collapse: collapse; font-size: 0.88em; width: 100%; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #eee; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.chosen { background: #eef4fb; font-weight: 600; } tr.plateau { background: #f8fafc; }
.scroll { overflow-x: auto; } svg { width: 100%; height: auto; display: block; }
"""


def build_page(data: dict[str, Any]) -> str:
    """The page as HTML. ValueError: matplotlib is not installed."""
    figures = _Figures()
    escaped = {name: html.escape(str(data[name])) for name in ("title", "config", "cluster", "hash")}
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in data["summary"]
    )
    sections = [
        ("Memory", "What each rank holds at its peak. Ranks that hold the same share a bar.", figures.memory(data)),
        ("The parts of a step", "Seconds of a step that each part takes and nothing else hides.", figures.parts(data)),
        (
            "One layer",
            "Forward and backward of one block. What a lane does while compute is busy costs nothing but its share of "
            "the GPU; gaps in compute are exposed communication.",
            figures.timeline(data["layer"], "milliseconds", 1e3),
        ),
        ("One step", "A step from its first micro-batch to the update.", figures.timeline(data["step"], "seconds", 1)),
        (
            "Memory against time",
            "The fastest plans that fit, of every layout, and those that no other plan beats in both.",
            figures.tradeoff(data),
        ),
    ]
    body = "".join(
        f"<h2>{title}</h2><p class='quiet'>{html.escape(text)}</p>{figure}" for title, text, figure in sections
    )
    assumptions = "".join(f"<li>{html.escape(line)}</li>" for line in data["assumptions"])
    numbers = json.dumps(data).replace("</", "<\\/")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped["title"]}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{escaped['title']}</h1><p class='quiet'><code>{escaped['config']}</code> on "
        f"<code>{escaped['cluster']}</code>. Predicted, not measured.</p>"
        f'<div class="cards">{cards}</div>{body}<h2>Plans</h2>{_table(data)}'
        f"<h2>Assumptions</h2><ul>{assumptions}</ul><p class='quiet'>Their hash: <code>{escaped['hash']}</code></p>"
        f'<script type="application/json" id="plan-data">{numbers}</script></body></html>\n'
    )


def read_data(page: str) -> dict[str, Any]:
    """The data of a page that `build_page` made."""
    start = page.index('id="plan-data">') + len('id="plan-data">')
    return json.loads(page[start : page.index("</script>", start)])


def _table(data: dict[str, Any]) -> str:
    rows = []
    for i, plan in enumerate(data["plans"][:30], start=1):
        kind = "chosen" if plan["chosen"] else "plateau" if plan["in_plateau"] else ""
        cells = f"<td class='number'>{i}</td><td>{html.escape(plan['name'])}</td>"
        cells += f"<td class='number'>{plan['seconds']:.3f}</td><td class='number'>{plan['bytes'] / GIB:.1f}</td>"
        rows.append(f'<tr class="{kind}">{cells}<td>{html.escape(plan["binding"])}</td></tr>')
    head = (
        "<th class='number'></th><th>plan</th><th class='number'>s/step</th><th class='number'>GiB</th><th>binding</th>"
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


class _Figures:
    """Figures as SVG, to stand in a page."""

    def __init__(self):
        try:
            import matplotlib
        except ModuleNotFoundError as e:
            if e.name != "matplotlib":
                raise
            raise ValueError(
                "plan.html: its figures need the package matplotlib, which is not installed; run pip install "
                "matplotlib, or leave the page out with --no-page"
            ) from None
        # Text stays text, so that the page can be searched; equal data gives an equal file.
        self.style = {
            "svg.fonttype": "none",
            "svg.hashsalt": "plan",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#999999",
        }
        self.matplotlib = matplotlib

    def _axes(self, height: float) -> tuple[Any, Any]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, height), layout="constrained")
        return figure, figure.add_subplot()

    def _svg(self, figure: Any) -> str:
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        return svg[svg.index("<svg") :]

    def memory(self, data: dict[str, Any]) -> str:
        bars = data["memory"]
        kinds = list(dict.fromkeys(kind for bar in bars for kind in bar["kinds"]))
        with self.matplotlib.rc_context(self.style):
            figure, axes = self._axes(1.5 + 0.45 * len(bars))
            left = [0.0] * len(bars)
            for kind, colour in zip(kinds, _KINDS * (1 + len(kinds) // len(_KINDS)), strict=False):
                widths = [bar["kinds"].get(kind, 0) / GIB for bar in bars]
                if any(widths):
                    axes.barh(range(len(bars)), widths, left=left, color=colour, label=kind, height=0.62)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for i, bar in enumerate(bars):
                axes.annotate(
                    f"{left[i]:.1f}",
                    (left[i], i),
                    (-5, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    color="white",
                    weight="bold",
                    bbox={"boxstyle": "round,pad=0.2", "fc": "#00000055", "ec": "none"},
                )
                for size, style in ((bar["usable"], "--"), (bar["capacity"], "-")):
                    axes.plot([size / GIB] * 2, [i - 0.42, i + 0.42], style, color="#bb2222", linewidth=1)
            axes.set_yticks(range(len(bars)), [bar["ranks"] for bar in bars])
            axes.set_ylim(len(bars) - 0.4, -0.6)
            axes.set_xlabel("GiB (red: usable, dashed, and what the GPU has)")
            figure.legend(loc="outside lower center", ncols=5, frameon=False)
            return self._svg(figure)

    def parts(self, data: dict[str, Any]) -> str:
        parts = {name: seconds for name, seconds in data["parts"].items() if seconds > 0}
        with self.matplotlib.rc_context(self.style):
            figure, axes = self._axes(0.7 + 0.26 * len(parts))
            axes.barh(range(len(parts)), list(parts.values()), color=COLOURS["compute"], height=0.66)
            for i, seconds in enumerate(parts.values()):
                share = seconds / data["step_seconds"]
                axes.annotate(
                    f"{seconds:.3g} s, {share:.1%}", (seconds, i), (6, 0), textcoords="offset points", va="center"
                )
            axes.set_yticks(range(len(parts)), list(parts))
            axes.invert_yaxis()
            axes.margins(x=0.16)
            axes.set_xlabel("seconds")
            return self._svg(figure)

    def timeline(self, events: list[dict[str, Any]], unit: str, scale: float) -> str:
        end = max(event["start"] + event["seconds"] for event in events) or 1.0
        events = [event for event in events if event["seconds"] > VISIBLE * end]
        lanes = sorted({event["lane"] for event in events}, key=lambda lane: (LANES.index(_kind(lane)), lane))
        with self.matplotlib.rc_context(self.style):
            figure, axes = self._axes(0.75 + 0.4 * len(lanes))
            for event in events:
                y, width = lanes.index(event["lane"]), event["seconds"] * scale
                kind = _kind(event["lane"])
                if kind == "compute":
                    kind = next((k for k in COLOURS if event["name"].startswith(k)), kind)
                colour = COLOURS[kind]
                axes.barh(
                    y, width, left=event["start"] * scale, color=colour, height=0.7, edgecolor="white", linewidth=0.4
                )
                if event["seconds"] > 0.0065 * len(event["name"]) * end:
                    middle = (event["start"] + event["seconds"] / 2) * scale
                    ink = "#333333" if kind in ("bubble", "recompute", "ring") else "white"
                    axes.text(middle, y, event["name"], ha="center", va="center", color=ink, fontsize=7.5)
            axes.set_yticks(range(len(lanes)), lanes)
            axes.set_ylim(len(lanes) - 0.4, -0.6)
            axes.set_xlim(0, end * scale * 1.005)
            axes.set_xlabel(unit)
            return self._svg(figure)

    def tradeoff(self, data: dict[str, Any]) -> str:
        plans = data["plans"]
        with self.matplotlib.rc_context(self.style):
            figure, axes = self._axes(4.2)
            kinds = (
                ("others", "#bbbbbb", 14, [p for p in plans if not p["in_plateau"] and not p["chosen"]]),
                ("within 2 % of the fastest", "#4477aa", 26, [p for p in plans if p["in_plateau"] and not p["chosen"]]),
                ("chosen", "#bb2222", 60, [p for p in plans if p["chosen"]]),
            )
            for label, colour, size, some in kinds:
                if some:
                    x, y = [p["bytes"] / GIB for p in some], [p["seconds"] for p in some]
                    axes.scatter(x, y, s=size, color=colour, label=label, zorder=3, edgecolor="white", linewidth=0.4)
            front = pareto(plans)
            axes.plot([p["bytes"] / GIB for p in front], [p["seconds"] for p in front], color="#888888", linewidth=0.8)
            usable = data["memory"][0]["usable"] / GIB
            axes.axvline(usable, color="#bb2222", linestyle="--", linewidth=1)
            fastest = min(p["seconds"] for p in plans)
            slowest = max(p["seconds"] for p in plans)
            if slowest > 4 * fastest:
                axes.set_yscale("log")
            axes.set_xlabel("GiB of the fullest rank (dashed: usable)")
            axes.set_ylabel("seconds a step")
            axes.legend(frameon=False)
            return self._svg(figure)


def _kind(lane: str) -> str:
    """The kind of a lane's work: lanes of a pipeline's stages are all compute."""
    return next((kind for kind in LANES if lane.startswith(kind)), "compute")


def pareto(plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plans that no other one beats both in bytes and in seconds, from the smallest."""
    front: list[dict[str, Any]] = []
    for plan in sorted(plans, key=lambda p: (p["bytes"], p["seconds"])):
        if not front or plan["seconds"] < front[-1]["seconds"]:
            front.append(plan)
    return front
