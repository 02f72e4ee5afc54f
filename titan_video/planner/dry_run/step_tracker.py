"""Counts what a training step allocates, sends and computes, from the operators that it runs on fake tensors.

Every storage is tracked from its allocation until it is freed. The category of its memory is often known only later:
what is alive after the forward was saved for backward. So allocations are logged, and the log is replayed after the
step, when each storage has its category.
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

# FSDP2's own operators, by the category of the memory that they write.
FSDP_CATEGORIES = {
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
    """A process group: the name of its mesh axis, the number of its ranks, and this process's rank in it."""

    name: str
    ranks: int
    rank: int


def bytes_sent(kind: str, payload: int, axis: Axis, splits: list[int] | None = None) -> int:
    """The least number of bytes that one rank sends.

    payload: bytes of the full tensor, which is the output of an all-gather and the input of all other kinds.
    splits: elements for each rank in an all-to-all with unequal parts.
    """
    if kind == "send":
        return payload
    if splits:
        return payload * (sum(splits) - splits[axis.rank]) // sum(splits)
    return payload * (axis.ranks - 1) // axis.ranks * (2 if kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Collective:
    """All calls of one kind over one axis in one phase ("" for the sends of a pipeline).

    sent: bytes that each rank sends in all these calls.
    """

    phase: str
    kind: str
    axis: str
    ranks: int
    count: int
    sent: int


@dataclass(frozen=True)
class Peak:
    """Allocated bytes by category.

    largest: the maximum of each category over the step. total: the maximum of their sum on the device.
    at_peak: bytes of each category at the time of that maximum.
    """

    largest: dict[str, int]
    at_peak: dict[str, int]
    total: int


# FLOPs from the shapes of the arguments: torch has these formulas, but not for the CPU's operator.
_SDPA_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


class StepTracker(TorchDispatchMode):
    """A dispatch mode around one step.

    axes: {name of a process group: its axis}. Collectives over one rank are not counted.
    bodies: {operator packet: Python function} of custom operators: the function runs in place of the operator, so that
    what it allocates is counted.
    The caller sets `phase`, by which FLOPs and collectives are counted. Collectives in phase "build" are not counted.
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
        self._category: list[str] = []
        self._pending: Callable[[], None] | None = None
        self._depth = 0

    # ---- storages ----

    @property
    def num_storages(self) -> int:
        """Storages seen so far; the next one gets this number."""
        return len(self._size)

    def set_category(self, tensor: Tensor, category: str) -> None:
        """Set the category of a tensor's storage, for its whole lifetime."""
        self._category[self._number(tensor)] = category

    def set_category_if_temporary(self, tensor: Tensor, category: str) -> None:
        """`set_category`, unless the storage has a category already."""
        if self._category[self._number(tensor)] == TEMPORARY:
            self.set_category(tensor, category)

    def categorize_live(self, category: str, since: int = 0) -> None:
        """Set the category of all live temporaries whose number is at least `since` (see `num_storages`)."""
        for number, _ in self._live.values():
            if number >= since and self._category[number] == TEMPORARY:
                self._category[number] = category

    def categorize_live_later(self, category: str, since: int) -> None:
        """`categorize_live` just before the next operator, when the caller's own references are gone."""
        self._pending = lambda: self.categorize_live(category, since)

    def add_workspace(self, size: int) -> None:
        """Count `size` bytes that an operator allocates and frees again."""
        number = self.num_storages
        self._size.append(size)
        self._category.append(TEMPORARY)
        self._log += [(number, size), (number, -size)]

    def peak(self, on_host: tuple[str, ...] = ()) -> Peak:
        """Replay the log. on_host: categories in host memory, which the sum leaves out."""
        current: Counter[str] = Counter()
        largest: Counter[str] = Counter()
        at_peak: dict[str, int] = {}
        total = max_total = 0
        for number, change in self._log:
            category = self._category[number]
            current[category] += change
            total += change if category not in on_host else 0
            largest[category] = max(largest[category], current[category])
            if total > max_total:
                max_total, at_peak = total, dict(current)
        return Peak(dict(largest), at_peak, max_total)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            number, size = self.num_storages, storage.nbytes()
            self._live[address] = number, weakref.ref(storage, lambda _: self._on_free(address))
            self._size.append(size)
            self._category.append(TEMPORARY)
            self._log.append((number, size))
        return self._live[address][0]

    def _on_free(self, address: int) -> None:
        number, _ = self._live.pop(address)
        self._log.append((number, -self._size[number]))

    def _on_resize(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live:
            number, _ = self._live[storage._cdata]
            self._log.append((number, storage.nbytes() - self._size[number]))
            self._size[number] = storage.nbytes()

    def __enter__(self):
        # FSDP frees and allocates gathered weights by resizing their storage, which is no operator.
        self._depth += 1
        if self._depth > 1:  # entered again, for the body of an operator
            return super().__enter__()
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage, size):
            result = resize(storage, size)
            self._on_resize(storage)
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
            return NotImplemented  # DTensor dispatches again, on the local shard
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
        elif space == "fsdp" and (category := FSDP_CATEGORIES.get(packet.__name__)):
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self.set_category_if_temporary(t, category)
        elif packet in _SDPA_CPU:
            self.flops[self.phase] += _SDPA_CPU[packet](*_shapes(args))
        elif packet in flop_registry:
            self.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=result)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            # The GPU's kernel accumulates dq in float32 and has a row sum of it.
            query, lse = args[1], args[5]
            self.add_workspace(4 * query.numel() + lse.nbytes)
        elif space == "titan_video" and packet.__name__ == "grouped_linear":
            # The products without their biases, and the biases repeated for each row.
            self.add_workspace(2 * result.nbytes)

    def _count_collective(self, kind, args, kwargs, result) -> None:
        groups = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.ScriptObject, str))]
        names = [a if isinstance(a, str) else _group_name(a) for a in groups]
        axis = next((self.axes[n] for n in names if n in self.axes), Axis("other", 0, 0))
        if axis.ranks == 1 or self.phase == "build":
            return
        payload = max(t.nbytes for t in tree_leaves((args, result)) if isinstance(t, Tensor))
        phase = "" if kind == "send" else self.phase  # the schedule decides when a pipeline sends
        entry = self._collectives[phase, kind, axis.name, axis.ranks]
        entry[0] += 1
        entry[1] += bytes_sent(kind, payload, axis, _splits(kind, args, axis)) if axis.ranks else payload

    def collectives(self) -> list[Collective]:
        """What was sent, in the order of the first call of each kind."""
        return [
            Collective(phase, kind, axis, ranks, count=count, sent=sent)
            for (phase, kind, axis, ranks), (count, sent) in self._collectives.items()
        ]


def _splits(kind: str, args, axis: Axis) -> list[int] | None:
    """The elements that an all-to-all sends to each rank; None: equal parts."""
    if kind != "all-to-all":
        return None
    lists = [a for a in args if isinstance(a, (list, tuple)) and len(a) == axis.ranks]
    splits = [a for a in lists if all(isinstance(n, int) for n in a)]
    return list(splits[-1]) if splits and axis.ranks else None


def _shapes(args) -> tuple:
    return tuple(a.shape if isinstance(a, Tensor) else a for a in args)


def _group_name(boxed: torch.ScriptObject) -> str | None:
    try:
        return ProcessGroup.unbox(boxed).group_name
    except RuntimeError:  # another object, such as a reduce operation
        return None
