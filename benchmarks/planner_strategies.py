"""What Galvatron's strategies, alone and together, would take on a job: the planner's best plan of each, as a table.

    python benchmarks/planner_strategies.py [--config wan2.1_t2v_14b_720p] [--cluster h100x8] [--write docs/planner.md]

Each row fixes some of the degrees and leaves the rest to the planner. Predicted, not measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.manager import load
from titan_video.planner import cluster
from titan_video.planner.describe import GIB
from titan_video.planner.explain import name_of, saved_by
from titan_video.planner.plan import Job, make_own_plan
from titan_video.planner.table import markdown

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- strategies -->"


def strategies(gpus: int) -> dict[str, dict]:
    """{name: degrees that are fixed} on `gpus` GPUs."""
    alone = {"pp": 1, "tp": 1, "ring": 1, "ulysses": 1}
    return {
        "the plan": {},
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


def row(name: str, job: Job, fastest: float) -> tuple[list[str], float]:
    planned = make_own_plan(job, job.build(job.config, job.cluster, None))
    result = planned.result
    if not result.num_candidates:
        return [name, "", "", f"not legal with {planned.space.step.clips} clips a step", ""], fastest
    if result.chosen is None:
        lacks = min(r.missing for r in result.rejected) / GIB
        return [name, "", "", f"does not fit: lacks {lacks:.0f} GiB" if lacks >= 1 else "does not fit", ""], fastest
    plan = result.plans[0]
    fastest = fastest or plan.seconds
    cells = [name, f"{plan.seconds:.2f}", f"{plan.seconds / fastest - 1:+.0%}"]
    return [*cells, f"{name_of(plan.candidate)}; {saved_by(plan.candidate)}", plan.binding], fastest


def table(config_path: Path, cluster_name: str) -> str:
    config, machine = load(config_path), cluster.load(ROOT / "train_configs" / "clusters" / f"{cluster_name}.toml")
    rows, fastest = [], 0.0
    for name, fixed in strategies(machine.gpus).items():
        cells, fastest = row(name, Job(config, machine, fixed=fixed), fastest)
        rows.append(cells)
    caption = f"`{config_path.stem}` on {cluster_name}:\n\n"
    return caption + markdown(["", "s/step", "", "fastest plan", "binding"], rows, right=(1, 2))


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
