"""From the path of a source to a list of clips with captions, or with the reason why one cannot be used. No video is
opened here.

    a folder        searched recursively: clips and images with a same-name .txt; a folder of images that has such
                    a .txt is one clip
    metadata        .csv, .json or .jsonl, or a folder that holds metadata.*: one clip a row
    tars            WebDataset shards: a path with braces and wildcards, a folder of them, or a URL
    tables          .parquet and .arrow files, or a folder of them: Hugging Face data sets on disk

A column `image` may name an image that replaces the clip's first frame as conditioning frame.
"""

import csv
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from titan_video.config.job_config import JobConfig
from titan_video.ingest import media
from titan_video.ingest.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

logger = logging.getLogger(__name__)

MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
METADATA_SUFFIXES = (".jsonl", ".csv", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow")
FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".tar", *TABLE_SUFFIXES)
MAX_EMBEDDED_CLIPS = 100_000
METADATA_NAMES = tuple("metadata" + suffix for suffix in METADATA_SUFFIXES)
MEDIA_COLUMNS = ("file_name", "file", "video", "video_path", "path", "media_path", "file_path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "cap")
IMAGE_COLUMN = "image"
DECLARED_COLUMNS = ("width", "height", "num_frames", "fps")


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


def scan(path: str | Path, caption_column: str = "") -> list[ClipRecord]:
    """All clips of a source, good and bad, in the order of names or rows.

    caption_column: the column of captions; "": the first of CAPTION_COLUMNS.
    ValueError: the path is missing or of no known layout, or metadata lacks a column.
    """
    pattern, columns = str(path), (caption_column,) if caption_column else CAPTION_COLUMNS
    files = media.expand(pattern)
    if not files:
        raise ValueError(f"data path {pattern!r}: nothing has such a name")
    if len(files) == 1 and not media.is_url(pattern) and os.path.isdir(files[0]):
        files, folder = _inside(Path(files[0])), Path(files[0])
        if not files:
            return _scan_folder(folder)
    records: list[ClipRecord] = []
    for file in files:
        suffix = Path(file).suffix.lower()
        if not media.is_url(file) and not os.path.isfile(file):
            raise ValueError(f"data path {file!r}: no such file or folder")
        if suffix == ".tar":
            records += _scan_tar(file, columns)
        elif suffix in METADATA_SUFFIXES and not media.is_url(file):
            records += _scan_metadata(Path(file), columns)
        elif suffix in TABLE_SUFFIXES and not media.is_url(file):
            records += _scan_table(Path(file), columns)
        else:
            known = (
                f"a folder, a metadata file ({' '.join(METADATA_SUFFIXES)}), tars, or {' '.join(TABLE_SUFFIXES)} "
                f"files; of URLs, tars"
            )
            raise ValueError(f"data path {file!r}: a file of another kind; give {known}")
    return records


def _inside(folder: Path) -> list[str]:
    """The metadata file, the tars or the tables of a folder; none where it holds clips as files."""
    metadata = [str(folder / name) for name in METADATA_NAMES if (folder / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(
            f"{folder}: holds both {' and '.join(Path(m).name for m in metadata)}; give the one to use as the path"
        )
    files = [] if metadata else sorted(_walk(folder))
    if any(p.suffix.lower() in MEDIA_SUFFIXES for p in files):
        return []
    return metadata or [str(p) for p in files if p.suffix.lower() in (".tar", *TABLE_SUFFIXES)]


# ---- a folder ----


def _scan_folder(folder: Path) -> list[ClipRecord]:
    files = sorted(_walk(folder))
    texts = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt"}
    clips = [p for p in files if p.suffix.lower() in MEDIA_SUFFIXES]
    # Images without captions of their own, in a folder that has one, are the frames of a clip.
    frame_dirs = {p.parent for p in clips if p.parent in texts and p.suffix.lower() in IMAGE_SUFFIXES}
    clips = sorted([p for p in clips if p.parent not in frame_dirs] + list(frame_dirs))
    others = len(files) - len(texts) - sum(p.suffix.lower() in MEDIA_SUFFIXES for p in files)
    if others:
        logger.info(
            f"{folder}: {others} files are neither clips ({' '.join(MEDIA_SUFFIXES)}) nor .txt captions and are "
            f"not looked at"
        )
    stems = {_stem(p) for p in clips}
    orphans = [p for stem, p in texts.items() if stem not in stems]
    return [_with_caption(clip, texts.get(_stem(clip))) for clip in clips] + [
        ClipRecord(str(p), reason="caption without a clip: no video file has this name") for p in orphans
    ]


def _stem(clip: Path) -> Path:
    return clip.with_suffix("") if clip.suffix.lower() in MEDIA_SUFFIXES else clip


def _walk(folder: Path) -> Iterator[Path]:
    """Visible files below `folder`, through links, each real folder once."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (Path(where, name) for name in names if not name.startswith("."))
        seen.add(real)


def _with_caption(clip: Path, text: Path | None) -> ClipRecord:
    if text is None:
        return ClipRecord(str(clip), reason=f"no caption: {_stem(clip).name}.txt is missing")
    try:
        caption = text.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name} is not UTF-8 (byte {e.start})")
    except OSError as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name}: {e.strerror}")
    return (
        ClipRecord(str(clip), (caption,))
        if caption
        else ClipRecord(str(clip), reason=f"empty caption: {text.name} holds no text")
    )


# ---- metadata ----


def _scan_metadata(file: Path, captions: tuple[str, ...]) -> list[ClipRecord]:
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}[file.suffix.lower()]
    rows = list(read(file))
    columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    if not any(isinstance(row, dict) for _, row in rows):
        if not rows:
            raise ValueError(f"{file}: holds no rows")
        return [ClipRecord(where, reason=row) for where, row in rows]
    clip = _column(file, columns, MEDIA_COLUMNS, "the clip")
    caption = _column(file, columns, captions, "the caption")
    logger.info(f"{file}: clips from column {clip!r}, captions from column {caption!r}")
    return [
        ClipRecord(where, reason=row) if isinstance(row, str) else _from_row(file, where, row, clip, caption)
        for where, row in rows
    ]


def _column(file: Path, columns: Iterable[str], accepted: tuple[str, ...], what: str) -> str:
    for name in accepted:
        if name in columns:
            return name
    raise ValueError(
        f"{file}: no column names {what}; found {', '.join(map(str, columns))}; accepted are {', '.join(accepted)}"
    )


def _from_row(file: Path, where: str, row: dict, clip: str, caption: str) -> ClipRecord:
    name = row.get(clip)
    if not isinstance(name, str) or not name.strip():
        return ClipRecord(where, reason=f"no clip named: column {clip!r} holds {name!r}")
    path = name.strip() if media.is_url(name) else str(file.parent / name.strip())
    if not media.is_url(name) and not os.path.exists(path):
        return ClipRecord(path, reason=f"missing file: named in {where}")
    texts = _texts(row.get(caption), f"column {caption!r} of {where}")
    if isinstance(texts, str):
        return ClipRecord(path, reason=texts)
    image = row.get(IMAGE_COLUMN) or ""
    if not isinstance(image, str) or (image and not (file.parent / image).is_file()):
        return ClipRecord(
            path, reason=f"missing image: column {IMAGE_COLUMN!r} of {where} holds {image!r}, which is no file"
        )
    return ClipRecord(path, texts, image=str(file.parent / image) if image else "", declared=_declared(row))


def _texts(value: Any, where: str) -> tuple[str, ...] | str:
    """The captions of a value, a text or a list of texts; or the reason why there is none."""
    values = value if isinstance(value, list) and value else [value]
    if not all(isinstance(v, str) for v in values):
        return f"no caption: {where} holds {value!r}"
    texts = tuple(dict.fromkeys(v.strip() for v in values if v.strip()))
    return texts or f"empty caption: {where}"


def _declared(row: dict) -> tuple[float, ...]:
    """Width, height, number of frames and rate; empty unless all are there and positive."""
    try:
        numbers = tuple(float(row.get(name) or 0) for name in DECLARED_COLUMNS)
    except (TypeError, ValueError):
        return ()
    return numbers if all(0 < n < 1e6 for n in numbers) else ()


def _read_json(file: Path) -> Iterator[tuple[str, dict | str]]:
    """(file[number], object or reason) of each item of the list that the file holds."""
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: is not JSON in UTF-8 ({e})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no list of objects, one for each clip; one object a line is a .jsonl file")
    for number, row in enumerate(rows):
        yield f"{file}[{number}]", row if isinstance(row, dict) else "bad line: not a JSON object"


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict | str]]:
    """(file:line, object or reason) of each line that is not blank."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            yield where, f"bad line: not UTF-8 (byte {e.start})"
        except (ValueError, RecursionError) as e:
            yield where, f"bad line: not JSON ({e})"
        else:
            yield where, row if isinstance(row, dict) else "bad line: not a JSON object"


def _read_csv(file: Path) -> Iterator[tuple[str, dict | str]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, restkey="(more)")
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


# ---- tars ----


def _scan_tar(file: str, columns: tuple[str, ...]) -> list[ClipRecord]:
    """A WebDataset shard. Members with the same name up to the first dot are one sample; its caption is in .txt, or in
    .json together with other columns.
    """
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    broken: list[ClipRecord] = []
    with media.open_container(file) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for m in tar:
                    folder, _, name = m.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if m.offset_data + m.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    if m.isfile() and stem:
                        samples.setdefault(f"{folder}/{stem}", {})["." + suffix.lower()] = m.name, m.offset_data, m.size
        except tarfile.TarError as e:
            broken.append(ClipRecord(file, reason=f"corrupt: the tar is broken off, or is none ({e})"))
        return [_from_members(file, members, f, columns) for members in samples.values()] + broken


def _from_members(
    file: str, members: dict[str, tuple[str, int, int]], f: BinaryIO, columns: tuple[str, ...]
) -> ClipRecord:
    def content(suffix: str) -> bytes:
        _, offset, size = members[suffix]
        f.seek(offset)
        return f.read(size)

    clips = [suffix for suffix in members if suffix.endswith(MEDIA_SUFFIXES)]
    path = media.member(file, *next(iter(members.values())))
    if not clips:
        return ClipRecord(path, reason="caption without a clip: no video or image in the tar has this name")
    path, row = media.member(file, *members[clips[0]]), {}
    try:
        if ".json" in members:
            row = json.loads(content(".json").decode("utf-8-sig"))
        where = members[".json"][0] if ".json" in members else ""
        row = row if isinstance(row, dict) else {}
        caption = next((row[name] for name in columns if name in row), None)
        if ".txt" in members:
            caption, where = content(".txt").decode("utf-8-sig"), members[".txt"][0]
    except UnicodeDecodeError as e:
        return ClipRecord(path, reason=f"unreadable caption: is not UTF-8 (byte {e.start})")
    except (ValueError, RecursionError) as e:
        return ClipRecord(path, reason=f"unreadable caption: {members['.json'][0]} is not JSON ({e})")
    texts = (
        _texts(caption, where or "neither .txt nor .json")
        if caption is not None
        else "no caption: neither .txt nor .json has one"
    )
    return (
        ClipRecord(path, reason=texts) if isinstance(texts, str) else ClipRecord(path, texts, declared=_declared(row))
    )


# ---- tables ----


def _scan_table(file: Path, captions: tuple[str, ...]) -> list[ClipRecord]:
    records, number, columns = [], 0, None
    for group, table in enumerate(media.row_groups(str(file))):
        names = table.column_names
        if columns is None:
            columns = (
                _column(file, names, (*MEDIA_COLUMNS, IMAGE_COLUMN, "mp4"), "the clip"),
                _column(file, names, captions, "the caption"),
            )
            logger.info(f"{file}: clips from column {columns[0]!r}, captions from column {columns[1]!r}")
        clip, caption = columns
        wanted = [name for name in names if name in (caption, *DECLARED_COLUMNS)]
        stored = media.stored_names(table, clip)
        for row, values in enumerate(table.select(wanted).to_pylist()):
            where, (name, inside) = f"row {number} of {file}", stored[row]
            path = media.member(str(file), f"{clip}/{name}", group, row) if inside else str(file.parent / name)
            texts = _texts(values[caption], f"column {caption!r} of {where}")
            if not inside and not (name and os.path.exists(path)):
                records.append(ClipRecord(path, reason=f"missing file: named in {where}"))
            elif isinstance(texts, str):
                records.append(ClipRecord(path, reason=texts))
            else:
                records.append(ClipRecord(path, texts, declared=_declared(values)))
            number += 1
    return records


# ---- rules of the configuration: each yields one line per mistake ----


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules about the paths of clips, which must exist."""
    data = config.data
    if data.path and data.source:
        yield (
            f"data.path: given {data.path}, but there is data.source too; make the path one of the sources, or remove "
            f"them"
        )
    elif not data.source:
        yield from _path_errors("data.path", data.path)
    for i, source in enumerate(data.source):
        yield from _path_errors(f"data.source: item {i}: path", source.path)
    if config.validation.path:
        yield from _path_errors("validation.path", config.validation.path)


def _path_errors(name: str, path: str) -> Iterator[str]:
    embedded = f"`embedded:shapes-N`, N from 1 to {MAX_EMBEDDED_CLIPS}, generates clips"
    suffixes = " ".join(FILE_SUFFIXES)
    if not path:
        yield f"{name}: empty; give a folder of clips, a file ({suffixes}), or {embedded}"
    elif path.startswith("embedded:"):
        match = re.fullmatch(r"embedded:shapes-([0-9]{1,9})", path)
        if not match or not 1 <= int(match[1]) <= MAX_EMBEDDED_CLIPS:
            yield f"{name}: given {path}; legal: {embedded}"
    elif "://" in path or set("*?[{") & set(path):
        if not path.lower().endswith(FILE_SUFFIXES):
            yield f"{name}: given {path}; a path with wildcards, braces or a URL must end in one of {suffixes}"
    elif not os.path.exists(path):
        yield f"{name}: {path} does not exist; give a folder of clips, a file ({suffixes}), or {embedded}"
    elif not os.path.isdir(path) and not path.lower().endswith(FILE_SUFFIXES):
        yield f"{name}: {path} is a file; legal: one that ends in {suffixes}, or a folder of clips"
