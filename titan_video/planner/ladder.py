"""What each option that saves memory would need, by dry runs; for the error message of a run that is out of memory.

    python -m titan_video.planner.ladder CONFIG.toml --world-size N [--out DUMP_FOLDER] [--section.field value ...]

The rows are the configuration as it is, and with each of the options that `training/out_of_memory.py` proposes. The
table is printed, and saved in DUMP_FOLDER, where the run finds it. What a dry run counts, and what not: dry_run/run.py.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import ConfigError, main_guard, parse_args
from titan_video.planner.dry_run.describe import GIB, UNCOUNTED
from titan_video.planner.dry_run.run import dry_run
from titan_video.tools.files import atomic_write
from titan_video.training.out_of_memory import TABLE, ladder

AS_IT_IS = ""  # the overrides of the first row


@dataclass(frozen=True)
class Row:
    """gib: of `rank`, the fullest one; None where the dry run is refused. note: what the overrides cost, or why not."""

    overrides: str
    gib: float | None
    rank: int
    note: str


def fullest_rank(config: JobConfig, world_size: int) -> tuple[float, int]:
    """(GiB at the peak, rank) of the fullest rank. Only the ranks of different pipeline stages differ.

    ValueError: see `dry_run`.
    """
    num_stages = config.parallelism.pipeline_parallel_degree
    ranks_per_stage = max(1, config.encoder.num_training_ranks(world_size) // num_stages)
    totals = [dry_run(config, world_size, stage * ranks_per_stage).total for stage in range(num_stages)]
    fullest = max(range(num_stages), key=lambda stage: totals[stage])
    return totals[fullest] / GIB, fullest * ranks_per_stage


def make_row(argv: list[str], world_size: int, overrides: str, cost: str) -> Row:
    """argv: of the configuration that the overrides are added to."""
    if overrides.startswith("--encoder."):
        return Row(overrides, None, 0, "a dry run does not count encoders")
    try:
        config = parse_args([*argv, *shlex.split(overrides)])
        gib, rank = fullest_rank(config, world_size)
    except ValueError as e:
        return Row(overrides, None, 0, str(e).replace("\n", "; "))
    return Row(overrides, gib, rank, cost)


def show(row: Row) -> str:
    size = "refused" if row.gib is None else f"{row.gib:.2f}"
    rank = "" if row.gib is None else str(row.rank)
    return f"{size:>8}{rank:>6}  {row.overrides or 'as it is'}  ({row.note})"


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the ladder itself, and the rest, which overrides the TOML."""
    about = "Memory of a run with each option that saves some. --section.field VALUE overrides the TOML."
    parser = argparse.ArgumentParser(prog="python -m titan_video.planner.ladder", description=about, allow_abbrev=False)
    parser.add_argument("config", type=Path, help="TOML of the run")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--out", type=Path, help="folder of the table; default: job.dump_folder")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    options, rest = parse(argv)
    argv = ["--job.config_file", str(options.config), *rest]
    with main_guard():
        if options.world_size < 1:
            raise ConfigError(f"--world-size: given {options.world_size}; legal: at least 1")
        config = parse_args(argv)
        check(config, options.world_size, files=False)
    print(f"{'GiB':>8}{'rank':>6}  overrides (cost, or why it is refused)")
    rows = []
    for overrides, cost in [(AS_IT_IS, "no change"), *ladder(config)]:
        rows.append(make_row(argv, options.world_size, overrides, cost))
        print(show(rows[-1]), flush=True)  # a row of a large model takes a minute
    table = {row.overrides: row.gib for row in rows if row.gib is not None}
    if not table:
        sys.exit(f"error: {rows[0].note}")
    path = (options.out or Path(config.job.dump_folder)) / TABLE
    atomic_write(path, json.dumps(table, indent=2) + "\n")
    print(f"GiB are those of the fullest rank at the peak of a step, on the device. {UNCOUNTED}\nsaved in {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
