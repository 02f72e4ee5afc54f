"""A table as columns in one file, mapped into memory: the processes of a machine share its pages, and a process has no
memory of its own that grows with the rows.

    8 bytes      length of the header
    header       JSON: format, rows, note, for each column its dtype, shape and offset, and a digest of all of them
    columns      each at a multiple of 64 bytes; a column of bytes of any length is one of all bytes and one of offsets

A file is written once, under another name that is replaced at the end, and never changed.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from titan_video.tools.files import atomic_path, writing

FORMAT = "titan-video columns 1"
ALIGNMENT, ROWS_WAITING, MAX_HEADER = 64, 4096, 1 << 30
UNUSED_SECONDS, KILLED_SECONDS = 60 * 86400, 86400
TIMES_SHARED = 1 << 16  # whose places a writer remembers


class Columns(Mapping[str, np.ndarray]):
    """{name: column} of a file, and its `note`, what else the writer had to say. It is sent to another process as its
    path.

    is_copied: the file is read and not mapped, so that it may be deleted meanwhile.
    ValueError: no such file, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike, is_copied: bool = False):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if length > min(size, MAX_HEADER):
                    raise ValueError("its header is longer than the file")
                header = json.loads(f.read(length))
            if header["format"] != FORMAT:
                raise ValueError("it has another format")
            self.num_rows, self.note, start = int(header["rows"]), header["note"], _aligned(8 + length)
            # Torch's mapping, unlike numpy's, holds no file descriptor, of which a process has few.
            if is_copied:
                data = np.fromfile(self.path, np.uint8)[start:]
            else:
                data = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()[start:]
            data.flags.writeable = False
            self._columns = {name: _column(data, *at) for name, at in header["columns"].items()}
        except FileNotFoundError as e:
            raise ValueError(f"{path}: is not there; all nodes of a run must see the cache folder") from e
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise ValueError(f"{path}: is no table of columns ({e}); delete this file and start again") from e
        except RuntimeError as e:  # torch's own, for a file that is gone
            raise ValueError(f"{path}: cannot be mapped ({e}); start again") from e

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name]

    def __iter__(self):
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __reduce__(self) -> tuple:
        return Columns, (self.path,)

    def blob(self, name: str, row: int) -> bytes:
        """The bytes of a row in a column of bytes."""
        start, end = self[f"{name}/ends"][row : row + 2].tolist()
        return self[name][start:end].tobytes()


class _IsThere(Exception):
    """The table that is written is there already."""


class ColumnWriter:
    """Writes a table row by row, or column by column. What waits is bounded: columns grow in temporary files.

    fixed: the columns of one value a row, a structured dtype. blobs: names of the columns of bytes.
    folder: of the temporary files. StorageError, of each method: it takes no more.
    """

    def __init__(self, folder: str | os.PathLike, fixed: np.dtype, blobs: Sequence[str] = ()):
        self.folder, self.fixed, self.blobs = Path(folder), fixed, tuple(blobs)
        with writing("table", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.num_rows = self.num_bytes = 0
        self.rows: list[tuple] = []
        self.texts: list[tuple[bytes, ...]] = []
        self.ends = np.zeros(len(self.blobs), np.int64)
        self.files: dict[str, BinaryIO] = {}
        self.columns: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.digest = hashlib.blake2b(digest_size=16)
        for name in self.blobs:
            self._put(f"{name}/ends", np.zeros(1, np.int64))

    def append(self, row: tuple, *texts: bytes) -> None:
        self.rows.append(row)
        self.texts.append(texts)
        if len(self.rows) == ROWS_WAITING:
            self._flush()

    def put(self, name: str, column: np.ndarray) -> None:
        """More rows of a column that is not one of `fixed` and `blobs`: [n, ...]."""
        self._put(name, column)

    def write(self, path: str | os.PathLike, note: Mapping[str, Any], what: str, num_rows: int | None = None) -> None:
        """The file, and the end of this writer. num_rows: of a table that was written by `put` alone.

        A file that is there and holds the same stays: other processes may have it mapped, and on NFS a file that
        another machine has replaced is gone for them.
        """
        self._flush()
        offset, places = 0, {}
        for name, (dtype, shape) in self.columns.items():
            places[name] = dtype.str, shape, offset
            offset = _aligned(offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        rows = self.num_rows if num_rows is None else num_rows
        about = {"format": FORMAT, "rows": rows, "note": note, "columns": places, "digest": self.digest.hexdigest()}
        header = json.dumps(about).encode()
        size, header = offset + len(header), len(header).to_bytes(8, "little") + header
        with suppress(_IsThere), atomic_path(path, what, size) as temporary, open(temporary, "wb") as out:
            out.write(header)
            for name, file in self.files.items():
                out.write(bytes(-out.tell() % ALIGNMENT))
                assert out.tell() == _aligned(len(header)) + places[name][2]
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)
            out.flush()  # before atomic_path syncs the file
            if _begins_with(path, header, out.tell()):
                raise _IsThere

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            with suppress(OSError):  # of a full disk, again: what it still holds is of no use
                file.close()

    def _flush(self) -> None:
        if not self.rows:
            return
        table = np.array(self.rows, self.fixed)
        for name in self.fixed.names:
            self._put(name, np.ascontiguousarray(table[name]))
        for i, name in enumerate(self.blobs):
            parts = [texts[i] for texts in self.texts]
            ends = self.ends[i] + np.cumsum([len(part) for part in parts], dtype=np.int64)
            self._put(name, np.frombuffer(b"".join(parts), np.uint8))
            self._put(f"{name}/ends", ends)
            self.ends[i] = ends[-1]
        self.num_rows += len(self.rows)
        self.rows, self.texts = [], []

    def _put(self, name: str, column: np.ndarray) -> None:
        data = np.ascontiguousarray(column).data
        self.num_bytes += column.nbytes
        try:
            if name not in self.files:
                self.files[name] = tempfile.TemporaryFile(dir=self.folder)
                self.columns[name] = column.dtype, (0, *column.shape[1:])
            self.files[name].write(data)
        except OSError as error:
            with writing("table", self.folder, self.num_bytes):  # asks how much is free: not for each column
                raise error
        dtype, (count, *shape) = self.columns[name]
        assert column.dtype == dtype and column.shape[1:] == tuple(shape), name
        self.digest.update(name.encode())
        self.digest.update(data)
        self.columns[name] = dtype, (count + len(column), *shape)


def used(path: Path) -> Path:
    """`path`, a table that is in use from now on. Tables of its kind that no run has taken for 60 days are deleted: not
    earlier, since a run may have them mapped; and what writers left that were killed.
    """
    kind = path.name.partition("-")[0]
    with suppress(OSError):  # a folder that cannot be written
        os.utime(path)
        for pattern, seconds in ((f"{kind}-*.columns", UNUSED_SECONDS), (f".{kind}-*.tmp", KILLED_SECONDS)):
            for other in path.parent.glob(pattern):
                if time.time() - other.stat().st_mtime > seconds:
                    other.unlink(missing_ok=True)
    return path


def _begins_with(path: str | os.PathLike, header: bytes, size: int) -> bool:
    with suppress(OSError), open(path, "rb") as f:
        return f.read(len(header)) == header and os.fstat(f.fileno()).st_size == size
    return False


def _column(data: np.ndarray, dtype: str, shape: Sequence[int], offset: int) -> np.ndarray:
    kind = np.dtype(dtype)
    end = offset + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if kind.hasobject or min(offset, *shape, 0) < 0 or end > len(data):
        raise ValueError("a column is longer than the file")
    return data[offset:end].view(kind).reshape(shape)


def _aligned(offset: int) -> int:
    return offset + -offset % ALIGNMENT


# ---- keys of 32 bytes ----


def words(keys: np.ndarray) -> np.ndarray:
    """uint64 [4, n], the most significant first, of keys uint8 [n, 32]: their order is that of the keys."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).T


def sort_keys(keys: np.ndarray) -> np.ndarray:
    """Positions that sort keys, uint8 [n, 32]; equal keys keep their order."""
    return np.lexsort(words(keys)[::-1])


def is_new(keys: np.ndarray) -> np.ndarray:
    """bool [n]: whether a key, uint8 [n, ...], is another one than that before it."""
    found = np.ones(len(keys), bool)
    found[1:] = (keys[1:] != keys[:-1]).any(1)
    return found


class SortedKeys:
    """Finds keys in keys, uint8 [n, 32], that are sorted. prefixes: their first 8 bytes, uint64 [n]."""

    def __init__(self, keys: np.ndarray, prefixes: np.ndarray):
        self.keys, self.prefixes = keys, prefixes

    @staticmethod
    def prefixes_of(keys: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(keys[:, :8]).view(">u8").astype(np.uint64).reshape(-1)

    def find(self, key: bytes) -> int:
        """The first position of a key, or -1."""
        prefix = np.uint64(int.from_bytes(key[:8], "big"))
        at = int(np.searchsorted(self.prefixes, prefix))
        while at < len(self.prefixes) and self.prefixes[at] == prefix:
            if self.keys[at].tobytes() == key:
                return at
            at += 1
        return -1

    def find_all(self, keys: np.ndarray) -> np.ndarray:
        """int64 [n]: a position of each key, or -1."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        wanted = self.prefixes_of(keys)
        at = np.searchsorted(self.prefixes, wanted)
        near = np.minimum(at, len(self.keys) - 1)
        found = np.where((self.keys[near] == keys).all(1), near, -1)
        for i in np.flatnonzero((found < 0) & (self.prefixes[near] == wanted)):  # several keys have these 8 bytes
            found[i] = self.find(keys[i].tobytes())
        return found


# ---- presentation times ----


class TimesWriter:
    """Codes ascending numbers as (first, step, place, count): evenly spaced ones have a place of -1 and take no more.
    Others are differences to the first, in the column `times` of a writer, which equal ones share.
    """

    def __init__(self, writer: ColumnWriter):
        self.writer, self.size, self.places = writer, 0, {}
        writer.put("times", np.zeros(0, np.int64))

    def code(self, times: Sequence[int]) -> tuple[int, int, int, int]:
        count = len(times)
        first = times[0] if count else 0
        step = times[1] - first if count > 1 else 0
        if times == (tuple(range(first, first + count * step, step)) if step > 0 else (first,) * count):
            return first, step, -1, count
        differences = np.array(times, np.int64) - first
        shared = hashlib.blake2b(differences.tobytes(), digest_size=16).digest()
        if (place := self.places.get(shared, -1)) < 0:
            if len(self.places) == TIMES_SHARED:
                self.places.clear()
            place = self.places[shared] = self.size
            self.writer.put("times", differences)
            self.size += count
        return first, 0, place, count


def decode_times(columns: Columns, first: int, step: int, place: int, count: int) -> tuple[int, ...]:
    if place < 0:
        return tuple(range(first, first + count * step, step)) if step > 0 else (first,) * count
    return tuple((columns["times"][place : place + count] + first).tolist())
