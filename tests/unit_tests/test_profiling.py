"""Traces of the right steps, with what the options ask for in them; snapshots of GPU memory."""

import contextlib
import json

import pytest
import torch

from tests.unit_tests.config_cases import get_message
from titan_video.config.job_config import JobConfig, Profiling
from titan_video.training import profiling
from titan_video.training.parts import NoProfiler, build_profiler
from titan_video.training.profiling import Profiler

CPU = torch.device("cpu")
TRACED = Profiling(enable_profiling=True, profile_freq=4)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)


def run_steps(section, folder, num_steps, first=1):
    """Steps `first` to `num_steps`, the operator of step i on a tensor of i numbers."""
    with build_profiler(JobConfig(profiling=section), folder, CPU) as profiler:
        for step in range(first, num_steps + 1):
            torch.cumsum(torch.ones(step), 0)
            profiler.step(step)


def traced_sizes(path):
    """The sizes of the tensors that a trace has seen `cumsum` of: the numbers of its steps."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::cumsum"]


def traces(folder):
    return {path.parent.name: path for path in sorted((folder / "profile_traces").rglob("*.json"))}


def test_a_trace_has_its_step_and_no_other(tmp_path):
    run_steps(TRACED, tmp_path, 9)
    found = traces(tmp_path)
    assert {name: path.name for name, path in found.items()} == {
        "step-4": "rank3_trace.json",
        "step-8": "rank3_trace.json",
    }
    assert [traced_sizes(path) for path in found.values()] == [[4], [8]]


def test_several_active_steps_in_a_folder_by_name(tmp_path):
    section = Profiling(
        enable_profiling=True, profile_freq=5, profiler_warmup=0, profiler_active=3, save_traces_folder="mine"
    )
    run_steps(section, tmp_path, 6)
    (path,) = (tmp_path / "mine").rglob("*.json")
    assert path.parent.name == "step-5" and traced_sizes(path) == [3, 4, 5]


def test_a_trace_is_named_by_the_step_of_the_run(tmp_path):
    """A run that resumes after step 10 counts its own steps between traces."""
    run_steps(TRACED, tmp_path, 14, first=11)
    assert {name: traced_sizes(path) for name, path in traces(tmp_path).items()} == {"step-14": [14]}


def test_without_options_nothing_is_loaded_or_written(tmp_path):
    assert isinstance(build_profiler(JobConfig(), tmp_path, CPU), NoProfiler)
    run_steps(Profiling(), tmp_path, 20)
    assert not list(tmp_path.iterdir())


def test_a_memory_snapshot_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"^profiling.enable_memory_snapshot: true, but only a GPU's allocations"):
        build_profiler(JobConfig(profiling=Profiling(enable_memory_snapshot=True)), tmp_path, CPU)


@pytest.fixture
def allocator(monkeypatch):
    """Stands in for the allocator's history; returns how it was started."""
    started = []
    monkeypatch.setattr("torch.cuda.memory._record_memory_history", lambda **options: started.append(options))
    monkeypatch.setattr("torch.cuda.memory._snapshot", lambda: {"segments": []})
    return started


def snapshots(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pickle"))


def test_snapshots_of_memory(tmp_path, allocator):
    section = Profiling(enable_memory_snapshot=True, profile_freq=2)
    with Profiler(section, tmp_path, torch.device("cuda")) as profiler:
        for step in range(1, 6):
            profiler.step(step)
    assert allocator == [{"max_entries": profiling.MAX_ENTRIES}]
    assert snapshots(tmp_path) == [f"memory_snapshot/step-{step}/rank3_memory_snapshot.pickle" for step in (2, 4)]


@pytest.mark.parametrize("error, is_written", [(torch.OutOfMemoryError("full"), True), (ValueError("other"), False)])
def test_a_snapshot_at_an_out_of_memory_error(tmp_path, allocator, error, is_written):
    section = Profiling(enable_memory_snapshot=True, save_memory_snapshot_folder="mine")
    with contextlib.suppress(type(error)), Profiler(section, tmp_path, torch.device("cuda")) as profiler:
        profiler.step(1)
        raise error
    expected = ["mine/out-of-memory/rank3_memory_snapshot.pickle"] if is_written else []
    assert snapshots(tmp_path) == expected


def test_warm_up_and_active_steps_fit_into_the_frequency():
    table = '[data]\npath = "embedded:shapes-8"\n[encoder]\nname = "debug"\n[profiling]\nenable_profiling = true\n'
    message = get_message(f"{table}profile_freq = 3\nprofiler_warmup = 2\nprofiler_active = 2\n")
    assert "profiling.profile_freq: given 3" in message and "take 4 steps of each" in message
