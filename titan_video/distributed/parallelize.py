"""The order in which a model is made ready for training; each step takes values, not the configuration."""

import torch
from torch import nn

from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.distributed.activation_checkpoint import apply_activation_checkpoint
from titan_video.distributed.compile import apply_compile
from titan_video.distributed.fsdp import apply_fsdp
from titan_video.distributed.parallel_dims import Meshes
from titan_video.models.spec import ParallelPlan


def parallelize(
    model: nn.Module,
    plan: ParallelPlan,
    meshes: Meshes,
    parallelism: Parallelism,
    training: Training,
    checkpointing: ActivationCheckpoint,
    compilation: Compile,
) -> None:
    """Checkpointing, then compile, then FSDP2, in place, on a model whose parameters may be on the meta device."""
    apply_activation_checkpoint(model, plan, checkpointing.mode)
    if compilation.enable:
        apply_compile(model, plan, compilation.backend)
    apply_fsdp(
        model,
        plan,
        meshes.fsdp,
        param_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        reshard_after_forward=parallelism.fsdp_reshard_after_forward,
    )
