"""What a training run exports: at its end, and with checkpoint.export_every on its way."""

from pathlib import Path

import torch
from torch import Tensor, nn

from titan_video.distributed.utils import broadcast_from_rank0
from titan_video.optim.ema import EmaWeights
from titan_video.tools.logging import logger
from titan_video.weights.export.interim import export_interim, is_complete
from titan_video.weights.export.pipeline_folder import complete_pipeline, export_path, is_exported
from titan_video.weights.export.save import save_hf
from titan_video.weights.trained import FullWeights


def is_done(weights: FullWeights, folder: Path, step: int) -> bool:
    """Whether what is exported at the end of a run, after `step` steps, is in its folder."""
    section = weights.settings.checkpoint
    return weights.is_written(folder) if section.last_save_in_hf else is_complete(section, folder, step)


def export(weights: FullWeights, model: nn.Module, folder: Path, step: int, ema: EmaWeights | None, last: bool) -> None:
    """Export the weights after `step` steps, or the EMA weights, if it is time to. All ranks call it."""
    section = weights.settings.checkpoint
    averaged = ema.state_dict() if ema else None
    if last and section.last_save_in_hf:
        weights.write(model, folder, averaged)
    elif section.export_every:
        export_interim(section, folder, step, lambda to: weights.write(model, to, averaged), weights.group)


def is_full_written(weights: FullWeights, folder: Path) -> bool:
    """Whether `write_full` has written all to `folder`."""
    format_name = weights.settings.checkpoint.export_format
    return is_exported(export_path(folder, format_name, weights.subfolder), format_name, weights.spec)


def write_full(weights: FullWeights, model: nn.Module, folder: Path, tensors: dict[str, Tensor] | None) -> None:
    """Write all weights of the model, or `tensors` by the same names, as checkpoint.export_format says."""
    c, assets = weights.settings.checkpoint, weights.settings.model.hf_assets_path
    path = export_path(folder, c.export_format, weights.subfolder)
    if c.export_format == "diffusers" and assets:
        broadcast_from_rank0(lambda: complete_pipeline(Path(assets), path.parent, weights.subfolder), weights.group)
    dtype = getattr(torch, c.export_dtype)
    save_hf(model, path, weights.spec, weights.args, dtype, weights=tensors, format_name=c.export_format)
    logger.info(f"exported to {path}")
