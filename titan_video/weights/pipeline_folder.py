"""Paths of a run's exports, and the rest of a diffusers pipeline around exported weights."""

import json
import os
import shutil
from pathlib import Path

from titan_video.checkpoint.files import MANIFEST, list_steps
from titan_video.models.spec import ModelSpec
from titan_video.tools.files import atomic_path, atomic_write, sha256
from titan_video.tools.logging import logger
from titan_video.weights.formats import CONFIG, INDEX, STEM, get_format

PIPELINE = "model_index.json"


def export_path(folder: Path, format_name: str, subfolder: str) -> Path:
    """Path of a run's export: `hf/transformer`, `original`, `single_file.safetensors` or `comfyui.safetensors`."""
    if format_name == "diffusers":
        return folder / "hf" / subfolder
    return folder / (f"{format_name}.safetensors" if get_format(format_name).one_file else format_name)


def is_exported(path: Path, format_name: str, spec: ModelSpec) -> bool:
    """Whether the file that an export writes last exists."""
    if get_format(format_name).one_file:
        return path.is_file()
    if format_name == "diffusers" or spec.args_to_original:
        return (path / CONFIG).is_file()
    return (path / INDEX).is_file() or (path / f"{STEM}.safetensors").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a step-N folder or contains some, rather than public weights."""
    return (path / MANIFEST).is_file() or bool(list_steps(path))


def complete_pipeline(source: Path, target: Path, subfolder: str) -> None:
    """If `source` is a complete pipeline folder, make `target` one too; `target/subfolder` is left to exported weights.

    The other parts are linked, or copied if the file system does not link; model_index.json is written last. Do not
    change a linked file in place: it is the same file as the source's. ValueError: both are the same folder, or
    model_index.json cannot be read.
    """
    index = source / PIPELINE
    if not index.is_file():
        return
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source itself; give another folder")
    try:
        parts = [
            name for name, kind in json.loads(index.read_text()).items() if isinstance(kind, list) and kind and kind[0]
        ]
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{index} cannot be read ({e}); it should be that of a diffusers pipeline") from e
    missing = [name for name in parts if name != subfolder and not (source / name).is_dir()]
    if missing or subfolder not in parts:
        problem = f"it lacks {', '.join(missing)}" if missing else f"it names no {subfolder}"
        logger.warning(f"{target} will hold the weights only: {source} is no complete pipeline, {problem}")
        return
    for name in parts:
        if name != subfolder:
            for file in sorted(path for path in (source / name).rglob("*") if path.is_file()):
                _link(file.resolve(), target / file.relative_to(source))
    atomic_write(target / PIPELINE, index.read_text(), "exported pipeline")


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
