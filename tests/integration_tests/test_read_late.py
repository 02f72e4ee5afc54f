"""training.read_late: the same run, bit for bit, whatever goes wrong in it; and the host does not wait in the step."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.faults import NAN, events, injected
from tests.integration_tests.test_host_side import watch_reads
from tests.integration_tests.test_resume import assert_same_checkpoint
from titan_video.config.job_config import Checkpoint, JobConfig, Training
from titan_video.training.fault_tolerance import NonFiniteGuard
from titan_video.training.step_numbers import StepJudge, UnreadStep

LATE = {"training.read_late": "true"}
OPTIONS = {"training.steps": 9, "checkpoint.interval": 4, "ema.enable": "true", "ema.decay": 0.9}
SAME = ("step", "loss", "max_loss", "grad_norm", "lr", "samples", "tokens", "bucket")
ROLLBACK = {"fault_tolerance.nonfinite": "rollback", "fault_tolerance.max_rollbacks": 100}
SPIKES = {"fault_tolerance.spike_deviations": 6, "fault_tolerance.spike_window": 8, "training.steps": 12}
FAULTS = {  # {step of the data: ...}: beside a checkpoint, one after another, and at the last step
    "none": ({}, {}),
    "skip": (
        {"fault_tolerance.nonfinite": "skip"},
        {2: (0, "loss", NAN), 4: (1, "gradient", NAN), 9: (1, "loss", NAN)},
    ),
    "rollback": (ROLLBACK, {5: (0, "loss", NAN), 6: (0, "gradient", NAN), 8: (0, "loss", NAN)}),
    "spikes": (SPIKES, {10: (0, "loss", 40.0), 11: (0, "gradient", 1e4)}),
}


def records(run):
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row.get(key) for key in SAME} for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "kind", ["rollback", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("none", "skip", "spikes"))]
)
def test_the_run_is_the_same(front, kind):
    """Losses, faults, order of the data, checkpoints; each step is recorded once, in order."""
    options, faults = OPTIONS | FAULTS[kind][0], FAULTS[kind][1]
    hook, last = partial(injected, faults), options["training.steps"]
    ranks = 2 if kind == "skip" else 1
    at_once = front.run("at_once", options, ranks, hook).ok()
    late = front.run("late", {**options, **LATE}, ranks, hook).ok()
    assert records(late) == records(at_once) and [row["step"] for row in records(late)] == list(range(1, last + 1))
    found, expected = ([{**event, "kept": ""} for event in events(run)] for run in (late, at_once))
    assert found == expected and len(found) == len(faults)
    for step in (4, 8, last):
        assert_same_checkpoint(*(run.folder / "checkpoint" / f"step-{step}" for run in (late, at_once)))


def test_a_stop_names_its_step_and_saves_nothing_of_it(front):
    run = front.run("run", {**OPTIONS, **LATE}, hook=partial(injected, {6: (0, "loss", NAN)}))
    assert run.code == 1 and "step 6: loss nan" in run.output and "the update was not applied" in run.output
    assert [row["step"] for row in records(run)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (run.folder / "checkpoint").iterdir()) == ["step-4"]
    again = front.run("run", {**OPTIONS, **LATE}).ok()
    assert [row["step"] for row in records(again)] == list(range(1, 10))


def test_nothing_is_read_of_a_step_before_its_successor_is_under_way(front, tmp_path):
    options = {"training.steps": 5, "checkpoint.enable": "false", "checkpoint.interval": 100, **LATE}
    front.run("run", options, hook=partial(watch_reads, tmp_path / "reads")).ok()
    reads = [read for read in json.loads((tmp_path / "reads").read_text()) if read[2] == "device.py:read"]
    assert [step for step, *_ in reads] == [2, 3, 4, 5, 5]  # the last step has no successor


def test_what_is_saved_exported_or_validated_is_judged_before():
    config = JobConfig(checkpoint=Checkpoint(interval=3, export_every=5), training=Training(steps=8, read_late=True))
    logged = []
    metrics = SimpleNamespace(log=lambda step, numbers: logged.append((step, numbers.loss)))
    guard = NonFiniteGuard()
    judge = StepJudge(config, guard, None, metrics, lambda fault, unread: unread.step - 1)
    known = dict.fromkeys(("lr", "samples", "tokens", "video_seconds", "data_seconds"), 0)
    known |= dict.fromkeys(("model_flops", "hardware_flops"), 0.0)
    seen = []
    for step in range(1, 9):
        seen.append([step for step, _ in logged])
        loss = NAN if step == 4 else float(step)
        assert judge.settle(step) == (3 if step == 5 else step)
        guard.losses[0] = torch.zeros(1)
        assert judge.add(UnreadStep(step, 0.0, torch.tensor([loss, loss, 1.0]), known, [], guard.losses, {})) == step
    assert seen == [[], [], [1], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    assert [step for step, _ in logged] == list(range(1, 9))
