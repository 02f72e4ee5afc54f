"""Atomic writes: a file is complete or unchanged. The hash of a file. What is said when the system refuses a write."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_video.tools.logging import logger

_warned: set[str] = set()


class StorageError(OSError, ValueError):
    """A file that cannot be written: one line for the user, who can mend the cause."""


@contextmanager
def writing(what: str, path: str | os.PathLike, size: int | None = None) -> Iterator[None]:
    """Inside, `what` is written to `path`; size: its bytes, where they are known.

    StorageError: the system refuses. This is the one message for it, and takes the place of the writers' own.
    """
    free = shutil.disk_usage(next(p for p in (path, *Path(path).absolute().parents) if os.path.exists(p))).free
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # writers in C++ and Rust hide it behind errors of their own
        while cause and not isinstance(cause, OSError) and "(os error " not in str(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None or isinstance(error, ValueError):  # of a file that is read meanwhile, with its message
            raise
        reason = getattr(cause, "strerror", None) or str(cause).rpartition(": ")[2]
        needed = "" if size is None else f"{size:,} bytes needed, "
        raise StorageError(f"{path}: cannot write the {what}: {reason} ({needed}{free:,} bytes were free)") from error


@contextmanager
def optional_write(what: str, path: str | os.PathLike, size: int | None = None) -> Iterator[None]:
    """`writing`, for what a run can do without: the error becomes a warning, once for each `what`."""
    try:
        with writing(what, path, size):
            yield
    except StorageError as error:
        if what not in _warned:
            logger.warning(f"{error}; the run goes on, and does not say this again")
        _warned.add(what)


@contextmanager
def atomic_path(path: str | os.PathLike, what: str = "file", size: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, whose folder is created. The file written there replaces `path` at the end.

    The file is synced to disk before the rename and its folder after it, so a crash at any moment leaves the old file
    or the new one. An exception leaves the old one. The temporary name is hidden and contains the host and process.
    StorageError, what, size: see `writing`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    with writing(what, path, size):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with suppress(OSError):  # the folder cannot be written
                temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, data: bytes | str, what: str = "file") -> None:
    """Replace the content of `path`; see `atomic_path`."""
    data = data.encode() if isinstance(data, str) else data
    with atomic_path(path, what, len(data)) as temporary:
        temporary.write_bytes(data)


def sync(path: str | os.PathLike) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
