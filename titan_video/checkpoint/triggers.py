"""What asks for a checkpoint beside the interval in steps: a file of the user's, and the clock."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

RETRY_SECONDS = 60.0  # after a failed save


class SaveTriggers:
    """`touch FOLDER/save`, and every `interval_minutes` (0: never). Only rank 0 asks; the others get its answer.

    clock: seconds.
    """

    def __init__(self, folder: Path, interval_minutes: float, clock: Callable[[], float] = time.monotonic):
        self.file, self.seconds, self.clock = folder / "save", 60 * interval_minutes, clock
        self.last_save = self.not_before = clock()
        self.is_asked = False  # a save is under way for a request

    def wanted(self) -> bool:
        """Whether to save at the end of this step; once for each request."""
        now = self.clock()
        if self.is_asked or now < self.not_before:
            return False
        self.is_asked = os.path.exists(self.file) or 0 < self.seconds <= now - self.last_save
        return self.is_asked

    def saved(self) -> None:
        """A checkpoint is committed. The file goes if it asked for it, and the clock begins anew."""
        with suppress(OSError):
            if self.is_asked:
                self.file.unlink(missing_ok=True)
        self.is_asked, self.last_save = False, self.clock()

    def failed(self) -> None:
        """A save has failed: a request stands, but not at once."""
        self.is_asked, self.not_before = False, self.clock() + RETRY_SECONDS
