"""Is the planner right about this machine? It is profiled, twelve layouts of a debug model are predicted and measured.

    python benchmarks/planner_here.py [--rounds 5] [--steps 12] [--write docs/planner_here.md]

Profiles: one for each number of processes, as processes share the cores. Measured: `train.py` under torchrun, the
median step of each run without the first steps; the layouts take turns, so that a busy machine slows all of them, and
each has the lower quartile of its rounds: other programs make some rounds longer, none shorter. Printed: Spearman's
rank correlation of predicted and measured seconds, and by how much the layout that the planner likes best is slower
than the best measured one. Every process has one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import parse_args
from titan_video.models import get_spec
from titan_video.planner import cluster
from titan_video.planner.candidate import PARTS, Prediction
from titan_video.planner.cost.model import CostModel
from titan_video.planner.plan_file import to_candidate
from titan_video.planner.profile.stopwatch import lower_quartile
from titan_video.tools.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
TOML = "train_configs/debug.toml"
WARM_UP = 3  # steps of each run that do not count
BAR_SPEARMAN, BAR_REGRET = 0.85, 0.10
CLIPS = 16  # of a step, in every layout
COMMON = {
    "job.description": "benchmarks/planner_here.py",
    "model.kernels": "torch",
    "data.path": "embedded:shapes-64",
    "data.buckets": "[[9, 96, 96]]",
    "training.global_batch_size": CLIPS,
    "activation_checkpoint.save_min_kv": 64,
    "ema.enable": "false",
    "validation.enable": "false",
    "metrics.enable_tensorboard": "false",
    "checkpoint.enable": "false",
}
FULL = {"activation_checkpoint.mode": "full"}
SELECTIVE = {"activation_checkpoint.mode": "selective"}
RANGES = {"activation_checkpoint.range": '[{layers = "0-1", mode = "full"}]'}
TP, ULYSSES = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.context_parallel_degree": 2}
PP = {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_microbatch_size": 4}


HEAD = """# The planner on this machine

A machine is measured by (needs all of its GPUs, or some minutes of a CPU that does nothing else)

```bash
torchrun --nproc_per_node 8 -m titan_video.planner profile --out here.toml --config CONFIG.toml
```

The file holds what products and attention of the configuration's model reach, memory, collectives by size and group,
and the host's time for a launch; the planner takes it as `--cluster here.toml`. Rates are those of all ranks at once:
where ranks share cores, measure with as many ranks as will train. It has not been run on GPUs yet.

On a CPU the host computes (`host.synchronous`), and tables of single operators, which run hot and one after the other,
promise too much. So the file also holds what a part of the model shows that runs forward, backward and update as in
training ([`profile/model.py`](../titan_video/planner/profile/model.py)): the memory rate of its operators
(`efficiency.model`), what ranks wait at each of FSDP's collectives beside its time alone (`links.unit_wait_us`), and
the time of an update for each weight (`host.tensor_us`). Ranks that compute between collectives, and in the order of a
pipeline, show what these take there (`links.wait_us`, `links.pipeline_slowdown`).
So the profiles below know three of the layouts closely, plain FSDP on 1, 2 and 4 processes; of the other nine, which
checkpoint, split clips or matrices, or are pipelines, nothing was measured as a whole. No figure is fitted to the
table.

With

```toml
[planner]
cluster = "here.toml"
```

the log of a run has, after 20 steps, a table of the predicted and the measured seconds of a step by part. Rank 0
records one step for it with torch's profiler; the prediction is made beside training, in a process of its own.

## On this machine

`benchmarks/planner_here.py` measures this machine, predicts twelve layouts and modes of checkpointing of a debug model
(`train_configs/debug.toml` with the options in the script) on 1, 2 and 4 processes of one thread, and then runs
`train.py` with each of them, in turns. Each has the lower quartile of its rounds' median steps: other programs make
some rounds longer, none shorter.

"""


@dataclass(frozen=True)
class Case:
    """clips: of a micro-batch on one data-parallel rank."""

    name: str
    world_size: int
    clips: int
    options: dict

    def arguments(self) -> list[str]:
        """Of train.py, without those of the run."""
        values = {**COMMON, "training.local_batch_size": self.clips, **self.options}
        return ["--job.config_file", str(ROOT / TOML), *(f"--{name}={value}" for name, value in values.items())]


CASES = (
    Case("one process", 1, CLIPS, {}),
    Case("one process, selective", 1, CLIPS, SELECTIVE),
    Case("one process, two of four blocks full", 1, CLIPS, RANGES),
    Case("one process, full", 1, CLIPS, FULL),
    Case("FSDP 2", 2, CLIPS // 2, {}),
    Case("FSDP 2, full", 2, CLIPS // 2, FULL),
    Case("Ulysses 2", 2, CLIPS, ULYSSES),
    Case("tensor parallel 2", 2, CLIPS, TP),
    Case("pipeline 2", 2, CLIPS, PP),
    Case("FSDP 4", 4, CLIPS // 4, {}),
    Case("FSDP 2 x Ulysses 2, full", 4, CLIPS // 2, ULYSSES | FULL),
    Case("FSDP 2 x tensor parallel 2", 4, CLIPS // 2, TP),
)


def launch(world_size: int, module: list[str]) -> None:
    """Run a program on so many processes. CalledProcessError with its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *module], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(module)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def profile(folder: Path, seconds: float) -> dict[int, cluster.Cluster]:
    """{number of processes: this machine with so many}"""
    found = {}
    config = folder / "profiled.toml"
    text = (ROOT / TOML).read_text().replace("[[9, 64, 64]]", COMMON["data.buckets"])
    atomic_write(config, text.replace("local_batch_size = 32", f"local_batch_size = {CLIPS}"))
    for world_size in sorted({case.world_size for case in CASES}):
        path = folder / f"{world_size}.toml"
        options = ["--out", str(path), "--config", str(config), "--seconds", str(seconds)]
        launch(world_size, ["-m", "titan_video.planner.profile", *options])
        found[world_size] = cluster.load(path)
    return found


def predict(case: Case, machine: cluster.Cluster) -> Prediction:
    config: JobConfig = parse_args(case.arguments())
    args = get_spec(config.model.name).flavors[config.model.flavor]
    return CostModel(config, machine).predict(to_candidate(config, case.world_size, args.num_layers))


def measure(case: Case, folder: Path, steps: int) -> float:
    """Seconds of a step: the median of one run."""
    run = Path(tempfile.mkdtemp(dir=folder))
    options = {"job.dump_folder": run, "data.cache_folder": folder / "cache", "training.steps": steps}
    launch(case.world_size, ["train.py", *case.arguments(), *(f"--{k}={v}" for k, v in options.items())])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_seconds"] for record in records if "loss" in record]
    return statistics.median(seconds[WARM_UP:])


def measure_all(folder: Path, rounds: int, steps: int) -> dict[str, float]:
    """{case: the lower quartile of its rounds}; the cases take turns."""
    found: dict[str, list[float]] = {case.name: [] for case in CASES}
    for i in range(rounds):
        for case in CASES:
            found[case.name].append(measure(case, folder, steps))
        print(f"round {i + 1} of {rounds} done", file=sys.stderr, flush=True)
    return {name: lower_quartile(values) for name, values in found.items()}


def ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    return [sum(other < v for other in values) + (sum(other == v for other in values) + 1) / 2 for v in values]


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks."""
    found = torch.corrcoef(torch.tensor([ranks(a), ranks(b)], dtype=torch.float64))
    return found[0, 1].item()


def report(predicted: dict[str, Prediction], measured: dict[str, float]) -> str:
    names = sorted(measured, key=lambda name: measured[name])
    seconds = {name: predicted[name].step_seconds for name in names}
    correlation = spearman([seconds[n] for n in names], [measured[n] for n in names])
    first = min(names, key=lambda name: seconds[name])
    regret = measured[first] / measured[names[0]] - 1
    lines = [
        "| layout | processes | predicted, ms | measured, ms | predicted / measured |",
        "|---|---:|---:|---:|---:|",
    ]
    world = {case.name: case.world_size for case in CASES}
    for n in names:
        here = f"{1e3 * seconds[n]:.1f} | {1e3 * measured[n]:.1f} | {seconds[n] / measured[n]:.2f}"
        lines.append(f"| {n} | {world[n]} | {here} |")
    words = {True: "reached", False: "missed"}
    text = (
        f"Spearman's rank correlation: {correlation:.3f} (bar {BAR_SPEARMAN}, "
        f"{words[correlation >= BAR_SPEARMAN]}). The planner's first choice, {first}, takes {100 * regret:.1f} % "
        f"longer than the best measured (bar {100 * BAR_REGRET:.0f} %, {words[regret <= BAR_REGRET]})."
    )
    lines += ["", *textwrap.wrap(text, width=120)]
    return "\n".join(lines)


def parts_table(predicted: dict[str, Prediction]) -> str:
    """Predicted milliseconds by part, of the parts that some layout has."""
    parts = [p for p in PARTS if any(x.seconds.get(p, 0.0) > 1e-5 for x in predicted.values())]
    lines = [f"| predicted, ms | {' | '.join(parts)} |", "|---|" + "---:|" * len(parts)]
    for name, prediction in predicted.items():
        lines.append(f"| {name} | {' | '.join(f'{1e3 * prediction.seconds.get(p, 0.0):.1f}' for p in parts)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--seconds", type=float, default=0.2, help="budget of each profiled figure")
    parser.add_argument("--folder", type=Path, help="keep profiles and runs there")
    parser.add_argument("--write", type=Path, help="page to write")
    cli = parser.parse_args(argv)
    if cli.steps <= WARM_UP or cli.rounds < 1:
        parser.error(f"--steps: legal: more than {WARM_UP}; --rounds: at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = cli.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        machines = profile(folder, cli.seconds)
        predicted = {case.name: predict(case, machines[case.world_size]) for case in CASES}
        before = os.getloadavg()[0]
        measured = measure_all(folder, cli.rounds, cli.steps)
    load = f"load average {before:.1f} before the measurements and {os.getloadavg()[2]:.1f} during the last of them"
    where = f"{machines[1].gpu.name}, {os.cpu_count()} cores, torch {torch.__version__}"
    how = f"{cli.rounds} rounds of {cli.steps} steps, {CLIPS} clips of {COMMON['data.buckets']} a step; {load}"
    machine = textwrap.fill(f"{where}; {how}.", width=120)
    text = f"{machine}\n\n{report(predicted, measured)}\n\n{parts_table(predicted)}\n"
    print(text)
    if cli.write:
        atomic_write(cli.write, HEAD + text)


if __name__ == "__main__":
    main(sys.argv[1:])
