"""What the system refuses to write: one line that names path, content, bytes needed and free; nothing is half there."""

import errno
import io
import json
import logging
import os
import re
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tests.small_disk import fill, free, small_disk
from tests.unit_tests.test_checkpoint import Counter, Weights, manager
from tests.unit_tests.test_hf_storage import ARGS, TOY, toy_model, toy_tensors
from titan_video.checkpoint import files as checkpoint_files
from titan_video.config.job_config import Metrics
from titan_video.config.manager import main_guard
from titan_video.data.latent_cache import LatentCache
from titan_video.ingest.files.refused import UnreadableFile, reading
from titan_video.ingest.plan.entries import Plan, PlanEntry
from titan_video.tasks.validation import ClipWriter
from titan_video.tools import files
from titan_video.tools.files import StorageError, atomic_path, atomic_write, optional_write, writing
from titan_video.tools.logging import _Handler
from titan_video.tools.video import write_mp4
from titan_video.training.metrics import MetricsLogger
from titan_video.weights.export.save import save_hf


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as path:
        yield path


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(files, "_warned", set())


def refused(number, path="/x"):
    return OSError(number, os.strerror(number), path)


def hidden(outer, number):
    """An error of a writer's own, raised while the system's was handled."""
    try:
        try:
            raise refused(number)
        except OSError:
            raise outer  # noqa: B904
    except type(outer) as error:
        return error


@pytest.mark.parametrize(
    "error, reason",
    [
        (refused(errno.ENOSPC), "No space left on device"),
        (refused(errno.EROFS), "Read-only file system"),
        (refused(errno.EDQUOT), "Disk quota exceeded"),
        (refused(errno.EACCES), "Permission denied"),
        (refused(errno.EFBIG), "File too large"),
        (hidden(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), errno.ENOSPC), "No"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
def test_one_line_for_every_refusal(tmp_path, error, reason):
    path = tmp_path / "new" / "file"
    with pytest.raises(StorageError) as caught, writing("plan", path, 12345):
        raise error
    text = str(caught.value)
    assert re.fullmatch(
        rf"{path}: cannot write the plan: {reason}[^:]* \(12,345 bytes needed, [\d,]+ bytes were free\)", text
    )
    assert "Pytorch" not in text and "\n" not in text
    with pytest.raises(SystemExit, match="^error: .*cannot write the plan"), main_guard():
        raise caught.value


def test_other_errors_pass(tmp_path):
    for error in (ValueError("mine"), RuntimeError("mine"), KeyError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing("plan", tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(StorageError, match="inner.*shard"), writing("plan", tmp_path), writing("shard", "/inner"):
        raise refused(errno.ENOSPC)


def test_a_file_that_is_read_meanwhile_is_told_as_read(tmp_path):
    for error, name in ((refused(errno.EIO, "a/file"), "a/file"), (refused(errno.EIO, None), "clips")):
        with (
            pytest.raises(UnreadableFile, match=f"^{name}: cannot read the remarks: Input/output error$"),
            optional_write("tables", tmp_path),
            writing("tables", tmp_path),
            reading("remarks", "clips"),
        ):
            raise error
    with pytest.raises(ValueError, match="^mine$"), writing("plan", tmp_path):
        raise ValueError("mine") from refused(errno.EIO)


def test_what_a_run_can_do_without_is_said_once(tmp_path, caplog):
    for what in ("clips", "clips", "traces", "clips"):
        with optional_write(what, tmp_path, 7):
            raise refused(errno.ENOSPC)
    assert [("clips" in r.getMessage(), r.levelname) for r in caplog.records] == [(True, "WARNING"), (False, "WARNING")]
    with pytest.raises(ZeroDivisionError), optional_write("clips", tmp_path):
        raise ZeroDivisionError


# ---- writers, on a disk that is really full ----


def shard(folder):
    cache = LatentCache(folder, "video", "text")
    cache.write("video", "k", torch.zeros(100_000), {})
    cache.flush()


def plan(folder):
    entries = tuple(PlanEntry(path=f"{i:0300d}.mp4", reason="too short") for i in range(200))
    Plan("clips", 8.0, (), entries).write_jsonl(folder / "data_plan.jsonl")


WRITERS = {
    "file": lambda folder: atomic_write(folder / "x", bytes(400_000)),
    "clip": lambda folder: write_mp4(folder / "x.mp4", noise(), 8),
    "latent cache shard": shard,
    "export": lambda folder: save_hf(toy_model(toy_tensors()), folder / "hf", TOY, ARGS, torch.float32),
    "checkpoint": lambda folder: manager(folder, large()).save(1),
}


def noise():
    return np.random.default_rng(0).integers(0, 255, (5, 128, 128, 3), dtype=np.uint8)


def large(value=1):
    weights = Weights(value)
    weights.values["large"] = torch.full((50_000,), float(value))
    return weights


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.parametrize("leave", [0, 8192])
def test_a_full_disk(disk, what, leave):
    folder = disk / "a"
    folder.mkdir()
    fill(disk, leave if what != "export" else 0)
    with pytest.raises(StorageError) as caught:
        WRITERS[what](folder)
    text = str(caught.value)
    assert f"{folder}" in text and f"cannot write the {what}: No space left on device (" in text
    assert re.search(r"[\d,]+ bytes needed, [\d,]+ bytes were free\)", text) and "\n" not in text
    assert "PytorchStreamWriter" not in text and "Serializ" not in text
    assert [p for p in folder.rglob("*") if p.is_file()] == [], "nothing is left"
    free(disk)
    WRITERS[what](folder)
    assert [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize("what", WRITERS)
def test_a_read_only_disk(tmp_path, what):
    with small_disk(tmp_path / "disk", "ro,size=1m") as disk:
        with pytest.raises(StorageError, match=f"cannot write the .*{what.split()[-1]}.*: Read-only file system"):
            WRITERS[what](disk / "new")


def test_the_file_that_was_there_stays(disk):
    atomic_write(disk / "x", "old")
    fill(disk)
    with pytest.raises(StorageError):
        atomic_write(disk / "x", bytes(400_000))
    assert (disk / "x").read_text() == "old" and sorted(p.name for p in disk.iterdir()) == ["ballast", "x"]


def test_a_folder_in_the_way_of_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="x: cannot write the plan: File exists"):
        atomic_write(tmp_path / "file" / "x", "", "plan")
    with pytest.raises(StorageError, match="cannot write the plan: Is a directory"):
        atomic_write(tmp_path, "", "plan")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "y"):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- checkpoint.on_error ----


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_continue_retries_the_next_save(disk, caplog, mode):
    weights, counter = large(), Counter({"samples": 1})
    saver = manager(disk / "c", weights, counter, async_mode=mode, on_error="continue", keep_latest_k=1)
    saver.save(1)
    saver.wait()
    fill(disk, 8192)
    for step in (2, 3):
        saver.save(step)
        weights.values["large"].fill_(step)
    if saver._thread:
        saver._thread.join()
    assert [path.name for path in (disk / "c").iterdir()] == ["step-1"], "no partial folder keeps the disk full"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2 and "checkpoint of step 2 could not be saved" in warnings[0], warnings
    assert "No space left on device (" in warnings[1] and "training goes on" in warnings[1] and "\n" not in warnings[1]
    free(disk)
    weights.fill(4)
    assert saver.save(4)
    saver.close()
    again = large()
    assert manager(disk / "c", again).load() == 4 and again.are(4)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_last_save_must_succeed(disk, mode):
    for policy in ("continue", "stop"):
        saver = manager(disk / policy, large(), async_mode=mode, on_error=policy)
        fill(disk, 8192)
        with pytest.raises(StorageError, match="checkpoint of step 5 could not be saved.*No space left on device"):
            saver.save(5, last=True)
            saver.wait()
        free(disk)
        assert saver.save(5, last=True), "the error is over"
        saver.close()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_stop_ends_at_the_next_save(disk, mode):
    saver = manager(disk / "c", large(), async_mode=mode, on_error="stop")
    fill(disk, 8192)
    with pytest.raises(StorageError, match="checkpoint of step 1 "):
        saver.save(1)
        saver.save(2)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_continue_does_not_hide_a_fault_of_ours(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(checkpoint_files, "write_manifest", lambda *args: 1 / 0)
    saver = manager(tmp_path, async_mode=mode, on_error="continue")
    with pytest.raises(RuntimeError, match="step 1 could not be saved.*ZeroDivisionError"):
        saver.save(1)
        saver.save(2)


# ---- numbers and clips ----


def log(logger, step):
    logger.log_scalars(step, {"loss": step / 2}, "validation")


def test_metrics_wait_for_the_disk(disk, caplog, monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)  # what threads print
    section = Metrics(enable_tensorboard=True)
    logger = MetricsLogger(section, disk / "run", 0, 1, torch.device("cpu"), num_steps=100)
    log(logger, 1)
    fill(disk)
    numbers = {f"number {i}": 0.5 for i in range(60)}
    for step in range(2, 20):
        logger.log_scalars(step, numbers)
    logger.log_video("clip", np.zeros((2, 16, 16, 3), np.uint8), 8, 19)
    warnings = [r.getMessage() for r in caplog.records]
    assert len([w for w in warnings if "cannot write the metrics: No space left" in w]) == 1, warnings
    assert len([w for w in warnings if "cannot write the TensorBoard events: No space left" in w]) == 1, warnings
    assert len(warnings) == 2
    for line in (disk / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line)
    free(disk)
    log(logger, 20)
    logger.close()
    steps = [json.loads(line)["step"] for line in (disk / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
    assert printed == []


def test_a_log_that_cannot_be_written(disk, monkeypatch, capfd):
    fill(disk)
    handler, record = _Handler(), logging.LogRecord("x", logging.INFO, "x", 1, "x" * 50_000, None, None)
    with open(os.open(disk / "log", os.O_WRONLY | os.O_CREAT), "wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
        handler.emit(record)
        monkeypatch.undo()
    assert "No space" not in capfd.readouterr().err


def test_a_sampled_clip_that_cannot_be_written(disk, caplog):
    fill(disk)
    frames = torch.from_numpy(noise()).permute(3, 0, 1, 2)
    writer = ClipWriter(lambda latents: frames[None], disk / "samples", 8)
    for index in range(3):
        found = writer.write(4, index, "a red circle", torch.zeros(1))
        assert torch.equal(found, torch.from_numpy(noise()))
    (warning,) = [r.getMessage() for r in caplog.records]
    assert "samples/step-4/0_a_red_circle.mp4: cannot write the sampled clip: No space left on device (" in warning
    free(disk)
    writer.write(8, 0, "a red circle", torch.zeros(1))
    assert (disk / "samples/step-8/0_a_red_circle.mp4").stat().st_size > 1000


def test_a_plan(disk):
    fill(disk, 8192)
    with pytest.raises(StorageError, match="data_plan.jsonl: cannot write the plan: No space left on device"):
        plan(disk)
    free(disk)
    plan(disk)
