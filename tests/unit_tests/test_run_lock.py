"""One run at a time in a folder."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT
from titan_video.supervision import run_lock
from titan_video.supervision.run_lock import NAME, RunLock

OWNER = """
import sys, time
from pathlib import Path
from titan_video.supervision import run_lock
run_lock.BEAT, run_lock.STALE = 0.1, 1.0
lock = run_lock.RunLock(Path(sys.argv[1]))
try:
    lock.acquire()
except ValueError as e:
    sys.exit(str(e))
print("has it", flush=True)
sys.stdin.readline()
lock.release()
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    monkeypatch.setattr(run_lock, "STALE", 1.0)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def start(folder, *before, **env):
    return subprocess.Popen(
        [*before, sys.executable, "-c", OWNER, str(folder)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def acquire_and_release(folder):
    lock = RunLock(folder)
    lock.acquire()
    lock.release()


@pytest.fixture
def owner(tmp_path):
    p = start(tmp_path)
    assert p.stdout.readline() == "has it\n"
    yield p
    p.kill()
    p.communicate()


def test_a_second_start_is_refused_and_names_the_first(tmp_path, owner):
    with pytest.raises(
        ValueError, match=rf"another run uses this folder \(host {os.uname().nodename}, pid {owner.pid}"
    ):
        RunLock(tmp_path).acquire()
    owner.communicate("\n", timeout=10)
    acquire_and_release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_of_this_machine_is_followed_at_once(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE", 1000.0)
    owner.kill()
    owner.wait()
    acquire_and_release(tmp_path)


def as_other_machine(folder, **changes):
    """The lock as if another machine had written it."""
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "node7", "host": "node7"} | changes))


def test_another_machine_is_alive_while_it_touches_the_file(tmp_path, owner):
    as_other_machine(tmp_path)
    with pytest.raises(ValueError, match="host node7"):
        RunLock(tmp_path).acquire()


def test_another_machine_without_a_touch_is_stale(tmp_path, owner):
    as_other_machine(tmp_path)
    os.kill(owner.pid, signal.SIGSTOP)
    lock = RunLock(tmp_path)
    before = time.monotonic()
    lock.acquire()
    assert time.monotonic() - before > 0.5  # not before STALE
    os.kill(owner.pid, signal.SIGCONT)
    assert owner.wait(10) == 1 and "took this folder over" in owner.stderr.read()  # before it writes anything more
    assert lock._is_ours()
    lock.release()


def test_the_restart_of_a_job_takes_over_at_once(tmp_path, owner, monkeypatch):
    as_other_machine(tmp_path, job="12", restarts=0)
    monkeypatch.setattr(run_lock, "STALE", 1000.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(ValueError, match="Slurm job 12"):  # another start in the same job is not its restart
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    acquire_and_release(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}'])
def test_an_unreadable_lock_is_stale_after_a_while(tmp_path, content, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE", 0.3)
    (tmp_path / NAME).write_text(content)
    acquire_and_release(tmp_path)


def try_lock(folder, barrier, results):
    run_lock.BEAT, run_lock.STALE = 0.1, 1.0
    lock = RunLock(folder)
    barrier.wait(20)
    try:
        lock.acquire()
        results.put("has it")
        barrier.wait(20)  # until all have tried
        lock.release()
    except ValueError as e:
        results.put(str(e))
        barrier.wait(20)


@pytest.mark.parametrize("before", ["nothing", "a dead owner", "no hard links"])
def test_of_several_starts_one_wins(tmp_path, before, monkeypatch):
    if before == "no hard links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "not permitted")))
    for _ in range(5):
        if before == "a dead owner":
            p = start(tmp_path)
            p.stdout.readline()
            p.kill()
            p.communicate()
        context = multiprocessing.get_context("fork")
        barrier, results = context.Barrier(4), context.Queue()
        arguments = tmp_path, barrier, results
        starts = [context.Process(target=try_lock, args=arguments, daemon=True) for _ in range(4)]
        for p in starts:
            p.start()
        found = sorted(results.get(timeout=20) for _ in starts)
        for p in starts:
            p.join()
        assert found[-1] == "has it" and all("another run uses this folder" in text for text in found[:-1])
        assert not (tmp_path / NAME).exists()


def in_other_namespaces():
    words = ["unshare", "--map-root-user", "--user", "--uts", "--net", "sh", "-c", 'hostname node7 && exec "$@"', "sh"]
    return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else None


@pytest.mark.skipif(in_other_namespaces() is None, reason="no namespaces here")
def test_two_host_names(tmp_path, owner):
    other = start(tmp_path, *in_other_namespaces())
    _, error = other.communicate(timeout=20)
    assert other.returncode == 1 and f"pid {owner.pid}" in error
