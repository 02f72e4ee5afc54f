"""What this process is doing, and since when: a run that hangs ends with the name of who hangs, and where.

The main thread names its phase; a thread writes it to a file every second. The launcher reads the files of its ranks:
one that is not written any more belongs to a process that is frozen. A phase of a rank's own work, which waits for no
other rank, has a limit: without progress for that time the process ends itself. What waits for others has none:
collectives have timeouts of their own.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "heartbeat.json"
SECONDS = 1.0  # between two beats
FIX = "Is the storage reachable? The same command continues; larger timeouts of [comm] wait longer"

_phase, _is_own, _since = "starting", False, time.monotonic()
_limit = 0.0
_reading: dict[int, tuple[float, str]] = {}  # by thread: since when, which file


def start(limit: float) -> None:
    """Begin. Under torchrun the file is beside that of the rank's error, where the launcher looks.

    limit: seconds without progress in own work; it can be set again.
    """
    global _limit
    is_running, _limit = _limit > 0, limit
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    path = Path(error_file).with_name(NAME) if error_file else None
    if not is_running:
        threading.Thread(target=_run, args=(path,), name="heartbeat", daemon=True).start()


def enter(phase: str, is_own: bool = False) -> None:
    """The main thread begins a phase. is_own: it waits for no other rank, so the limit applies."""
    global _phase, _is_own, _since
    _phase, _is_own, _since = phase, is_own, time.monotonic()


@contextmanager
def own_work(phase: str) -> Iterator[None]:
    """A part of a phase to which the limit applies."""
    before = _phase, _is_own
    enter(phase, is_own=True)
    try:
        yield
    finally:
        enter(*before)


def progress(detail: str = "") -> None:
    """The main thread goes on in its phase; detail: with what."""
    enter(f"{_phase.partition(': ')[0]}: {detail}" if detail else _phase, _is_own)


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
    return f"{_phase} for {now - _since:.0f} s{file}"


def _run(path: Path | None) -> None:
    while True:
        if path:
            _write(path)
        if _is_own and time.monotonic() - _since > _limit:
            who = f"rank {os.environ.get('RANK', 0)} (host {os.uname().nodename}, pid {os.getpid()})"
            print(f"error: {who} hangs: {describe()}. {FIX}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(SECONDS)


def _write(path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps({"pid": os.getpid(), "doing": describe(), "limit": _limit}), encoding="utf-8")
        temporary.replace(path)
    except OSError:  # a full disk does not end the run: the launcher takes an old file for a frozen rank, so there must
        path.unlink(missing_ok=True)  # be none
