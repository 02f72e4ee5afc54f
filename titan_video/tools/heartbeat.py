"""What this process is doing, and since when, for `supervision/watch.py` to read; nothing else depends on it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

phase, is_own, since = "starting", False, time.monotonic()
_reading: dict[int, tuple[float, str]] = {}  # by thread: since when, which file


def enter(name: str, own: bool = False) -> None:
    """The main thread begins a phase. own: it waits for no other rank, so that a limit applies."""
    global phase, is_own, since
    phase, is_own, since = name, own, time.monotonic()


@contextmanager
def own_work(name: str) -> Iterator[None]:
    """A part of a phase in which the rank waits for no other one."""
    name_before, own_before = phase, is_own
    enter(name, own=True)
    try:
        yield
    finally:
        enter(name_before, own_before)


def progress(detail: str = "") -> None:
    """The main thread goes on in its phase; detail: with what."""
    enter(f"{phase.partition(': ')[0]}: {detail}" if detail else phase, is_own)


@contextmanager
def reading(file: object) -> Iterator[None]:
    """This thread reads a file, which a message about a hang then names."""
    thread = threading.get_ident()
    _reading[thread] = time.monotonic(), str(file)
    try:
        yield
    finally:
        del _reading[thread]


def describe() -> str:
    """Phase, its seconds without progress, and the file that is being read for longest."""
    now, files = time.monotonic(), sorted(_reading.values())
    file = f", reading {files[0][1]} for {now - files[0][0]:.0f} s" if files else ""
    return f"{phase} for {now - since:.0f} s{file}"
