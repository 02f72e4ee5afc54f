"""What is said when the system refuses to let us read a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UnreadableFile(OSError, ValueError):
    """A file that cannot be read: one line for the user, who can mend the cause."""


@contextmanager
def reading(what: str, path: str | os.PathLike) -> Iterator[None]:
    """Inside, `what` is read from `path`, or from a file that the system names. UnreadableFile: it refuses.

    It is a ValueError, so that no writer around it (tools.files.writing) takes it for its own.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, ValueError):  # has its message
            raise
        reason = error.strerror or str(error)
        raise UnreadableFile(f"{error.filename or path}: cannot read the {what}: {reason}") from error
