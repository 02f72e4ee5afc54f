"""`[planner] cluster`: what the log says of a step, predicted and measured."""

import io
import json
import logging
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import ROOT, run_ranks
from tests.unit_tests.config_cases import get_message, with_values
from titan_video.config import JobConfig, dump, from_dict
from titan_video.config.job_config import Planner, Validation
from titan_video.planner.candidate import PARTS
from titan_video.planner.report import comparison
from titan_video.planner.report.comparison import (
    ELSEWHERE,
    NUM_STEPS,
    Comparison,
    Predicting,
    kind_of,
    scaled,
    sort_events,
    table,
)
from titan_video.tools.logging import logger

CPU = torch.device("cpu")
SECONDS = {part: 0.001 * (i + 1) for i, part in enumerate(PARTS)}


class Known:
    """Stands in for Predicting: the result is there at once."""

    result_of = staticmethod(lambda: {"seconds": SECONDS, "memory": 0})

    def __init__(self, config, num_training):
        pass

    def is_ready(self):
        return True

    def result(self):
        return self.result_of()


def event(name, parent=None):
    return SimpleNamespace(name=name, cpu_parent=parent)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::addmm", "products"),
        ("titan_video::frozen_linear_backward", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("titan_video::ring_attention_backward", "attention"),
        ("aten::native_layer_norm", "memory-bound"),
        ("triton_poi_fused_add_0", "memory-bound"),
        ("c10d::allgather_", ELSEWHERE),
        ("FSDP::all_gather", ELSEWHERE),
        ("Optimizer.step#AdamW.step", "optimizer"),
    ],
)
def test_kinds_of_operators(name, kind):
    assert kind_of(event(name)) == kind
    assert kind_of(event(name, parent=event("aten::linear"))) == kind
    inside = event("aten::_fused_adamw_", parent=event("Optimizer.step#AdamW.step"))
    assert kind_of(event(name, parent=inside)) == "optimizer"


def test_a_recorded_step_is_sorted():
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recording:
        x = F.gelu(layer(torch.ones(2, 4, 8, 64)))
        F.scaled_dot_product_attention(x, x, x).sum().backward()
        optimizer.step()
    found = sort_events(recording.events(), CPU)
    assert set(found) == {"products", "attention", "memory-bound", "optimizer", ELSEWHERE} and min(found.values()) >= 0
    assert min(found[kind] for kind in ("products", "attention", "memory-bound", "optimizer")) > 0
    assert sum(scaled(found, 3.0).values()) == pytest.approx(3.0)
    assert scaled({"products": 0.0}, 3.0) == {}


def test_the_table_has_every_part_once():
    measured = {"products": 0.5, "attention": 0.25, "memory-bound": 0.125, "optimizer": 0.1, ELSEWHERE: 0.025}
    head, *rows, step, waits = table(SECONDS, measured, 1.0)
    cells = [row[34:].split() for row in rows]
    assert head.split() == ["seconds", "predicted", "measured"]
    assert sum(float(predicted) for predicted, _ in cells) == pytest.approx(sum(SECONDS.values()))
    assert [here for _, here in cells] == ["0.5000", "0.2500", "0.1250", "above", "0.1000", "0.0250"]
    assert step.split()[:3] == ["step", f"{sum(SECONDS.values()):.4f}", "1.0000"]
    assert "all-gather" in waits and "products" not in waits
    assert [row[34:].split()[1] for row in list(table(SECONDS, {}, 1.0))[1:4]] == ["-"] * 3


def messages(config, num_calls):
    """What the log of a rank has after so many steps, each of a product, by step."""
    comparison.Predicting = Known
    found, step = [], 0
    handler = logging.Handler()
    handler.emit = lambda record: found.append((step, record.getMessage()))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with Comparison(config, CPU) as compared:
        for step in range(1, num_calls + 1):
            torch.ones(8, 8) @ torch.ones(8, 8)
            compared.step(step)
    logger.removeHandler(handler)
    return found


def run_cases():
    config = JobConfig(planner=Planner(cluster="here"))
    validating = replace(config, validation=Validation(enable=True, freq=NUM_STEPS + 1))
    cases = (config, NUM_STEPS + 9), (validating, NUM_STEPS + 9), (config, 6), (config, 1)
    return [messages(*case) for case in cases]


def test_one_table_after_twenty_steps_of_rank_0():
    """The first call begins the first interval. A step with a validation after it is not recorded."""
    (usual, validating, short, single), others = run_ranks(run_cases, 2)
    assert others == [[], [], [], []] and single == []
    assert [step for step, _ in usual] == [NUM_STEPS + 3] and [step for step, _ in validating] == [NUM_STEPS + 4]
    for text in (usual[0][1], validating[0][1]):
        assert "planner: a step on here" in text and "products" in text and text.splitlines()[2].split()[2] != "-"
    assert len(short) == 1 and short[0][1].splitlines()[2].split()[2] == "-"


def test_where_nothing_is_predicted_the_run_goes_on():
    assert run_ranks(run_refused, 1)[0]


def run_refused():
    comparison.Predicting, found = Known, []
    Known.result_of = staticmethod(lambda: {"error": "optimizer.name: not known"})
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    with Comparison(JobConfig(planner=Planner(cluster="here")), CPU) as compared:
        for step in range(1, 4):
            compared.step(step)
    return len(found) == 1 and "no prediction: optimizer.name: not known" in found[0]


def test_rules():
    text = dump(from_dict(with_values({"planner.cluster": "no-such"})))
    assert "planner.cluster: no-such cannot be read" in get_message(text)
    text = dump(from_dict(with_values({"planner.cluster": "h100x1", "profiling.enable_profiling": True})))
    assert "only one of both can record" in get_message(text)


def printed(text):
    """What the process that predicts has to say of a TOML."""
    sys.stdin = io.StringIO(text)
    with redirect_stdout(io.StringIO()) as output:
        comparison.main(1)
    return json.loads(output.getvalue())


def test_the_process_that_predicts(tmp_path):
    """On a cluster of the shipped ones: the step of the debug run; and an error in words."""
    config = from_dict(with_values({"planner.cluster": str(ROOT / "train_configs" / "clusters" / "h100x1.toml")}))
    found = Predicting(config, 1).result()
    assert set(found["seconds"]) <= set(PARTS) and sum(found["seconds"].values()) > 0 and found["memory"] > 0
    unknown = replace(config, planner=Planner(cluster=str(tmp_path / "none.toml")))
    assert "cannot be read" in run_ranks(printed, 1, dump(unknown), init=False)[0]["error"]


def test_a_prediction_that_takes_too_long_is_given_up():
    predicting = Predicting(JobConfig(planner=Planner(cluster="h100x1")), 1)
    predicting.limit = 0.0
    assert "took longer than 0 s" in predicting.result()["error"]
    assert predicting.process.returncode == -signal.SIGKILL


def test_no_prediction_goes_on_after_a_run_that_stopped():
    assert run_ranks(run_stopped, 1)[0] == -signal.SIGKILL


def run_stopped():
    config = JobConfig(planner=Planner(cluster="h100x1"))
    with pytest.raises(SystemExit), Comparison(config, CPU) as compared:
        predicting = compared.predicting = Predicting(config, 1)
        raise SystemExit("stopped by a signal")
    return predicting.process.returncode
