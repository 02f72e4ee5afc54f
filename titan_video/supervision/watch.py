"""A run that hangs ends with the name of who hangs, and where.

A thread of each rank writes what the main thread is doing (tools/heartbeat.py) to a file every second. The launcher
reads the files of its ranks: one that is not written any more belongs to a process that is frozen. A phase of a rank's
own work, which waits for no other rank, has a limit: without progress for that time the process ends itself. What waits
for others has none: collectives have timeouts of their own.
"""

import atexit
import json
import os
import sys
import threading
import time
from pathlib import Path

from titan_video.tools import heartbeat

NAME = "heartbeat.json"
SECONDS = 1.0  # between two beats
# How long Python may take to end, in which no thread runs: a second of the processor, which a busy machine stretches.
ENDING_SECONDS = 60.0
FIX = "Is the storage reachable? The same command continues; larger timeouts of [comm] wait longer"
_limit = 0.0
_lock = threading.Lock()


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
        atexit.register(_end, path)


def _end(path: Path | None) -> None:
    global _limit
    _limit = max(_limit, ENDING_SECONDS)
    heartbeat.enter("the end of Python")
    if path:
        _write(path)


def _run(path: Path | None) -> None:
    while True:
        if path:
            _write(path)
        if heartbeat.is_own and time.monotonic() - heartbeat.since > _limit:
            who = f"rank {os.environ.get('RANK', 0)} (host {os.uname().nodename}, pid {os.getpid()})"
            print(f"error: {who} hangs: {heartbeat.describe()}. {FIX}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(SECONDS)


def _write(path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with _lock:
        try:
            rank = int(os.environ.get("RANK", 0))
            beat = {"pid": os.getpid(), "rank": rank, "doing": heartbeat.describe(), "limit": _limit}
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.replace(path)
        except OSError:  # a full disk does not end the run: the launcher takes an old file for a frozen rank, so there
            path.unlink(missing_ok=True)  # must be none
