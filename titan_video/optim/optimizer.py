"""Builds the optimizer of a run, over sharded weights.

    optimizer.name   matrices of blocks   other matrices   vectors, modulation   state bytes per element of a block
    AdamW            AdamW                AdamW            AdamW                 8
    AdamW8bit        AdamW8bit            AdamW8bit        AdamW                 2.13
    Muon             Muon                 AdamW            AdamW                 4

AdamW of float32 weights is torch.optim.AdamW over local shards. Everything else, and every optimizer of bfloat16
weights, is `MixedOptimizer` (mixed.py, optional). There is always one optimizer with one state. Each tensor of the
state has the rows of its weight and is sharded like it. A name with a dot is a class of another package (by_name.py,
optional).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from titan_video.config.job_config import JobConfig, Optimizer
from titan_video.distributed.utils import clean_name, get_mesh, to_local
from titan_video.tools.parts import resolve

# Names of a parameter's state tensors, by the kind of its group; checkpoints use these names.
SLOTS = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "AdamW8bit": ("step", "exp_avg", "exp_avg_scale", "exp_avg_root", "exp_avg_root_scale"),
    "Muon": ("step", "momentum"),
}

# Optional parts. "mixed" is for AdamW8bit, Muon and bfloat16 weights.
OPTIONAL = {
    "mixed": "titan_video.optim.mixed:MixedOptimizer",
    "8-bit state": "titan_video.optim.low_bit:new_slot",
    "in_backward": "titan_video.optim.in_backward:InBackward",
    "package.module.Class": "titan_video.optim.by_name:build",
}


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which updates the local shards (see `utils._norm`). Its state is sharded like the weights."""

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [to_local(t) for t in tensors]
        return has_complex


def new_slot(p: Tensor, kind: str, slot: str) -> Tensor:
    """Zeros for a state tensor (not "step") of a parameter that an optimizer of `kind` updates."""
    if kind == "AdamW8bit":
        return resolve(OPTIONAL["8-bit state"], asked_by="optimizer.name = AdamW8bit")(p, slot)
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def updated_by(parameter: str, ndim: int, name: str, blocks: tuple[str, ...]) -> str:
    """The kind (a key of `SLOTS`, or a name with a dot) that updates a parameter under optimizer.name = `name`.

    blocks: paths of the containers of blocks (ParallelPlan.blocks).
    """
    is_matrix = not is_vector(parameter, ndim) and not parameter.startswith("routers.")
    if name == "Muon":
        return "Muon" if is_matrix and parameter.startswith(tuple(f"{path}." for path in blocks)) else "AdamW"
    return name if is_matrix or "." in name else "AdamW"


def is_vector(parameter: str, ndim: int) -> bool:
    """Whether a parameter is a vector, or a table of vectors: modulation, and the biases [E, D] of stacked experts."""
    return ndim < 2 or "modulation" in parameter or parameter.endswith("bias")


def build_optimizer(
    model: nn.Module,
    section: Optimizer,
    blocks: tuple[str, ...] = (),
    seed: int = 0,
    adjust_group: Callable[[str, dict], dict] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters. Vectors (biases, norm weights) and modulation get no weight decay.

    blocks: see `updated_by`. seed: for stochastic rounding of bfloat16 weights.
    adjust_group: (clean parameter name, entries of its group) -> entries in their place, or further ones (optim/mup).
    Each group carries "kind" and "lr_scale"; the scheduler sets "lr" to the rate of the step times "lr_scale".
    ValueError: a tensor-parallel split cuts through the blocks of 8-bit state.
    """
    groups = {}
    names = {p: clean_name(name) for name, p in model.named_parameters() if p.requires_grad}
    for p, name in names.items():
        group = {
            "weight_decay": 0.0 if is_vector(name, p.ndim) else section.weight_decay,
            "kind": updated_by(name, p.ndim, section.name, blocks),
            "lr_scale": 1.0,
        }
        group |= adjust_group(name, group | {"eps": section.eps}) if adjust_group else {}
        # torch's foreach and fused kernels take the parameters of one mesh at a time.
        key = (*group.values(), get_mesh(p))
        groups.setdefault(key, {"params": [], **group, "lr": section.lr * group["lr_scale"]})["params"].append(p)
    defaults = {"lr": section.lr, "betas": (section.beta1, section.beta2), "eps": section.eps}
    if "." in section.name:
        build = resolve(OPTIONAL["package.module.Class"], asked_by=f"optimizer.name = {section.name}")
        return build(list(groups.values()), section)
    if section.name == "AdamW" and not any(p.dtype == torch.bfloat16 for p in names):
        return AdamW(
            list(groups.values()),
            fused=section.implementation == "fused",
            foreach=section.implementation == "foreach",
            **defaults,
        )
    asked_by = "training.dtype = bfloat16" if section.name == "AdamW" else f"optimizer.name = {section.name}"
    mixed = resolve(OPTIONAL["mixed"], asked_by)
    defaults["momentum"] = section.momentum
    return mixed(list(groups.values()), names, seed, uses_muon=section.name == "Muon", defaults=defaults)


def step_in_backward(optimizer: torch.optim.Optimizer) -> Any:
    """An `InBackward` (in_backward.py, optional), which steps `optimizer` for each parameter during backward."""
    return resolve(OPTIONAL["in_backward"], asked_by="optimizer.in_backward = true")(optimizer)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the optimizer, one line per mistake."""
    name = config.optimizer.name
    if name not in SLOTS and "." not in name:
        yield f"optimizer.name: given {name}; legal: one of {', '.join(SLOTS)}, or package.module.Class"
    if config.optimizer.args and "." not in name:
        yield f"optimizer.args: has no effect with optimizer.name {name}; remove the table, or name a package's class"
