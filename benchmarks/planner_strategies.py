"""What Galvatron's strategies, alone and together, would take on a job: the planner's best plan of each, as a table.

    python benchmarks/planner_strategies.py [--config wan2.1_t2v_14b_720p] [--cluster h100x8] [--write docs/planner.md]

The first row is the plan that the planner chooses, among those that are equal as far as a prediction goes. The second
is the fastest; each other one fixes some of the degrees and leaves the rest to the planner. Predicted, not measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.manager import load
from titan_video.planner import cluster
from titan_video.planner.cost.model import CostModel
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.plan import Job, make_own_plan
from titan_video.planner.report.table import markdown
from titan_video.planner.search.explain import name_of, saved_by
from titan_video.planner.search.fastest import Plan

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- strategies -->"
PLAN = "the plan"


def strategies(gpus: int) -> dict[str, dict]:
    """{name: degrees that are fixed} on `gpus` GPUs."""
    alone = {"pp": 1, "tp": 1, "ring": 1, "ulysses": 1}
    return {
        PLAN: {},
        "ZeRO-3 alone": {**alone, "dp_replicate": 1, "reshard": True},
        "ZeRO-2 alone": {**alone, "dp_replicate": 1, "reshard": False},
        "DDP": {**alone, "dp_shard": 1},
        "Megatron-SP in the node": {"pp": 1, "tp": 8, "ring": 1, "ulysses": 1},
        "Megatron-SP 2, the rest free": {"tp": 2},
        "Ulysses in the node": {"pp": 1, "tp": 1, "ring": 1, "ulysses": 8},
        "ring in the node": {"pp": 1, "tp": 1, "ring": 8, "ulysses": 1},
        "1F1B of two stages": {"pp": 2, "schedule": "1F1B"},
        "1F1B of eight stages": {"pp": 8, "schedule": "1F1B"},
        "Megatron-SP and 1F1B": {"tp": 8, "pp": max(1, gpus // 8)} if gpus > 8 else {"tp": 4, "pp": 2},
    }


def rows(name: str, job: Job, model: CostModel, chosen: float) -> tuple[list[list[str]], float]:
    """(rows of a strategy, seconds of the chosen plan). chosen: so far; 0: these are its rows."""
    planned = make_own_plan(job, model)
    result = planned.result
    if not result.num_candidates:
        return [[name, "", "", f"not legal with {planned.space.step.clips} clips a step", ""]], chosen
    if result.chosen is None:
        lacks = min(r.missing for r in result.rejected) / GIB
        return [[name, "", "", f"does not fit: lacks {lacks:.0f} GiB" if lacks >= 1 else "does not fit", ""]], chosen
    plans = {name: result.plans[0]} if chosen else {name: result.chosen, "the fastest": result.plans[0]}
    chosen = chosen or result.chosen.seconds
    return [
        [title, f"{plan.seconds:.2f}", f"{plan.seconds / chosen - 1:+.1%}", layout_of(plan), plan.binding]
        for title, plan in plans.items()
    ], chosen


def layout_of(plan: Plan) -> str:
    return f"{name_of(plan.candidate)}; {saved_by(plan.candidate)}"


def table(config_path: Path, cluster_name: str) -> str:
    config, machine = load(config_path), cluster.load(ROOT / "train_configs" / "clusters" / f"{cluster_name}.toml")
    found, chosen, model = [], 0.0, CostModel(config, machine)
    for name, fixed in strategies(machine.gpus).items():
        more, chosen = rows(name, Job(config, machine, fixed=fixed), model, chosen)
        found += more
    caption = f"`{config_path.stem}` on {cluster_name}:\n\n"
    return caption + markdown(["", "s/step", "", "layout", "binding"], found, right=(1, 2))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="The planner's best plan of each strategy.", allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=["wan2.1_t2v_14b_720p", "wan2.1_t2v_14b_720p_64gpu"])
    parser.add_argument("--cluster", nargs="+", default=["h100x8", "h100x64"])
    parser.add_argument("--write", type=Path, help=f"page whose tables between two lines {MARKER} are replaced")
    options = parser.parse_args(argv)
    pairs = zip(options.config, options.cluster, strict=True)
    text = "\n".join(table(ROOT / "train_configs" / f"{config}.toml", name) for config, name in pairs)
    print(text, end="")
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{text}{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
