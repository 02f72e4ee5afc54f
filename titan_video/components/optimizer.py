"""The optimizer: AdamW over sharded float32 master weights."""

import torch
from torch import nn

from titan_video.config.job_config import Optimizer
from titan_video.distributed.utils import mesh_of


def build_optimizer(model: nn.Module, section: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019). Vectors, i.e. biases, norm weights and modulation tables, are not decayed, frozen weights are left out."""
    groups = {}
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        decay = 0.0 if p.ndim < 2 or "modulation" in name else section.weight_decay
        # torch updates the parameters of one mesh at a time.
        groups.setdefault((decay, mesh_of(p)), {"params": [], "weight_decay": decay})["params"].append(p)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )
