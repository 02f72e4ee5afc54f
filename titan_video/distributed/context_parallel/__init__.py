"""Context parallel: the tokens of a clip over several ranks. Only attention communicates; all else is per token.

    ulysses   ranks exchange tokens for heads: each attends over the whole clip with its own heads
    ring      queries stay; chunks of keys and values pass every rank, and the partial results are merged
    unified   both: Ulysses among neighbouring ranks, the ring around them

Ranks are counted ring first: rank (i, j) of ring x ulysses holds slice i * ulysses + j of the tokens, so the slices of
a Ulysses group are one contiguous chunk, which the ring passes on.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.distributed.collectives import rank_group
from titan_video.distributed.fsdp import get_blocks
from titan_video.models.spec import ParallelPlan
from titan_video.tools.parts import resolve

# Class of an inner attention -> what replaces it on the ring and on the ulysses axis.
_REPLACEMENTS = {
    "InnerAttention": (
        "titan_video.distributed.context_parallel.ring:RingAttention",
        "titan_video.distributed.context_parallel.ulysses:UlyssesAttention",
    ),
    "JointInnerAttention": (
        "titan_video.distributed.context_parallel.joint:JointRingAttention",
        "titan_video.distributed.context_parallel.joint:JointUlyssesAttention",
    ),
}


def apply_context_parallel(
    model: nn.Module, plan: ParallelPlan, ring: DeviceMesh, ulysses: DeviceMesh, rotate: str
) -> None:
    """Replace the plan's inner attentions in place. rotate: how the ring moves keys and values (RingAttention)."""
    for container, key in get_blocks(model, plan):
        for path in plan.inner_attention:
            parent_path, _, name = path.rpartition(".")
            parent = container[key].get_submodule(parent_path)
            setattr(parent, name, parallel_attention(getattr(parent, name), ring, ulysses, rotate))


def parallel_attention(attention: nn.Module, ring: DeviceMesh, ulysses: DeviceMesh, rotate: str) -> nn.Module:
    """The replacement of an inner attention on these two axes; an axis of one rank adds nothing."""
    targets = _REPLACEMENTS[type(attention).__name__]
    on_ring, on_ulysses = (resolve(target, asked_by="parallelism.context_parallel_degree") for target in targets)
    if ring.size() > 1:
        attention = on_ring(rank_group(ring), rotate)
    return on_ulysses(rank_group(ulysses), attention) if ulysses.size() > 1 else attention
