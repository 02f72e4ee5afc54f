"""The optional parts that the trainer uses, each behind one function: what is not asked for is not loaded."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_video.config.job_config import Debug, Encoder, FaultTolerance, JobConfig
from titan_video.config.manager import dump
from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import init_distributed
from titan_video.models.spec import ModelSpec
from titan_video.tools.logging import logger
from titan_video.tools.parts import find_module, resolve
from titan_video.training.ending import RunEnd
from titan_video.training.fault_tolerance import NonFiniteGuard
from titan_video.training.step_numbers import UnreadStep

FAULTS = "titan_video.training.faults"
FLIGHT_RECORDER = "titan_video.training.flight_recorder"
ONLINE = "titan_video.online.setup"
SUPERVISION = "titan_video.supervision"  # every run uses it where it is there


def init_process_groups(config: JobConfig, device: torch.device, num_training: int) -> Any:
    """Join the default group, of the training ranks. Returns the channel to encoder ranks; None without such ranks."""
    section, comm = config.encoder, config.comm
    if device.type == "cuda" and find_module(FLIGHT_RECORDER):
        resolve(f"{FLIGHT_RECORDER}:start", asked_by="comm.trace_buf_size")(comm, config.job.dump_folder)
    if section.placement == "separate":
        return _online("init_process_groups", section)(section, comm, device, num_training)
    init_distributed(device, comm.init_timeout_seconds)
    return None


def build_online_encoder(
    config: JobConfig,
    encoders: Any,
    cache: LatentCache,
    dims: ParallelDims,
    channel: Any,
    latent_shape: Callable[[Bucket], tuple[int, ...]],
    max_text_length: int,
) -> Any:
    """What encodes during training, for a training rank; None where all is encoded beforehand (placement cached).

    Arguments: see online.setup.build_online_encoder.
    """
    if config.encoder.placement == "cached":
        return None
    build = _online("build_online_encoder", config.encoder)
    return build(config, encoders, cache, dims, channel, latent_shape, max_text_length)


def run_encoder_rank(config: JobConfig, num_training: int) -> None:
    """All that an encoder rank does, from start to end."""
    run = _online("run_encoder_rank", config.encoder)
    run(config.encoder, config.data, config.comm, config.model.hf_assets_path, num_training)


def parametrize(spec: ModelSpec, config: JobConfig) -> ModelSpec:
    """The model family with the initialisation and the parameter groups of optimizer.parametrization."""
    if config.optimizer.parametrization == "standard":
        return spec
    mup = resolve("titan_video.optim.mup.parametrization:parametrize", asked_by="optimizer.parametrization = mup")
    return mup(spec, config)


def load_pipeline(degree: int) -> Any:
    """The package distributed/pipeline_parallel; None for one stage."""
    if degree == 1:
        return None
    return resolve("titan_video.distributed.pipeline_parallel", asked_by="parallelism.pipeline_parallel_degree")


def load_validation() -> Any:
    """The module tasks/validation."""
    return resolve("titan_video.tasks.validation", asked_by="validation.enable = true")


def supervise(config: JobConfig) -> RunEnd:
    """A context around a run: how it ends, and where the part is there, its lock, heartbeat and status.json.

    Logs what describes the run.
    """
    printed = f"configuration:\n{dump(config)}" if config.job.print_config else ""
    for text in filter(None, (config.job.description, printed) if os.environ.get("RANK", "0") == "0" else ()):
        logger.info(text)
    if not find_module(SUPERVISION):
        return RunEnd(config.fault_tolerance.save_on_signal)
    return resolve(f"{SUPERVISION}.run_status:RunStatus", asked_by="job.dump_folder")(config)


class NoProfiler(nullcontext):
    """Stands in for training.profiling.Profiler."""

    def __enter__(self) -> "NoProfiler":
        return self

    def step(self, step: int) -> None:
        pass


def build_profiler(config: JobConfig, folder: Path, device: torch.device) -> Any:
    """A context manager whose `step` is called after each optimizer step."""
    section = config.profiling
    if config.planner.cluster:
        return resolve("titan_video.planner.report.comparison:Comparison", asked_by="planner.cluster")(config, device)
    if not (section.enable_profiling or section.enable_memory_snapshot):
        return NoProfiler()
    return resolve("titan_video.training.profiling:Profiler", asked_by="profiling")(section, folder, device)


def build_guard(section: FaultTolerance) -> NonFiniteGuard:
    """What decides whether a step's update is applied."""
    if section.nonfinite == "stop" and not section.spike_deviations:
        return NonFiniteGuard()
    return resolve(f"{FAULTS}.guard:FaultGuard", asked_by=f"fault_tolerance.nonfinite = {section.nonfinite}")(section)


def handle_fault(num_steps: int, fault: str, unread: UnreadStep, **run: Any) -> int:
    """What follows a step whose update was left out; returns the step from which the run goes on.

    run: the fields of faults.handler.FaultHandler. FloatingPointError: the run stops, as always without this part.
    """
    if not find_module(FAULTS):
        raise FloatingPointError(f"{fault}; the update was not applied")
    handler = resolve(f"{FAULTS}.handler:FaultHandler", asked_by=fault)(**run)
    return handler.handle(fault, unread, num_steps)


def build_gradient_check(section: Debug, model: nn.Module, group: dist.ProcessGroup) -> Callable[..., Any]:
    """(step, its forward and backward) -> the loss. With debug.verify_every they run twice. group: all, on the host."""
    if not section.verify_every:
        return lambda step, run: run()
    check = resolve("titan_video.training.gradient_check:GradientCheck", asked_by="debug.verify_every")
    return check(section.verify_every, model, group)


def balance_experts(config: JobConfig, args: Any, run: Callable[..., Any], **trained: Any) -> Callable[..., Any]:
    """`run`, beside which a mixture of experts is balanced. args: the model's. trained: as of ExpertBalance."""
    if getattr(args, "experts", None) is None:
        return run
    build = resolve("titan_video.training.expert_balance:build", asked_by="model.flavor")
    return build(config, args, run=run, **trained)


def explain_out_of_memory(error: torch.OutOfMemoryError, config: JobConfig, step: int, bucket: str) -> str:
    """The message for the user; bucket: sizes of the clips of the step."""
    explain = resolve("titan_video.training.out_of_memory:explain", asked_by=f"out of memory: {error}")
    return explain(error, config, step, bucket)


def _online(name: str, section: Encoder) -> Any:
    return resolve(f"{ONLINE}:{name}", asked_by=f"encoder.placement = {section.placement}")
