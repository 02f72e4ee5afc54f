"""metrics.jsonl, the log line, TensorBoard, and what a resume leaves of them."""

import io
import json
import logging
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_video.config.job_config import Metrics
from titan_video.tasks.task import Evaluation
from titan_video.tools.logging import Progress, init_logger
from titan_video.training import metrics
from titan_video.training.metrics import MetricsLogger, StepMetrics


def make(folder, resume_step=0, rank=0, log_freq=2, samples=0, **section):
    section = Metrics(log_freq=log_freq, **section)
    return MetricsLogger(
        section, folder, rank, 4, torch.device("cpu"), num_steps=10, resume_step=resume_step, samples=samples
    )


def step(logger, i, **values):
    defaults = dict(
        loss=1 / (i + 2),
        max_loss=1.0,
        grad_norm=0.1 * i,
        lr=1e-4,
        samples=8 * i,
        tokens=4000,
        video_seconds=10.0,
        model_flops=1e12,
        hardware_flops=2e12,
        step_seconds=2.0,
        data_seconds=0.5,
        bucket="17x64x64",
    )
    logger.log(i, StepMetrics(**{**defaults, **values}))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    accumulator = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_every_step_is_recorded_exactly(tmp_path):
    m = make(tmp_path)
    for i in range(1, 4):
        step(m, i, extra={"shift": 3.5})
        assert len(records(tmp_path)) == i  # on disk at once, not at close
    assert [r["loss"] for r in records(tmp_path)] == [1 / 3, 1 / 4, 1 / 5]
    assert set(records(tmp_path)[0]) == {
        "step",
        "loss",
        "max_loss",
        "grad_norm",
        "lr",
        "samples",
        "tokens",
        "step_seconds",
        "data_seconds",
        "time",
        "bucket",
        "shift",
        "resident_gib",
    }
    m.close()


def test_nonfinite_numbers_stay_valid_json(tmp_path):
    m = make(tmp_path)
    step(m, 1, loss=math.nan, grad_norm=-math.inf)
    m.log_scalars(1, {"loss": math.inf})
    m.close()
    first, second = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert (first["loss"], first["grad_norm"], second["validation"]["loss"]) == ("nan", "-inf", "inf")
    assert math.isnan(float(first["loss"]))


PREFIX = len("[titan] 11-30 06:54:06 ")


def test_log_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    m = make(tmp_path, log_freq=4)
    for i in range(1, 5):
        step(m, i, step_seconds=20.0 * i, data_seconds=0.1 * i if i < 4 else 20)
    m.close()
    first, second = [r.getMessage() for r in caplog.records]
    assert first.startswith("step: 1  loss: 0.3333  grad_norm: 0.100  lr: 0.00010  mem: ")
    assert first.endswith("GiB  tps: 50  eta: 0h03m") and "mfu" not in first
    # Steps 2, 3, 4 take 40 + 60 + 80 = 180 s: 12,000 tokens on 4 devices, 6 steps of 60 s to go.
    assert second.startswith("step: 4 loss: 0.1667 grad_norm: 0.400 lr: 0.00010 mem: ")  # closer: it is longer
    assert second.endswith("GiB tps: 17 data_wait: 11% eta: 0h06m")


@pytest.mark.parametrize("number", [1, 10_000, 123_456_789])
@pytest.mark.parametrize("value", [0.0, 1.23456789e-9, 12.3456789, 123456789.0, -9.87654321e37, math.nan, -math.inf])
def test_a_log_line_has_120_columns_at_most(tmp_path, caplog, monkeypatch, number, value):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1.0)
    m = make(tmp_path, enable_tensorboard=False, log_freq=1)
    m.num_steps = 10**9
    step(m, number, loss=value, grad_norm=value, lr=1.23456e-07, tokens=10**12, data_seconds=1.999)
    m.close()
    line = caplog.records[0].getMessage()
    assert len(line) <= 120 - PREFIX and line.startswith(f"step: {number} ") and "lr: 1.2e-07" in line, line


def test_the_usual_numbers_of_a_gpu_fit(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 989e12)
    m = make(tmp_path, enable_tensorboard=False, log_freq=1)
    m.num_steps = 20000
    step(m, 12000, loss=0.12345, grad_norm=0.12345, lr=1e-4, tokens=12345 * 8, model_flops=840e12, data_seconds=0.01)
    m.close()
    line = caplog.records[0].getMessage()
    assert len(line) <= 120 - PREFIX
    for word in ("loss: 0.1235", "grad_norm: 0.123", "lr: 0.00010", "mem: ", "tps: 12,345", "mfu: 42%", "eta: 4h27m"):
        assert word in line, line


def test_utilisation_where_the_peak_is_known(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 5e12)
    m = make(tmp_path)
    step(m, 1)
    m.close()
    assert "mfu: 10%" in caplog.records[0].getMessage()
    assert [events(tmp_path).Scalars(tag)[0].value for tag in ("mfu(%)", "hfu(%)")] == [10, 20]


def test_tensorboard_names_and_values(tmp_path):
    m = make(tmp_path, resume_step=4, samples=32)
    for i in range(5, 8):
        step(m, i, bucket="17x64x64" if i < 6 else "1x32x32")
    m.log_scalars(6, {"loss": 0.25, "loss_t0.5": 0.125})
    m.close()
    e = events(tmp_path)
    names = {
        "Loss/training",
        "Loss/held_out",
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "lr",
        "throughput(tps)",
        "throughput(samples_per_s)",
        "throughput(video_s_per_s)",
        "tflops",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "time_metrics/data_loading(%)",
        "memory/max_active(GiB)",
        "memory/max_active(%)",
        "memory/max_reserved(GiB)",
        "memory/max_reserved(%)",
        "memory/num_alloc_retries",
        "memory/num_ooms",
        "validation/loss",
        "validation/loss_t0.5",
        "resident_gib",
        "bucket/17x64x64",
        "bucket/1x32x32",
    }
    assert set(e.Tags()["scalars"]) == names
    assert [s.step for s in e.Scalars("loss_metrics/global_avg_loss")] == [6]
    # Steps 5 and 6: 16 clips in 4 s.
    values = {tag: e.Scalars(tag)[0].value for tag in names}
    assert (
        values["throughput(samples_per_s)"] == 4
        and values["throughput(tps)"] == 500
        and values["time_metrics/data_loading(%)"] == 25
    )
    assert values["Loss/training"] == values["loss_metrics/global_avg_loss"] == pytest.approx(1 / 8)
    assert sorted({tag.partition("/")[0] for tag in names})[0] == "Loss" and all(tag.count("/") < 2 for tag in names)
    assert values["bucket/17x64x64"] == values["bucket/1x32x32"] == 0.5
    assert values["validation/loss"] == values["Loss/held_out"] == 0.25 and values["memory/max_active(GiB)"] > 0


def test_resume_continues_the_same_files(tmp_path):
    first = make(tmp_path)
    for i in range(1, 7):
        step(first, i, loss=float(i))
        first.log_scalars(i, {"loss": float(i)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "lo')  # killed while writing
    again = make(tmp_path, resume_step=4)
    for i in range(5, 9):
        step(again, i, loss=10.0 * i)
    again.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path) if "loss" in r] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
        (6, 60),
        (7, 70),
        (8, 80),
    ]
    assert [r["step"] for r in records(tmp_path) if "validation" in r] == [1, 2, 3, 4]
    e = events(tmp_path)
    assert [(s.step, s.value) for s in e.Scalars("loss_metrics/global_avg_loss")] == [
        (1, 1),
        (2, 2),
        (4, 4),
        (6, 60),
        (8, 80),
    ]
    assert [s.step for s in e.Scalars("validation/loss")] == [1, 2, 3, 4]


def test_rewind_keeps_faults(tmp_path):
    """As after a rollback from step 4 to step 2."""
    m = make(tmp_path, enable_tensorboard=False)
    for i in range(1, 5):
        step(m, i)
    m.log_event(3, "fault", {"step": 3, "loss": math.nan})
    m.rewind(2)
    m.log_event(3, "fault", {"step": 4})
    step(m, 3, loss=7.0)
    m.close()
    rows = records(tmp_path)
    assert [(row["step"], row.get("loss"), row.get("fault")) for row in rows] == [
        (1, 1 / 3, None),
        (2, 1 / 4, None),
        (3, None, {"step": 3, "loss": "nan"}),
        (3, None, {"step": 4}),
        (3, 7.0, None),
    ]
    make(tmp_path, resume_step=2, enable_tensorboard=False).close()
    assert len(records(tmp_path)) == 2


def test_a_new_run_in_a_used_folder_starts_anew(tmp_path):
    first = make(tmp_path)
    first.log_scalars(0, {"loss": 1.0})
    step(first, 1)
    first.close()
    again = make(tmp_path)
    again.log_scalars(0, {"loss": 2.0})
    again.close()
    assert [r["step"] for r in records(tmp_path)] == [0]
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("validation/loss")] == [(0, 2.0)]


def test_a_crash_while_truncating_loses_nothing(tmp_path, monkeypatch):
    first = make(tmp_path)
    for i in range(1, 4):
        step(first, i)
    first.close()

    def crash(fd):
        raise OSError("crash")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="crash"):
        make(tmp_path, resume_step=1)
    assert len(records(tmp_path)) == 3 and {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tb"}


def test_clips_are_animated_images(tmp_path):
    m = make(tmp_path)
    frames_FHWC = np.zeros((5, 16, 24, 3), dtype=np.uint8)
    for i in range(5):
        frames_FHWC[i, :, 4 * i : 4 * i + 4] = 255
    prompt = "a cat/dog\n walks" + 20 * " and walks"
    m.log_evaluation(3, Evaluation({}, [(prompt, torch.from_numpy(frames_FHWC))], folder="x"), 8.0, 1.0)
    m.close()
    (tag,) = events(tmp_path).Tags()["images"]
    assert tag.startswith("samples/0 a cat dog walks and walks") and tag.endswith("...") and len(tag) < 100
    (event,) = events(tmp_path).Images(tag)
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.step, event.width, event.height, image.format, image.n_frames, image.size) == (
        3,
        24,
        16,
        "GIF",
        5,
        (24, 16),
    )
    image.seek(4)
    assert np.asarray(image.convert("RGB"))[0, :, 0].tolist() == frames_FHWC[4, 0, :, 0].tolist()


def test_config_tables_and_hyperparameters(tmp_path):
    """What has one value is text; hyperparameters are in the same event file, and no second run appears."""
    text = "[optimizer]\nlr = 0.5\nname = 'Muon'\n[ema]\nenable = true\n[job]\ndescription = 'not this'\n"
    (tmp_path / "config.toml").write_text(text)
    m = make(tmp_path)
    m.log_table(0, {"clips": 1234567, "dropped/no caption": 3, "a|b": 0.5}, "data")
    step(m, 1)
    m.close()
    assert records(tmp_path)[0]["data"] == {"clips": 1234567, "dropped/no caption": 3, "a|b": 0.5}
    e = events(tmp_path)
    assert not [tag for tag in e.Tags()["scalars"] if tag.startswith("data")]
    shown = {tag: e.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in e.Tags()["tensors"] if "text" in tag}
    assert shown["config/text_summary"] == f"```toml\n{text}\n```"
    rows = shown["data/text_summary"].splitlines()
    assert rows[2:] == ["| clips | 1,234,567 |", "| dropped/no caption | 3 |", "| a/b | 0.5 |"]
    start = e.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert all(word in start for word in (b"optimizer.lr", b"optimizer.name", b"Muon", b"ema.enable"))
    assert b"description" not in start
    experiment = e.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"loss_metrics/global_avg_loss" in experiment and b"validation/loss" in experiment
    assert "_hparams_/session_end_info" in e.summary_metadata
    assert [path.name for path in (tmp_path / "tb").iterdir() if path.is_dir()] == []


def test_other_ranks_and_a_disabled_tensorboard_write_nothing(tmp_path):
    m = make(tmp_path / "other", rank=1)
    step(m, 1)
    m.log_scalars(1, {"loss": 1.0})
    m.log_table(1, {"clips": 1}, "data")
    m.close()
    assert not (tmp_path / "other").exists()
    m = make(tmp_path / "off", enable_tensorboard=False)
    step(m, 1)
    m.log_table(1, {"clips": 1}, "data")
    m.close()
    assert [p.name for p in (tmp_path / "off").iterdir()] == ["metrics.jsonl"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def fresh_root_logger(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    yield root
    root.setLevel(level)


def test_log_lines_go_above_the_bar_on_a_terminal(monkeypatch, fresh_root_logger):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    init_logger()
    bar = Progress(10, initial=4)
    bar.update(6, "loss 0.5")
    logging.getLogger().warning("a line")
    bar.close()
    text = screen.getvalue()
    line = next(part for part in text.splitlines() if "a line" in part)
    assert "\033[33m[titan] " in line and " WARNING a line" in line and "it/s" not in line.split("[titan]")[1]
    assert "6/10" in text.split("a line")[1] and "loss 0.5" in text


def test_plain_lines_elsewhere(monkeypatch, fresh_root_logger):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    init_logger()
    init_logger()
    bar = Progress(10)
    bar.update(1)
    logging.getLogger().info("a line")
    logging.getLogger().debug("not this")
    bar.close()
    assert re.fullmatch(r"\[titan\] \d\d-\d\d \d\d:\d\d:\d\d a line\n", out.getvalue())
    assert err.getvalue() == "" and "\033" not in out.getvalue()


@pytest.mark.parametrize("rank, local_rank, shown", [(0, 0, 2), (1, 1, 2), (8, 0, 1), (9, 1, 2)])
def test_of_several_machines_one_says_what_happens(monkeypatch, fresh_root_logger, rank, local_rank, shown):
    """Under torchrun, which labels the lines: local rank 0 of another machine than the first only warns."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, str(value))
    init_logger()
    logging.getLogger().info("a line")
    logging.getLogger().warning("a warning")
    lines = out.getvalue().splitlines()
    assert len(lines) == shown and re.fullmatch(r"[-\d]{5} [:\d]{8} WARNING a warning", lines[-1])
