"""The weights that a run starts from."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from titan_video.components.checkpoint import load_weights
from titan_video.components.hf_storage import load_hf
from titan_video.components.lora import load_lora
from titan_video.components.pipeline_folder import is_checkpoint
from titan_video.config.job_config import Lora
from titan_video.distributed.utils import initialise
from titan_video.models.lora import init_adapter, is_adapter, is_frozen
from titan_video.models.spec import ModelSpec
from titan_video.tools.logging import logger


def load_start(
    model: nn.Module, source: str, spec: ModelSpec, args: Any, subfolder: str, seed: int, lora: Lora, group: dist.ProcessGroup | None = None
) -> None:
    """Fill all parameters from `source`, a step-N folder of a run or weights in a public format, or where it is empty from the seed; adapters
    from their own file or from the seed.

    subfolder: where a pipeline folder has the weights. All ranks of `group` (default: all there are) call it. ValueError: see the loaders.
    """
    which = is_frozen if lora.enable else None
    if not source:
        initialise(model, spec.init_parameter, seed, which)
    elif is_checkpoint(Path(source)):
        load_weights(Path(source), model, group=group, which=which)
    else:
        load_hf(model, source, spec, args, subfolder)
    if source:
        logger.info(f"weights from {source}")
    if lora.initial_load_path:
        load_lora(model, Path(lora.initial_load_path), spec, args, lora)
        logger.info(f"adapters from {lora.initial_load_path}")
    elif lora.enable:
        initialise(model, init_adapter, seed, is_adapter)
