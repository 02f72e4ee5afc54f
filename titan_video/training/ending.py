"""How a run ends: the message and the exit code. `supervision/`, where it is there, does more around a run.

Exit codes: 0 finished, 85 stopped and to be continued by the same command, 1 error. torchrun takes every code but 0 for
a failure, so under torchrun a stopped rank ends with 0, and the launcher makes the code from status.json.
"""

import os
import sys
from types import TracebackType

from titan_video.tools import signals
from titan_video.tools.logging import logger

FOR_USERS = (ValueError, OSError, FloatingPointError)  # what the user can mend; our own errors are assertions
# What gloo and the store say of a rank that has ended, or gives no answer.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "wait timeout after", "timed out")


def run_id() -> str:
    """Equal on all ranks of one start; "" without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


class RunEnd:
    """A context around a run. save_on_signal: without it signals end the run in their usual way."""

    def __init__(self, save_on_signal: bool):
        if not save_on_signal:
            signals.uninstall()

    def __enter__(self) -> "RunEnd":
        return self

    def set_limit(self, seconds: float) -> None:
        """How long a rank's own work may make no progress."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, signals.Stopped):
            logger.info(str(error))
            sys.exit(0 if run_id() else signals.STOPPED)
        if isinstance(error, FOR_USERS):
            sys.exit(f"error: {error}")
        if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST):
            sys.exit(f"error: another rank has ended or hangs; its own message, or the launcher, says why ({error})")
