"""What a step allocates, sends and computes, read from the operators that it runs; made for fake tensors, where nothing
is computed.

Every storage is followed from its allocation to its end. What kind of memory it was is often known only later (what the
forward leaves alive was saved for backward), so allocations are logged, and the log is replayed when the step is over
and each storage has its kind.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

TEMPORARY = "temporaries"

# FSDP2's own operators, by what the memory that they write is for.
FSDP_KINDS = {
    "all_gather_copy_in": "gathered weights",
    "split_with_sizes_copy": "gathered weights",
    "chunk_cat": "reduction buffers",
}

COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "send": "send",
}


@dataclass(frozen=True)
class Axis:
    """A process group: the name of its mesh axis, its ranks, and which of them this is."""

    name: str
    ranks: int
    rank: int


def bytes_sent(kind: str, payload: int, axis: Axis, splits: list[int] | None = None) -> int:
    """Bytes that a rank sends at least. payload: bytes of the larger side, a rank's whole tensor (gathered, to be
    scattered, reduced).

    splits: of an all-to-all whose parts are not equal, how much each rank gets.
    """
    if kind == "send":
        return payload
    if splits:
        return payload * (sum(splits) - splits[axis.rank]) // sum(splits)
    return payload * (axis.ranks - 1) // axis.ranks * (2 if kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind over one axis in one phase ("" for a pipeline's sends). sent:

    bytes that each rank sends, all calls together.
    """

    phase: str
    kind: str
    axis: str
    ranks: int
    count: int
    sent: int


@dataclass(frozen=True)
class Peak:
    """Live bytes by kind:

    `largest` each kind ever had, `at_peak` what each had when the sum of those here, `total`, was largest.
    """

    largest: dict[str, int]
    at_peak: dict[str, int]
    total: int


# Of the shapes of the arguments. torch knows these formulas, but not this operator.
_SDPA_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


class StepTracker(TorchDispatchMode):
    """A dispatch mode around one step.

    axes: {process group's name: its axis}; collectives among one rank are left out.
    bodies: {operator packet: Python function}: what these operators do inside is to be seen, so the function is run in
    their place. `phase` labels what comes; the caller sets it. What is sent before is not counted.
    """

    def __init__(self, axes: dict[str, Axis], bodies: dict[object, Callable] | None = None):
        super().__init__()
        self.axes, self.bodies = axes, bodies or {}
        self.phase = "build"
        self.flops: Counter[str] = Counter()
        self._collectives: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # address of a storage -> its number
        self._log: list[tuple[int, int]] = []  # (number, change of bytes), in order
        self._size: list[int] = []
        self._kind: list[str] = []
        self._pending: Callable[[], None] | None = None
        self._depth = 0

    # ---- storages ----

    @property
    def clock(self) -> int:
        """Number of storages seen so far; those allocated later have this number or a higher one."""
        return len(self._size)

    def set_kind(self, tensor: Tensor, kind: str) -> None:
        """A tensor's storage is of this kind, for all its life."""
        self._kind[self._number(tensor)] = kind

    def keep_tensor(self, tensor: Tensor, kind: str) -> None:
        """`set_kind` for what counts as temporary so far."""
        if self._kind[self._number(tensor)] == TEMPORARY:
            self.set_kind(tensor, kind)

    def keep(self, kind: str, since: int = 0) -> None:
        """Give `kind` to the temporaries that are alive and were allocated since a `clock`."""
        for number, _ in self._live.values():
            if number >= since and self._kind[number] == TEMPORARY:
                self._kind[number] = kind

    def save_later(self, kind: str, since: int) -> None:
        """`keep` when the next operator runs: when what is about to be dropped is gone."""
        self._pending = lambda: self.keep(kind, since)

    def workspace(self, size: int) -> None:
        """Memory that an operator takes and gives back."""
        number = self.clock
        self._size.append(size)
        self._kind.append(TEMPORARY)
        self._log += [(number, size), (number, -size)]

    def peak(self, elsewhere: tuple[str, ...] = ()) -> Peak:
        """elsewhere: kinds that are in other memory, and so not in the sum."""
        now, largest, at_peak, total, most = Counter(), Counter(), {}, 0, 0
        for number, change in self._log:
            kind = self._kind[number]
            now[kind] += change
            total += change if kind not in elsewhere else 0
            largest[kind] = max(largest[kind], now[kind])
            if total > most:
                most, at_peak = total, dict(now)
        return Peak(dict(largest), at_peak, most)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            number, size = self.clock, storage.nbytes()
            self._live[address] = number, weakref.ref(storage, lambda _: self._freed(address))
            self._size.append(size)
            self._kind.append(TEMPORARY)
            self._log.append((number, size))
        return self._live[address][0]

    def _freed(self, address: int) -> None:
        number, _ = self._live.pop(address)
        self._log.append((number, -self._size[number]))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live:
            number, _ = self._live[storage._cdata]
            self._log.append((number, storage.nbytes() - self._size[number]))
            self._size[number] = storage.nbytes()

    def __enter__(self):
        # FSDP frees and takes gathered weights by resizing their storage, which is no operator.
        self._depth += 1
        if self._depth > 1:  # entered again, for a body
            return super().__enter__()
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage, size):
            result = resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *exception):
        self._depth -= 1
        if self._depth == 0:
            torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    # ---- operators ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)
        if DTensor in types:
            return NotImplemented  # it comes again, as an operator on the local part
        if self._pending:
            pending, self._pending = self._pending, None
            pending()
        kwargs = kwargs or {}
        if func.overloadpacket in self.bodies:
            with self:
                return self.bodies[func.overloadpacket](*args, **kwargs)
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (list, tuple)) else (result,)
        for t in outputs if all(isinstance(t, Tensor) for t in outputs) else tree_leaves(result):
            if isinstance(t, Tensor):
                self._number(t)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func, args, kwargs, result) -> None:
        packet, space = func.overloadpacket, func.namespace
        if space in ("c10d", "_c10d_functional") and (kind := COLLECTIVES.get(packet.__name__)):
            self._count_collective(kind, args, kwargs, result)
        elif space == "fsdp" and (kind := FSDP_KINDS.get(packet.__name__)):
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self.keep_tensor(t, kind)
        elif packet in _SDPA_CPU:
            self.flops[self.phase] += _SDPA_CPU[packet](*_shapes(args))
        elif packet in flop_registry:
            self.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=result)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            # The GPU's kernel adds dq up in float32 and keeps a row sum of it.
            query, lse = args[1], args[5]
            self.workspace(4 * query.numel() + lse.nbytes)

    def _count_collective(self, kind, args, kwargs, result) -> None:
        groups = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.ScriptObject, str))]
        names = [a if isinstance(a, str) else _group_name(a) for a in groups]
        axis = next((self.axes[n] for n in names if n in self.axes), Axis("other", 0, 0))
        if axis.ranks == 1 or self.phase == "build":
            return
        payload = max(t.nbytes for t in tree_leaves((args, result)) if isinstance(t, Tensor))
        splits = [
            a
            for a in args
            if isinstance(a, (list, tuple)) and len(a) == axis.ranks and all(isinstance(n, int) for n in a)
        ]
        phase = "" if kind == "send" else self.phase  # a pipeline sends when its schedule says so
        entry = self._collectives[phase, kind, axis.name, axis.ranks]
        entry[0] += 1
        entry[1] += (
            bytes_sent(kind, payload, axis, splits[-1] if kind == "all-to-all" and splits else None)
            if axis.ranks
            else payload
        )

    def collectives(self) -> list[Collective]:
        return [Collective(*key, *numbers) for key, numbers in self._collectives.items()]


def _shapes(args) -> tuple:
    return tuple(a.shape if isinstance(a, Tensor) else a for a in args)


def _group_name(boxed: torch.ScriptObject) -> str | None:
    try:
        return ProcessGroup.unbox(boxed).group_name
    except RuntimeError:  # another object, such as a reduce operation
        return None
