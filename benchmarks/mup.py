"""muP: slopes of the coordinate check, and whether a rate holds at four times the width.

    python benchmarks/mup.py [--runs outputs/mup] [--json benchmarks/results/mup.json] [--write docs/mup.md]

1. The check at widths 64 to 512 for both families, with muP and without.
2. Runs of train.py on generated clips of moving shapes: `proxy-debug` (width 32) and `debug` (128) at several rates,
   `debug` without muP too, each with three seeds, over which losses are averaged: near the rate at which training fails
   the loss of one run varies. A finished run in --runs is read and not made again. 63 runs: an hour on one core.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, markdown
from titan_video.config.manager import parse_args
from titan_video.optim.mup import transfer
from titan_video.optim.mup.coordinate_check import Probe, coordinate_check
from titan_video.tools.logging import init_logger

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- mup -->"
WIDTHS = (64, 128, 256, 512)
CHECKED = (("wan", "AdamW"), ("wan", "Muon"), ("hunyuan_video", "AdamW"), ("hunyuan_video", "Muon"))
BASE, MODEL = "proxy-debug", "debug"
MUP = ["--optimizer.parametrization", "mup", "--optimizer.base_flavor", BASE]
RATES = [2.0**k for k in range(-10, -3)]
SEEDS = (0, 1, 2)
RUN = """
--training.steps 120 --training.local_batch_size 16 --training.max_norm 0 --lr_scheduler.warmup_steps 20
--lr_scheduler.decay_ratio 0.4 --optimizer.beta2 0.95 --ema.enable false --validation.enable false
--checkpoint.enable false --metrics.log_freq 60 --metrics.enable_tensorboard false
""".split()


def check_slopes(widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
    """The worst slope of each family and optimizer, with muP and without."""
    found = []
    for family, name in CHECKED:
        row: dict[str, Any] = {"family": family, "optimizer": name}
        for parametrization in ("mup", "standard"):
            argv = ["--model.name", family, "--encoder.max_text_length", "16", "--optimizer.name", name]
            config = parse_args([*argv, "--optimizer.parametrization", parametrization])
            layer, step, slope = coordinate_check(config, Probe(widths)).worst()
            row[parametrization] = {"layer": layer, "step": step, "slope": round(slope, 2)}
        found.append(row)
    return found


def sweep_rates(runs: Path) -> dict[str, dict[str, list[float]]]:
    """{what was trained: {rate: loss of each seed}}."""
    sweeps: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        argv = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml"), *RUN, "--debug.seed", str(seed)]
        for name, options, flavor in (("base", MUP, BASE), ("mup", MUP, MODEL), ("standard", [], MODEL)):
            folder = runs / f"seed-{seed}" / ("standard" if name == "standard" else "mup")
            config = parse_args([*argv, *options])
            found = transfer.sweep(config, [*argv, *options], folder, flavor, RATES, num_ranks=1)
            for rate, outcome in found.items():
                sweeps.setdefault(name, {}).setdefault(repr(rate), []).append(outcome.loss)
    return sweeps


def cost(base: dict[str, float], wide: dict[str, float]) -> float:
    """By what fraction the wide model's loss at the base's best rate is above its own best one."""
    return wide[min(base, key=base.get)] / min(wide.values()) - 1


def costs_by_seed(transferred: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """`cost` of each model at the best rate that its seed has at the base."""
    found: dict[str, list[float]] = {name: [] for name in transferred}
    for seed in range(len(SEEDS)):
        by_name = {name: {rate: x[seed] for rate, x in by_rate.items()} for name, by_rate in transferred.items()}
        for name, losses in by_name.items():
            found[name].append(cost(by_name["base"], losses))
    return found


def shown(worst: dict[str, Any]) -> str:
    return f"{worst['slope']:+.2f} (`{worst['layer']}`, step {worst['step']})"


def page(results: dict[str, Any]) -> str:
    """The tables of docs/mup.md."""
    rows = [
        [row["family"], row["optimizer"], *(shown(row[which]) for which in ("mup", "standard"))]
        for row in results["check"]
    ]
    check = markdown(["family", "optimizer", "worst slope with muP", "without"], rows)
    sweeps = {
        name: {rate: sum(losses) / len(losses) for rate, losses in by_rate.items()}
        for name, by_rate in results["transfer"].items()
    }
    names = {"base": f"`{BASE}`, width 32", "mup": f"`{MODEL}`, width 128, muP", "standard": f"`{MODEL}`, standard"}
    rates = list(sweeps["base"])
    best = {name: min(losses, key=losses.get) for name, losses in sweeps.items()}
    rows = [
        [label, *(f"**{x:.3f}**" if best[name] == rate else f"{x:.3f}" for rate, x in sweeps[name].items())]
        for name, label in names.items()
    ]
    table = markdown(["loss at rate", *(f"2^{round(torch.tensor(float(r)).log2().item())}" for r in rates)], rows)
    mean = {name: cost(sweeps["base"], losses) for name, losses in sweeps.items()}
    alone = {name: ", ".join(f"{x:.1%}" for x in costs) for name, costs in costs_by_seed(results["transfer"]).items()}
    words = (
        f"The best rate of width 32, carried to width 128, costs {mean['mup']:.1%} of loss over the best rate there "
        f"with muP, and {mean['standard']:.1%} without. Tuned and carried with each seed alone, as one does: "
        f"{alone['mup']} with muP, and {alone['standard']} without."
    )
    return f"{check}\n\n{table}\n\n{words}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "mup")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "mup.json")
    parser.add_argument("--write", type=Path, help=f"page whose part between two {MARKER} lines is replaced")
    options = parser.parse_args(argv)
    init_logger()
    results = {"check": check_slopes(), "transfer": sweep_rates(options.runs)}
    content = {"benchmark": "mup", "environment": environment(torch.device("cpu")), "results": results}
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(page(results))
    if options.write:
        before, _, after = options.write.read_text(encoding="utf-8").split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{page(results)}\n{MARKER}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
