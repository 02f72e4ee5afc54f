"""`--profiling.enable_profiling` and `--planner.cluster` through the trainer."""

import json

from tests.helpers import ROOT


def test_traces_of_two_steps(front):
    options = {"training.steps": 4, "profiling.enable_profiling": "true", "profiling.profile_freq": 2}
    run = front.run("run", options).ok()
    traces = sorted((run.folder / "profile_traces").rglob("*.json"))
    assert [path.parent.name for path in traces] == ["step-2", "step-4"]
    for path in traces:
        names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
        assert names.count("Optimizer.step#AdamW.step") == 1  # one step, and all of it
        assert {"aten::addmm", "autograd::engine::evaluate_function: AddmmBackward0"} <= set(names)


def test_a_step_is_compared_with_its_prediction(front):
    """A short run: the table comes at its end, without the recorded step's parts."""
    cluster = ROOT / "train_configs" / "clusters" / "h100x1.toml"
    run = front.run("run", {"training.steps": 3, "planner.cluster": cluster}).ok()
    assert f"planner: a step on {cluster}, and here on rank 0" in run.output
    assert "predicted / measured" in run.output and "Traceback" not in run.output
