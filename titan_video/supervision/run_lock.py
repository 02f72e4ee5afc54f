"""One run at a time in a folder: a file that names who uses it.

The owner touches the file every BEAT seconds. A second start is refused while the owner is alive: on the same machine
that is its process, elsewhere its touches. After STALE seconds without one the next start takes the folder over; the
restart of a Slurm job, or of a process of this machine that has ended, does so at once. An owner that was suspended
until its folder was taken over ends itself before it writes anything more.
"""

import json
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "run.lock"
BEAT, STALE = 10.0, 60.0  # seconds


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine began; "" if there is none. Process ids alone are used again."""
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if fields and fields[0] != "Z" else ""


class RunLock:
    """The lock of `folder`, held from `acquire` to `release`."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self.token = uuid.uuid4().hex
        self.temporary = folder / f".{NAME}.{self.token}"
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        # Process ids can be compared in one boot and one namespace of process ids.
        spaces = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        self.owner = {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "machine": f"{os.uname().nodename} {_first_line('/proc/sys/kernel/random/boot_id')} {spaces}",
            "started": process_start(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restarts": self.restarts,
            "token": self.token,
        }
        self._released = threading.Event()

    def acquire(self) -> None:
        """ValueError: another run uses the folder; the message says which."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first_look = None
        while not self._create():
            other, touched = self._read()
            if other is None:
                continue  # released between the two lines
            if self._is_stale(other, touched):
                if self._take_over(other["token"]):
                    break
            elif other["machine"] == self.owner["machine"] or first_look not in (None, (other["token"], touched)):
                job = f", Slurm job {other['job']}" if other["job"] else ""
                raise ValueError(
                    f"{self.folder}: another run uses this folder (host {other['host']}, pid {other['pid']}{job}; "
                    f"{self._age(touched):.0f} s ago). Wait until it ends, stop it, or choose another job.dump_folder"
                )
            first_look = first_look or (other["token"], touched)
            time.sleep(BEAT / 10)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Put our lock there if there is none: a hard link appears complete, on network file systems too."""
        self.temporary.write_text(json.dumps(self.owner), encoding="utf-8")
        try:
            os.link(self.temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                self.path.touch(exist_ok=False)
            except FileExistsError:
                return False
            self.path.write_text(json.dumps(self.owner), encoding="utf-8")
        finally:
            self.temporary.unlink(missing_ok=True)
        return True

    def _read(self) -> tuple[dict[str, Any] | None, float]:
        """What the lock says, and when it was touched; (None, 0) without a lock."""
        unknown = dict.fromkeys(self.owner, "") | {"host": "unknown", "pid": 0, "restarts": 0}
        try:
            touched, text = self.path.stat().st_mtime, self.path.read_text(encoding="utf-8")
            return unknown | json.loads(text), touched
        except FileNotFoundError:
            return None, 0.0
        except (ValueError, TypeError):
            return unknown, touched

    def _is_ours(self) -> bool:
        return (self._read()[0] or {}).get("token") == self.token

    def _age(self, touched: float) -> float:
        """Seconds since a time of the file system's clock, which may not be this machine's."""
        self.temporary.touch()
        try:
            return self.temporary.stat().st_mtime - touched
        finally:
            self.temporary.unlink(missing_ok=True)

    def _is_stale(self, other: dict[str, Any], touched: float) -> bool:
        if other["machine"] == self.owner["machine"]:
            return process_start(other["pid"]) != other["started"]
        is_restart = other["job"] and other["job"] == self.owner["job"] and other["restarts"] < self.restarts
        return bool(is_restart) or self._age(touched) > STALE

    def _take_over(self, token: str) -> bool:
        """Replace a stale lock, of the owner `token`; False: another start does it."""
        mutex = self.folder / f"{NAME}.takeover"
        try:
            mutex.touch(exist_ok=False)
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._age(mutex.stat().st_mtime) > STALE:
                    mutex.unlink()  # of a start that was killed there
            return False
        try:
            other, touched = self._read()
            if other is None or other["token"] != token or not self._is_stale(other, touched):
                return False
            self.temporary.write_text(json.dumps(self.owner), encoding="utf-8")
            os.replace(self.temporary, self.path)
            return True
        finally:
            mutex.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            try:
                if not self._is_ours() and not self._released.is_set():
                    print(f"error: {self.folder}: another run took this folder over", file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(self.path)
            except OSError:
                pass  # a storage that is away for a while
