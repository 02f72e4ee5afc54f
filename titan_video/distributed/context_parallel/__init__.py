"""Context parallel: the tokens of a clip over several ranks. Only the attention cores know; the rest of a block works
token by token.

    ulysses   tokens are exchanged for heads: each rank attends over the whole clip with its own heads
    ring      queries stay; chunks of keys and values go round, and what each chunk gives is merged
    unified   both: Ulysses among neighbours, the ring around them

Ranks are counted ring first: rank (i, j) of ring x ulysses holds slice i * ulysses + j of the tokens, so the slices of
a Ulysses group are one contiguous chunk, which is what the ring passes on. Bytes sent: traffic.py.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.distributed.context_parallel.ring import JointRingAttention, RingAttention
from titan_video.distributed.context_parallel.ulysses import JointUlyssesAttention, UlyssesAttention
from titan_video.distributed.fsdp import get_blocks
from titan_video.models.layers import InnerAttention, JointInnerAttention
from titan_video.models.spec import ParallelPlan

_REPLACEMENTS = {
    InnerAttention: (RingAttention, UlyssesAttention),
    JointInnerAttention: (JointRingAttention, JointUlyssesAttention),
}


def apply_context_parallel(
    model: nn.Module, plan: ParallelPlan, ring: DeviceMesh, ulysses: DeviceMesh, rotate: str
) -> None:
    """Replace the plan's attention cores in place. rotate:

    how the ring moves keys and values, "alltoall" or "allgather".
    """
    for container, key in get_blocks(model, plan):
        for path in plan.inner_attention:
            parent_path, _, name = path.rpartition(".")
            parent = container[key].get_submodule(parent_path)
            setattr(parent, name, parallel_attention(getattr(parent, name), ring, ulysses, rotate))


def parallel_attention(core: nn.Module, ring: DeviceMesh, ulysses: DeviceMesh, rotate: str) -> nn.Module:
    """What takes the place of `core` on these two axes; an axis of one rank adds nothing."""
    in_ring, in_ulysses = _REPLACEMENTS[type(core)]
    if ring.size() > 1:
        core = in_ring(ring, rotate)
    return in_ulysses(ulysses, core) if ulysses.size() > 1 else core
