"""A file system that is full, for tests: a small tmpfs in a mount namespace of its own, which needs no rights.

Other processes reach it through /proc/PID/root of the process that holds the namespace.
"""

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder, options="size=1m"):
    """A tmpfs with these mount options; its path. Skips the test where the system lets nobody mount one."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare of util-linux")
    folder.mkdir()
    script = 'mount -t tmpfs -o "$0" tmpfs "$1" && echo mounted && exec sleep 600'
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, options, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("needs a tmpfs in a user namespace")
        yield Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.kill()
        holder.wait()


def fill(disk, leave=0):
    """Fill a disk up to about `leave` bytes."""
    size = shutil.disk_usage(disk).free - leave
    (disk / "ballast").write_bytes(bytes(max(size, 0)))


def free(disk):
    (disk / "ballast").unlink()
