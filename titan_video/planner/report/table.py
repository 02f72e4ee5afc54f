"""The ranked table of plans, as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence

from titan_video.planner.candidate import PARTS
from titan_video.planner.search.explain import name_of, saved_by
from titan_video.planner.search.fastest import PLATEAU, Result
from titan_video.planner.search.space import DEGREES


def to_markdown(result: Result, most: int = 20) -> str:
    """The fastest `most` plans; * marks the chosen one, = those on the plateau."""
    head = ("", "s/step", "MFU", "GiB", "layout", "checkpointing", "binding")
    rows = []
    for plan in result.plans[:most]:
        p = plan.prediction
        mark = "*" if plan is result.chosen else "=" if plan in result.plateau else ""
        sizes = (f"{plan.seconds:.3f}", f"{p.mfu:.1%}", f"{p.fullest.needed:.1f}")
        rows.append((mark, *sizes, name_of(plan.candidate), saved_by(plan.candidate), plan.binding))
    if result.chosen and result.chosen not in result.plans[:most]:
        plan, p = result.chosen, result.chosen.prediction
        sizes = (f"{plan.seconds:.3f}", f"{p.mfu:.1%}", f"{p.fullest.needed:.1f}")
        rows.append(("*", *sizes, name_of(plan.candidate), saved_by(plan.candidate), plan.binding))
    note = f"\\* chosen; = within {PLATEAU:.0%} of the fastest. GiB: what a GPU must have, reserve included."
    return markdown(head, rows, right=(1, 2, 3)) + f"\n{note}\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table whose columns are aligned in the text, too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = [
        ("-" * (width - 1) + ":" if i in right else "-" * width)
        for i, width in enumerate(map(lambda w: max(w, 3), widths))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.rjust(len(r)) if i in right else c.ljust(len(r)) for i, (c, r) in enumerate(zip(cells, rule, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), line(rule), *map(line, rows)]) + "\n"


def to_csv(result: Result) -> str:
    """All plans that were solved exactly: the degrees, the seconds of each part, bytes, what binds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    choices = ("local_batch_size", "microbatches", "tokens_per_microbatch", "reshard", "schedule", "optimizer")
    degrees = (*DEGREES, "ep")
    head = ["rank", "chosen", "step_seconds", "mfu", "needed_gib", *degrees, *choices, "checkpointing", "split"]
    writer.writerow([*head, "binding", *(f"seconds: {part}" for part in PARTS), "bytes"])
    for i, plan in enumerate(result.plans, start=1):
        c, p = plan.candidate, plan.prediction
        row = [i, plan is result.chosen, plan.seconds, p.mfu, p.fullest.needed]
        row += [getattr(c, name) for name in (*degrees, *choices)]
        row += [saved_by(c), " ".join(map(str, c.split)), plan.binding]
        row += [p.seconds.get(part, 0.0) for part in PARTS]
        writer.writerow([*row, p.fullest.total])
    return text.getvalue()
