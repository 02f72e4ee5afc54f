"""From `data.path` to a list of clips with captions, or with the reason why one cannot be used. No video is opened here.

Two layouts are read: a folder, searched recursively, of clips with a same-name .txt; and a metadata .csv or .jsonl file, or a
folder that holds `metadata.csv` or `metadata.jsonl`, with one clip a row. A column `image` may name the first frame that an
image-to-video model is given instead of the clip's own.
"""

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MEDIA_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MEDIA_COLUMNS = ("file_name", "file", "video", "video_path", "path", "media_path", "file_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "cap")
IMAGE_COLUMN = "image"


@dataclass(frozen=True)
class ClipRecord:
    """A clip with its caption. With a `reason`, `category: detail`, it cannot be used, and `path` names the file or row at fault."""

    path: str
    caption: str = ""
    reason: str = ""
    image: str = ""


def scan(path: str | Path) -> list[ClipRecord]:
    """All clips of a folder or metadata file, in the order of names or rows, good and bad.

    Raises ValueError when the path is missing or of no known layout, and for metadata without the columns it needs.
    """
    path = Path(path)
    if path.is_dir():
        metadata = [path / name for name in METADATA_NAMES if (path / name).is_file()]
        if len(metadata) > 1:
            raise ValueError(f"{path}: holds both {' and '.join(METADATA_NAMES)}; give the one to use as data.path")
        return _scan_metadata(metadata[0]) if metadata else _scan_folder(path)
    if path.is_file() and path.suffix.lower() in (".jsonl", ".csv"):
        return _scan_metadata(path)
    kind = "a file of another kind" if path.exists() else "no such file or folder"
    raise ValueError(f"data.path {str(path)!r}: {kind}; give a folder of clips with same-name .txt captions, or a metadata .csv or .jsonl file")


# ---- a folder ----


def _scan_folder(folder: Path) -> list[ClipRecord]:
    files = sorted(_walk(folder))
    media = [p for p in files if p.suffix.lower() in MEDIA_SUFFIXES]
    texts = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt"}
    others = len(files) - len(media) - len(texts)
    if others:
        logger.info(f"{folder}: {others} files are neither clips ({' '.join(MEDIA_SUFFIXES)}) nor .txt captions and are not looked at")
    stems = {p.with_suffix("") for p in media}
    orphans = [p for stem, p in texts.items() if stem not in stems]
    return [_with_caption(clip, texts.get(clip.with_suffix(""))) for clip in media] + [
        ClipRecord(str(p), reason="caption without a clip: no video file has this name") for p in orphans
    ]


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
        return ClipRecord(str(clip), reason=f"no caption: {clip.with_suffix('.txt').name} is missing")
    try:
        caption = text.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name} is not UTF-8 (byte {e.start})")
    except OSError as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name}: {e.strerror}")
    return ClipRecord(str(clip), caption) if caption else ClipRecord(str(clip), reason=f"empty caption: {text.name} holds no text")


# ---- metadata ----


def _scan_metadata(file: Path) -> list[ClipRecord]:
    rows = list(_read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file))
    columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    if not any(isinstance(row, dict) for _, row in rows):
        if not rows:
            raise ValueError(f"{file}: holds no rows")
        return [ClipRecord(where, reason=row) for where, row in rows]
    media = _column(file, columns, MEDIA_COLUMNS, "the clip")
    caption = _column(file, columns, CAPTION_COLUMNS, "the caption")
    logger.info(f"{file}: clips from column {media!r}, captions from column {caption!r}")
    return [ClipRecord(where, reason=row) if isinstance(row, str) else _from_row(file, where, row, media, caption) for where, row in rows]


def _column(file: Path, columns: Iterable[str], accepted: tuple[str, ...], what: str) -> str:
    for name in accepted:
        if name in columns:
            return name
    raise ValueError(f"{file}: no column names {what}; found {', '.join(map(str, columns))}; accepted are {', '.join(accepted)}")


def _from_row(file: Path, where: str, row: dict, media: str, caption: str) -> ClipRecord:
    name, text = row.get(media), row.get(caption)
    if not isinstance(name, str) or not name.strip():
        return ClipRecord(where, reason=f"no clip named: column {media!r} holds {name!r}")
    path = file.parent / name.strip()
    if not path.is_file():
        return ClipRecord(str(path), reason=f"missing file: named in {where}")
    if not isinstance(text, str):
        return ClipRecord(str(path), reason=f"no caption: column {caption!r} of {where} holds {text!r}")
    if not text.strip():
        return ClipRecord(str(path), reason=f"empty caption: column {caption!r} of {where}")
    image = row.get(IMAGE_COLUMN) or ""
    if not isinstance(image, str) or (image and not (file.parent / image).is_file()):
        return ClipRecord(str(path), reason=f"missing image: column {IMAGE_COLUMN!r} of {where} holds {image!r}, which is no file")
    return ClipRecord(str(path), text.strip(), image=str(file.parent / image) if image else "")


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
