"""What an export puts where, and the rest of a diffusers pipeline around exported weights."""

import json
import os
import shutil
from pathlib import Path

from titan_video.checkpoint.files import MANIFEST, fsync_path, list_steps, sha256_of, write_text
from titan_video.models.spec import ModelSpec
from titan_video.tools.logging import logger
from titan_video.weights.formats import CONFIG, FORMATS, INDEX, STEM

PIPELINE = "model_index.json"


def export_path(folder: Path, format_name: str, subfolder: str) -> Path:
    """Where a run's export lies in its folder:

    `hf/transformer`, `original`, `single_file.safetensors` or `comfyui.safetensors`.
    """
    if format_name == "diffusers":
        return folder / "hf" / subfolder
    return folder / (f"{format_name}.safetensors" if FORMATS[format_name].one_file else format_name)


def is_exported(path: Path, format_name: str, spec: ModelSpec) -> bool:
    """Whether the file that an export writes last is there."""
    if FORMATS[format_name].one_file:
        return path.is_file()
    if format_name == "diffusers" or spec.args_to_original:
        return (path / CONFIG).is_file()
    return (path / INDEX).is_file() or (path / f"{STEM}.safetensors").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a step-N folder, or holds some, rather than public weights."""
    return (path / MANIFEST).is_file() or bool(list_steps(path))


def complete_pipeline(source: Path, target: Path, subfolder: str) -> None:
    """Make `target`, where `subfolder` is to hold exported weights, a whole pipeline folder if `source` is one: its
    other parts are linked, or copied where the file system does not link, and model_index.json comes last. A linked
    file is the same file: change neither in place.
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
        lacks = f"it lacks {', '.join(missing)}" if missing else f"it names no {subfolder}"
        logger.warning(f"{target} will hold the weights only: {source} is no whole pipeline, {lacks}")
        return
    for name in parts:
        if name != subfolder:
            for file in sorted(path for path in (source / name).rglob("*") if path.is_file()):
                _link(file.resolve(), target / file.relative_to(source))
    write_text(target / PIPELINE, index.read_text())
    fsync_path(target)


def _link(file: Path, target: Path) -> None:
    """Hard links: a folder that is moved or whose source is removed stays whole."""
    if target.exists() and target.samefile(file):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
        fsync_path(target)
        if sha256_of(target) != sha256_of(file):
            raise RuntimeError(f"{target} does not hold what was copied from {file}") from None
