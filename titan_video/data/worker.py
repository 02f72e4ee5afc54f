"""What every worker process does first, and the memory in which it sends what it has made."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64  # bytes
BUFFERS = 4  # that a worker keeps
PR_SET_PDEATHSIG = 1  # of prctl(2)


def set_up_worker(worker: int) -> None:
    """`worker_init_fn` of every DataLoader: a process group of its own, and the same end as its parent.

    Schedulers signal whole process groups; a worker that died of it would take down the trainer before it could save.

    So a worker ends with its parent instead. torch's own watch over the parent takes seconds, in which the worker holds
    the parent's connections open, and never ends a worker whose parent was killed before it was set up.
    """
    os.setpgid(0, 0)
    if (
        sys.platform == "linux" and multiprocessing.get_start_method() != "forkserver"
    ):  # the parent of whose children is the server
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


_buffers: list[Tensor] = []  # of this worker


def _shared(size: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def buffer(size: int) -> Tensor:
    """uint8 [size] to decode into: in a worker, shared memory, so that it is sent without another copy; if possible
    some that was let go of.

    Fresh shared memory costs as much as decoding some frames: the system finds, clears and takes back each page. A byte
    behind the buffer says whether it is in use.
    """
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    whole = next((b for b in _buffers if b.numel() > size and not b[-1]), None)
    if whole is None:
        whole = _shared(size + 1)
        _buffers[:] = [whole, *(b for b in _buffers if b[-1])][:BUFFERS]  # those not in use are too small
    whole[-1] = 1
    return whole[:size]


def release(*tensors: Tensor | None) -> None:
    """What lies in the memory of these is of no more use:

    if it is a worker's buffer, that is overwritten from now on.
    """
    for x in tensors:
        if x is not None and x.is_shared():
            torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())[-1] = 0


Layout = dict[str, Any]  # of nested dicts: {name: a layout, or (first byte, type, shape) of a tensor}


def pack(tensors: dict[str, Any]) -> tuple[Tensor, Layout]:
    """Tensors in nested dicts as one, uint8:

    to take over a worker's tensor costs a round trip of a millisecond or more, whatever its size.
    """
    size, parts = 0, []

    def place(x: Any) -> Any:
        nonlocal size
        if isinstance(x, dict):
            return {name: place(part) for name, part in x.items()}
        first, size = size, size + x.nbytes + -x.nbytes % ALIGNMENT
        parts.append((first, x))
        return first, x.dtype, tuple(x.shape)

    layout = place(tensors)
    whole = _shared(max(1, size))
    for first, x in parts:
        whole[first : first + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
    return whole, layout


def unpack(whole: Tensor, layout: Layout) -> dict[str, Any]:
    """The tensors again, which share the memory of `whole`."""

    def part(x: Any) -> Any:
        if isinstance(x, dict):
            return unpack(whole, x)
        first, dtype, shape = x
        return whole[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    return {name: part(x) for name, x in layout.items()}
