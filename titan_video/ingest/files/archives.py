"""Clips inside other files: the members of tars, the values of tables."""

import logging
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from titan_video.ingest.files import media
from titan_video.ingest.files.media import MEDIA_SUFFIXES
from titan_video.ingest.files.metadata import (
    DECLARED_COLUMNS,
    IMAGE_COLUMN,
    MEDIA_COLUMNS,
    ClipRecord,
    column,
    declared_of,
    located,
    once_each,
    texts_of,
    unread,
    without_collisions,
)
from titan_video.ingest.files.names import FileNames
from titan_video.ingest.files.text import MAX_TEXT_BYTES, TextFault, decode
from titan_video.tools.bounded import parse_json, short

logger = logging.getLogger(__name__)

# ---- tars ----


def scan_tar(file: str, columns: tuple[str, ...]) -> list[ClipRecord]:
    """A WebDataset shard. Members with the same name up to the first dot are one sample; its caption is in .txt, or in
    .json together with other columns.
    """
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    broken: list[ClipRecord] = []
    with media.open_container(file) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        try:
            with tarfile.open(fileobj=_Whole(f, size), mode="r:") as tar:
                last = -1
                for m in tar:
                    folder, _, name = m.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if m.offset <= last or m.size < 0:  # a header that leads back would be read for ever
                        raise tarfile.ReadError("a member of a negative size")
                    last = m.offset
                    if m.offset_data + m.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    if m.isfile() and stem:
                        samples.setdefault(f"{folder}/{stem}", {})["." + suffix.lower()] = m.name, m.offset_data, m.size
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as e:
            broken.append(ClipRecord(file, reason=f"corrupt: the tar is broken off, or is none ({short(str(e))})"))
        return [_from_members(file, members, f, columns) for members in samples.values()] + broken


class _Whole:
    """A file that is never asked for more bytes than it has: a header may state any size."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.seek, self.tell = file, size, file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self.file.read(max(0, min(count, self.size - self.file.tell())))


def _from_members(
    file: str, members: dict[str, tuple[str, int, int]], f: BinaryIO, columns: tuple[str, ...]
) -> ClipRecord:
    def content(suffix: str) -> str:
        name, offset, size = members[suffix]
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"{name} is larger than {MAX_TEXT_BYTES >> 20} MiB")
        f.seek(offset)
        try:
            return decode(f.read(size))
        except TextFault as e:
            raise ValueError(f"{name} {e}") from None

    clips = [suffix for suffix in members if suffix.endswith(MEDIA_SUFFIXES)]
    path = media.member(file, *next(iter(members.values())))
    if not clips:
        for member in members.values():
            if reason := unread(member[0]):
                return ClipRecord(media.member(file, *member), reason=reason)
        held = ", ".join(sorted(members))
        return ClipRecord(path, reason=f"caption without a clip: of this name the tar has {short(held)}, no clip")
    path, row = media.member(file, *members[clips[0]]), {}
    try:
        if ".json" in members:
            row = parse_json(content(".json"), members[".json"][0], once_each)
        where = members[".json"][0] if ".json" in members else ""
        row = row if isinstance(row, dict) else {}
        caption = next((row[name] for name in columns if name in row), None)
        if ".txt" in members:
            caption, where = content(".txt"), members[".txt"][0]
    except ValueError as e:
        return ClipRecord(path, reason=f"unreadable caption: {e}")
    texts = (
        texts_of(caption, where or "neither .txt nor .json")
        if caption is not None
        else "no caption: neither .txt nor .json has one"
    )
    return (
        ClipRecord(path, reason=texts) if isinstance(texts, str) else ClipRecord(path, texts, declared=declared_of(row))
    )


# ---- tables ----


def scan_table(file: Path, captions: tuple[str, ...]) -> list[ClipRecord]:
    records, number, columns, files = [], 0, None, FileNames(file.parent)
    for group, table in enumerate(media.row_groups(str(file))):
        names = table.column_names
        if columns is None:
            columns = (
                column(file, names, (*MEDIA_COLUMNS, IMAGE_COLUMN, "mp4"), "the clip"),
                column(file, names, captions, "the caption"),
            )
            logger.info(f"{file}: clips from column {columns[0]!r}, captions from column {columns[1]!r}")
        clip, caption = columns
        wanted = [name for name in names if name in (caption, *DECLARED_COLUMNS)]
        stored = media.stored_names(table, clip)
        for row, values in enumerate(table.select(wanted).to_pylist()):
            where, (name, inside) = f"row {number} of {file}", stored[row]
            path, written, reason = media.member(str(file), f"{clip}/{name}", group, row), "", ""
            if not inside:
                path, written, reason = located(files, name, where)
                reason = reason or unread(path)
            texts = texts_of(values[caption], f"column {caption!r} of {where}")
            if reason:
                records.append(ClipRecord(path, reason=reason))
            elif isinstance(texts, str):
                records.append(ClipRecord(path, reason=texts))
            else:
                records.append(ClipRecord(path, texts, declared=declared_of(values), written=written))
            number += 1
    return without_collisions(records)
