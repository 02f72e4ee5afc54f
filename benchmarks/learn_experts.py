"""Does a mixture of experts learn as fast as the dense model whose feed-forward has the size that is active in it?

    python benchmarks/learn_experts.py [--dense debug] [--moe moe-debug] [--config train_configs/debug.toml]
                                       [--seeds 0 1 2 3] [--steps 1400] [--every 50] [--out outputs/learn_experts]
                                       [--section.field value ...]

Both flavors train with the TOML and each seed, each in a folder of --out; a run that was stopped resumes, one that is
finished is only read. Every --every steps 96 clips are sampled and scored (validation.num_scored). Printed for each
seed: the step at which the direction of 95 % of the clips is right, between two scores on a straight line; and the
ratio of the means. One seed says little: the ratio of a seed varies by a sixth.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.95
MOST = 1.1  # times the steps of the dense model
SCORES = ("direction", "colour", "shape")


def train(flavor: str, seed: int, options: argparse.Namespace, overrides: list[str]) -> dict[int, dict[str, float]]:
    """{step: scores of the clips sampled there}"""
    folder = options.out / f"{flavor}-seed{seed}"
    scores = read_scores(folder / "metrics.jsonl")
    if options.steps not in scores:
        command = [sys.executable, str(ROOT / "train.py"), "--job.config_file", str(options.config)]
        command += ["--job.dump_folder", str(folder), "--data.cache_folder", str(options.out / "cache")]
        command += ["--model.flavor", flavor, "--debug.seed", str(seed), "--training.steps", str(options.steps)]
        command += ["--validation.freq", str(options.every), "--validation.num_scored", "96"]
        subprocess.run([*command, "--validation.num_videos", "1", *overrides], check=True, cwd=ROOT)
        scores = read_scores(folder / "metrics.jsonl")
    return scores


def read_scores(path: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {r["step"]: r["validation"] for r in records if "score_direction" in r.get("validation", {})}


def first_step(scores: dict[int, dict[str, float]]) -> float | None:
    """The step at which the direction first reaches GOAL, on a straight line between scores; None: it does not."""
    before, low = 0, 0.0
    for step, found in sorted(scores.items()):
        if (score := found["score_direction"]) >= GOAL:
            return before + (step - before) * (GOAL - low) / (score - low)
        before, low = step, score
    return None


def table(flavors: tuple[str, str], by_seed: dict[int, list[dict[int, dict[str, float]]]]) -> str:
    """by_seed: the scores of both flavors. The steps to the goal, the other scores there at the end, the verdict."""
    rows, firsts = [], []
    for seed, both in by_seed.items():
        first = [first_step(scores) for scores in both]
        last = [scores[max(scores)] for scores in both]
        ends = ", ".join(" / ".join(f"{x[f'score_{name}']:.0%}" for x in last) + f" {name}" for name in SCORES)
        ratio = first[1] / first[0] if all(first) else math.nan
        rows.append([str(seed), *(f"{x:,.0f}" if x else "none" for x in first), f"{ratio:.2f}", ends])
        firsts.append([x or math.nan for x in first])
    dense, moe = (sum(x) / len(x) for x in zip(*firsts, strict=True))
    rows.append(["mean", f"{dense:,.0f}", f"{moe:,.0f}", f"{moe / dense:.2f}", ""])
    head = ["seed", *(f"{flavor}, step" for flavor in flavors), "ratio", "of the clips right at the end"]
    within = "yes" if moe <= MOST * dense else "no"
    return f"{markdown(head, rows)}\n\nThe mixture takes at most {MOST} times the steps: {within}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="debug")
    parser.add_argument("--moe", default="moe-debug")
    parser.add_argument("--config", type=Path, default=ROOT / "train_configs" / "debug.toml")
    parser.add_argument("--steps", type=int, default=1400)  # the 800 of debug.toml end before the goal
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "learn_experts")
    options, overrides = parser.parse_known_args()
    flavors = options.dense, options.moe
    runs = {seed: [train(flavor, seed, options, overrides) for flavor in flavors] for seed in options.seeds}
    print(table(flavors, runs))


if __name__ == "__main__":
    main()
