"""The flight recorder's variables: what is set, when, and that the user's own values are kept."""

import os
import pickle
import sys

import pytest
import torch
import torch.distributed as dist

from tests.helpers import run_ranks
from titan_video.config.job_config import Comm, JobConfig
from titan_video.training import flight_recorder, parts

NAMES = (*flight_recorder.BUFFER_SIZE, *flight_recorder.FILE_PREFIX, *flight_recorder.DUMP_ON_TIMEOUT)


@pytest.fixture
def environment(monkeypatch):
    """The environment without the recorder's variables; what a test sets is taken back."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    return monkeypatch


def found():
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_variables_folder_and_log_line(environment, tmp_path, caplog):
    caplog.set_level("INFO")
    flight_recorder.start(Comm(), tmp_path)
    assert found() == {
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/comm_traces/rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert (tmp_path / "comm_traces").is_dir()
    assert f"20,000 collectives to {tmp_path}/comm_traces/rank_" in caplog.text


def test_a_relative_folder_does_not_depend_on_where_torch_writes(environment, tmp_path):
    environment.chdir(tmp_path)
    flight_recorder.start(Comm(save_traces_folder="mine"), "run")
    assert found()["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/mine/rank_"


@pytest.mark.parametrize(
    "own",
    [
        {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_FR_DUMP_TEMP_FILE": "{}/own/r", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"},
        {
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "{}/own/r",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        },
    ],
    ids=["new names", "old names"],
)
def test_values_of_the_user_are_kept(environment, tmp_path, own):
    own = {name: value.format(tmp_path) for name, value in own.items()}
    for name, value in own.items():
        environment.setenv(name, value)
    flight_recorder.start(Comm(), tmp_path / "run")
    assert found() == own
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_zero_turns_it_off(environment, tmp_path):
    flight_recorder.start(Comm(trace_buf_size=0), tmp_path)
    assert found() == {"TORCH_FR_BUFFER_SIZE": "0"}  # torch's own default is 2000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("placement", ["cached", "separate"])
@pytest.mark.parametrize("device, is_started", [("cuda", True), ("cpu", False)])
def test_started_before_the_group_and_only_on_gpus(environment, tmp_path, placement, device, is_started):
    from titan_video.config import from_dict

    calls = []

    def join(*args):
        calls.append(found())

    environment.setattr(parts, "init_distributed", join)
    environment.setattr(parts, "_online", lambda name, section: join)
    config = from_dict({"job": {"dump_folder": str(tmp_path)}, "encoder": {"placement": placement}})
    parts.init_process_groups(config, torch.device(device), num_training=1)
    assert [bool(values) for values in calls] == [is_started]


def test_a_gpu_run_starts_without_the_part(environment):
    environment.setitem(sys.modules, parts.FLIGHT_RECORDER, None)
    environment.setattr(parts, "init_distributed", lambda *args: None)
    parts.init_process_groups(JobConfig(), torch.device("cuda"), num_training=1)
    assert found() == {}


def record(size, folder):
    """Entries of the recorder after eight collectives."""
    flight_recorder.start(Comm(trace_buf_size=size), folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(8):
        dist.all_reduce(torch.ones(2))
    return len(pickle.loads(torch._C._distributed_c10d._dump_fr_trace())["entries"])


@pytest.mark.parametrize("size", [5, 0])
def test_torch_reads_the_size(tmp_path, size):
    """Gloo's collectives go through the same recorder, which can be read without a GPU."""
    assert run_ranks(record, 1, size, tmp_path, init=False) == [size]
