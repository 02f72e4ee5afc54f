"""The processes that decode clips: what each does first, the shared memory they decode into, and who watches them.

A decoder may crash, hang or take all memory on a damaged clip, and a file system may not answer. So clips are decoded
in processes that can be lost: one that dies or is silent is replaced, and what it had is decoded again in the same
order. A clip on which two processes are lost is given up (`failed` of the data set).
"""

import atexit
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.pool import ExceptionWithTraceback
from typing import Any

import torch
from torch import Tensor

from titan_video.ingest.files.media import DEFAULT_LIMITS, DecodeLimits
from titan_video.tools.bounded import short
from titan_video.tools.logging import logger

MAX_BLOCKS = 4  # of shared memory that a worker keeps
PR_SET_PDEATHSIG = 1  # of prctl(2)
MAX_RESTARTS = 20  # of all workers of one pass over the clips
GRACE = 10.0  # seconds behind a worker's own alarm, after which it is ended from outside
MAX_DESCRIPTORS = 200  # of one message; Linux takes 253
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GIB = 1 << 30
_is_worker = False
_blocks: list[Tensor] = []  # shared memory of this worker


def map_in_workers(dataset: Any, items: Iterable, num_workers: int, prefetch_factor: int = 2) -> Iterator[Any]:
    """dataset[item] for each item, in order, in `num_workers` processes (0: in this one, where nothing is watched).

    dataset: may have `name(item)`, the file, for messages; `limits(item)`, the DecodeLimits of an item; and
        `failed(item, reason)`, which gives the result of an item on which two processes were lost, or which needs more
        memory than its limit. Without it such an item is a RuntimeError, as is the loss of MAX_RESTARTS processes.
    prefetch_factor: items in advance for each process.
    """
    if not num_workers:
        yield from (dataset[item] for item in items)
        return
    pool = _Pool(dataset, num_workers, num_workers * prefetch_factor)
    atexit.register(pool.close)  # before multiprocessing's own, which waits for the processes
    try:
        yield from pool.results(items)
    finally:
        atexit.unregister(pool.close)
        pool.close()


# ---- in the worker ----


def set_up_worker(worker: int) -> None:
    """The process gets a process group of its own, and ends with its parent.

    Schedulers signal whole process groups. A worker that died of such a signal would end the trainer before it could
    save, so a worker has a group of its own and ends with its parent instead. Without the request to the system, a
    worker whose parent is killed lives until it has decoded its clip.
    """
    os.setpgid(0, 0)
    # Under forkserver the parent is the server and not the trainer.
    if sys.platform == "linux" and multiprocessing.get_start_method() != "forkserver":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def _serve(connection: socket.socket, others: socket.socket, dataset: Any, worker: int) -> None:
    """The worker's program: receive (number, item), send (number, result, error), until the connection closes."""
    global _is_worker
    others.close()
    for number in IGNORED:  # some schedulers signal every process; the parent decides when a worker ends
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    set_up_worker(worker)
    torch.set_num_threads(1)
    _is_worker = True
    requests: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(connection, requests), daemon=True).start()
    start = _private_bytes()
    while True:
        number, item = requests.get()
        result, error = _make(dataset, item, start)
        try:
            _send(connection, (number, result, error))
        except (pickle.PicklingError, AttributeError, TypeError) as e:  # it has no pickle
            _send(connection, (number, None, RuntimeError(f"{short(error or result)} cannot be sent: {e}")))


def _read_requests(connection: socket.socket, requests: queue.SimpleQueue) -> None:
    """In a thread, so that the parent never waits for a worker that decodes."""
    with suppress(OSError, EOFError):
        while True:
            requests.put(_receive(connection))
    os._exit(0)


def _make(dataset: Any, item: Any, start: int) -> tuple[Any, Any]:
    """(the item's result, None) or (None, error with its traceback).

    An item that takes too long ends the process, by an alarm that also ends a call into a library.
    """
    limits = _limits(dataset, item)
    _limit_memory(start, limits.memory_gib)
    if limits.seconds:
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    try:
        return dataset[item], None
    except Exception as e:
        return None, ExceptionWithTraceback(e, e.__traceback__)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _private_bytes() -> int:
    """Private writable memory that this process has reserved, which RLIMIT_DATA counts; shared memory is not in it."""
    with suppress(OSError), open("/proc/self/status") as f:
        return next((int(line.split()[1]) << 10 for line in f if line.startswith("VmData:")), 0)
    return 0


def _limit_memory(start: int, memory_gib: float) -> None:
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = start + int(memory_gib * GIB) if memory_gib else hard
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _limits(dataset: Any, item: Any) -> DecodeLimits:
    return dataset.limits(item) if hasattr(dataset, "limits") else DEFAULT_LIMITS


# ---- messages: tensors go as descriptors of shared memory, everything else as a pickle ----


class _Pickler(pickle.Pickler):
    """torch's own way, over a socket that the sender serves, makes the receiver wait for a sender that has stopped."""

    def __init__(self, buffer: io.BytesIO):
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.descriptors: list[int] = []
        self.sent: dict[int, tuple[int, int]] = {}  # by the address of a storage: its place among them, its size

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or obj.device.type != "cpu":
            return None
        storage = obj.untyped_storage()
        if storage.data_ptr() not in self.sent:
            if len(self.descriptors) >= MAX_DESCRIPTORS:
                return None
            descriptor, size = storage._share_fd_cpu_()
            self.sent[storage.data_ptr()] = len(self.descriptors), size
            self.descriptors.append(descriptor)
        index, size = self.sent[storage.data_ptr()]
        return index, size, obj.dtype, obj.storage_offset(), tuple(obj.shape), obj.stride()


class _Unpickler(pickle.Unpickler):
    """Views of one storage arrive as such: `release` must see that they are one."""

    def __init__(self, buffer: io.BytesIO, descriptors: list[int]):
        super().__init__(buffer)
        self.descriptors = descriptors
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        index, size, dtype, offset, shape, stride = pid
        if index not in self.storages:
            self.storages[index] = torch.UntypedStorage._new_shared_fd_cpu(self.descriptors[index], size)
        return torch.empty(0, dtype=dtype).set_(self.storages[index], offset, shape, stride)


def _send(connection: socket.socket, message: Any) -> None:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(message)
    data = buffer.getbuffer()
    socket.send_fds(connection, [len(data).to_bytes(8, "little")], pickler.descriptors)
    connection.sendall(data)


def _receive(connection: socket.socket) -> Any:
    """EOFError: the other side is gone. TimeoutError: it stopped in the middle."""
    head, descriptors, _, _ = socket.recv_fds(connection, 8, MAX_DESCRIPTORS)
    try:
        if len(head) < 8:
            raise EOFError
        data = bytearray(int.from_bytes(head, "little"))
        rest = memoryview(data)
        while rest:
            count = connection.recv_into(rest)
            if not count:
                raise EOFError
            rest = rest[count:]
        return _Unpickler(io.BytesIO(data), descriptors).load()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# ---- in the trainer ----


class _Worker:
    """numbers: of the items that it has, in the order of its work. silent_since: when it was first found silent.
    is_broken: an item could not be sent to it.
    """

    def __init__(self, index: int, dataset: Any):
        self.index = index
        self.numbers: deque[int] = deque()
        self.silent_since: float | None = None
        self.is_broken = False
        self.connection, theirs = socket.socketpair()
        with theirs:
            args = (theirs, self.connection, dataset, index)
            self.process = multiprocessing.Process(target=_serve, args=args, daemon=True)
            self.process.start()
        self.connection.settimeout(GRACE)

    def kill(self) -> int | None:
        """End the process. Returns how it ended, if it had ended by itself, as `exitcode` of multiprocessing."""
        self.connection.close()
        self.process.join(0.5)
        ended = self.process.exitcode
        self.process.kill()
        self.process.join(GRACE)  # not for ever: a process in a file system that does not answer cannot be killed
        return ended


class _Pool:
    """capacity: items that are in work or wait for the reader."""

    def __init__(self, dataset: Any, num_workers: int, capacity: int):
        self.dataset, self.capacity = dataset, capacity
        self.items: dict[int, Any] = {}
        self.made: dict[int, tuple[Any, Exception | None]] = {}
        self.losses: Counter[int] = Counter()
        self.restarts = 0
        self.workers: list[_Worker] = []
        for index in range(num_workers):
            self.workers.append(_Worker(index, dataset))

    def close(self) -> None:
        for worker in self.workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join(GRACE)

    def results(self, items: Iterable) -> Iterator[Any]:
        source, number = enumerate(items), 0
        self._fill(source)
        while number in self.items:
            while number not in self.made:
                self._wait()
            del self.items[number]
            result, error = self.made.pop(number)
            if error is not None:
                raise error
            self._fill(source)
            yield result
            number += 1

    def _fill(self, source: Iterator[tuple[int, Any]]) -> None:
        while len(self.items) < self.capacity and (following := next(source, None)):
            number, item = following
            self.items[number] = item
            self._give(min(self.workers, key=lambda worker: len(worker.numbers)), number)

    def _give(self, worker: _Worker, number: int) -> None:
        worker.numbers.append(number)
        try:
            _send(worker.connection, (number, self.items[number]))
        except OSError:
            worker.is_broken = True

    def _wait(self) -> None:
        """Take what the workers have sent, and replace those that are lost."""
        for worker in [worker for worker in self.workers if worker.is_broken]:
            self._replace(worker, is_silent=False)
        busy = [worker for worker in self.workers if worker.numbers]
        ready = multiprocessing.connection.wait([worker.connection for worker in busy], timeout=1.0)
        for worker in busy:
            if worker.connection in ready:
                try:
                    number, result, error = _receive(worker.connection)
                except Exception as e:  # it died, or stopped, or what it sent is broken
                    self._replace(worker, is_silent=isinstance(e, TimeoutError))
                    continue
                worker.numbers.remove(number)
                worker.silent_since = None
                self._take(number, result, error)
            elif worker.silent_since is None:
                worker.silent_since = time.monotonic()
            else:
                seconds = _limits(self.dataset, self.items[worker.numbers[0]]).seconds
                if seconds and time.monotonic() - worker.silent_since > seconds + GRACE:
                    self._replace(worker, is_silent=True)

    def _take(self, number: int, result: Any, error: Exception | None) -> None:
        if isinstance(error, MemoryError):
            gib = _limits(self.dataset, self.items[number]).memory_gib
            reason = f"too large: decoding needs more than {gib:g} GiB of memory (data.decode_memory_gib)"
            self._give_up(number, reason)
        else:
            self.made[number] = result, error

    def _give_up(self, number: int, reason: str) -> None:
        if hasattr(self.dataset, "failed"):
            self.made[number] = self.dataset.failed(self.items[number], reason), None
        else:
            self.made[number] = None, RuntimeError(f"{self._name(number)}: {reason}")

    def _name(self, number: int) -> str:
        item = self.items[number]
        return self.dataset.name(item) if hasattr(self.dataset, "name") else f"item {short(item)}"

    def _replace(self, worker: _Worker, is_silent: bool) -> None:
        """A new process in place of one that is dead or silent; it gets what that had. The first item is at fault."""
        pid, ended = worker.process.pid, worker.kill()
        number, self.restarts = worker.numbers[0], self.restarts + 1
        seconds = f"{_limits(self.dataset, self.items[number]).seconds:g} s (data.decode_timeout_seconds)"
        if is_silent:
            reason = f"too slow: nothing came for {seconds}"
        elif ended == -signal.SIGALRM:
            reason = f"too slow: decoding took more than {seconds}"
        else:
            reason = f"crashed: its decoding process ended {_how(ended)}"
        where = f"decoding process {worker.index} (pid {pid}) at {self._name(number)}"
        self.losses[number] += 1
        if self.restarts > MAX_RESTARTS:
            raise RuntimeError(
                f"{where}: {reason}. {MAX_RESTARTS} such processes were lost: is the storage reachable, is the machine "
                "out of memory? Start again with the same command, which continues; data.num_workers = 0 shows the clip"
            )
        if self.losses[number] > 1:
            self._give_up(worker.numbers.popleft(), reason)
        logger.warning(f"{where}: {reason}; it is replaced, {self.restarts} of at most {MAX_RESTARTS} times")
        new = self.workers[self.workers.index(worker)] = _Worker(worker.index, self.dataset)
        for number in worker.numbers:
            self._give(new, number)


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"with exit code {exitcode}"
    return f"by {signal.Signals(-exitcode).name}"


# ---- shared memory ----


def alloc_shared(size: int) -> Tensor:
    """uint8 [size] to decode into. In a worker it is shared memory, which is sent without another copy; a block that
    was released is used again.

    Fresh shared memory costs as much as decoding some frames: the system finds, clears and takes back each page. One
    byte behind the block says whether it is in use.
    """
    if not _is_worker:
        return torch.empty(size, dtype=torch.uint8)
    block = next((b for b in _blocks if b.numel() > size and not b[-1]), None)
    if block is None:
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_using_fd_cpu(size + 1))
        _blocks[:] = [block, *(b for b in _blocks if b[-1])][:MAX_BLOCKS]  # those not in use are too small
    block[-1] = 1
    return block[:size]


def release(*tensors: Tensor | None) -> None:
    """The content of these is not needed any more. A worker's shared memory is overwritten from now on.

    A block that several of them view is given back once: a second time the worker may have another clip in it already.
    """
    shared = [x.untyped_storage() for x in tensors if x is not None and x.is_shared()]
    for storage in {storage.data_ptr(): storage for storage in shared}.values():
        _give_back(storage)


def _give_back(storage: torch.UntypedStorage) -> None:
    torch.empty(0, dtype=torch.uint8).set_(storage)[-1] = 0
