"""Stop requests: signals become a flag that the program reads where it can stop.

SIGTERM, SIGINT (Ctrl-C), SIGUSR2 and SIGHUP ask for a stop. So does SIGUSR1, by which the launcher passes a stop on: it
may come beside the others and never counts as a second request. A second signal of the others, GRACE seconds or more
after the first, ends the process at once.
"""

import atexit
import ctypes
import os
import signal
import socket
import threading
import time

FORWARDED = signal.SIGUSR1
DIRECT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
GRACE = 0.2  # seconds; schedulers send the same signal twice, by two ways
STOPPED = 85  # exit code: stopped, and to be continued by the same command
MESSAGE = "stopping as soon as the run can be continued from there; a second signal stops at once"


class Stopped(Exception):
    """The run ends here, on all ranks, because of a stop request. Nothing is wrong."""


class StopFlag:
    """Set by the first signal. Construct it in the main thread; `close` restores the previous handlers.

    A thread reads the signals, so the flag is set while the main thread is inside a long call, and the second signal
    then meets the system's default: it ends the process whatever Python is doing. Only a call that keeps the
    interpreter's lock delays both until it returns. Signals that were blocked until now, such as by the launcher while
    Python starts, arrive at the end of the constructor.
    """

    def __init__(self):
        # nohup ignores SIGHUP, and a background job of a shell SIGINT: the first stays so.
        self.direct = [s for s in DIRECT if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self.signum = 0  # the first one's
        self._armed = False
        self._pid = os.getpid()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous = {s: signal.signal(s, self._handle) for s in (FORWARDED, *self.direct)}
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        atexit.register(self._ignore_all)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (FORWARDED, *self.direct))

    def _handle(self, signum: int, frame: object) -> None:
        """In the main thread, when it can. Python has written the number to the wake-up socket before."""
        self.signum = self.signum or signum

    def _leave_to_parent(self) -> None:
        """In a forked child: a terminal's or a scheduler's request is for the parent, which ends its children."""
        if self._previous and self._pid != os.getpid():
            signal.set_wakeup_fd(-1)
            for s in self._previous:
                signal.signal(s, signal.SIG_DFL if s == signal.SIGTERM else signal.SIG_IGN)
            self._previous = {}

    def _ignore_all(self) -> None:
        """Python gives signals their default, death, while it ends: one would make a failure of a run that is over."""
        if self._previous and self._pid == os.getpid():
            for s in self._previous:
                signal.signal(s, signal.SIG_IGN)

    def _watch(self) -> None:
        is_known = False
        while data := self._read.recv(1):
            signum = data[0]
            if signum != FORWARDED and signum not in self.direct:
                continue  # another handler's
            self.signum = self.signum or signum
            if not is_known:
                is_known = True
                name = "stop requested" if signum == FORWARDED else signal.Signals(signum).name
                # Another thread may hold the lock of stderr, so this writes past it.
                os.write(2, f"{name}: {MESSAGE}\n".encode())
            if signum in self.direct and not self._armed:
                self._armed = True
                time.sleep(GRACE)
                # signal.signal works in the main thread only, which may be busy for long.
                libc = ctypes.CDLL(None)
                libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
                for s in self.direct:
                    libc.signal(int(s), None)

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        self._previous = {}
        self._write.close()


_flag: StopFlag | None = None


def install() -> None:
    """From here on signals ask for a stop. A second call changes nothing."""
    global _flag
    _flag = _flag or StopFlag()


def uninstall() -> None:
    """From here on signals have their previous effect."""
    global _flag
    if _flag:
        _flag.close()
    _flag = None


def stop_requested() -> bool:
    """Whether this process has been asked to stop. Other ranks may not have been: they must agree on what follows."""
    return _flag is not None and _flag.signum != 0
