"""Metadata files: one clip a row of a .csv, .tsv, .json or .jsonl file.

And what all sources share: the record of a clip, the names of columns, captions, and bounds of what is read.
"""

import csv
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from titan_video.ingest.files import media
from titan_video.ingest.files.names import FileNames, quoted
from titan_video.ingest.files.text import MAX_TEXT_BYTES, TextFault, fault, read_lines, read_text, unix_line_ends
from titan_video.tools.bounded import KINDS, open_regular, parse_json, short

logger = logging.getLogger(__name__)

MEDIA_COLUMNS = ("file_name", "file", "video", "video_path", "path", "media_path", "file_path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "cap")
IMAGE_COLUMN = "image"
DECLARED_COLUMNS = ("width", "height", "num_frames", "fps")
MAX_ROWS, MAX_COLUMNS, MAX_PATH_BYTES = 10_000_000, 1000, 4096
MAX_JSON_BYTES = 1 << 30
# Known and not read: their frames have no times (.mpg), or no reader for them is tested here.
UNREAD_IMAGES = tuple(".tif .tiff .avif .heic .heif .jxl .jp2 .tga .exr .dpx .psd .dng .cr2 .nef .svg .ico".split())
RAW_IMAGES = (".dng", ".cr2", ".nef")
UNREAD_SUFFIXES = (
    *".mpg .mpeg .vob .m2v .m1v .mpv .ogv .ogm .rm .rmvb .mxf .dv .y4m .h264 .264 .h265 .265 .hevc .divx .swf".split(),
    *UNREAD_IMAGES,
)


@dataclass(frozen=True)
class ClipRecord:
    """A clip with its captions. With a `reason`, `category: detail`, it cannot be used, and `path` names the file or
    row at fault.

    declared: width, height, number of frames and rate, if the metadata holds all of them.
    image: replaces the clip's first frame as conditioning frame.
    written: its name in the metadata, or that of its caption, where that is spelled in another way (names.py).
    """

    path: str
    captions: tuple[str, ...] = ()
    reason: str = ""
    image: str = ""
    declared: tuple[float, ...] = ()
    written: str = ""

    @property
    def caption(self) -> str:
        return self.captions[0] if self.captions else ""


def scan_metadata(file: Path, captions: tuple[str, ...]) -> list[ClipRecord]:
    read = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}[file.suffix.lower()]
    rows = list(islice(read(file, captions), MAX_ROWS + 1))
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
    names = FileNames(file.parent)
    return without_collisions(
        ClipRecord(where, reason=row) if isinstance(row, str) else _from_row(names, where, row, clip, caption)
        for where, row in rows
    )


def without_collisions(records: Iterable[ClipRecord]) -> list[ClipRecord]:
    """The records; where names that were not taken as they stand mean one file, as other names do, with a reason."""
    records, written = list(records), {}
    if not any(r.written for r in records):
        return records
    for r in records:
        if not r.reason:
            written.setdefault(r.path, set()).add(r.written)
    return [
        replace(
            r, reason=f"ambiguous name: {quoted(r.written)} and another row's name mean this file; correct one of them"
        )
        if r.written and len(written.get(r.path, ())) > 1
        else r
        for r in records
    ]


def column(file: Path, columns: Iterable[str], accepted: tuple[str, ...], what: str) -> str:
    for name in accepted:
        if name in columns:
            return name
    raise ValueError(
        f"{file}: no column names {what}; found {short(', '.join(map(str, columns)), 300)}; accepted are "
        f"{', '.join(accepted)}"
    )


def _from_row(names: FileNames, where: str, row: dict, clip: str, caption: str) -> ClipRecord:
    name = row.get(clip)
    if not isinstance(name, str) or not name.strip() or not _is_path(name):
        return ClipRecord(where, reason=f"no clip named: column {clip!r} holds {short(repr(name))}")
    path, written, reason = (name.strip(), "", "") if media.is_url(name) else located(names, name.strip(), where)
    if reason := reason or unread(path):
        return ClipRecord(path, reason=reason)
    texts = texts_of(row.get(caption), f"column {caption!r} of {where}")
    if isinstance(texts, str):
        return ClipRecord(path, reason=texts)
    given, image = row.get(IMAGE_COLUMN) or "", ""
    if given:
        image, _, wrong = located(names, given.strip() if isinstance(given, str) else "", where)
        if wrong.startswith("unreadable: "):
            return ClipRecord(path, reason=wrong)
        if wrong or not os.path.isfile(image):
            held = f"column {IMAGE_COLUMN!r} of {where} holds {short(repr(given))}"
            return ClipRecord(path, reason=f"missing image: {held}, which is no file")
    return ClipRecord(path, texts, image=image, declared=declared_of(row), written=written)


def located(names: FileNames, name: str, where: str) -> tuple[str, str, str]:
    """(path, name as it was written where that is not the file's, reason) of a name in a row; the reason is "" where
    there is such a file. where: the row, for the reason.
    """
    if not name.strip() or not _is_path(name):
        return where, "", f"no clip named: {where} holds {short(repr(name))}"
    path = names.join(name)
    reason = not_a_clip(path, f"named in {where}")
    if not reason.startswith("missing file"):
        return path, "", reason
    found = names.find(name)
    if not found.path:
        return path, "", f"{reason} as {quoted(name)}; {found.advice}"
    return found.path, name, not_a_clip(found.path)


def unread(path: str) -> str:
    """The reason for a file of a suffix that is known and not read, or ""."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in media.MEDIA_SUFFIXES or suffix not in UNREAD_SUFFIXES:
        return ""
    name = os.path.basename(path).replace("'", r"'\''")  # for the shell
    new = f"{os.path.splitext(name)[0]}{'.png' if suffix in UNREAD_IMAGES else '.mp4'}"
    how = f"ffmpeg -i '{name}' {'' if suffix in UNREAD_IMAGES else '-c:v libx264 -crf 12 '}'{new}'"
    if suffix in (".heic", ".heif"):  # in tiles, of which many versions of ffmpeg give the first
        how = f"heif-convert '{name}' '{new}'"
    elif suffix in RAW_IMAGES:
        how = f"darktable-cli '{name}' '{new}'"
    elif suffix == ".svg":
        how = f"rsvg-convert -o '{new}' '{name}'"
    return f"not read: files of the suffix {suffix} are not read; convert it: {how}"


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
        if reason := media.unreadable(e):
            return reason
        return f"missing file: {named}" if named and e.errno != errno.ELOOP else f"not a file: {e.strerror}"
    is_usable = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return "" if is_usable else f"not a file: it is a {KINDS.get(stat.S_IFMT(mode), 'device')}"


def texts_of(value: Any, where: str) -> tuple[str, ...] | str:
    """The captions of a value, a text or a list of texts; or the reason why there is none."""
    values = value if isinstance(value, list) and value else [value]
    if not all(isinstance(v, str) for v in values):
        return f"no caption: {where} holds {short(repr(value))}"
    if sum(map(len, values)) > MAX_TEXT_BYTES:
        return f"unreadable caption: {where} holds more than {MAX_TEXT_BYTES >> 20} MiB"
    if found := next(filter(None, map(fault, values)), ""):
        return f"unreadable caption: {where} {found}"
    texts = tuple(dict.fromkeys(unix_line_ends(v).strip() for v in values if v.strip()))
    return texts or f"empty caption: {where}"


def declared_of(row: dict) -> tuple[float, ...]:
    """Width, height, number of frames and rate; empty unless all are there and positive."""
    try:
        numbers = tuple(float(row.get(name) or 0) for name in DECLARED_COLUMNS)
    except (TypeError, ValueError, OverflowError):
        return ()
    return numbers if all(0 < n < 1e6 for n in numbers) else ()


def _read_json(file: Path, _: tuple[str, ...]) -> Iterator[tuple[str, dict | str]]:
    """(file[number], object or reason) of each item of the list that the file holds."""
    try:
        rows = parse_json(read_text(file, MAX_JSON_BYTES), str(file), once_each)
    except TextFault as e:
        raise ValueError(f"{file}: {e}") from None
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}") from e
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no list of objects, one for each clip; one object a line is a .jsonl file")
    for number, row in enumerate(rows):
        yield f"{file}[{number}]", row if isinstance(row, dict) else "bad line: not a JSON object"


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. ValueError: two have one name, of which JSON parsers keep the last."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{short(next(n for n in names if names.count(n) > 1))!r} is there twice in one object")
    return found


def _read_jsonl(file: Path, _: tuple[str, ...]) -> Iterator[tuple[str, dict | str]]:
    """(file:line, object or reason) of each line that is not blank."""
    for number, line in _lines(file):
        where = f"{file}:{number}"
        if len(line) > MAX_TEXT_BYTES:
            yield where, f"bad line: longer than {MAX_TEXT_BYTES >> 20} MiB"
        elif found := fault(line, number):
            yield where, f"bad line: it {found}"
        elif line.strip():
            try:
                row = parse_json(line, where, once_each)
            except ValueError as e:
                yield where, f"bad line: not JSON ({e})"
            else:
                yield where, row if isinstance(row, dict) else "bad line: not a JSON object"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with open_regular(file) as f:
            yield from read_lines(f)
    except TextFault as e:
        raise ValueError(f"{file}: {e}") from None


class _Rows:
    """The rows of a .csv or .tsv file, each with the lines that it takes: a quoted field may hold line ends."""

    def __init__(self, file: Path):
        self.file, self.numbered = file, _lines(file)
        self.taken: list[tuple[int, str]] = []  # the lines of the row that was read last
        header = next(((n, line) for n, line in self.numbered if line.strip()), (1, ""))
        if found := fault(header[1], header[0]):
            raise ValueError(f"{file}: {found}")
        self.delimiter = _delimiter(header[1], file.suffix.lower())
        self.reader = csv.reader(self._give(header), delimiter=self.delimiter, strict=True)

    def _give(self, header: tuple[int, str]) -> Iterator[str]:
        for number, line in chain([header], self.numbered):
            if (found := fault(line, number)).startswith("is not UTF-8"):
                raise ValueError(f"{self.file}: {found}")
            if len(line) > MAX_TEXT_BYTES:
                raise ValueError(f"{self.file}: line {number} is longer than {MAX_TEXT_BYTES >> 20} MiB")
            self.taken.append((number, line))
            yield line + "\n"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.taken[0][0]}"

    def __iter__(self) -> Iterator[list[str] | str]:
        """The fields of each row, or the reason why it has none. ValueError: where a row ends is not known."""
        while True:
            self.taken.clear()
            try:
                yield next(self.reader)
            except StopIteration:
                return
            except csv.Error as e:
                first, last = self.taken[0][0], self.taken[-1][0]
                if first < last:
                    raise self.unclosed(last) from None
                hint = "" if "limit" in str(e) else "; close the quote, and double the quotes inside a quoted field"
                yield f"bad line: {e}{hint}"

    def unclosed(self, line: int) -> ValueError:
        return ValueError(
            f"{self.file}: is not CSV: a quoted field begins in line {self.taken[0][0]} and is not closed before line "
            f"{line}, so where its row ends is not known; close it, and double the quotes inside a quoted field"
        )

    def check_lines(self, clip: int) -> None:
        """ValueError: a field of the last row holds lines that are rows themselves. clip: the column of clips."""
        for number, line in self.taken[1:]:
            fields = _fields(line, self.delimiter)
            name = fields[clip].strip().lower() if clip < len(fields) else ""
            if name.endswith(media.MEDIA_SUFFIXES) or (len(fields) > 1 and media.is_url(name)):
                raise self.unclosed(number)


def _fields(line: str, delimiter: str) -> list[str]:
    """The fields of one line by itself; none where it is no row."""
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []


def _delimiter(header: str, suffix: str) -> str:
    """Of comma, semicolon and tab the first that gives a column of clips; without one the usual of the suffix."""
    usual = "\t" if suffix == ".tsv" else ","
    for delimiter in dict.fromkeys((usual, ",", ";", "\t")):
        if {name.strip() for name in _fields(header, delimiter)} & set(MEDIA_COLUMNS):
            return delimiter
    return usual


def _read_csv(file: Path, captions: tuple[str, ...]) -> Iterator[tuple[str, dict | str]]:
    """(file:line, row or reason) of each row that is not blank."""
    rows = _Rows(file)
    every = iter(rows)
    header = next(every, [])
    if isinstance(header, str):
        raise ValueError(f"{file}: is not CSV: line {rows.taken[0][0]}: {header.removeprefix('bad line: ')}")
    header = [name.strip() for name in header]
    if len(header) > MAX_COLUMNS:
        raise ValueError(f"{file}: is not CSV (its header names more than {MAX_COLUMNS:,} columns)")
    for name in (*MEDIA_COLUMNS, *captions, IMAGE_COLUMN, *DECLARED_COLUMNS):
        if header.count(name) > 1:
            raise ValueError(f"{file}: two columns are named {name!r}; rename one of them")
    clip = next((header.index(name) for name in MEDIA_COLUMNS if name in header), 0)
    for fields in every:
        if isinstance(fields, str):
            yield rows.where, fields
        elif len(fields) > len(header):
            yield rows.where, "bad line: more fields than the header names (quote captions that hold a comma)"
        elif fields:
            rows.check_lines(clip)
            yield rows.where, dict(zip(header, fields, strict=False))
