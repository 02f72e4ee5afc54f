"""Context parallel: the tokens of a clip over several ranks. Only attention communicates; all else is per token.

    ulysses   ranks exchange tokens for heads: each attends over the whole clip with its own heads
    ring      queries stay; chunks of keys and values pass every rank, and the partial results are merged
    unified   both: Ulysses among neighbouring ranks, the ring around them

Ranks are counted ring first: rank (i, j) of ring x ulysses holds slice i * ulysses + j of the tokens, so the slices of
a Ulysses group are one contiguous chunk, which the ring passes on.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.config.job_config import JobConfig, Parallelism
from titan_video.config.values import divisors
from titan_video.distributed.collectives import rank_group
from titan_video.distributed.fsdp import get_blocks
from titan_video.distributed.parallel_dims import ParallelDims
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


def layout_errors(dims: ParallelDims, section: Parallelism, args: Any) -> Iterator[str]:
    """What a model's architecture does not allow, one line per mistake. args: the model's (see ModelSpec)."""
    heads, rest = divmod(args.num_heads, dims.tp)
    if rest or heads % dims.ulysses == 0:  # a rest: tensor parallel says so
        return
    is_unified = section.context_parallel_method == "unified"
    field = "context_parallel_ulysses_degree" if is_unified else "context_parallel_degree"
    per_rank = f"{heads} heads" if dims.tp == 1 else f"{heads} heads of each tensor-parallel rank"
    yield (
        f"parallelism.{field}: given {dims.ulysses}, but Ulysses divides the {per_rank}; legal: {divisors(heads)}; "
        f"context_parallel_method ring or unified takes other degrees"
    )


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the degree of Ulysses, one line per mistake."""
    p = config.parallelism
    cp, ulysses = p.context_parallel_degree, p.context_parallel_ulysses_degree
    if p.context_parallel_method == "unified" and cp % ulysses:
        yield (
            f"parallelism.context_parallel_ulysses_degree: given {ulysses}, which does not divide "
            f"parallelism.context_parallel_degree {cp}; legal: {divisors(cp)}"
        )
    if p.context_parallel_method != "unified" and ulysses != 1:
        yield (
            f"parallelism.context_parallel_ulysses_degree: given {ulysses}, but parallelism.context_parallel_method is "
            f"{p.context_parallel_method}; set that to unified, or leave this at 1"
        )
