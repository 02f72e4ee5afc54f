"""Whether the rate holds: runs of train.py at the base's width and at the model's, at several rates.

Each run is an ordinary one, in a folder of its own: RUNS/FLAVOR/lr-RATE. A run that is finished is read and not made
again, and one that was stopped goes on, so runs can also be made elsewhere with the printed commands. Its resolved TOML
must say what a new run would be; a folder of another run is refused. All runs see the same clips, noise and noise
levels, so their losses can be compared.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import load
from titan_video.config.values import show
from titan_video.tools.logging import logger

TOLERANCE = 0.02  # by which the loss at the carried rate may be above the best one
LAST_PART = 0.1  # of the steps, over which the training loss is averaged
# Sections and fields that change no loss: where a run lies, what it says, keeps and shows.
NEUTRAL_SECTIONS = ("job", "metrics", "profiling", "planner", "comm")
NEUTRAL = frozenset(
    """data.num_workers data.prefetch_factor data.cache_folder data.cache_url data.cache_url_gib checkpoint.enable
    checkpoint.folder checkpoint.interval checkpoint.interval_minutes checkpoint.keep_latest_k checkpoint.async_mode
    checkpoint.plan_caching checkpoint.on_error checkpoint.last_save_in_hf checkpoint.export_every
    checkpoint.keep_exports checkpoint.export_format checkpoint.export_dtype""".split()
)
TRAIN = Path(__file__).resolve().parents[3] / "train.py"


@dataclass(frozen=True)
class Outcome:
    """One run. loss: its mean over the last tenth of the steps; infinite if the run diverged. clipped: share of the
    steps whose gradient was clipped.
    """

    loss: float
    clipped: float


Sweep = dict[float, Outcome]  # {rate: outcome}, rates rising


def run_folder(runs: Path, flavor: str, rate: float) -> Path:
    return runs / flavor / f"lr-{rate:.3e}"


def command(config: JobConfig, argv: list[str], runs: Path, flavor: str, rate: float, num_ranks: int) -> list[str]:
    """What starts the run of one flavor at one rate. argv: the options from which `config` was read."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    given = {"model.flavor": flavor, "optimizer.lr": repr(rate), "job.dump_folder": str(run_folder(runs, flavor, rate))}
    if not config.data.cache_folder:
        given["data.cache_folder"] = str(runs / "cache")
    return [
        sys.executable,
        *(torchrun if num_ranks > 1 else ()),
        str(TRAIN),
        *argv,
        *(word for name, value in given.items() for word in (f"--{name}", value)),
    ]


def check_runs(config: JobConfig, runs: Path, flavors: Sequence[str], rates: Sequence[float]) -> None:
    """ValueError: the folder of one of the runs holds another run; each line names what differs."""
    problems = []
    if config.training.epochs:
        problems.append(
            f"training.epochs: given {config.training.epochs}, but runs are compared by training.steps; set that, and "
            f"this to 0"
        )
    for flavor in flavors:
        for rate in sorted(rates):
            wanted = replace(
                config,
                model=replace(config.model, flavor=flavor),
                optimizer=replace(config.optimizer, lr=rate),
            )
            folder = run_folder(runs, flavor, rate)
            if differing := "; ".join(differences(folder, wanted)):
                problems.append(f"{folder}: {differing}: remove it, or give another --runs")
    if problems:
        raise ValueError("\n".join(problems))


def differences(folder: Path, wanted: JobConfig) -> Iterator[str]:
    """In what the run in a folder, if there is one, is another than `wanted`, by its resolved TOML. ConfigError: it
    cannot be read.
    """
    path = folder / "config.toml"
    if not path.is_file():
        if (folder / "metrics.jsonl").is_file():
            yield "holds a run without its config.toml, which says how it was made"
        return
    found, wanted = asdict(load(path)), asdict(wanted)
    for section in (section for section in wanted if section not in NEUTRAL_SECTIONS):
        for name, value in wanted[section].items():
            if found[section][name] != value and f"{section}.{name}" not in NEUTRAL:
                yield f"{section}.{name} of the run there is {show(found[section][name])}, and not {show(value)}"


def read_outcome(folder: Path, config: JobConfig) -> Outcome | None:
    """What a run has written; None if it has not all its steps."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # the last line of a run that was killed
            records.append(json.loads(line))
    steps = {record["step"]: record for record in records if "grad_norm" in record}  # a resumed run repeats some
    if max(steps, default=0) < config.training.steps:
        return None
    last = [r["loss"] for step, r in steps.items() if step > (1 - LAST_PART) * config.training.steps]
    max_norm = config.training.max_norm
    clipped = sum(r["grad_norm"] > max_norm > 0 for r in steps.values()) / len(steps)
    loss = sum(last) / len(last)
    return Outcome(loss if math.isfinite(loss) else math.inf, clipped)


def sweep(config: JobConfig, argv: list[str], runs: Path, flavor: str, rates: list[float], num_ranks: int) -> Sweep:
    """Make and read the runs of one flavor. A run that ends because its loss is not finite has diverged.

    ValueError: a run failed otherwise; its log is named. A folder holds another run: see `check_runs`.
    """
    check_runs(config, runs, (flavor,), rates)
    found = {}
    for rate in sorted(rates):
        folder = run_folder(runs, flavor, rate)
        outcome = read_outcome(folder, config)
        if outcome is None:
            logger.info(f"{flavor} at {rate:.3e}: {folder}")
            words = command(config, argv, runs, flavor, rate, num_ranks)
            folder.mkdir(parents=True, exist_ok=True)
            log = folder / "log.txt"
            with log.open("a", encoding="utf-8") as output:
                start = output.tell()  # what is before is of earlier attempts
                code = subprocess.run(words, stdout=output, stderr=output, check=False).returncode
            outcome = read_outcome(folder, config)
            if outcome is None and b"FloatingPointError" in log.read_bytes()[start:]:
                outcome = Outcome(math.inf, clipped=math.nan)
            if outcome is None:
                raise ValueError(f"the run of {flavor} at {rate:.3e} ended with exit code {code}: see {log}")
        found[rate] = outcome
    return found


def best_rate(found: Sweep) -> float:
    return min(found, key=lambda rate: found[rate].loss)


def excess(base: Sweep, target: Sweep) -> float:
    """By what fraction the target's loss at the base's best rate is above its own best loss."""
    return target[best_rate(base)].loss / target[best_rate(target)].loss - 1


def report(base_flavor: str, base: Sweep, flavor: str, target: Sweep) -> Iterator[str]:
    """The table, in Markdown, and the result."""
    yield "| lr | " + " | ".join(f"{rate:.2e}" for rate in base) + " |"
    yield "|---" * (len(base) + 1) + "|"
    for name, found in ((base_flavor, base), (flavor, target)):
        best = best_rate(found)
        cells = (f"**{o.loss:.4f}**" if rate == best else f"{o.loss:.4f}" for rate, o in found.items())
        yield f"| {name} | " + " | ".join(cells) + " |"
    for name, found in ((base_flavor, base), (flavor, target)):
        if found[best_rate(found)].loss == math.inf:
            yield f"Every run of {name} diverged: give lower --rates."
            return
    at_end = {"lowest": min(base), "highest": max(base)}
    for which, rate in at_end.items():
        if best_rate(base) == rate:
            yield f"The best rate of {base_flavor} is the {which} of the sweep: extend --rates."
    clipped = max(o.clipped for found in (base, target) for o in found.values() if not math.isnan(o.clipped))
    yield (
        f"The best rate of {base_flavor}, {best_rate(base):.2e}, costs {flavor} {excess(base, target):.1%} of loss "
        f"over its own best, {best_rate(target):.2e}. Gradients were clipped in up to {clipped:.0%} of a run's steps."
    )
