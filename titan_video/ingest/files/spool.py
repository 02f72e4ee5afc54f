"""Lines that are written once and read many times: in memory, and beyond a bound in a file beside the cache. The
temporary folder of a machine may be small, or memory itself.
"""

import errno
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from titan_video.ingest.files.refused import reading
from titan_video.tools.files import StorageError, writing

MEMORY, BLOCK = 64 << 20, 1 << 20  # bytes that stay in memory; that are written and read together


class Spool:
    """what: the lines are, for messages. folders: for the file, which has no name; where one takes no more, all goes to
    the next. StorageError: none takes more.
    """

    def __init__(self, what: str, folders: Sequence[Path]):
        self.what, self.folders = what, list(folders)
        self.waiting = io.BytesIO()
        self.file: BinaryIO | None = None
        self.folder: Path | None = None  # of the file
        self.size = 0  # of the file

    def append(self, line: bytes) -> None:
        """line: with its end."""
        self.waiting.write(line)
        if self.waiting.tell() >= (BLOCK if self.file else MEMORY):
            self._write(self.waiting.getvalue())
            self.waiting = io.BytesIO()

    def __iter__(self) -> Iterator[bytes]:
        """The lines so far, with their ends."""
        at, rest = 0, b""
        while at < self.size:
            with reading(self.what, self.folder):
                block = os.pread(self.file.fileno(), min(BLOCK, self.size - at), at)
                if not block:
                    raise OSError(errno.EIO, "it is shorter than it was")
            at += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        yield from io.BytesIO(self.waiting.getvalue())

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _write(self, data: bytes) -> None:
        while True:
            try:
                with writing(self.what, self.folders[0], self.size + len(data)):
                    self._write_to(self.folders[0], data)
                return
            except StorageError:
                if len(self.folders) == 1:
                    raise
                del self.folders[0]

    def _write_to(self, folder: Path, data: bytes) -> None:
        if folder != self.folder:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder, buffering=0)
            for at in range(0, self.size, BLOCK):
                with reading(self.what, self.folder):
                    block = os.pread(self.file.fileno(), BLOCK, at)
                _write_all(file, block)
            self.close()
            self.file, self.folder = file, folder
        self.file.seek(self.size)
        _write_all(self.file, data)
        self.size += len(data)


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
