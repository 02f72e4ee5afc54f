"""Where the bytes of a clip are. A clip has one string as its path, wherever it is stored:

    clips/a.mp4   clips/a.png                   a file
    clips/walk                                  a folder of images, each a frame
    shards/000.tar!0007.mp4@1536+84213          a member of a tar, by offset and size: nothing is extracted
    data/train.parquet!video/a.mp4@3+12         a value of a table: row group (or batch, of an .arrow file) and row
    s3://bucket/000.tar!0007.mp4@1536+84213     a file or a member of a tar, by any URL that fsspec opens

fsspec, its drivers and pyarrow are optional packages.

What has the name of a clip may be anything, so a device, a fifo or a socket is refused before it is opened.
"""

import errno
import glob
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from titan_video.config.sections.data import Data
from titan_video.tools.bounded import open_regular, short

MAX_PATHS, MAX_BRACES = 1_000_000, 20  # of one pattern
VIDEO_SUFFIXES = tuple(".mp4 .mov .mkv .webm .avi .m4v .gif .ts .mts .m2ts .flv .f4v .wmv .asf .3gp .3g2".split())
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
# Of the system, a share or a network, and not of a file's content: the next try may not meet them.
PASSING_ERRORS = frozenset(
    getattr(errno, name)
    for name in """ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET ECONNABORTED ECONNREFUSED
    ENOTCONN ESHUTDOWN EREMOTEIO ENOLINK EAGAIN EINTR ENFILE EMFILE EACCES EPERM""".split()
    if hasattr(errno, name)
)
_BRACES = re.compile(r"\{([^{}]*)\}")
_MEMBER = re.compile(r"(?P<container>.+\.(?:tar|parquet|arrow))!(?P<name>.*)@(?P<a>\d+)\+(?P<b>\d+)", re.DOTALL)


@dataclass(frozen=True)
class DecodeLimits:
    """What one file may take: pixels of a frame, frames after resampling, and in a worker seconds and GiB of memory."""

    max_pixels: int = Data.max_decoded_pixels
    max_frames: int = Data.max_frames
    seconds: float = Data.decode_timeout_seconds
    memory_gib: float = Data.decode_memory_gib

    @classmethod
    def of(cls, section: Data) -> "DecodeLimits":
        return cls(
            section.max_decoded_pixels, section.max_frames, section.decode_timeout_seconds, section.decode_memory_gib
        )


DEFAULT_LIMITS = DecodeLimits()


def member(container: str, name: str, a: int, b: int) -> str:
    """The path of a tar's member (offset, size) or of a table's value (group, row)."""
    return f"{container}!{name}@{a}+{b}"


def kind(path: str) -> Literal["video", "image", "frames"]:
    found = _MEMBER.fullmatch(path)
    name = found["name"] if found else path
    if name.lower().endswith(IMAGE_SUFFIXES):
        return "image"
    return "frames" if found is None and os.path.isdir(path) else "video"


def is_url(path: str) -> bool:
    return "://" in path


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise ValueError(
            "a URL as data path needs the package fsspec and its driver for the URL's protocol: pip install fsspec"
        ) from None
    return fsspec


def expand(pattern: str) -> list[str]:
    """The paths that match a pattern with braces ({000..012}, {a,b}) and wildcards, in order.

    ValueError: there are more than MAX_PATHS.
    """
    patterns = [pattern]
    while patterns and _BRACES.search(patterns[0]):
        patterns = list(islice((path for one in patterns for path in _expand_braces(one)), MAX_PATHS + 1))
        if len(patterns) > MAX_PATHS or pattern.count("{") > MAX_BRACES:
            raise ValueError(f"data path {short(pattern)}: its braces give more than {MAX_PATHS:,} names")
    return [path for one in patterns for path in _glob(one)]


def _expand_braces(pattern: str) -> Iterator[str]:
    """The pattern with each item of its first braces; itself without braces."""
    opening = _BRACES.search(pattern)
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", opening[1])
    numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
    items = (f"{i:0{len(span[1])}d}" for i in numbers) if span else opening[1].split(",")
    return (pattern[: opening.start()] + item + pattern[opening.end() :] for item in items)


def _glob(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    if is_url(pattern):
        fs, inner = _fsspec().core.url_to_fs(pattern)
        return sorted(fs.unstrip_protocol(path) for path in fs.glob(inner))
    return sorted(glob.glob(pattern, recursive=True))


class _Slice(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        data = self.file.read(max(0, min(len(buffer), self.size - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def open_binary(path: str) -> BinaryIO:
    """A file, a member or a value, for reading. Raises OSError, also for what is no regular file; ValueError when a
    package is missing.
    """
    found = _MEMBER.fullmatch(path)
    if found and not found["container"].endswith(".tar"):
        return io.BytesIO(
            _table_value(found["container"], found["name"].partition("/")[0], int(found["a"]), int(found["b"]))
        )
    if is_url(path):
        return io.BytesIO(_fetched(path))
    if found:
        return io.BufferedReader(_Slice(open_regular(found["container"]), int(found["a"]), int(found["b"])))
    return open_regular(path)


def open_container(file: str) -> BinaryIO:
    """A whole tar, for looking through it."""
    return _fsspec().open(file, "rb").open() if is_url(file) else open_regular(file)


@lru_cache(maxsize=1)
def _fetched(path: str) -> bytes:
    """The bytes of a URL. Cached, because probing reads them several times."""
    found = _MEMBER.fullmatch(path)
    with _fsspec().open(found["container"] if found else path, "rb") as f:
        if not found:
            return f.read()
        f.seek(int(found["a"]))
        return f.read(int(found["b"]))


def version(path: str) -> dict[str, Any]:
    """Identity of the content of `path` by name, size and time of change, without reading it. Raises OSError."""
    found = _MEMBER.fullmatch(path) if "!" in path else None
    file = found["container"] if found else path
    if is_url(file):
        fs, inner = _fsspec().core.url_to_fs(file)
        info = fs.info(inner)
        return {
            "path": path,
            **{key: str(info[key]) for key in ("size", "mtime", "ETag", "LastModified", "created") if key in info},
        }
    stats = [os.stat(file)]
    if stat.S_ISDIR(stats[0].st_mode):
        stats += (os.stat(p) for p in frame_files(file))
    return {
        "path": os.path.abspath(path),
        "size": sum(s.st_size for s in stats),
        "mtime_ns": max(s.st_mtime_ns for s in stats),
    }


def unreadable(error: BaseException) -> str:
    """The reason for a file that the system does not let us read, though the next try may; "" for another error.

    libav means damaged files by EIO, too.
    """
    is_system = isinstance(error, OSError) and not type(error).__module__.startswith("av.")
    number = getattr(error, "errno", None)
    if number in PASSING_ERRORS or (number == errno.EIO and is_system):
        return f"unreadable: {error.strerror or error}"
    return ""


def frame_files(folder: str) -> list[Path]:
    """The images of a folder in the order of the numbers in their names."""
    images = [p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(images, key=lambda p: ([int(n) for n in re.findall(r"\d+", p.stem)], p.name))


def sha256(path: str) -> tuple[str, int]:
    """(SHA-256, number) of the bytes of `path`; of a folder of frames one file after the other. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    for part in frame_files(path) if kind(path) == "frames" else [path]:
        with open_binary(str(part)) as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    return digest.hexdigest(), size


# ---- tables ----


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            "a .parquet or .arrow file as data path needs the package pyarrow: pip install pyarrow"
        ) from None
    return pyarrow


def row_groups(file: str, columns: list[str] | None = None) -> Iterator[Any]:
    """The tables of a parquet file's row groups, or of the batches of an .arrow file (Hugging Face data sets)."""
    pyarrow = _pyarrow()
    if file.endswith(".parquet"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as f:
            for group in range(f.num_row_groups):
                yield f.read_row_group(group, columns=columns)
        return
    with pyarrow.memory_map(file) as f:
        for batch in pyarrow.ipc.open_stream(f):
            table = pyarrow.Table.from_batches([batch])
            yield table.select(columns) if columns else table


@lru_cache(maxsize=1)
def _row_group(file: str, column: str, group: int) -> Any:
    if file.endswith(".parquet"):
        _pyarrow()
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as f:
            return f.read_row_group(group, columns=[column])[column]
    for number, table in enumerate(row_groups(file, [column])):
        if number == group:
            return table[column]
    raise OSError(f"no batch {group}")


def _table_value(file: str, column: str, group: int, row: int) -> bytes:
    value = _row_group(file, column, group)[row].as_py()
    return value["bytes"] if isinstance(value, dict) else value


def stored_names(table: Any, column: str) -> list[tuple[str, bool]]:
    """(file name, whether its bytes are in the table) of each row's clip; the name is "" where there is neither."""
    values = table[column].combine_chunks()
    kinds = _pyarrow().types
    if kinds.is_struct(values.type):  # how Hugging Face stores media: bytes, or the path of a file
        paths = values.field("path").to_pylist()
        return [
            (os.path.basename(p or "clip"), True) if b else (p or "", False)
            for p, b in zip(paths, values.field("bytes").is_valid().to_pylist(), strict=True)
        ]
    if kinds.is_string(values.type) or kinds.is_large_string(values.type):
        return [(p or "", False) for p in values.to_pylist()]
    return [("clip", True)] * len(values)
