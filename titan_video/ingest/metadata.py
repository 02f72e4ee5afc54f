"""Metadata files: one clip a row of a .csv, .json or .jsonl file. And what all sources share: the record of a clip, the
names of columns, captions, and bounds of what is read.
"""

import csv
import errno
import io
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from titan_video.ingest import media
from titan_video.tools.bounded import KINDS, open_regular, parse_json, read_json, short

logger = logging.getLogger(__name__)

MEDIA_COLUMNS = ("file_name", "file", "video", "video_path", "path", "media_path", "file_path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "cap")
IMAGE_COLUMN = "image"
DECLARED_COLUMNS = ("width", "height", "num_frames", "fps")
MAX_ROWS, MAX_COLUMNS, MAX_PATH_BYTES = 10_000_000, 1000, 4096
MAX_TEXT_BYTES, MAX_JSON_BYTES = 1 << 20, 1 << 30


@dataclass(frozen=True)
class ClipRecord:
    """A clip with its captions. With a `reason`, `category: detail`, it cannot be used, and `path` names the file or
    row at fault.

    declared: width, height, number of frames and rate, if the metadata holds all of them.
    image: replaces the clip's first frame as conditioning frame.
    """

    path: str
    captions: tuple[str, ...] = ()
    reason: str = ""
    image: str = ""
    declared: tuple[float, ...] = ()

    @property
    def caption(self) -> str:
        return self.captions[0] if self.captions else ""


def scan_metadata(file: Path, captions: tuple[str, ...]) -> list[ClipRecord]:
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}[file.suffix.lower()]
    rows = list(islice(read(file), MAX_ROWS + 1))
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{file}: holds more than {MAX_ROWS:,} rows; give several files, each a [[data.source]]")
    columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    if not any(isinstance(row, dict) for _, row in rows):
        if not rows:
            raise ValueError(f"{file}: holds no rows")
        return [ClipRecord(where, reason=row) for where, row in rows]
    clip = column(file, columns, MEDIA_COLUMNS, "the clip")
    caption = column(file, columns, captions, "the caption")
    logger.info(f"{file}: clips from column {clip!r}, captions from column {caption!r}")
    return [
        ClipRecord(where, reason=row) if isinstance(row, str) else _from_row(file, where, row, clip, caption)
        for where, row in rows
    ]


def column(file: Path, columns: Iterable[str], accepted: tuple[str, ...], what: str) -> str:
    for name in accepted:
        if name in columns:
            return name
    raise ValueError(
        f"{file}: no column names {what}; found {short(', '.join(map(str, columns)), 300)}; accepted are "
        f"{', '.join(accepted)}"
    )


def _from_row(file: Path, where: str, row: dict, clip: str, caption: str) -> ClipRecord:
    name = row.get(clip)
    if not isinstance(name, str) or not name.strip() or not _is_path(name):
        return ClipRecord(where, reason=f"no clip named: column {clip!r} holds {short(repr(name))}")
    path = name.strip() if media.is_url(name) else str(file.parent / name.strip())
    if not media.is_url(name) and (reason := not_a_clip(path, f"named in {where}")):
        return ClipRecord(path, reason=reason)
    texts = texts_of(row.get(caption), f"column {caption!r} of {where}")
    if isinstance(texts, str):
        return ClipRecord(path, reason=texts)
    image = row.get(IMAGE_COLUMN) or ""
    if not isinstance(image, str) or (image and not (_is_path(image) and (file.parent / image).is_file())):
        held = f"column {IMAGE_COLUMN!r} of {where} holds {short(repr(image))}"
        return ClipRecord(path, reason=f"missing image: {held}, which is no file")
    return ClipRecord(path, texts, image=str(file.parent / image) if image else "", declared=declared_of(row))


def _is_path(name: str) -> bool:
    """Whether the system may know a file by this name."""
    try:
        return len(os.fsencode(name)) <= MAX_PATH_BYTES and "\0" not in name
    except UnicodeEncodeError:
        return False


def not_a_clip(path: str, named: str = "") -> str:
    """Why `path` is neither a file nor a folder, or "". It is not opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        return f"missing file: {named}" if named and e.errno != errno.ELOOP else f"not a file: {e.strerror}"
    is_usable = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return "" if is_usable else f"not a file: it is a {KINDS.get(stat.S_IFMT(mode), 'device')}"


def read_text(path: Path) -> bytes:
    """A caption's bytes. OSError: it is no regular file, cannot be read, or is larger than any caption."""
    with open_regular(path) as f:
        data = f.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_TEXT_BYTES >> 20} MiB")
    return data


def texts_of(value: Any, where: str) -> tuple[str, ...] | str:
    """The captions of a value, a text or a list of texts; or the reason why there is none."""
    values = value if isinstance(value, list) and value else [value]
    if not all(isinstance(v, str) for v in values):
        return f"no caption: {where} holds {short(repr(value))}"
    if sum(map(len, values)) > MAX_TEXT_BYTES:
        return f"unreadable caption: {where} holds more than {MAX_TEXT_BYTES >> 20} MiB"
    if any("\ud800" <= letter <= "\udfff" for v in values for letter in v):
        return f"unreadable caption: {where} holds half a character (a lone surrogate)"
    texts = tuple(dict.fromkeys(v.strip() for v in values if v.strip()))
    return texts or f"empty caption: {where}"


def declared_of(row: dict) -> tuple[float, ...]:
    """Width, height, number of frames and rate; empty unless all are there and positive."""
    try:
        numbers = tuple(float(row.get(name) or 0) for name in DECLARED_COLUMNS)
    except (TypeError, ValueError, OverflowError):
        return ()
    return numbers if all(0 < n < 1e6 for n in numbers) else ()


def _read_json(file: Path) -> Iterator[tuple[str, dict | str]]:
    """(file[number], object or reason) of each item of the list that the file holds."""
    rows = read_json(file, MAX_JSON_BYTES)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no list of objects, one for each clip; one object a line is a .jsonl file")
    for number, row in enumerate(rows):
        yield f"{file}[{number}]", row if isinstance(row, dict) else "bad line: not a JSON object"


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict | str]]:
    """(file:line, object or reason) of each line that is not blank."""
    with open_regular(file) as f:
        for number, line in enumerate(_lines(f), 1):
            where = f"{file}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_TEXT_BYTES:
                yield where, f"bad line: longer than {MAX_TEXT_BYTES >> 20} MiB"
                continue
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8"), where)
            except UnicodeDecodeError as e:
                yield where, f"bad line: not UTF-8 (byte {e.start})"
            except ValueError as e:
                yield where, f"bad line: not JSON ({e})"
            else:
                yield where, row if isinstance(row, dict) else "bad line: not a JSON object"


def _lines(f: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long only the beginning."""
    while line := f.readline(MAX_TEXT_BYTES + 2):
        rest = line
        while len(line) > MAX_TEXT_BYTES and not rest.endswith(b"\n") and (rest := f.readline(MAX_TEXT_BYTES)):
            pass
        yield from line.splitlines()


def _read_csv(file: Path) -> Iterator[tuple[str, dict | str]]:
    try:
        with open_regular(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, restkey="(more)")
            if len(reader.fieldnames or ()) > MAX_COLUMNS:
                raise csv.Error(f"its header names more than {MAX_COLUMNS:,} columns")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if "(more)" in row:
                    yield where, "bad line: more fields than the header names (quote captions that hold a comma)"
                else:
                    yield where, row
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: is not UTF-8 (byte {e.start}); save it as UTF-8") from None
    except csv.Error as e:
        raise ValueError(f"{file}: is not CSV ({e})") from None
