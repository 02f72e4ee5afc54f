"""From the path of a source to a list of clips with captions, or with the reason why one cannot be used. No video is
opened here.

    a folder        searched recursively: clips and images with a same-name .txt; a folder of images that has such
                    a .txt is one clip
    metadata        .csv, .json or .jsonl, or a folder that holds metadata.*: one clip a row
    tars            WebDataset shards: a path with braces and wildcards, a folder of them, or a URL
    tables          .parquet and .arrow files, or a folder of them: Hugging Face data sets on disk

A column `image` may name an image that replaces the clip's first frame as conditioning frame.
"""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from titan_video.config.job_config import JobConfig
from titan_video.ingest import media
from titan_video.ingest.archives import scan_table, scan_tar
from titan_video.ingest.media import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from titan_video.ingest.metadata import CAPTION_COLUMNS, ClipRecord, not_a_clip, read_text, scan_metadata

logger = logging.getLogger(__name__)

METADATA_SUFFIXES = (".jsonl", ".csv", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow")
FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".tar", *TABLE_SUFFIXES)
MAX_EMBEDDED_CLIPS = 100_000
METADATA_NAMES = tuple("metadata" + suffix for suffix in METADATA_SUFFIXES)


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
            records += scan_tar(file, columns)
        elif suffix in METADATA_SUFFIXES and not media.is_url(file):
            records += scan_metadata(Path(file), columns)
        elif suffix in TABLE_SUFFIXES and not media.is_url(file):
            records += scan_table(Path(file), columns)
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
    """Visible files below `folder`, through links, each real folder once. A link to a folder around it, or to the
    system's own, is not followed.
    """
    seen, root = set(), Path(os.path.realpath(folder))
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        is_inside = Path(real).is_relative_to(root)
        if not is_inside and (root.is_relative_to(real) or f"{real}/".startswith(("/proc/", "/sys/", "/dev/"))):
            logger.warning(f"{where}: a link to {real}, which is not followed")
            seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (Path(where, name) for name in names if not name.startswith("."))
        seen.add(real)


def _with_caption(clip: Path, text: Path | None) -> ClipRecord:
    if reason := not_a_clip(str(clip)):
        return ClipRecord(str(clip), reason=reason)
    if text is None:
        return ClipRecord(str(clip), reason=f"no caption: {_stem(clip).name}.txt is missing")
    try:
        caption = read_text(text).decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name} is not UTF-8 (byte {e.start})")
    except OSError as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name}: {e.strerror}")
    return (
        ClipRecord(str(clip), (caption,))
        if caption
        else ClipRecord(str(clip), reason=f"empty caption: {text.name} holds no text")
    )


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
