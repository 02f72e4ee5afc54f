"""What every worker process does first."""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2)


def set_up_worker(worker: int) -> None:
    """`worker_init_fn` of every DataLoader: a process group of its own, and the same end as its parent.

    Schedulers signal whole process groups; a worker that died of it would take down the trainer before it could save.

    So a worker ends with its parent instead. torch's own watch over the parent takes seconds, in which the worker holds the parent's connections
    open, and never ends a worker whose parent was killed before it was set up.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux" and multiprocessing.get_start_method() != "forkserver":  # the parent of whose children is the server
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)
