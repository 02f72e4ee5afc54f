"""The optimizer: AdamW over sharded float32 master weights."""

import torch
from torch import nn

from titan_video.config.job_config import Optimizer


def build_optimizer(model: nn.Module, section: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019). Vectors, i.e. biases, norm weights and modulation tables, are not decayed."""
    named = list(model.named_parameters())
    vectors = [p for name, p in named if p.ndim < 2 or "modulation" in name]
    matrices = [p for name, p in named if not (p.ndim < 2 or "modulation" in name)]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )
