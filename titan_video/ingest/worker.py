"""The processes that decode clips: what each does first, the shared memory they decode into, and the DataLoader that
runs them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

MAX_BLOCKS = 4  # of shared memory that a worker keeps
PR_SET_PDEATHSIG = 1  # of prctl(2)
TIMEOUT = 600  # seconds for one item; only a process that has stopped or hangs in a file system takes so long


def map_in_workers(dataset: Dataset, items: Iterable, num_workers: int, prefetch_factor: int = 2) -> Iterator[Any]:
    """dataset[item] for each item, in order, in `num_workers` processes (0: in this one).

    prefetch_factor: items in advance for each process.
    RuntimeError: a process has died, or gave nothing for ten minutes.
    """
    options: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": set_up_worker}
    if num_workers:
        options |= {"prefetch_factor": prefetch_factor, "timeout": TIMEOUT}
    try:
        yield from DataLoader(dataset, batch_size=None, sampler=items, **options)
    except RuntimeError as e:
        if "timed out" not in str(e):
            raise
        raise RuntimeError(
            f"a decoding process gave nothing for {TIMEOUT} s: is the storage reachable, is the machine out "
            "of memory? Start again with the same command, which continues; data.num_workers = 0 shows the clip"
        ) from e


def set_up_worker(worker: int) -> None:
    """`worker_init_fn` of every DataLoader: the process gets a process group of its own, and ends with its parent.

    Schedulers signal whole process groups. A worker that died of such a signal would end the trainer before it could
    save, so a worker has a group of its own and ends with its parent instead. torch's own watch over the parent takes
    seconds, in which the worker holds the parent's connections open, and it never ends a worker whose parent was killed
    before the watch began.
    """
    os.setpgid(0, 0)
    # Under forkserver the parent is the server and not the trainer.
    if sys.platform == "linux" and multiprocessing.get_start_method() != "forkserver":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


_blocks: list[Tensor] = []  # shared memory of this worker


def alloc_shared(size: int) -> Tensor:
    """uint8 [size] to decode into. In a worker it is shared memory, which is sent without another copy; a block that
    was released is used again.

    Fresh shared memory costs as much as decoding some frames: the system finds, clears and takes back each page. One
    byte behind the block says whether it is in use.
    """
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    block = next((b for b in _blocks if b.numel() > size and not b[-1]), None)
    if block is None:
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size + 1))
        _blocks[:] = [block, *(b for b in _blocks if b[-1])][:MAX_BLOCKS]  # those not in use are too small
    block[-1] = 1
    return block[:size]


def release(*tensors: Tensor | None) -> None:
    """The content of these is not needed any more. A worker's shared memory is overwritten from now on."""
    for x in tensors:
        if x is not None and x.is_shared():
            torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())[-1] = 0
