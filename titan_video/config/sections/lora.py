"""[lora]: the section of the optional part `titan_video/lora/`."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt


@dataclass(frozen=True)
class Lora:
    enable: bool = opt(
        False,
        "Train low-rank adapters of frozen weights. The frozen weights are stored in training.mixed_precision_param. "
        "Checkpoints hold the adapters and their state; a resumed run reads the frozen weights from where it started.",
    )
    rank: int = opt(32, "Rank of an adapter.", ge=1)
    alpha: float = opt(32.0, "The output of an adapter is scaled by alpha / rank.", gt=0)
    base_dtype: Literal["compute", "int8", "float8"] = opt(
        "compute", "Stored type of the frozen weights of the blocks' Linears. compute: training.mixed_precision_param."
    )
    target_modules: tuple[str, ...] = opt(
        (),
        "Linears of the blocks that get an adapter, by the end of their dotted name in our model, such as self_attn.q. "
        "Empty: all Linears of attention and feed-forward except those of image tokens.",
    )
    initial_load_path: str = opt(
        "",
        "File or folder of adapters of any known trainer (docs/lora.md) to start from if there is no checkpoint yet.",
    )
    export: tuple[Literal["diffusers", "comfyui", "merged"], ...] = opt(
        ("diffusers", "comfyui"),
        "Files that checkpoint.last_save_in_hf and export_every write: `lora/pytorch_lora_weights.safetensors` for "
        "diffusers, `lora/comfyui.safetensors`, or all weights with the adapters merged, in checkpoint.export_format.",
    )
