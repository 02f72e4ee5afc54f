"""The layout of every shipped TOML of several GPUs beside the planner's choice, as a table. Predicted, not measured.

    python benchmarks/planner_shipped.py [--room 5] [--write docs/planner.md] [NAME ...]

NAME: of TOMLs in train_configs, without .toml; default: all of several GPUs. A TOML's first line says for how many;
they are H100 with 80 GB, eight a node.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.manager import load
from titan_video.planner import cluster
from titan_video.planner.plan import Job, as_it_is, make_plan
from titan_video.planner.report.table import markdown
from titan_video.planner.search.explain import name_of, saved_by

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- shipped -->"


def num_gpus(path: Path) -> int:
    return int(re.match(r"# world size: (\d+)", path.read_text())[1])


def job_of(path: Path, room: float) -> Job:
    gpus = num_gpus(path)
    machine = cluster.load(ROOT / "train_configs" / "clusters" / f"h100x{8 if gpus <= 8 else 64}.toml")
    machine = replace(machine, gpus=gpus, gpus_per_node=min(gpus, 8), name=f"{gpus} H100")
    return Job(load(path), cluster.with_room(machine, room))


def row_of(path: Path, room: float) -> list[str]:
    job = job_of(path, room)
    planned = make_plan(job)
    own = as_it_is(job, planned.model)
    chosen = planned.result.chosen
    if chosen is None:
        return [f"`{path.stem}`", str(job.cluster.gpus), "", "", "nothing fits", "", ""]
    best = f"{name_of(chosen.candidate)}; {saved_by(chosen.candidate)}"
    cells = [f"`{path.stem}`", str(job.cluster.gpus)]
    if isinstance(own, str):
        return [*cells, own, "", best, f"{chosen.seconds:.2f}", ""]
    shipped = f"{name_of(own.candidate)}; {saved_by(own.candidate)}"
    gain = "the same" if own.candidate == chosen.candidate else f"{own.seconds / chosen.seconds - 1:+.1%}"
    return [*cells, shipped, f"{own.seconds:.2f}", best, f"{chosen.seconds:.2f}", gain]


def table(paths: list[Path], room: float) -> str:
    head = ["TOML", "GPUs", "as shipped", "s/step", "the planner's choice", "s/step", "shipped takes"]
    rows = []
    for path in paths:
        rows.append(row_of(path, room))
        print(f"{path.stem}: {'; '.join(rows[-1][2:])}", file=sys.stderr, flush=True)  # a row takes some seconds
    return markdown(head, rows, right=(1, 3, 5, 6))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Shipped layouts beside the planner's.", allow_abbrev=False)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--room", type=float, default=0.0, help="GiB of a GPU that a plan leaves free")
    parser.add_argument("--write", type=Path, help=f"page whose table between two lines {MARKER} is replaced")
    options = parser.parse_args(argv)
    folder = ROOT / "train_configs"
    paths = [folder / f"{name}.toml" for name in options.names]
    paths = paths or [path for path in sorted(folder.glob("*.toml")) if num_gpus(path) > 1]
    text = table(paths, options.room)
    print(text, end="")
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{text}{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
