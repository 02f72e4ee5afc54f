"""What surrounds a run: its folder's lock, its heartbeat, `status.json`, the message and the exit code at its end.

Exit codes: 0 finished, 85 stopped and to be continued by the same command, 1 error. torchrun takes every other code
than 0 for a failure, so under torchrun a stopped rank ends with 0, and the launcher makes the code from status.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from titan_video.checkpoint.files import list_steps
from titan_video.config.job_config import JobConfig
from titan_video.supervision import watch
from titan_video.supervision.run_lock import RunLock
from titan_video.tools.files import atomic_write, optional_write, writing
from titan_video.tools.signals import STOPPED, Stopped
from titan_video.training.ending import FOR_USERS, RunEnd, run_id

NAME = "status.json"


def read_status(folder: Path) -> dict[str, Any]:
    """The content of status.json; {} without one, or if it is not readable."""
    try:
        status = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return status if isinstance(status, dict) else {}
    except (OSError, ValueError):
        return {}


def mark_failed(folder: Path, run_id: str, message: str) -> None:
    """Say in status.json that the run of this id failed, if its first rank was ended before it could."""
    status = read_status(folder)
    if status.get("run_id") == run_id and status.get("exit_code") is None:
        status |= {"status": "failed", "exit_code": 1, "message": message}
        atomic_write(folder / NAME, json.dumps(status, indent=1) + "\n")


class RunStatus(RunEnd):
    """A context around a run. Rank 0 holds the lock and writes status.json: status, step of the newest checkpoint, exit
    code, and how many starts in a row have made no progress.

    ValueError: another run uses the folder.
    """

    def __init__(self, config: JobConfig):
        self.folder = Path(config.job.dump_folder)
        self.checkpoints = self.folder / config.checkpoint.folder
        self.is_first = int(os.environ.get("RANK", 0)) == 0
        self.lock = RunLock(self.folder) if self.is_first else None
        self.limit = float(config.comm.init_timeout_seconds)
        super().__init__(config.fault_tolerance.save_on_signal)

    def __enter__(self) -> "RunStatus":
        if self.lock:
            try:
                with writing("lock of the run", self.lock.path):
                    self.lock.acquire()
            except FOR_USERS as e:
                sys.exit(f"error: {e}")
        if self.is_first:
            before, self.first_step = read_status(self.folder), self._step()
            ended_there = before.get("status") not in (None, "finished") and before.get("step") == self.first_step
            self.idle_starts = int(before.get("idle_starts", 0)) + 1 if ended_there else 0
            self._write("running", None)
        watch.start(self.limit)
        return self

    def set_limit(self, seconds: float) -> None:
        """How long a rank's own work may make no progress."""
        watch.start(seconds)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_first:
            if error is None:
                self._write("finished", 0)
            elif isinstance(error, Stopped):
                self._write("stopped", STOPPED)
            else:
                self._write("failed", 1, f"{error or kind}")
        if self.lock:
            self.lock.release()
        super().__exit__(kind, error, trace)

    def _step(self) -> int:
        return max(list_steps(self.checkpoints), default=0)

    def _write(self, status: str, exit_code: int | None, message: str = "") -> None:
        step = self._step()
        content = {
            "status": status,
            "step": step,
            "exit_code": exit_code,
            "message": message,
            "idle_starts": self.idle_starts if step <= self.first_step else 0,
            "run_id": run_id(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        }
        with optional_write("status of the run", self.folder / NAME):
            atomic_write(self.folder / NAME, json.dumps(content, indent=1) + "\n")
