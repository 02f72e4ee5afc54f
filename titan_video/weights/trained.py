"""Which weights of a model a run trains, starts from, saves and exports.

All of them by default. LoRA (lora/training.py, optional) trains adapters of frozen weights instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from titan_video.checkpoint.files import is_checkpoint
from titan_video.checkpoint.manager import load_weights
from titan_video.config.job_config import Checkpoint, Lora, Model, Training
from titan_video.distributed.utils import initialise
from titan_video.models.layers import cast_params
from titan_video.models.spec import ModelSpec
from titan_video.optim.ema import EmaWeights
from titan_video.tools.parts import resolve
from titan_video.weights.hf_storage import load_hf

LORA = "titan_video.lora.training:LoraWeights"  # optional
EXPORT, EXPORTING = "titan_video.weights.export.run", "an export"  # optional


@dataclass(frozen=True)
class WeightsSettings:
    """The sections that say which weights these are."""

    model: Model
    checkpoint: Checkpoint
    training: Training
    lora: Lora
    seed: int


class FullWeights:
    """All weights of the model are trained.

    is_saved: which parameters a checkpoint holds, by name; None: all.
    """

    is_saved: Callable[[str], bool] | None = None

    def __init__(self, settings: WeightsSettings, spec: ModelSpec, args: Any, group: dist.ProcessGroup | None = None):
        """group: of the ranks that load and save, on the host; None: the default group, or this process alone."""
        self.settings, self.spec, self.args, self.group = settings, spec, args, group
        # Of the two experts of Wan 2.2 A14B the low-noise one is `transformer_2`.
        self.subfolder = f"{spec.hf_folder}_2" if settings.model.expert == "low" else spec.hf_folder

    @property
    def source(self) -> str:
        """Where the run's first weights are: a step-N folder or weights in a public format; "": drawn from the seed."""
        checkpoint = self.settings.checkpoint
        return checkpoint.initial_load_path or (
            self.settings.model.hf_assets_path if checkpoint.initial_load_in_hf else ""
        )

    def prepare(self, model: nn.Module) -> None:
        """Set the types of the weights, and what is trained, in place; the model is on the meta device."""
        cast_params(model, self.spec.plan.fp32, getattr(torch, self.settings.training.dtype))

    def load_frozen(self, model: nn.Module) -> None:
        """Load the weights that no checkpoint of this run holds. All ranks call it, as the methods below."""

    def load_initial(self, model: nn.Module) -> None:
        """Fill the trained weights for the first step of a run. ValueError: see the loaders."""
        self.load_base(model)

    def load_base(self, model: nn.Module, which: Callable[[str], bool] | None = None) -> None:
        """Fill the parameters that `which` accepts by name (None: all) from `source`."""
        source = self.source
        if not source:
            initialise(model, self.spec.init_parameter, self.settings.seed, which)
        elif is_checkpoint(Path(source)):
            load_weights(Path(source), model, group=self.group, which=which)
        else:
            load_hf(model, source, self.spec, self.args, self.subfolder, which)

    def origin(self, step: int) -> str:
        """Where the weights come from, for the log. step: of the checkpoint of this run that was loaded; 0: none."""
        drawn = f"drawn at random with debug.seed {self.settings.seed}"
        return f"step {step} of this run's checkpoints" if step else f"from {self.source}" if self.source else drawn

    def counters(self) -> dict[str, Stateful]:
        """Further state of checkpoints."""
        return {}

    def is_exported(self, folder: Path, step: int) -> bool:
        """Whether what is exported at the end of a run, after `step` steps, is in its folder."""
        return not self._is_asked or resolve(f"{EXPORT}:is_done", EXPORTING)(self, folder, step)

    def export(self, model: nn.Module, folder: Path, step: int, ema: EmaWeights | None, last: bool) -> None:
        """Export the weights after `step` steps, or the EMA weights, if the run's configuration asks for it."""
        if self._is_asked:
            resolve(f"{EXPORT}:export", EXPORTING)(self, model, folder, step, ema, last)

    @property
    def _is_asked(self) -> bool:
        return self.settings.checkpoint.last_save_in_hf or self.settings.checkpoint.export_every > 0

    def is_written(self, folder: Path) -> bool:
        """Whether `write` has written all to `folder`."""
        return resolve(f"{EXPORT}:is_full_written", EXPORTING)(self, folder)

    def write(self, model: nn.Module, folder: Path, tensors: dict[str, Tensor] | None) -> None:
        """Write the weights, or `tensors` by the same names (EMA weights), to `folder`, in checkpoint.export_format."""
        resolve(f"{EXPORT}:write_full", EXPORTING)(self, model, folder, tensors)


def build_weights(
    settings: WeightsSettings, spec: ModelSpec, args: Any, group: dist.ProcessGroup | None = None
) -> FullWeights:
    """Full weights, or adapters with lora.enable."""
    kind = resolve(LORA, asked_by="lora.enable = true") if settings.lora.enable else FullWeights
    return kind(settings, spec, args, group)
