"""Activation checkpointing, block by block."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from titan_video.config.job_config import ActivationCheckpoint
from titan_video.distributed.fsdp import blocks_of
from titan_video.models.spec import ParallelPlan


def apply_activation_checkpoint(model: nn.Module, plan: ParallelPlan, section: ActivationCheckpoint) -> None:
    """`full`: each block keeps its input only and is run again in backward. `none`: nothing."""
    if section.mode in ("selective", "memory_budget") or section.layers or section.offload:
        raise ValueError("activation_checkpoint: only modes none and full are built yet")
    if section.mode == "full":
        for container, key in blocks_of(model, plan):
            # The blocks draw no random numbers, so there is no generator state to keep.
            container[key] = checkpoint_wrapper(container[key], preserve_rng_state=False)
