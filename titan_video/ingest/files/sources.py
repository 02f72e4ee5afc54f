"""From the path of a source to a list of clips with captions, or with the reason why one cannot be used. No video is
opened here.

    a folder        searched recursively: clips and images with a same-name .txt or .caption; a folder of images that
                    has such a caption is one clip
    metadata        .csv, .tsv, .json or .jsonl, or a folder that holds metadata.*: one clip a row
    tars            WebDataset shards: a path with braces and wildcards, a folder of them, or a URL
    tables          .parquet and .arrow files, or a folder of them: Hugging Face data sets on disk

A column `image` may name an image that replaces the clip's first frame as conditioning frame.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from titan_video.config.job_config import JobConfig
from titan_video.ingest.files import media, metadata
from titan_video.ingest.files.archives import scan_table, scan_tar
from titan_video.ingest.files.media import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from titan_video.ingest.files.metadata import CAPTION_COLUMNS, ClipRecord, not_a_clip, scan_metadata, unread
from titan_video.ingest.files.names import FileNames, fold, quoted
from titan_video.ingest.files.text import TextFault, read_text

logger = logging.getLogger(__name__)

METADATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
CAPTION_SUFFIXES = (".txt", ".caption")  # of a clip that has both, the first
TABLE_SUFFIXES = (".parquet", ".arrow")
FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".tar", *TABLE_SUFFIXES)
MAX_EMBEDDED_CLIPS = 100_000
MAX_BESIDE, NAMES_SHOWN = 100_000, 5  # files with a source that are looked at, and shown
METADATA_NAMES = tuple("metadata" + suffix for suffix in METADATA_SUFFIXES)


def scan(path: str | Path, caption_column: str = "") -> list[ClipRecord]:
    """All clips of a source, good and bad: see `iter_records`."""
    return list(iter_records(path, caption_column))


def iter_records(path: str | Path, caption_column: str = "") -> Iterator[ClipRecord]:
    """All clips of a source, good and bad, in the order of names or rows. What is in memory is a folder, or one of the
    files of metadata, tars and tables.

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
            yield from _scan_folder(folder)
    for file in files:
        suffix = Path(file).suffix.lower()
        if not media.is_url(file) and not os.path.isfile(file):
            raise ValueError(f"data path {file!r}: no such file or folder")
        if suffix == ".tar":
            yield from scan_tar(file, columns)
        elif suffix in METADATA_SUFFIXES and not media.is_url(file):
            yield from _scan_metadata(Path(file), columns, is_found=os.path.isdir(pattern))
        elif suffix in TABLE_SUFFIXES and not media.is_url(file):
            yield from scan_table(Path(file), columns)
        else:
            known = (
                f"a folder, a metadata file ({' '.join(METADATA_SUFFIXES)}), tars, or {' '.join(TABLE_SUFFIXES)} "
                f"files; of URLs, tars"
            )
            raise ValueError(f"data path {file!r}: a file of another kind; give {known}")


def _scan_metadata(file: Path, columns: tuple[str, ...], is_found: bool) -> list[ClipRecord]:
    """is_found: the file was not given, but lies in the folder that was: albums come with a metadata.json of theirs."""
    try:
        return scan_metadata(file, columns)
    except ValueError as e:
        hint = "; a file of this name is taken for the list of the folder's clips: rename it if it is none"
        raise ValueError(f"{e}{hint * is_found}") from e


def _inside(folder: Path) -> list[str]:
    """The metadata file, the tars or the tables of a folder; none where it holds clips as files."""
    metadata = [str(folder / name) for name in sorted(os.listdir(folder)) if name.lower() in METADATA_NAMES]
    metadata = [file for file in metadata if os.path.isfile(file)]
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
    clips = [p for p in files if p.suffix.lower() in MEDIA_SUFFIXES]
    captions = _Captions(p for p in files if p.suffix.lower() in CAPTION_SUFFIXES)
    # Images without captions of their own, in a folder that has one, are the frames of a clip.
    frame_dirs = {p.parent for p in clips if p.parent in captions.exact and p.suffix.lower() in IMAGE_SUFFIXES}
    clips = sorted([p for p in clips if p.parent not in frame_dirs] + list(frame_dirs))
    found = captions.of_clips(clips)
    records = []
    for clip in clips:
        text, written = found.get(clip, (None, ""))
        records.append(_with_caption(clip, text, written))
    unread_files = {p: reason for p in files if (reason := unread(str(p)))}
    records += [ClipRecord(str(p), reason=reason) for p, reason in unread_files.items()]
    not_clips = {_stem(p) for p in clips} | {p.with_suffix("") for p in unread_files}
    others: dict[Path, list[str]] = {}
    for p in files:
        if p.suffix.lower() not in (*CAPTION_SUFFIXES, *MEDIA_SUFFIXES):
            others.setdefault(p.with_suffix(""), []).append(p.name)
    for text in captions.left:
        if text.with_suffix("") not in not_clips:
            beside = ", ".join(others.get(text.with_suffix(""), []))
            why = f"{beside} has a suffix that is not read" if beside else "no video or image has this name"
            records.append(ClipRecord(str(text), reason=f"caption without a clip: {why}"))
    return records


class _Captions:
    """Which caption file belongs to which clip: one of the clip's name without its suffix, or with it (a.mp4.txt); else
    the only one of a name that systems take for the same (names.fold).

    exact: {name without the suffix: file}. left: files that belong to no clip.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = list(files)
        self.exact: dict[Path, Path] = {}
        for p in sorted(self.files, key=lambda p: CAPTION_SUFFIXES.index(p.suffix.lower())):
            self.exact.setdefault(p.with_suffix(""), p)
        self.left: list[Path] = []

    def of_clips(self, clips: Sequence[Path]) -> dict[Path, tuple[Path, str]]:
        """{clip: (caption file, its name where that is spelled in another way)}."""
        found, folded = {}, {}
        for clip in clips:
            if text := self.exact.get(_stem(clip)) or self.exact.get(clip):
                found[clip] = text, ""
        used = {text for text, _ in found.values()}
        free = [p for p in self.exact.values() if p not in used]
        for p in free:
            folded.setdefault((p.parent, fold(p.with_suffix("").name)), []).append(p)
        wanted = Counter((clip.parent, fold(_stem(clip).name)) for clip in clips if clip not in found)
        for clip in clips:
            name = clip.parent, fold(_stem(clip).name)
            if clip not in found and wanted[name] == len(folded.get(name, ())) == 1:
                found[clip] = folded[name][0], folded[name][0].name
        used |= {text for text, _ in found.values()}
        self.left = [p for p in free if p not in used]
        return found


def _stem(clip: Path) -> Path:
    return clip.with_suffix("") if clip.suffix.lower() in MEDIA_SUFFIXES else clip


def _walk(folder: Path) -> Iterator[Path]:
    return (Path(where, name) for where, name in _files(folder))


def _files(folder: Path, hidden: list[Path] | None = None) -> Iterator[tuple[str, str]]:
    """(folder, name) of the visible files below `folder`, through links, each real folder once. A link to a folder
    around it, or to the system's own, is not followed.

    hidden: files and folders whose names begin with a dot are added to it.
    """
    seen, root = set(), Path(os.path.realpath(folder))
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        is_inside = Path(real).is_relative_to(root)
        if not is_inside and (root.is_relative_to(real) or f"{real}/".startswith(("/proc/", "/sys/", "/dev/"))):
            logger.warning(f"{where}: a link to {real}, which is not followed")
            seen.add(real)
        if hidden is not None and real not in seen:
            hidden += (Path(where, name) for name in (*folders, *names) if name.startswith("."))
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from ((where, name) for name in names if not name.startswith("."))
        seen.add(real)


def _with_caption(clip: Path, text: Path | None, written: str) -> ClipRecord:
    if reason := not_a_clip(str(clip)):
        return ClipRecord(str(clip), reason=reason)
    if text is None:
        return ClipRecord(str(clip), reason=f"no caption: {_stem(clip).name}.txt is missing")
    try:
        caption = read_text(text, metadata.MAX_TEXT_BYTES).strip()
    except TextFault as e:
        return ClipRecord(str(clip), reason=f"unreadable caption: {text.name} {e}")
    except OSError as e:
        return ClipRecord(str(clip), reason=media.unreadable(e) or f"unreadable caption: {text.name}: {e.strerror}")
    if not caption:
        return ClipRecord(str(clip), reason=f"empty caption: {text.name} holds no text")
    return ClipRecord(str(clip), (caption,), written=written)


# ---- what is beside the clips ----


def remarks(paths: Iterable[str], records: Sequence[ClipRecord]) -> list[str]:
    """Lines for the plan: files that lie with the sources at `paths` and are in no record, and names that were not
    taken as they are written. records: of all sources.
    """
    spelled = [f"{quoted(r.written)} is taken for {r.path}" for r in records if r.written]
    lines = [f"{len(spelled)} names are spelled in another way: {_first(spelled)}"] if spelled else []
    known = {os.path.abspath(p) for r in records for p in (r.path, r.image) if p}
    for folder, used in _folders(paths).items():
        hidden: list[Path] = []
        files = list(islice(_files(folder, hidden), max(MAX_BESIDE, 2 * len(records))))
        captions_by_name = _Captions(Path(*file) for file in files if file[1].lower().endswith(CAPTION_SUFFIXES))
        captions = set(captions_by_name.exact.values())
        lines += _shared(captions_by_name, folder, records) if not used else []
        if hidden:
            names = sorted(str(p.relative_to(folder)) for p in hidden)
            lines.append(f"{len(names)} names in {folder} begin with a dot, and are not looked at: {_first(names)}")
        left: dict[str, list[str]] = {}
        # Most files are clips of a record. They are left out by name, as to make a Path takes ten times as long.
        inside = {where: os.path.abspath(where) for where in {where for where, _ in files}}
        not_known = (f for f in files if inside[f[0]] not in known and os.path.join(inside[f[0]], f[1]) not in known)
        for p in sorted(Path(*file) for file in not_known):
            suffix = p.suffix.lower()
            if p in used:
                continue
            if suffix in MEDIA_SUFFIXES or unread(str(p)):
                what = f"are not listed in {_first(sorted(p.name for p in used))}, and not used"
            elif suffix in CAPTION_SUFFIXES and (used or p in captions):
                what = f"are not read, as captions are in {_first(sorted(p.name for p in used))}" if used else ""
            elif suffix in CAPTION_SUFFIXES:
                what = f"are not read, as {CAPTION_SUFFIXES[0]} files of the same names are there"
            else:
                what = "are neither clips nor captions, and not read"
            left.setdefault(what, []).append(str(p.relative_to(folder)))
        lines += [f"{len(names)} files in {folder} {what}: {_first(names)}" for what, names in left.items() if what]
    return lines


def _shared(captions: _Captions, folder: Path, records: Sequence[ClipRecord]) -> list[str]:
    """A line about caption files that belong to several clips, such as the two halves of a Live Photo."""
    clips: dict[Path, list[str]] = {}
    inside = [Path(r.path) for r in records if not r.reason and r.path.startswith(str(folder))]
    for clip, (text, _) in captions.of_clips(inside).items():
        clips.setdefault(text, []).append(clip.name)
    shared = [f"{text.name} of {' and '.join(names)}" for text, names in clips.items() if len(names) > 1]
    return [f"{len(shared)} captions belong to several clips: {_first(shared)}"] if shared else []


def _folders(paths: Iterable[str]) -> dict[Path, set[Path]]:
    """{folder of a source: the metadata files in it that are read; empty where its clips are files}. Without those of
    tars and tables, which hold their clips.
    """
    found: dict[Path, set[Path]] = {}
    for path in paths:
        for file in map(Path, () if media.is_url(path) else media.expand(path)):
            inside = [Path(p) for p in (_inside(file) if file.is_dir() else [file])]
            if all(p.suffix.lower() in METADATA_SUFFIXES for p in inside):
                found.setdefault(file if file.is_dir() else file.parent, set()).update(inside)
    return found


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]).encode("utf-8", "backslashreplace").decode() + more


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
    embedded = f"`embedded:shapes-N` or `embedded:large-shapes-N`, N from 1 to {MAX_EMBEDDED_CLIPS}, generates clips"
    suffixes = " ".join(FILE_SUFFIXES)
    if not path:
        yield f"{name}: empty; give a folder of clips, a file ({suffixes}), or {embedded}"
    elif path.startswith("embedded:"):
        match = re.fullmatch(r"embedded:(?:large-)?shapes-([0-9]{1,9})", path)
        if not match or not 1 <= int(match[1]) <= MAX_EMBEDDED_CLIPS:
            yield f"{name}: given {path}; legal: {embedded}"
    elif "://" in path or set("*?[{") & set(path):
        if not path.lower().endswith(FILE_SUFFIXES):
            yield f"{name}: given {path}; a path with wildcards, braces or a URL must end in one of {suffixes}"
    elif not os.path.exists(path):
        found = FileNames(Path()).find(path).path
        hint = (
            f"{found} does, a name that is spelled in another way; give that"
            if found
            else (f"give a folder of clips, a file ({suffixes}), or {embedded}")
        )
        yield f"{name}: {path} does not exist; {hint}"
    elif not os.path.isdir(path) and not path.lower().endswith(FILE_SUFFIXES):
        yield f"{name}: {path} is a file; legal: one that ends in {suffixes}, or a folder of clips"
