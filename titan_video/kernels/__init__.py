"""Memory-bound operators of the transformer block. `use` chooses, for the whole process, how they are computed.

    torch     plain torch operators, one after another (reference.py); what everything runs that is not on a GPU, and all of float64
"""

from importlib.util import find_spec

import torch

from titan_video.kernels.reference import (
    ada_layer_norm,
    gated_residual,
    layer_norm,
    mean_square,
    residual_ada_layer_norm,
    residual_layer_norm,
    rms_norm,
    rms_norm_rope,
    wide,
)

__all__ = [
    "ada_layer_norm",
    "choose",
    "gated_residual",
    "in_use",
    "layer_norm",
    "mean_square",
    "residual_ada_layer_norm",
    "residual_layer_norm",
    "rms_norm",
    "rms_norm_rope",
    "use",
    "wide",
]

_in_use = "torch"


def choose(name: str, device: torch.device) -> str:
    """"triton" or "torch" for `model.kernels`, of which "auto" is triton where it can run. ValueError where what is asked for cannot."""
    missing = "GPU" if device.type != "cuda" else "triton package" if find_spec("triton") is None else ""
    if name == "triton" and missing:
        raise ValueError(f"model.kernels: triton, but there is no {missing} here; choose torch, or auto, which is torch where triton cannot run")
    return ("torch" if missing else "triton") if name == "auto" else name


def use(name: str) -> None:
    """From here on compute with "triton" or "torch"."""
    global _in_use
    if name not in ("triton", "torch"):
        raise ValueError(f"kernels: {name!r}; legal: triton, torch")
    _in_use = name


def in_use() -> str:
    """What is computed with: "torch" until `use` is called."""
    return _in_use
