"""The order in which a model is prepared for training; each step takes values, not the configuration."""

import torch
from torch import nn

from titan_video.config.job_config import ActivationCheckpoint, Compile, Float8, Parallelism, Training
from titan_video.distributed.activation_checkpoint import BlockSections, apply_activation_checkpoint
from titan_video.distributed.compile import apply_compile
from titan_video.distributed.fsdp import apply_fsdp
from titan_video.distributed.parallel_dims import Meshes
from titan_video.models.spec import ParallelPlan
from titan_video.tools.parts import resolve

FLOAT8 = "titan_video.distributed.float8:apply_float8"  # optional
TENSOR_PARALLEL = "titan_video.distributed.tensor_parallel:apply_tensor_parallel"  # optional
BLOCK_SWAP = "titan_video.distributed.block_swap:apply_block_swap"  # optional
EXPERT_PARALLEL = "titan_video.distributed.expert_parallel:apply_expert_parallel"  # optional
CONTEXT_PARALLEL = "titan_video.distributed.context_parallel:apply_context_parallel"  # optional


def parallelize(
    model: nn.Module,
    plan: ParallelPlan,
    meshes: Meshes,
    parallelism: Parallelism,
    training: Training,
    checkpointing: ActivationCheckpoint | BlockSections,
    compilation: Compile,
    float8: Float8 | None = None,
) -> None:
    """Apply float8, expert, tensor and context parallel, checkpointing, compile, block swap and FSDP2, in this order.

    In place; the parameters may be on the meta device. checkpointing: see `apply_activation_checkpoint`.
    ValueError: see `apply_activation_checkpoint`, `apply_float8` and `apply_block_swap`.
    """
    if float8 is not None and float8.enable:
        apply_float8 = resolve(FLOAT8, asked_by="float8.enable = true")
        apply_float8(model, plan, float8, meshes.world.device_type, meshes.tp.size())
    if meshes.ep is not None:
        resolve(EXPERT_PARALLEL, asked_by="parallelism.expert_parallel_degree")(model, plan, meshes.ep)
    if meshes.tp.size() > 1:
        apply_tensor_parallel = resolve(TENSOR_PARALLEL, asked_by="parallelism.tensor_parallel_degree")
        apply_tensor_parallel(model, plan, meshes.tp, parallelism.enable_async_tensor_parallel)
    if meshes.ring.size() * meshes.ulysses.size() > 1:
        apply_context_parallel = resolve(CONTEXT_PARALLEL, asked_by="parallelism.context_parallel_degree")
        apply_context_parallel(model, plan, meshes.ring, meshes.ulysses, parallelism.context_parallel_rotate_method)
    apply_activation_checkpoint(model, plan, checkpointing)
    if compilation.enable:
        apply_compile(model, plan, compilation.backend)
    if training.swap_blocks:
        resolve(BLOCK_SWAP, asked_by="training.swap_blocks")(model, plan, training.swap_blocks, meshes.world.size())
    apply_fsdp(
        model,
        plan,
        meshes,
        param_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        reshard_after_forward=parallelism.fsdp_reshard_after_forward,
        cpu_offload=training.enable_cpu_offload,
        symmetric_memory=parallelism.enable_fsdp_symm_mem,
    )
