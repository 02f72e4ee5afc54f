"""Saves that a file or the clock asks for."""

import pytest

from tests.unit_tests.test_checkpoint import Counter, Weights, manager
from titan_video.checkpoint import files
from titan_video.checkpoint.manager import CheckpointManager
from titan_video.checkpoint.triggers import RETRY_SECONDS, SaveTriggers
from titan_video.config.job_config import Checkpoint


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_the_file(tmp_path):
    clock = Clock()
    triggers = SaveTriggers(tmp_path, 0, clock)
    assert not triggers.wanted()
    clock.now += 1e9
    assert not triggers.wanted(), "no interval in minutes"
    (tmp_path / "save").touch()
    assert triggers.wanted()
    assert not triggers.wanted() and (tmp_path / "save").exists(), "its save is under way"
    triggers.saved()
    assert not (tmp_path / "save").exists() and not triggers.wanted()
    (tmp_path / "save").touch()
    triggers.saved()
    assert (tmp_path / "save").exists() and triggers.wanted(), "a save for something else is no answer"
    triggers.failed()
    assert (tmp_path / "save").exists() and not triggers.wanted()
    clock.now += RETRY_SECONDS
    assert triggers.wanted()


def test_the_clock(tmp_path):
    clock = Clock()
    triggers = SaveTriggers(tmp_path, 0.5, clock)
    clock.now += 29
    assert not triggers.wanted()
    clock.now += 1
    assert triggers.wanted() and not triggers.wanted()
    clock.now += 100
    assert not triggers.wanted()
    triggers.saved()
    clock.now += 29
    assert not triggers.wanted(), "it begins anew with every save"
    triggers.saved()
    clock.now += 29
    assert not triggers.wanted()
    clock.now += 1
    assert triggers.wanted()
    triggers.failed()
    clock.now += RETRY_SECONDS - 1
    assert not triggers.wanted()
    clock.now += 1
    assert triggers.wanted()


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("folder", ["checkpoint", "deep/er"])
def test_through_the_manager(tmp_path, monkeypatch, mode, folder):
    section = Checkpoint(folder=folder, async_mode=mode, interval=100)
    saver = CheckpointManager(section, tmp_path / folder, {"ema": Weights()}, {"train": Counter()})
    assert not saver.wanted()
    (tmp_path / "save").touch()
    assert saver.wanted() and saver.save(3, force=True)
    saver.wait()
    assert files.list_steps(tmp_path / folder) == [3] and not (tmp_path / "save").exists() and not saver.wanted()
    (tmp_path / "save").touch()
    assert saver.wanted() and not saver.save(3, force=True), "the state on the disk is that of this step already"
    assert not (tmp_path / "save").exists() and not saver.wanted()
    (tmp_path / "save").touch()
    assert saver.wanted()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError):
            saver.save(4, force=True)
            saver.wait()
    assert (tmp_path / "save").exists() and not saver.wanted()
    saver.triggers.not_before = 0
    assert saver.wanted() and saver.save(5, force=True)
    saver.close()
    assert not (tmp_path / "save").exists()


def test_without_checkpoints_nobody_asks(tmp_path):
    (tmp_path / "save").touch()
    saver = manager(tmp_path / "checkpoint", enable=False, interval_minutes=1e-9)
    assert not saver.wanted() and (tmp_path / "save").exists()
