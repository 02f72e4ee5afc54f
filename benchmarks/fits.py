"""What fits on which GPUs: the README's table of models and layouts, with each rank's memory by the dry run.

    python benchmarks/fits.py [--run] [--write README.md]

--run makes the dry runs, about a minute each on a CPU, and keeps their figures in benchmarks/results/fits.json. Without
it the table is made from that file. Nothing here was measured on a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fits.json"
MARKER = "<!-- fits -->"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One line of the table.

    gpus: number and memory of the GPUs. model: what is trained. config: TOML in train_configs/, without `.toml`.
    options: what is changed in it.
    """

    gpus: str
    num_ranks: int
    model: str
    config: str
    options: str = ""

    @property
    def command(self) -> str:
        words = f"train_configs/{self.config}.toml --world-size {self.num_ranks} {self.options}"
        return f"python -m titan_video.planner.dry_run {words}".strip()


LOW_MEMORY = (
    "--training.dtype bfloat16 --training.max_norm 0 --training.global_batch_size 1 --optimizer.name AdamW8bit "
    "--optimizer.in_backward true --ema.enable false"
)
BFLOAT16_BASE = "--lora.base_dtype compute --training.swap_blocks"
ROWS = (
    Row("1 x 24 GB", 1, "Wan 2.1 T2V 1.3B, LoRA", "wan2.1_t2v_1.3b", "--lora.enable true"),
    Row("1 x 24 GB", 1, "Wan 2.1 T2V 1.3B, bfloat16 weights, 8-bit AdamW in backward", "wan2.1_t2v_1.3b", LOW_MEMORY),
    Row("1 x 24 GB", 1, "Wan 2.1 T2V 14B, LoRA of an int8 base", "wan2.1_t2v_14b_lora_24gb"),
    Row("1 x 24 GB", 1, "Wan 2.1 T2V 14B, LoRA", "wan2.1_t2v_14b_lora_24gb", f"{BFLOAT16_BASE} 36"),
    Row("1 x 48 GB", 1, "Wan 2.1 T2V 14B, LoRA", "wan2.1_t2v_14b_lora_24gb", f"{BFLOAT16_BASE} 0"),
    Row("1 x 80 GB", 1, "Wan 2.1 T2V 1.3B", "wan2.1_t2v_1.3b"),
    Row("8 x 80 GB", 8, "Wan 2.1 T2V 1.3B", "wan2.1_t2v_1.3b_8gpu"),
    Row("8 x 80 GB", 8, "Wan 2.2 TI2V 5B", "wan2.2_ti2v_5b_8gpu"),
    Row("8 x 80 GB", 8, "Wan 2.1 T2V 14B", "wan2.1_t2v_14b"),
    Row("8 x 80 GB", 8, "Wan 2.1 T2V 14B", "wan2.1_t2v_14b_720p"),
    Row("32 x 80 GB", 32, "HunyuanVideo I2V", "hunyuan_video_i2v_720p_32gpu"),
    Row("64 x 80 GB", 64, "Wan 2.1 T2V 14B", "wan2.1_t2v_14b_720p_64gpu"),
    Row("64 x 80 GB", 64, "Wan 2.1 I2V 14B", "wan2.1_i2v_14b_720p_64gpu"),
    Row("64 x 80 GB", 64, "HunyuanVideo T2V", "hunyuan_video_t2v_720p_64gpu"),
)


def measure(row: Row) -> dict:
    """What the dry run of a row finds."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = row.command.split()[1:]
        subprocess.run([sys.executable, *words, "--json", file.name], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(Path(file.name).read_text())
    return {key: report[key] for key in ("bucket", "tokens", "total")}


def table(figures: dict[str, dict]) -> str:
    """The README's table. figures: of each row, by its command."""
    lines = ["| GPUs | full fine-tuning unless it says LoRA | frames x size | TOML in `train_configs/` | GiB a rank |"]
    lines.append("|---|---|---|---|---|")
    for row in ROWS:
        found = figures[row.command]
        frames, height, width = found["bucket"]
        config = f"`{row.config}.toml`" + (f"<br>`{row.options}`" if row.options else "")
        total = f"{found['total'] / GIB:.1f}"
        lines.append(f"| {row.gpus} | {row.model} | {frames} x {height} x {width} | {config} | {total} |")
    return "\n".join(lines)


def write(page: Path, figures: dict[str, dict]) -> None:
    before, _, after = page.read_text().split(MARKER)
    page.write_text(f"{before}{MARKER}\n{table(figures)}\n{MARKER}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", action="store_true", help="make the dry runs again")
    parser.add_argument("--write", type=Path, help="page; the table between its two markers is replaced")
    options = parser.parse_args()
    if options.run:
        figures = {row.command: measure(row) for row in ROWS}
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    figures = json.loads(RESULTS.read_text())
    if options.write:
        write(options.write, figures)
    print(table(figures))


if __name__ == "__main__":
    main()
