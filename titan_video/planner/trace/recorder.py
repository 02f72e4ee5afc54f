"""A StepTracker that also keeps every operator of a traced module: what it computes, moves and sends, and when.

Sizes are traced at numbers of clips and of tokens that no other size is a multiple of. So each number in the log is
known as a polynomial of both, and one trace serves all batches and lengths. Under expert parallel a rank computes with
rows of other ranks, too: a third number, known by the rows of a tensor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from titan_video.planner.dry_run.step_tracker import _SDPA_CPU, COLLECTIVES, Axis, StepTracker, _group_name, _shapes

# Primes that divide no size of a model. What is added to a multiple of LENGTH (text beside video) is much less.
CLIPS, LENGTH = 101, 10_000_000_019
# Coefficients of 1, B, L, B L, B L^2, B L r. B: clips, L: rows of one rank, r: load of its experts / mean load.
Poly = tuple[float, float, float, float, float, float]
ZERO: Poly = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
LOAD = 5  # of the load in traces: times as many rows come to a rank as leave it, so that no other tensor has them

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
GROUPED = ("grouped_linear", "grouped_linear_backward")
_FREE = ("empty", "new_empty", "detach", "wait_tensor", "_local_scalar_dense")


def decode(number: int) -> Poly:
    """The polynomial whose value at (CLIPS, LENGTH) is `number`."""
    per_clip, rest = divmod(int(number), CLIPS)
    value = int(number) if rest else per_clip
    square, value = divmod(value, LENGTH * LENGTH)
    linear, constant = divmod(value, LENGTH)
    assert not (rest and square), "attention of no clips"
    return (constant, 0.0, linear, 0.0, 0.0, 0.0) if rest else (0.0, constant, 0.0, linear, square, 0.0)


def decode_received(number: int) -> Poly:
    """`decode` of a multiple of the rows that a rank's experts get."""
    linear, rest = divmod(int(number), CLIPS * LENGTH * LOAD)
    assert not rest, "rows of experts, and something else"
    return (*ZERO[:5], linear)


def add(polys: Iterable[Poly]) -> Poly:
    return tuple(map(sum, zip(ZERO, *polys, strict=True)))


def monomials(clips: float, length: float, load: float = 1.0) -> np.ndarray:
    """The values that a Poly's coefficients are multiplied by."""
    rows = clips * length
    return np.array([1.0, clips, length, rows, rows * length, rows * load])


@dataclass(frozen=True)
class Op:
    """One operator.

    kind: "product", "attention", "memory", "collective", or "wait" of the host for the device. part: of the trace (see
    `Recorder.part`). outer: number of the operator that autograd and checkpointing see, which may be made of several.
    moved: bytes read and written; fused: the same in a compiled block, where neighbouring plain operators become one
    kernel.
    shape: of a product, rows, inner and columns, of experts for each of them; of attention, keys and head width.
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
    """axes, bodies: as StepTracker's. received: rows that this rank's experts get; 0: it has none of others.

    part: what runs now, set by the caller, such as "forward". listeners: called before each operator that autograd
    sees, with its number, the operator and its arguments.
    """

    def __init__(self, axes: dict[str, Axis], bodies: dict[object, Callable] | None = None, received: int = 0):
        super().__init__(axes, bodies)
        self.received = received
        self._of_others: set[int] = set()  # storages of such rows
        self._is_of_others = False  # the operator that runs
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
        return np.array([self._poly(number, size) for number, size in enumerate(self._size)]).reshape(-1, len(ZERO))

    def _poly(self, storage: int, size: int) -> Poly:
        return decode_received(size) if storage in self._of_others else decode(size)

    def _has_received(self, tensors: Iterable[Any]) -> bool:
        return self.received > 0 and any(isinstance(t, Tensor) and t.shape[:1] == (self.received,) for t in tensors)

    def wait(self) -> None:
        """The host waits for the device here."""
        self.ops.append(Op("wait", "wait", self.part, self.outer))
        self._touched.append(({}, {}, False))

    def add_workspace(self, size: int) -> None:
        self.allocated_by[self.num_storages] = self.outer
        if self._is_of_others:
            self._of_others.add(self.num_storages)
        super().add_workspace(size)

    def live(self) -> set[int]:
        """Storages that are alive."""
        return {number for number, _ in self._live.values()}

    def _number(self, tensor: Tensor) -> int:
        number = super()._number(tensor)
        self.allocated_by.setdefault(number, self.outer)
        if self._has_received([tensor]):
            self._of_others.add(number)
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
        self._is_of_others = self._has_received(tree_leaves((args, result)))
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
        elif name in GROUPED:
            self._count_biases(op, args, result)
            op = replace(op, kind="product", **self._grouped(packet, args, kwargs, result))
        elif not is_collective and (reads or writes) and not name.startswith(_FREE):
            op = replace(op, moved=self._sum(reads, writes))
        else:
            return
        self.ops.append(op)
        self._touched.append((reads, writes, op.kind == "memory" and func.namespace == "aten"))

    def _count_biases(self, op: Op, args, result) -> None:
        """What a grouped product does beside multiplying: biases are repeated and added, or their gradients summed."""
        decoded = decode_received if self._is_of_others else decode
        moved = decoded(4 * result.nbytes if op.name == GROUPED[0] else args[0].nbytes)
        self.ops.append(replace(op, moved=moved))
        self._touched.append(({}, {}, False))

    def _grouped(self, packet, args, kwargs, result) -> dict[str, Any]:
        decoded = decode_received if self._is_of_others else decode
        x, w = [t for t in args if isinstance(t, Tensor)][: 2 if packet.__name__ == GROUPED[0] else 3][-2:]
        rows = tuple(n / w.shape[0] for n in decoded(x.shape[0]))
        flops = decoded(flop_registry[packet](*args, **kwargs, out_val=result))
        return {"flops": flops, "shape": (rows, decode(w.shape[1]), decode(w.shape[2]))}

    def _collective(self, op: Op, kind: str, args, kwargs, result) -> Op:
        groups = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.ScriptObject, str))]
        names = [a if isinstance(a, str) else _group_name(a) for a in groups]
        axis = next((self.axes[n].name for n in names if n in self.axes), "other")
        payload = max(t.nbytes for t in tree_leaves((args, result)) if isinstance(t, Tensor))
        moved = decode_received(payload) if self._is_of_others else decode(payload)
        return replace(op, kind="collective", moved=moved, collective=(kind, axis))

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

    def _sum(self, *accesses: dict[int, int]) -> Poly:
        return add(self._poly(storage, size) for some in accesses for storage, size in some.items())

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
                writes = {s: size for s, size in written.items() if (i, s) in needed}
                op = replace(op, fused=self._sum(reads[i], writes))
            elif op.kind == "memory":
                op = replace(op, fused=op.moved)
            ops.append(op)
        return tuple(ops)


def _touched(t: Tensor) -> int:
    numel = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        numel *= size if stride else min(size, 1)
    return numel * t.element_size()
