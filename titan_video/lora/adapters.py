"""Low-rank adapters (Hu et al. 2021, "LoRA"). A Linear with a frozen weight W also adds scale * up(down(x)); only
`down` and `up` are trained.

    x --+-- W, bias -----------------+-- y        down [r, in], up [out, r], scale = alpha / r
        +-- down -- * scale -- up ---+

While `up` is zero, as at the start, the model is the frozen one. An adapter is a submodule of its Linear, so the frozen
parameters keep their names: beside `blocks.0.self_attn.q.weight` there are `blocks.0.self_attn.q.adapter.down` and
`blocks.0.self_attn.q.adapter.up`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video.config.job_config import JobConfig, Lora
from titan_video.models.layers import Linear, cast_params, local_shard
from titan_video.models.spec import ModelSpec
from titan_video.tools.parts import find_module

NAME = "adapter"
ORIGINAL = "titan_video.weights.original"


class Adapter(nn.Module):
    """The adapter of one Linear. Tensor parallel splits it like the Linear's weight: `up` over the outputs, or `down`
    over the inputs.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        like = {"device": linear.weight.device, "dtype": dtype}
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        # One rank has no FSDP that casts them (see `apply_fsdp`).
        down, up = local_shard(self.down).to(x.dtype), local_shard(self.up).to(x.dtype)
        return F.linear(F.linear(x, down) * self.scale, up)


def add_adapters(model: nn.Module, spec: ModelSpec, section: Lora, dtype: torch.dtype) -> None:
    """Freeze the model, and add an adapter, in place, to the Linears of its blocks that `section.target_modules` names.

    dtype: compute dtype, in which the frozen weights are stored; the plan's float32 parts keep theirs. Adapters are at
    least float32. Call it before anything else changes the model, which may be on the meta device.
    ValueError: a target fits no Linear of a block.
    """
    cast_params(model, spec.plan.fp32, dtype)
    model.requires_grad_(False)
    linears = {
        f"{path}.{name}": module
        for path in spec.plan.blocks
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, Linear)
    }
    targets = section.target_modules or spec.lora_targets
    for target in targets:
        if not any(_fits(name, target) for name in linears):
            known = dict.fromkeys(name.split(".", 2)[2] for name in linears)
            raise ValueError(
                f"lora.target_modules: {target!r} is the end of no name of a Linear in a block of {spec.name}; "
                f"there are {', '.join(known)}"
            )
    for name, linear in linears.items():
        if any(_fits(name, target) for target in targets):
            linear.adapter = Adapter(
                linear, section.rank, section.alpha / section.rank, torch.promote_types(dtype, torch.float32)
            )


def _fits(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def init_adapter(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill one full parameter of an adapter in place: `down` as torch initializes a Linear, `up` with zeros."""
    if name.endswith(".up"):
        tensor.zero_()
    else:
        bound = tensor.shape[1] ** -0.5
        tensor.uniform_(-bound, bound, generator=generator)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about adapters, one line per mistake."""
    lora = config.lora
    for name in ("target_modules", "export"):
        values = getattr(lora, name)
        if len(set(values)) < len(values):
            yield f"lora.{name}: given {list(values)}; remove what appears twice"
    c = config.checkpoint
    for name, value in (("last_save_in_hf", c.last_save_in_hf), ("export_every", c.export_every)):
        if lora.enable and value and not lora.export:
            yield (
                f"lora.export: empty, but checkpoint.{name} is {str(value).lower()}; give at least one of diffusers, "
                f"comfyui, merged, or set that to {'false' if value is True else 0}"
            )
    if lora.enable and "comfyui" in lora.export and not find_module(ORIGINAL):
        yield f"lora.export: comfyui needs the optional part {ORIGINAL.replace('.', '/')}, which is not installed here"
    source = config.checkpoint.initial_load_path or (
        config.model.hf_assets_path if config.checkpoint.initial_load_in_hf else ""
    )
    if lora.enable and not source and not config.model.flavor.startswith("debug"):
        yield (
            f"lora.enable: the weights of {config.model.flavor} that are adapted would be drawn at random; give a "
            f"diffusers folder in model.hf_assets_path with checkpoint.initial_load_in_hf true, or weights in "
            f"checkpoint.initial_load_path"
        )
    is_quantized = lora.base_dtype != "compute"
    if is_quantized and not lora.enable:
        yield (
            f"lora.base_dtype: given {lora.base_dtype}, but lora.enable is false; only frozen weights are quantized: "
            f"enable it, or set this to compute"
        )
    if is_quantized and config.float8.enable:
        yield (
            "lora.base_dtype: quantized weights are multiplied in training.mixed_precision_param; set it to compute, "
            "or float8.enable to false"
        )
    if lora.initial_load_path and not lora.enable:
        yield (
            f"lora.initial_load_path: given {lora.initial_load_path}, but lora.enable is false; enable it, or leave "
            f"this empty"
        )
    if lora.enable and config.optimizer.name == "Muon":
        yield (
            "optimizer.name: Muon orthogonalizes the updates of full weights, but lora.enable trains adapters only; "
            "choose AdamW or AdamW8bit"
        )
    if lora.enable and config.training.dtype == "bfloat16":
        yield (
            "training.dtype: bfloat16, but with lora.enable frozen weights are stored in "
            "training.mixed_precision_param anyway; leave it float32"
        )
