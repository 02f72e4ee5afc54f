"""LoRA in training: what of the model a run trains, starts from, saves and exports (see weights/trained.py)."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from titan_video.checkpoint.files import is_checkpoint
from titan_video.config.job_config import Lora
from titan_video.distributed.utils import broadcast_from_rank0, initialise
from titan_video.lora.adapters import add_adapters, init_adapter
from titan_video.lora.files import MergedWeights, are_exported, load_lora, lora_path, save_lora
from titan_video.lora.quantized_base import CODE_DTYPES, fill_quantized, quantize_base
from titan_video.models.layers import is_adapter
from titan_video.weights.trained import FullWeights


class LoraWeights(FullWeights):
    """Adapters are trained; the weights that they adapt are frozen and in no checkpoint."""

    is_saved = staticmethod(is_adapter)

    def prepare(self, model: nn.Module) -> None:
        """Freeze the model, in training.mixed_precision_param, add float32 adapters, quantize if lora.base_dtype."""
        lora = self.settings.lora
        add_adapters(model, self.spec, lora, getattr(torch, self.settings.training.mixed_precision_param))
        if lora.base_dtype in CODE_DTYPES:
            quantize_base(model, self.spec.plan, lora.base_dtype)

    def load_frozen(self, model: nn.Module) -> None:
        source, kind = self.source, self.settings.lora.base_dtype
        if kind in CODE_DTYPES:
            # A step folder is read by one collective call: its weights are wide in host memory for a while.
            fill_quantized(model, self.load_base, at_once=bool(source) and is_checkpoint(Path(source)))
        else:
            self.load_base(model, which=lambda name: not is_adapter(name))

    def load_initial(self, model: nn.Module) -> None:
        path = self.settings.lora.initial_load_path
        if path:
            load_lora(model, Path(path), self.spec, self.args, self.settings.lora)
        else:
            initialise(model, init_adapter, self.settings.seed, is_adapter)

    def origin(self, step: int) -> str:
        drawn = f"drawn at random with debug.seed {self.settings.seed}"
        adapters = f"from {self.settings.lora.initial_load_path}" if self.settings.lora.initial_load_path else drawn
        kind = self.settings.lora.base_dtype
        stored = f", stored in {kind}" if kind in CODE_DTYPES else ""
        return f"base {super().origin(0)}{stored}; adapters {super().origin(step) if step else adapters}"

    def counters(self) -> dict[str, Stateful]:
        frozen = f"drawn from seed {self.settings.seed}"
        if self.source:
            frozen = broadcast_from_rank0(lambda: fingerprint(Path(self.source), self.subfolder), self.group)
        return {"lora": LoraState(self.settings.lora, frozen)}

    def is_written(self, folder: Path) -> bool:
        lora = self.settings.lora
        return are_exported(folder, lora) and ("merged" not in lora.export or super().is_written(folder))

    def write(self, model: nn.Module, folder: Path, tensors: dict[str, Tensor] | None) -> None:
        """Files of adapters in the formats of lora.export; with "merged" also full weights with the adapters added."""
        lora, dtype = self.settings.lora, getattr(torch, self.settings.checkpoint.export_dtype)
        for form in lora.export:
            if form == "merged":
                super().write(model, folder, MergedWeights(model, tensors))
            else:
                save_lora(model, lora_path(folder, form), self.spec, self.args, lora, form, dtype, tensors)


class LoraState:
    """What the adapters in a checkpoint belong to: their scale, and the frozen weights, which no checkpoint holds, and
    the type in which these were stored.

    frozen: identity of the frozen weights.
    """

    def __init__(self, section: Lora, frozen: str):
        self.state = {"scale": section.alpha / section.rank, "frozen": frozen}
        if section.base_dtype in CODE_DTYPES:  # earlier checkpoints do not say
            self.state["base_dtype"] = section.base_dtype

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError if the run resumes with another scale or other frozen weights: they would be another model."""
        new_run = "; for a new run from these adapters give another job.dump_folder and lora.initial_load_path"
        if state["scale"] != self.state["scale"]:
            raise ValueError(
                f"lora.alpha / lora.rank is {self.state['scale']:g}, but the checkpoint's adapters were trained with "
                f"{state['scale']:g}: set alpha to {state['scale']:g} x rank{new_run}"
            )
        ours, theirs = (x.get("base_dtype", "compute") for x in (self.state, state))
        if ours != theirs:
            raise ValueError(
                f"lora.base_dtype is {ours}, but the checkpoint's adapters were trained with {theirs}: set it to "
                f"that{new_run}"
            )
        if state["frozen"] != self.state["frozen"]:
            raise ValueError(
                f"checkpoint.initial_load_path or model.hf_assets_path: the weights there are not those that the "
                f"checkpoint's adapters were trained on ({self.state['frozen']}, not {state['frozen']}): give "
                f"those{new_run}"
            )


def fingerprint(source: Path, subfolder: str) -> str:
    """Identity of weight files: sizes, and the first and last MiB of each, whatever their names and folders."""
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
