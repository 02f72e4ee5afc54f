"""What a trace holds: allocations, operators and sizes of a block, and of what is outside the blocks."""

from dataclasses import dataclass, field

import numpy as np

from titan_video.planner.trace.recorder import Op


@dataclass(frozen=True)
class Log:
    """Allocations of one traced module; storages are rows of `sizes` [storages, monomials].

    forward, backward: [events, 2] of storage and +1 or -1. inputs: storages of its own inputs, which exist before.
    kept: what its forward leaves for backward, its own inputs among it if they are. results: of its forward; they are
    the next block's.
    outputs: {outer operator: storages of its results}. allocated_by: outer operator of each storage.
    expert_gradients: storages of the gradients of experts that are an FSDP unit of their own (expert parallel);
    experts_end: events of the backward after which all of these are there.
    last_pack: events of the forward after which nothing more is saved: there recomputation stops.
    """

    sizes: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    inputs: frozenset[int]
    kept: frozenset[int]
    results: frozenset[int]
    outputs: dict[int, list[int]]
    allocated_by: dict[int, int]
    last_pack: int
    last_outer: int  # outer operator at last_pack
    expert_gradients: frozenset[int] = frozenset()
    experts_end: int = 0


@dataclass(frozen=True)
class BlockTrace:
    """selected: {(save, whether attention is long enough to be saved): outer operators whose results are saved}."""

    ops: tuple[Op, ...]
    log: Log
    selected: dict[tuple[tuple[str, ...], bool], frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class EndsTrace:
    """The model without its blocks. Parts of ops: "embed", "trunk", "head", "loss", "head backward" and
    "embed backward".

    inputs, embed, trunk, head: [monomials], bytes that a micro-batch keeps from its forward to its backward: what it
    is made of, and what each part saves. state: bytes that pass from stage to stage.
    log: its forward begins with `embed`; head_start: events after which `head` begins; embed_start: events of the
    backward after which that of `embed` begins. last_unit: the FSDP unit outside the blocks that runs last before them.
    """

    ops: tuple[Op, ...]
    inputs: np.ndarray
    embed: np.ndarray
    trunk: np.ndarray
    head: np.ndarray
    log: Log
    state: np.ndarray
    head_start: int
    embed_start: int
    last_unit: str
