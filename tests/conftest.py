"""For all tests: signals as a program that is started from a terminal finds them, and no program outlives its test."""

import signal

import pytest

from tests.helpers import end_programs

# A background job of a shell ignores SIGINT, one under nohup SIGHUP, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def programs_end_with_their_test():
    yield
    end_programs()
