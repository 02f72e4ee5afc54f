"""How much each shipped multi-GPU TOML must recompute: memory and recomputed FLOPs of a rank in each mode of activation
checkpointing, by the dry run.

    python benchmarks/checkpointing.py [--run [CONFIG ...]] [--write docs/performance.md]

--run makes the dry runs, about half a minute each on a CPU, of all TOMLs or of those named, and keeps their figures in
benchmarks/results/checkpointing.json. Without it the table is made from that file. Nothing here was measured on a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from titan_video.planner.describe import CAPACITY, CONTEXT, GAPS, GIB, NCCL  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "checkpointing.json"
MARKER = "<!-- checkpointing -->"
GPU = 80  # GB, of all these TOMLs
RANKS = {
    "wan2.1_t2v_1.3b_8gpu": 8,
    "wan2.2_ti2v_5b_8gpu": 8,
    "wan2.1_t2v_14b": 8,
    "wan2.1_t2v_14b_720p": 8,
    "hunyuan_video_i2v_720p_32gpu": 32,
    "wan2.1_t2v_14b_720p_64gpu": 64,
    "wan2.1_i2v_14b_720p_64gpu": 64,
    "hunyuan_video_t2v_720p_64gpu": 64,
}
SAVED = {  # from the most recomputation to the least
    "full": None,
    "attention": ("attention",),
    "attention, down": ("attention", "down"),
    "attention, down, exchange": ("attention", "down", "exchange"),
    "attention, matmul": ("attention", "matmul"),
    "attention, down, matmul": ("attention", "down", "matmul"),
    "none": None,
}


def measure(config: str, mode: str) -> dict:
    """What the dry run finds: bytes at the peak, and FLOPs of a micro-batch by phase."""
    save = SAVED[mode]
    options = ["--activation_checkpoint.mode", "selective" if save else mode]
    if save:
        options += ["--activation_checkpoint.save", ",".join(save)]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [
            "-m",
            "titan_video.planner.dry_run",
            f"train_configs/{config}.toml",
            "--world-size",
            str(RANKS[config]),
        ]
        words += [*options, "--json", file.name]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(Path(file.name).read_text())
    return {key: report[key] for key in ("total", "flops", "model_flops")}


def needed(total: float) -> float:
    """GiB that a GPU must have, with the reserve of the dry run."""
    return total / GIB * (1 + GAPS) + CONTEXT + NCCL


def choice(figures: dict[str, dict]) -> str:
    """The mode that fits GPU and recomputes least; of equal ones, that which saves least."""
    fitting = [mode for mode in figures if needed(figures[mode]["total"]) <= CAPACITY[GPU]]
    return min(fitting, key=lambda mode: (sum(figures[mode]["flops"].values()), figures[mode]["total"]))


def table(figures: dict[str, dict[str, dict]]) -> str:
    lines = [f"| TOML | saved | GiB at the peak | fits {GPU} GB | FLOPs beyond the model's |", "|---|---|---|---|---|"]
    for config, by_mode in figures.items():
        chosen = choice(by_mode)
        for mode in (name for name in SAVED if name in by_mode):
            found = by_mode[mode]
            extra = sum(found["flops"].values()) / found["model_flops"] - 1
            fits = "yes" if needed(found["total"]) <= CAPACITY[GPU] else "no"
            name = f"**{mode}**" if mode == chosen else mode
            lines.append(f"| `{config}` | {name} | {found['total'] / GIB:.1f} | {fits} | {extra:.1%} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    before, _, after = page.read_text().split(MARKER)
    page.write_text(f"{before}{MARKER}\n{text}\n{MARKER}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", nargs="*", help="make the dry runs again, of these TOMLs (default: all)")
    parser.add_argument("--write", type=Path, help="page; the table between its two markers is replaced")
    options = parser.parse_args()
    figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.run is not None:
        for config in options.run or RANKS:
            uses_ulysses = "ulysses" in (ROOT / "train_configs" / f"{config}.toml").read_text()
            modes = [mode for mode in SAVED if uses_ulysses or "exchange" not in mode]
            figures[config] = {mode: measure(config, mode) for mode in modes}
            RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    text = table(figures)
    if options.write:
        write(options.write, text)
    print(text)


if __name__ == "__main__":
    main()
