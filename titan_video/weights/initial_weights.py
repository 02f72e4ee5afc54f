"""The weights that a run starts from, and that adapters belong to."""

import hashlib
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from titan_video.checkpoint.manager import load_weights
from titan_video.config.job_config import Lora
from titan_video.distributed.utils import broadcast_from_rank0, initialise
from titan_video.lora.adapters import init_adapter, is_adapter, is_frozen
from titan_video.lora.files import load_lora
from titan_video.models.spec import ModelSpec
from titan_video.tools.logging import logger
from titan_video.weights.hf_storage import load_hf
from titan_video.weights.pipeline_folder import is_checkpoint


def load_initial_weights(
    model: nn.Module,
    source: str,
    spec: ModelSpec,
    args: Any,
    subfolder: str,
    seed: int,
    lora: Lora,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill all parameters from `source`, a step-N folder of a run or weights in a public format, or where it is empty
    from the seed; adapters from their own file or from the seed.

    subfolder: where a pipeline folder has the weights. All ranks of `group` (default: all there are) call it.
        ValueError: see the loaders.
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


class LoraState:
    """What the adapters in a checkpoint belong to: their scale, and the frozen weights, which no checkpoint holds.
    Others would be another model.

    source, subfolder, seed: as in `load_initial_weights`. All ranks of `group` build it.
    """

    def __init__(self, section: Lora, source: str, subfolder: str, seed: int, group: dist.ProcessGroup | None = None):
        frozen = (
            broadcast_from_rank0(lambda: fingerprint(Path(source), subfolder), group)
            if source
            else f"drawn from seed {seed}"
        )
        self.state = {"scale": section.alpha / section.rank, "frozen": frozen}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError if the run goes on with another scale or other frozen weights than it was saved with."""
        another = "; for a new run from these adapters give another job.dump_folder and lora.initial_load_path"
        if state["scale"] != self.state["scale"]:
            raise ValueError(
                f"lora.alpha / lora.rank is {self.state['scale']:g}, but the checkpoint's adapters were trained with "
                f"{state['scale']:g}: set alpha to {state['scale']:g} x rank{another}"
            )
        if state["frozen"] != self.state["frozen"]:
            raise ValueError(
                "checkpoint.initial_load_path or model.hf_assets_path: the weights there are not those that the "
                "checkpoint's adapters "
                f"were trained on ({self.state['frozen']}, not {state['frozen']}): give those{another}"
            )


def fingerprint(source: Path, subfolder: str) -> str:
    """Of weight files: their sizes, and the first and last MiB of each, whatever their names and where they are."""
    root = source / subfolder if (source / subfolder).is_dir() else source
    files = [root] if root.is_file() else [p for p in root.rglob("*") if p.suffix in (".safetensors", ".distcp")]
    parts = []
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(1 << 20)
            f.seek(max(0, size - (1 << 20)))
            parts.append(hashlib.sha256(b"%d " % size + head + f.read()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]
