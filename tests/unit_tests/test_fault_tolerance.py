"""Signals agreed over ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from tests.helpers import ROOT, run_ranks
from titan_video.training.fault_tolerance import SignalFlag


def _one_rank_is_signalled(signum):
    group = dist.group.WORLD
    with SignalFlag() as flag:
        seen = [flag.requested(group)]
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signum)
        seen += [flag.requested(group), flag.requested(group)]
        return seen, flag.requested()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_is_seen_by_all(signum):
    # The last value is without a group: rank 0 received no signal and knows of it through the group only.
    assert run_ranks(_one_rank_is_signalled, 2, signum) == [([False, True, True], False), ([False, True, True], True)]


def test_handlers_are_restored():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2)]
    with SignalFlag():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2)] == before


PROGRAM = """
import os, sys, time
from titan_video.training.fault_tolerance import SignalFlag
flag = SignalFlag()
child = os.fork() if sys.argv[1] == "fork" else None
if child == 0:
    time.sleep(20)
    os._exit(7)
print("ready", child, flush=True)
while not flag.requested():
    time.sleep(0.01)
print("seen", flush=True)
time.sleep(20)
"""


def _start(mode):
    p = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return p, p.stdout.readline().split()


def test_a_second_signal_exits_at_once():
    p, _ = _start("alone")
    p.send_signal(signal.SIGUSR2)
    assert p.stdout.readline() == "seen\n"
    started = time.monotonic()
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=10)
    assert p.returncode == 128 + signal.SIGTERM and time.monotonic() - started < 5
    assert err.count("SIGUSR2: saving") == 1


def test_a_forked_process_still_ends_on_sigterm_and_outlives_sigusr2():
    p, (_, child) = _start("fork")
    os.kill(int(child), signal.SIGUSR2)
    time.sleep(0.2)
    assert "Z" not in open(f"/proc/{child}/stat").read().split()[2]
    os.kill(int(child), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while open(f"/proc/{child}/stat").read().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    p.kill()
    p.communicate()
