"""What a run reports: each step in metrics.jsonl; every log_freq steps a log line and TensorBoard points."""

import errno
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titan_video.config.job_config import ActivationCheckpoint, Metrics
from titan_video.distributed.activation_checkpoint import recomputed_flops
from titan_video.tasks.task import BatchInfo, Evaluation
from titan_video.tools.device import DeviceMemory, peak_flops, resident_memory
from titan_video.tools.files import atomic_write, optional_write, writing
from titan_video.tools.logging import MAX_COLUMNS, PREFIX_COLUMNS, Progress, logger, paint
from titan_video.tools.parts import find_module, resolve

TENSORBOARD = "titan_video.training.tensorboard_sink"  # every run uses it where it is there


def _plain(value: Any) -> Any:
    """Replace non-finite numbers, which JSON does not have, by the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def truncate_records(path: Path, last_step: int, kept_name: str = "") -> None:
    """Remove the records of `path` after `last_step`, but for events `kept_name`, and incomplete lines. Atomic."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= last_step or kept_name in record:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    atomic_write(path, "".join(kept), "metrics")


@dataclass(frozen=True)
class StepMetrics:
    """Numbers of one optimizer step.

    loss: mean over all samples. max_loss: the largest mean of a rank.
    samples: clips drawn since the start of the run.
    tokens, video_seconds: over all ranks.
    model_flops, hardware_flops: on one device, without and with recomputation.
    step_seconds: the whole step. data_seconds: the part of it spent waiting for data.
    bucket: the clip sizes of the step. extra: further numbers by name.
    """

    loss: float
    max_loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    video_seconds: float
    model_flops: float
    hardware_flops: float
    step_seconds: float
    data_seconds: float
    bucket: str = ""
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step on one device. args: the model's (see ModelSpec). ranks_per_sample: ranks that share a clip."""

    args: Any
    checkpointing: ActivationCheckpoint
    ranks_per_sample: int

    def flops(self, infos: Sequence[BatchInfo]) -> dict[str, float]:
        """Without and with recomputation, for this rank's micro-batches. Backward takes twice the forward's."""
        model = 3 * sum(info.flops for info in infos)
        recomputed = sum(
            recomputed_flops(self.checkpointing, self.args, info.num_tokens, info.num_clips) for info in infos
        )
        hardware = model + recomputed
        return {"model_flops": model / self.ranks_per_sample, "hardware_flops": hardware / self.ranks_per_sample}


# Fields of StepMetrics in metrics.jsonl, and those whose sums over the steps since the last log line make rates.
_RECORDED = ("loss", "max_loss", "grad_norm", "lr", "samples", "tokens", "step_seconds", "data_seconds")
_SUMMED = ("tokens", "video_seconds", "model_flops", "hardware_flops", "step_seconds", "data_seconds")


class MetricsLogger:
    """Writes the run's numbers. Only rank 0 writes; on other ranks every method does nothing.

    dump_folder: folder of metrics.jsonl and of TensorBoard's folder.
    num_steps: of the whole run, for the remaining time. world_size: for rates per device.
    resume_step: step of the checkpoint from which the run resumes, 0 for a new run. Records of later steps, which an
        earlier run wrote, are removed.
    samples: clips drawn up to resume_step.
    """

    def __init__(
        self,
        section: Metrics,
        dump_folder: str | Path,
        rank: int,
        world_size: int,
        device: torch.device,
        num_steps: int,
        resume_step: int = 0,
        samples: int = 0,
    ):
        self.enabled, self.sinks = rank == 0, []
        if not self.enabled:
            return
        self.log_freq = section.log_freq
        self.num_steps = num_steps
        self.world_size = world_size
        self.peak_flops = peak_flops(device)
        self.memory = DeviceMemory(device)
        self.memory.reset_peak()
        self.window: Counter[str] = Counter()
        self.samples = samples
        self.progress = Progress(num_steps, resume_step)
        folder = Path(dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        # For a new run, the validation before the first step (a record of step 0) is removed too.
        last_step = resume_step if resume_step else -1
        if self.path.exists():
            truncate_records(self.path, last_step)
        with writing("metrics", self.path):
            self.file = self.path.open("ab", buffering=0)
        self.unwritten = b""  # whole records, while a full disk takes none
        self.tb_folder = folder / section.save_tb_folder
        if section.enable_tensorboard and find_module(TENSORBOARD):
            sink = resolve(f"{TENSORBOARD}:TensorboardSink", asked_by="metrics.enable_tensorboard = true")
            self.sinks.append(sink(folder, self.tb_folder, last_step + 1))
        if section.enable_wandb:
            sink = resolve("titan_video.training.wandb_sink:WandbSink", asked_by="metrics.enable_wandb = true")
            self.sinks.append(sink(folder, is_resumed=resume_step > 0))

    def log(self, step: int, metrics: StepMetrics) -> None:
        """Record optimizer step `step`, counted from 1."""
        if not self.enabled:
            return
        extra = {**resident_memory(), **metrics.extra}
        numbers = {name: getattr(metrics, name) for name in _RECORDED}
        self._record({"step": step, **numbers, "time": time.time(), "bucket": metrics.bucket, **extra})
        self.window.update({name: getattr(metrics, name) for name in _SUMMED})
        self.window.update({"steps": 1, "samples": metrics.samples - self.samples, f"bucket/{metrics.bucket}": 1})
        self.samples = metrics.samples
        self.progress.update(step, f"loss {metrics.loss:.4f}")
        if step == 1 or step % self.log_freq == 0 or step == self.num_steps:
            self._report(step, metrics, extra)
            self.window.clear()
            self.memory.reset_peak()

    def _report(self, step: int, metrics: StepMetrics, extra: dict[str, float]) -> None:
        w, memory = self.window, self.memory.stats()
        seconds, steps = max(w["step_seconds"], 1e-9), w["steps"]
        tps = w["tokens"] / seconds / self.world_size
        flops, hardware_flops = w["model_flops"] / seconds, w["hardware_flops"] / seconds
        scalars = {
            "loss_metrics/global_avg_loss": metrics.loss,
            "loss_metrics/global_max_loss": metrics.max_loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            **extra,
            "throughput(tps)": tps,
            "throughput(samples_per_s)": w["samples"] / seconds,
            "throughput(video_s_per_s)": w["video_seconds"] / seconds,
            "tflops": flops / 1e12,
            "time_metrics/end_to_end(s)": w["step_seconds"] / steps,
            "time_metrics/data_loading(s)": w["data_seconds"] / steps,
            "time_metrics/data_loading(%)": 100 * w["data_seconds"] / seconds,
            **{name: count / steps for name, count in w.items() if name.startswith("bucket/") and metrics.bucket},
            **{f"memory/{name}": value for name, value in zip(_MEMORY_TAGS, asdict(memory).values(), strict=True)},
        }
        if self.peak_flops is not None:
            scalars |= {"mfu(%)": 100 * flops / self.peak_flops, "hfu(%)": 100 * hardware_flops / self.peak_flops}
        self._scalars(step, scalars)
        gib, mfu, wait = memory.max_reserved_gib, scalars.get("mfu(%)"), scalars["time_metrics/data_loading(%)"]
        minutes = math.ceil((self.num_steps - step) * w["step_seconds"] / steps / 60)
        words = {
            "red": f"step: {step}",
            "green": f"loss: {metrics.loss:#.4g}",
            "yellow": f"grad_norm: {metrics.grad_norm:#.3g}",
            "": f"lr: {metrics.lr:#.2g}",
            "cyan": f"mem: {gib:.{1 if gib < 10 else 0}f}GiB",
            "blue": f"tps: {tps:,.0f}",
            "magenta": "" if mfu is None else f"mfu: {mfu:.0f}%",
            "wait": f"data_wait: {wait:.0f}%" if wait >= 5 else "",
            "eta": f"eta: {minutes // 60}h{minutes % 60:02}m",
        }
        logger.info(_fit({color: word for color, word in words.items() if word}))

    def log_scalars(self, step: int, scalars: dict[str, float], name: str = "validation") -> None:
        """Numbers that do not belong to a training step: one record {"step", "time", name: scalars} without a `loss`,
        and TensorBoard points `name/key`.
        """
        self.log_event(step, name, scalars)
        self._scalars(step, {f"{name}/{key}": value for key, value in scalars.items()})

    def log_table(self, step: int, numbers: dict[str, float], name: str) -> None:
        """Numbers of a whole start, which TensorBoard shows as a table of text; the same record."""
        self.log_event(step, name, numbers)
        self._each_sink("add_table", name, numbers, step)

    def log_event(self, step: int, name: str, event: dict[str, Any]) -> None:
        """What happened beside the numbers: one record {"step", "time", name: event}."""
        if self.enabled:
            self._record({"step": step, "time": time.time(), name: event})

    def rewind(self, step: int) -> None:
        """Remove the records after `step`, from which the run goes on, but for faults. TensorBoard keeps its points."""
        if self.enabled:
            self.file.close()
            truncate_records(self.path, step, kept_name="fault")
            self.file, self.unwritten = self.path.open("ab", buffering=0), b""

    def log_video(self, tag: str, frames_FHWC: np.ndarray, fps: float, step: int) -> None:
        """A clip, uint8 RGB."""
        self._each_sink("add_clip", tag, frames_FHWC, fps, step)

    def log_evaluation(self, step: int, found: Evaluation, fps: float, seconds: float) -> None:
        """Numbers and sampled clips of a validation that took `seconds`."""
        if not self.enabled:
            return
        if found.scalars:
            self.log_scalars(step, found.scalars)
            numbers = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in found.scalars.items())
            logger.info(f"validation at step {step}: {numbers}")
        for i, (prompt, frames) in enumerate(found.clips):
            self.log_video(f"samples/{i} {prompt.replace('/', ' ')}", frames.numpy(), fps, step)
        sampled = f", {len(found.clips)} clips sampled to {found.folder}" if found.clips else ""
        logger.info(f"validation took {seconds:.1f} s{sampled}")

    def close(self) -> None:
        if not self.enabled:
            return
        self.progress.close()
        self.file.close()
        self._each_sink("close")

    def _record(self, record: dict[str, Any]) -> None:
        self.unwritten += json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        size, end = len(self.unwritten), self.file.seek(0, os.SEEK_END)
        with optional_write("metrics", self.path, size):
            try:
                if self.file.write(self.unwritten) < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.unwritten = b""
            except OSError:
                self.file.truncate(end)
                raise

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._each_sink("add_scalar", name, value, step)

    def _each_sink(self, method: str, *args: Any) -> None:
        for sink in self.sinks:
            with optional_write("TensorBoard events", self.tb_folder):
                getattr(sink, method)(*args)


def _fit(words: dict[str, str]) -> str:
    """{colour: word} in the columns of a line: in double spaces, else in single ones, else without the last words."""
    columns = MAX_COLUMNS - PREFIX_COLUMNS
    gap = "  " if len("  ".join(words.values())) <= columns else " "
    while len(gap.join(words.values())) > columns:
        words.popitem()
    return gap.join(paint(word, color) for color, word in words.items())


# In the order of the fields of MemoryStats.
_MEMORY_TAGS = "max_active(GiB) max_active(%) max_reserved(GiB) max_reserved(%) num_alloc_retries num_ooms".split()
