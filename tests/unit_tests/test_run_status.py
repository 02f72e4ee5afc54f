"""How a run ends: exit code, message, status.json."""

import json
import os

import pytest

from titan_video.config.manager import parse_args
from titan_video.supervision import run_status
from titan_video.supervision.run_status import RunStatus, mark_failed, read_status
from titan_video.tools import signals
from titan_video.tools.signals import Stopped


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No thread watches this process, and signals stay as they are."""
    monkeypatch.setattr(run_status.watch, "start", lambda limit: None)
    monkeypatch.setattr(signals, "uninstall", lambda: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def run(folder, error=None, saved=0):
    """The exit code or message of a run that saves step `saved` and ends with `error`."""
    try:
        with RunStatus(parse_args(["--job.dump_folder", str(folder)])):
            assert read_status(folder)["status"] == "running" and (folder / "run.lock").exists()
            if saved:
                (folder / "checkpoint" / f"step-{saved}").mkdir(parents=True)
            if error:
                raise error
        return 0
    except SystemExit as e:
        return e.code
    finally:
        assert not (folder / "run.lock").exists()


def status(folder):
    found = read_status(folder)
    return found["status"], found["exit_code"], found["step"], found["idle_starts"]


def test_how_a_run_ends(tmp_path, monkeypatch):
    assert run(tmp_path, Stopped("stopped")) == 85 and status(tmp_path) == ("stopped", 85, 0, 0)
    assert run(tmp_path, Stopped("stopped")) == 85 and status(tmp_path) == ("stopped", 85, 0, 1)
    assert run(tmp_path, Stopped("stopped")) == 85 and status(tmp_path) == ("stopped", 85, 0, 2)
    assert run(tmp_path, Stopped("stopped"), saved=5) == 85 and status(tmp_path) == ("stopped", 85, 5, 0)
    assert run(tmp_path, ValueError("data.path: x")) == "error: data.path: x"
    assert status(tmp_path) == ("failed", 1, 5, 1) and read_status(tmp_path)["message"] == "data.path: x"
    assert run(tmp_path, OSError(28, "No space left on device", "/x")).startswith("error: [Errno 28] No space")
    with pytest.raises(AssertionError):  # ours: with its traceback
        run(tmp_path, AssertionError("ours"))
    assert status(tmp_path)[:2] == ("failed", 1)
    assert run(tmp_path) == 0 and status(tmp_path)[:2] == ("finished", 0)
    assert run(tmp_path) == 0 and status(tmp_path)[3] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")  # a code other than 0 would be a failure for torchrun
    assert run(tmp_path, Stopped("stopped")) == 0 and status(tmp_path)[:2] == ("stopped", 85)


def test_a_rank_that_is_not_the_first_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="error: wrong"):
        with RunStatus(parse_args(["--job.dump_folder", str(tmp_path / "run")])):
            raise ValueError("wrong")
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder(tmp_path):
    with RunStatus(parse_args(["--job.dump_folder", str(tmp_path)])):
        with pytest.raises(SystemExit, match=f"error: {tmp_path}: another run uses this folder .*pid {os.getpid()}"):
            with RunStatus(parse_args(["--job.dump_folder", str(tmp_path)])):
                pass
        assert read_status(tmp_path)["status"] == "running"


def test_a_killed_first_rank_is_marked_as_failed(tmp_path):
    content = {"status": "running", "exit_code": None, "run_id": "a"}
    (tmp_path / "status.json").write_text(json.dumps(content))
    mark_failed(tmp_path, "b", "killed")
    assert read_status(tmp_path) == content
    mark_failed(tmp_path, "a", "rank 0 was killed")
    assert read_status(tmp_path) == {**content, "status": "failed", "exit_code": 1, "message": "rank 0 was killed"}


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_status_is_none(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) == {}
    assert run(tmp_path) == 0
