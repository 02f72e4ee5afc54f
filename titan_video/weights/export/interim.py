"""`checkpoint.export_every`: exports of a run that goes on, in `exports/step-N` of its folder.

A folder is written as `step-N.partial` and renamed when it is whole, so another program may read what is there at any
time. What an interrupted export leaves is removed by the next one. Nothing of the run depends on these folders.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from titan_video.checkpoint import files
from titan_video.config.job_config import Checkpoint, JobConfig
from titan_video.distributed.utils import broadcast_from_rank0
from titan_video.models import get_args, get_spec
from titan_video.tools import heartbeat
from titan_video.tools.files import StorageError, sync, writing
from titan_video.tools.logging import logger
from titan_video.weights.export.save import format_problem

FOLDER = "exports"


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about exports, one line per mistake."""
    c = config.checkpoint
    if c.keep_exports and not c.export_every:
        yield (
            f"checkpoint.keep_exports: given {c.keep_exports}, but checkpoint.export_every is 0; set that to steps, or "
            f"leave this at 0"
        )
    if c.last_save_in_hf or c.export_every:
        yield from _format_errors(config)
    assets, target = config.model.hf_assets_path, Path(config.job.dump_folder) / "hf"
    is_full = not config.lora.enable or "merged" in config.lora.export
    is_ours = c.last_save_in_hf and c.export_format == "diffusers" and is_full
    if is_ours and assets and Path(assets).resolve() == target.resolve():
        yield (
            f"model.hf_assets_path: given {assets}, into which checkpoint.last_save_in_hf exports; give another "
            f"job.dump_folder"
        )


def _format_errors(config: JobConfig) -> Iterator[str]:
    m, export_format = config.model, config.checkpoint.export_format
    try:
        args = get_args(get_spec(m.name), m.flavor, m.hf_assets_path, config.encoder.max_text_length)
    except (ValueError, OSError):  # the program itself names the mistake
        return
    if problem := format_problem(export_format, args):
        yield f"checkpoint.export_format: given {export_format}, with model.flavor {m.flavor}: {problem}"


def is_due(section: Checkpoint, step: int) -> bool:
    """Whether the weights after `step` steps are exported here. At step 0 they are those that the run starts from."""
    return step > 0 and section.export_every > 0 and step % section.export_every == 0


def is_complete(section: Checkpoint, folder: Path, step: int) -> bool:
    """Whether no export of `step` is due, or it is there. folder: of the run."""
    return not is_due(section, step) or (folder / FOLDER / f"step-{step}").is_dir()


def export_interim(
    section: Checkpoint, folder: Path, step: int, write: Callable[[Path], None], group: dist.ProcessGroup | None
) -> None:
    """Export the weights after `step` steps, if it is time to. All ranks call it.

    folder: of the run. write: exports into the folder that it is given; all ranks call it. group: for what rank 0 does
    alone. StorageError, on all ranks: it cannot be written, and checkpoint.on_error is not "continue".
    """
    if not is_due(section, step):
        return
    final = folder / FOLDER / f"step-{step}"
    partial = final.with_name(f"{final.name}.partial")
    heartbeat.enter(f"exporting step {step}")
    try:
        broadcast_from_rank0(lambda: _remove_unfinished(final.parent), group)
        write(partial)
        broadcast_from_rank0(lambda: _commit(partial, final, section.keep_exports), group)
    except StorageError as error:
        broadcast_from_rank0(lambda: shutil.rmtree(partial, ignore_errors=True), group)
        if section.on_error == "stop":
            raise
        logger.warning(f"{error}; training goes on, and the next export is tried")


def _remove_unfinished(folder: Path) -> None:
    with writing("export", folder):
        for path in files.list_partial(folder):
            shutil.rmtree(path)


def _commit(partial: Path, final: Path, keep: int) -> None:
    with writing("export", final):
        if final.exists():  # of the same step, before a rollback or a resume
            files.remove(final)
        partial.rename(final)
        sync(final.parent)
        logger.info(f"exported to {final}")
        steps = [step for step in files.list_steps(final.parent) if step <= int(final.name.removeprefix("step-"))]
        for step in steps[:-keep] if keep else []:
            files.remove(files.step_folder(final.parent, step))
