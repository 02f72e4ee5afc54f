"""A StepTracker that also keeps every operator of a traced module: what it computes, moves and sends, and when.

Sizes are traced at numbers of clips and of tokens that no other size is a multiple of. So each number in the log is
known as a polynomial of both, and one trace serves all batches and lengths.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from titan_video.planner.step_tracker import _SDPA_CPU, COLLECTIVES, Axis, StepTracker, _group_name, _shapes

# Primes that divide no size of a model. What is added to a multiple of LENGTH (text beside video) is much less.
CLIPS, LENGTH = 101, 10_000_000_019
Poly = tuple[float, float, float, float, float]  # coefficients of 1, B, L, B L, B L^2; B: clips, L: rows of one rank
ZERO: Poly = (0.0, 0.0, 0.0, 0.0, 0.0)

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_FREE = ("empty", "new_empty", "detach", "wait_tensor", "_local_scalar_dense")


def decode(number: int) -> Poly:
    """The polynomial whose value at (CLIPS, LENGTH) is `number`."""
    per_clip, rest = divmod(int(number), CLIPS)
    value = int(number) if rest else per_clip
    square, value = divmod(value, LENGTH * LENGTH)
    linear, constant = divmod(value, LENGTH)
    assert not (rest and square), "attention of no clips"
    return (constant, 0.0, linear, 0.0, 0.0) if rest else (0.0, constant, 0.0, linear, square)


def decode_sum(numbers: Iterable[int]) -> Poly:
    """The sum of their polynomials."""
    return tuple(map(sum, zip(ZERO, *map(decode, numbers), strict=True)))


def monomials(clips: float, length: float) -> np.ndarray:
    """The values that a Poly's coefficients are multiplied by."""
    return np.array([1.0, clips, length, clips * length, clips * length * length])


@dataclass(frozen=True)
class Op:
    """One operator.

    kind: "product", "attention", "memory" or "collective". part: of the trace (see `Recorder.part`). outer: number of
    the operator that autograd and checkpointing see, which may be made of several. moved: bytes read and written;
    fused: the same in a compiled block, where neighbouring plain operators become one kernel.
    shape: of a product, rows, inner and columns; of attention, keys and head width.
    collective: kind and axis; moved is then the payload, as step_tracker.bytes_sent takes it. count: launches.
    """

    kind: str
    name: str
    part: str
    outer: int
    flops: Poly = ZERO
    moved: Poly = ZERO
    fused: Poly = ZERO
    shape: tuple[Poly, ...] = ()
    collective: tuple[str, str] = ("", "")
    count: float = 1


class Recorder(StepTracker):
    """axes, bodies: as StepTracker's.

    part: what runs now, set by the caller, such as "forward". listeners: called before each operator that autograd
    sees, with its number, the operator and its arguments.
    """

    def __init__(self, axes: dict[str, Axis], bodies: dict[object, Callable] | None = None):
        super().__init__(axes, bodies)
        self.part, self.phase = "", "forward"
        self.ops: list[Op] = []
        self.outer = -1
        self.outputs: dict[int, list[int]] = {}  # of each outer operator
        self.allocated_by: dict[int, int] = {}  # storage -> outer operator
        self.listeners: list[Callable[[int, Any, tuple], None]] = []
        self._touched: list[tuple[dict[int, int], dict[int, int], bool]] = []  # of each op: reads, writes, fusible
        self._is_inside = False

    @property
    def log(self) -> list[tuple[int, int]]:
        """(storage, change of bytes), in order."""
        return self._log

    def events(self, first: int, last: int) -> np.ndarray:
        """[events, 2] of this part of the log: storage, and 1 for an allocation or -1."""
        return np.array([(number, 1 if change > 0 else -1) for number, change in self._log[first:last]]).reshape(-1, 2)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        return self._number(tensor)

    def sizes(self) -> np.ndarray:
        """[storages, monomials]"""
        return np.array([decode(size) for size in self._size]).reshape(-1, 5)

    def live(self) -> set[int]:
        """Storages that are alive."""
        return {number for number, _ in self._live.values()}

    def _number(self, tensor: Tensor) -> int:
        number = super()._number(tensor)
        self.allocated_by.setdefault(number, self.outer)
        return number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._is_inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._is_inside, self.outer = True, self.outer + 1
        try:
            for listen in self.listeners:
                listen(self.outer, func, args)
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_inside = False
        if result is not NotImplemented:
            self.outputs[self.outer] = [self._number(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result

    def _count(self, func, args, kwargs, result) -> None:
        super()._count(func, args, kwargs, result)
        packet, name = func.overloadpacket, func._schema.name.partition("::")[2]
        reads, writes = self._accesses(func, name, args, kwargs, result)
        op = Op("memory", name, self.part, self.outer)
        is_collective = func.namespace in ("c10d", "_c10d_functional")
        if is_collective and (kind := COLLECTIVES.get(packet.__name__)):
            op = self._collective(op, kind, args, kwargs, result)
        elif packet in _SDPA_CPU:
            keys, width = args[2 if name.endswith("backward") else 1].shape[-2:]
            flops = decode(_SDPA_CPU[packet](*_shapes(args)))
            op = replace(op, kind="attention", flops=flops, shape=(decode(keys), decode(width)))
        elif name in PRODUCTS:
            left, right = [t for t in args if isinstance(t, Tensor)][-2:]
            shape = tuple(decode(n) for n in (left.shape[-2], left.shape[-1], right.shape[-1]))
            flops = decode(flop_registry[packet](*args, **kwargs, out_val=result))
            op = replace(op, kind="product", flops=flops, shape=shape)
        elif not is_collective and (reads or writes) and not name.startswith(_FREE):
            op = replace(op, moved=decode_sum([*reads.values(), *writes.values()]))
        else:
            return
        self.ops.append(op)
        self._touched.append((reads, writes, op.kind == "memory" and func.namespace == "aten"))

    def _collective(self, op: Op, kind: str, args, kwargs, result) -> Op:
        groups = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.ScriptObject, str))]
        names = [a if isinstance(a, str) else _group_name(a) for a in groups]
        axis = next((self.axes[n].name for n in names if n in self.axes), "other")
        payload = max(t.nbytes for t in tree_leaves((args, result)) if isinstance(t, Tensor))
        return replace(op, kind="collective", moved=decode(payload), collective=(kind, axis))

    def _accesses(self, func, name: str, args, kwargs, result) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes that an operator reads and writes, by storage; nothing for a view. Broadcast dims count once."""
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        read = {self._number(t): _touched(t) for t in inputs}
        written = {self._number(t): _touched(t) for t in outputs}
        if not func._schema.is_mutable and written and inputs and set(written) <= set(read):
            return {}, {}
        if name.endswith("_like") or name.startswith("new_"):
            read = {}
        elif name in ("copy_", "fill_", "zero_"):
            read = {self._number(t): _touched(t) for t in inputs[1:]}
        return read, written

    def fuse(self, kept: set[int]) -> tuple[Op, ...]:
        """The operators, with `fused` set. kept: storages that are read after the trace's last operator.

        A plain operator reads for free what another plain one has just made, and writes for free what only such read.
        """
        last_writer: dict[int, int] = {}
        reads: list[dict[int, int]] = []
        needed: set[tuple[int, int]] = set()  # (writer, storage) that some other kind of operator reads
        for i, (read, written, is_plain) in enumerate(self._touched):
            same_part = {
                s: last_writer[s]
                for s in read
                if s in last_writer and self.ops[last_writer[s]].part == self.ops[i].part and is_plain
            }
            free = {s for s, writer in same_part.items() if self._touched[writer][2]}
            needed |= {(last_writer[s], s) for s in read if s in last_writer and s not in free}
            reads.append({s: size for s, size in read.items() if s not in free})
            last_writer |= dict.fromkeys(written, i)
        needed |= {(writer, s) for s, writer in last_writer.items() if s in kept}
        ops = []
        for i, op in enumerate(self.ops):
            _, written, is_plain = self._touched[i]
            if is_plain:
                writes = [size for s, size in written.items() if (i, s) in needed]
                op = replace(op, fused=decode_sum([*reads[i].values(), *writes]))
            elif op.kind == "memory":
                op = replace(op, fused=op.moved)
            ops.append(op)
        return tuple(ops)


def _touched(t: Tensor) -> int:
    numel = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        numel *= size if stride else min(size, 1)
    return numel * t.element_size()
