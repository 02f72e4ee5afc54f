"""Does a mixture of experts learn as fast as the dense model whose feed-forward has the size that is active in it?

    python benchmarks/learn_experts.py [--dense debug] [--moe moe-debug] [--config train_configs/debug.toml]
                                       [--every 100] [--out outputs/learn_experts] [--section.field value ...]

Both flavors train with the TOML, each in a folder of --out; a run that was stopped resumes, one that is finished is
only read. Every --every steps 96 clips are sampled and scored (validation.num_scored). Printed: the scores of both, the
step at which the direction of 95 % of the clips is right, between two scores on a straight line, and the ratio.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.95
MOST = 1.1  # times the steps of the dense model
SCORES = ("direction", "colour", "shape")


def train(flavor: str, options: argparse.Namespace, overrides: list[str]) -> dict[int, dict[str, float]]:
    """{step: scores of the clips sampled there}"""
    folder = options.out / flavor
    command = [sys.executable, str(ROOT / "train.py"), "--job.config_file", str(options.config)]
    command += ["--job.dump_folder", str(folder), "--data.cache_folder", str(options.out / "cache")]
    command += ["--model.flavor", flavor, "--validation.freq", str(options.every), "--validation.num_scored", "96"]
    subprocess.run([*command, "--validation.num_videos", "1", *overrides], check=True, cwd=ROOT)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["validation"] for r in records if "score_direction" in r.get("validation", {})}


def first_step(scores: dict[int, dict[str, float]]) -> float | None:
    """The step at which the direction first reaches GOAL, on a straight line between scores; None: it does not."""
    before, low = 0, 0.0
    for step, found in sorted(scores.items()):
        if (score := found["score_direction"]) >= GOAL:
            return before + (step - before) * (GOAL - low) / (score - low)
        before, low = step, score
    return None


def table(by_flavor: dict[str, dict[int, dict[str, float]]]) -> str:
    """Scores by step, and the verdict."""
    lines = ["| step | " + " | ".join(f"{f}: {', '.join(SCORES)}" for f in by_flavor) + " |"]
    lines.append("|---|" + "---|" * len(by_flavor))
    for step in sorted(set().union(*by_flavor.values())):
        cells = [
            ", ".join(f"{100 * scores[step][f'score_{name}']:.0f} %" for name in SCORES) if step in scores else ""
            for scores in by_flavor.values()
        ]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    first = {flavor: first_step(scores) for flavor, scores in by_flavor.items()}
    words = [f"{f}: direction right for {GOAL:.0%} at step {f'{s:.0f}' if s else 'none'}" for f, s in first.items()]
    if all(first.values()):
        dense, moe = first.values()
        words.append(f"ratio {moe / dense:.2f}, at most {MOST}: {'yes' if moe <= MOST * dense else 'no'}")
    return "\n".join([*lines, "", "; ".join(words)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="debug")
    parser.add_argument("--moe", default="moe-debug")
    parser.add_argument("--config", type=Path, default=ROOT / "train_configs" / "debug.toml")
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "learn_experts")
    options, overrides = parser.parse_known_args()
    print(table({flavor: train(flavor, options, overrides) for flavor in (options.dense, options.moe)}))


if __name__ == "__main__":
    main()
