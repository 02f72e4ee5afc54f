"""When checkpoints are saved, what a run starts from, and what it exports."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt


@dataclass(frozen=True)
class Checkpoint:
    enable: bool = opt(True, "Save checkpoints, and resume from the newest valid one in the folder.")
    folder: str = opt("checkpoint", "Folder of the step-N folders, inside job.dump_folder.")
    interval: int = opt(500, "Steps between checkpoints; the last step is always saved.", ge=1)
    interval_minutes: float = opt(0.0, "Minutes between checkpoints, beside `interval`; 0: steps alone count.", ge=0)
    keep_latest_k: int = opt(3, "Number of valid checkpoints to keep; 0: all.", ge=0)
    async_mode: Literal["disabled", "async"] = opt(
        "async", "`async` writes from a copy in host memory while training continues."
    )
    plan_caching: bool = opt(
        False,
        "Keep what each rank writes (DCP's plan) for the next save, which with many ranks then begins sooner.",
    )
    on_error: Literal["stop", "continue"] = opt(
        "stop",
        "When a checkpoint cannot be written (disk full, quota, ...): `stop` ends the run, `continue` warns and tries "
        "the next save. The last save of a run must succeed either way.",
    )
    load_step: int = opt(-1, "Step to resume from; -1: the newest valid one.", ge=-1)
    initial_load_path: str = opt(
        "",
        "Weights to start from if there is no checkpoint yet: a step-N folder, or a folder or file in any public "
        "format. The format is detected from the tensor names.",
    )
    initial_load_in_hf: bool = opt(False, "Start from model.hf_assets_path if initial_load_path is empty.")
    last_save_in_hf: bool = opt(
        False,
        "After the last step also export the weights (the EMA weights with ema.enable) into job.dump_folder, "
        "in export_format.",
    )
    export_every: int = opt(
        0, "Steps between such exports during training, into `exports/step-N` of job.dump_folder; 0: none.", ge=0
    )
    keep_exports: int = opt(0, "Number of the newest folders in `exports` to keep; 0: all.", ge=0)
    export_format: Literal["diffusers", "original", "single_file", "comfyui", "stacked"] = opt(
        "diffusers",
        "diffusers: a folder `hf`, a complete pipeline if model.hf_assets_path is one. original: a folder `original` "
        "in the layout of the model's public code. single_file: that layout in one file `single_file.safetensors`. "
        "comfyui: `comfyui.safetensors`, the same with the name prefix `model.diffusion_model.`. "
        "stacked: a folder `stacked`, for mixtures of experts, which the other programs cannot load.",
    )
    export_dtype: Literal["float32", "bfloat16"] = opt("bfloat16", "Dtype of the exported tensors.")
