"""Paths of a run's exports, and the rest of a diffusers pipeline around exported weights."""

import os
import shutil
from pathlib import Path

from titan_video.models.spec import ModelSpec
from titan_video.tools.bounded import is_plain_name, read_json, short
from titan_video.tools.files import atomic_path, atomic_write, sha256
from titan_video.tools.logging import logger
from titan_video.weights.formats import CONFIG, INDEX, STEM, get_format

PIPELINE = "model_index.json"


def export_path(folder: Path, format_name: str, subfolder: str) -> Path:
    """Path of a run's export, such as `hf/transformer`, `original` or `single_file.safetensors`."""
    if format_name in ("diffusers", "stacked"):
        return folder / ("hf" if format_name == "diffusers" else format_name) / subfolder
    return folder / (f"{format_name}.safetensors" if get_format(format_name).one_file else format_name)


def is_exported(path: Path, format_name: str, spec: ModelSpec) -> bool:
    """Whether the file that an export writes last exists."""
    if get_format(format_name).one_file:
        return path.is_file()
    if format_name in ("diffusers", "stacked") or spec.args_to_original:
        return (path / CONFIG).is_file()
    return (path / INDEX).is_file() or (path / f"{STEM}.safetensors").is_file()


def complete_pipeline(source: Path, target: Path, subfolder: str) -> None:
    """If `source` is a complete pipeline folder, make `target` one too; `target/subfolder` is left to exported weights.

    The other parts are linked, or copied if the file system does not link; model_index.json is written last. Do not
    change a linked file in place: it is the same file as the source's. ValueError: both are the same folder, or
    model_index.json cannot be read.

    Parts have plain names. A link out of `source` is not followed, but into the blobs of its repository in a cache.
    """
    index = source / PIPELINE
    if not index.is_file():
        return
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source itself; give another folder")
    try:
        content = read_json(index)
        parts = [name for name, kind in content.items() if isinstance(kind, list) and kind and kind[0]]
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{index} cannot be read ({e}); it should be that of a diffusers pipeline") from e
    others, files = [name for name in parts if name != subfolder], []
    missing = [name for name in others if not is_plain_name(name) or not (source / name).is_dir()]
    problem = "" if subfolder in parts else f"it names no {subfolder}"
    if missing:
        problem = f"it lacks a folder of the name {short(', '.join(missing))}"
    elif not problem:
        folders = [source / name for name in others]
        files = [path for f in folders if _is_inside(f, source) for path in sorted(f.rglob("*")) if path.is_file()]
        if outside := [path for path in folders + files if not _is_inside(path, source)]:
            problem = f"{outside[0]} is a link to {outside[0].resolve()}, outside of it"
    if problem:
        logger.warning(f"{target} will hold the weights only: {source} is no complete pipeline, {problem}")
        return
    for file in files:
        _link(file.resolve(), target / file.relative_to(source))
    atomic_write(target / PIPELINE, index.read_bytes(), "exported pipeline")


def _is_inside(path: Path, source: Path) -> bool:
    """Whether the file that `path` leads to is in `source`, or in the blobs of its repository in a cache."""
    root, file = source.resolve(), path.resolve()
    repositories = [p.parent for p in (root, *root.parents) if p.name == "snapshots" and "--" in p.parent.name]
    return any(file.is_relative_to(folder) for folder in (root, *(r / "blobs" for r in repositories)))


def _link(file: Path, target: Path) -> None:
    """A hard link, so that `target` stays valid when the source is moved or removed; else a verified copy."""
    if target.exists() and target.samefile(file):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        with atomic_path(target, "exported pipeline", file.stat().st_size) as temporary:
            shutil.copyfile(file, temporary)
            if sha256(temporary) != sha256(file):
                raise RuntimeError(f"{target} does not hold what was copied from {file}") from None
