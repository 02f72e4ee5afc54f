"""Stop requests: one flag, whatever the main thread does; a second one ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from tests.helpers import ROOT, run_ranks
from titan_video.tools import signals
from titan_video.training.fault_tolerance import StopAgreement


def one_rank_is_signalled(signum):
    signals.install()
    stop = StopAgreement(dist.group.WORLD)
    seen = [stop.requested(), stop.requested(False, dist.get_rank() == 1, dist.get_rank() == 0)]
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signum)
        while not signals.stop_requested():
            time.sleep(0.01)
    seen += [stop.requested(), stop.requested(False)]
    with pytest.raises(signals.Stopped):
        stop.guard(lambda: None)()
    return seen, signals.stop_requested()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_is_agreed_by_all(signum):
    seen = [False, [False, False, True, True], True, [True, False]]
    assert run_ranks(one_rank_is_signalled, 2, signum) == [(seen, False), (seen, True)]


PROGRAM = """
import hashlib, os, signal, sys, time
from titan_video.tools import signals
if "hold" in sys.argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("ready", flush=True)
    time.sleep(0.5)
if "grace" in sys.argv:
    signals.GRACE = 20
signals.install()
child = os.fork() if "fork" in sys.argv else None
if child == 0:
    time.sleep(20)
    os._exit(7)
if "uninstall" in sys.argv:
    signals.uninstall()
print("ready", child, flush=True)
if "long" in sys.argv:  # one call, without the interpreter's lock
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 200_000_000)
while not signals.stop_requested():
    time.sleep(0.01)
print("seen", flush=True)
time.sleep(20)
"""


class Start:
    """The program above; `line` is the first that it prints."""

    def __init__(self, *words, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.p = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], cwd=ROOT, **pipes, **options)
        self.line = self.p.stdout.readline().split()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.p.kill()
        self.p.communicate()


@pytest.mark.parametrize("signum", [s.name for s in (signals.FORWARDED, *signals.DIRECT)])
def test_every_stop_signal_sets_the_flag(signum):
    with Start() as started:
        started.p.send_signal(signal.Signals[signum])
        assert started.p.stdout.readline() == "seen\n"


@pytest.mark.parametrize("words", [(), ("long",)], ids=["alone", "in one long call"])
def test_a_second_signal_ends_the_process(words):
    with Start(*words) as started:
        started.p.send_signal(signal.SIGUSR2)
        time.sleep(2 * signals.GRACE)
        started.p.send_signal(signal.SIGINT)
        _, error = started.p.communicate(timeout=10)
        assert started.p.returncode == -signal.SIGINT
        assert error == f"SIGUSR2: {signals.MESSAGE}\n"


def test_twice_in_a_short_time_is_one_request():
    with Start("grace") as started:
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
            started.p.send_signal(signum)
            time.sleep(0.1)
        assert started.p.stdout.readline() == "seen\n"
        assert started.p.poll() is None


def test_what_the_launcher_passes_on_never_counts():
    """Before or after a direct signal."""
    with Start() as started:
        for signum in (signals.FORWARDED, signal.SIGTERM, signals.FORWARDED):
            started.p.send_signal(signum)
            time.sleep(2 * signals.GRACE)
        assert started.p.stdout.readline() == "seen\n"
        assert started.p.poll() is None


def test_a_signal_that_was_held_back_arrives():
    with Start("hold") as started:
        started.p.send_signal(signal.SIGTERM)
        assert [started.p.stdout.readline() for _ in range(2)] == ["ready None\n", "seen\n"]


def test_nohup_is_respected():
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with Start(preexec_fn=ignore) as started:
        started.p.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        started.p.send_signal(signal.SIGTERM)
        assert started.p.stdout.readline() == "seen\n"
        assert started.p.stderr.readline().startswith("SIGTERM")


def test_without_it_a_signal_has_its_usual_effect():
    with Start("uninstall") as started:
        started.p.send_signal(signal.SIGTERM)
        started.p.communicate(timeout=10)
        assert started.p.returncode == -signal.SIGTERM


def test_a_forked_process_leaves_requests_to_its_parent():
    """It ignores all but SIGTERM, by which its parent ends it; and its parent does not take that for a request."""
    with Start("fork") as started:
        child = int(started.line[1])

        def state():
            return open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0]

        for signum in (signal.SIGINT, signal.SIGUSR2, signals.FORWARDED):
            os.kill(child, signum)
        time.sleep(0.3)
        assert state() != "Z"
        os.kill(child, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while state() != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        started.p.send_signal(signal.SIGUSR2)
        assert started.p.stderr.readline().startswith("SIGUSR2")


def test_a_forwarded_signal_that_comes_while_python_ends_is_nothing():
    """A rank has stopped by its own signal, and the launcher passes it on once more."""
    code = (
        "import os, signal, threading\n"
        "from titan_video.tools import signals\n"
        "signals.install()\n"
        "class Late:\n"
        "    def __del__(self):  # after atexit's functions, when Python has given back its handlers\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "import builtins\n"
        "builtins.late = Late()\n"
    )
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert p.returncode == 0, (p.returncode, p.stderr)
