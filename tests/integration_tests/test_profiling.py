"""`--profiling.enable_profiling` through the trainer."""

import json


def test_traces_of_two_steps(front):
    options = {"training.steps": 4, "profiling.enable_profiling": "true", "profiling.profile_freq": 2}
    run = front.run("run", options).ok()
    traces = sorted((run.folder / "profile_traces").rglob("*.json"))
    assert [path.parent.name for path in traces] == ["step-2", "step-4"]
    for path in traces:
        names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
        assert names.count("Optimizer.step#AdamW.step") == 1  # one step, and all of it
        assert {"aten::addmm", "autograd::engine::evaluate_function: AddmmBackward0"} <= set(names)
