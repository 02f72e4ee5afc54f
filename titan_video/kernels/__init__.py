"""Memory-bound operators of the transformer block. `set_backend` chooses, for the whole process, how they are computed.

torch     plain torch operators, one after another (reference.py)
triton    one fused kernel each, forward and backward (fused_layer_norm.py, fused_rms_norm.py); float64 stays with torch
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch

from titan_video.kernels import reference
from titan_video.kernels.reference import mean_square, upcast
from titan_video.kernels.triton import layer_norm as fused_layer_norm
from titan_video.kernels.triton import rms_norm as fused_rms_norm

__all__ = [
    "ada_layer_norm",
    "resolve_backend",
    "gated_residual",
    "current_backend",
    "layer_norm",
    "mean_square",
    "residual_ada_layer_norm",
    "residual_layer_norm",
    "rms_norm",
    "rms_norm_rope",
    "set_backend",
    "upcast",
]

_in_use = "torch"


def resolve_backend(name: str, device: torch.device) -> str:
    """ "triton" or "torch" for `model.kernels`, of which "auto" is triton where it can run.

    ValueError where what is asked for cannot.
    """
    missing = "GPU" if device.type != "cuda" else "triton package" if find_spec("triton") is None else ""
    if name == "triton" and missing:
        raise ValueError(
            f"model.kernels: triton, but there is no {missing} here; choose torch, or auto, which is torch where "
            f"triton cannot run"
        )
    return ("torch" if missing else "triton") if name == "auto" else name


def set_backend(name: str) -> None:
    """From here on compute with "triton" or "torch"."""
    global _in_use
    if name not in ("triton", "torch"):
        raise ValueError(f"kernels: {name!r}; legal: triton, torch")
    _in_use = name


def current_backend() -> str:
    """What is computed with: "torch" until `use` is called."""
    return _in_use


def _either(plain: Callable, fused: Callable) -> Callable:
    """The one or the other, by what is in use and by the type of the first argument."""

    @wraps(plain)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if _in_use == "triton" and x.dtype != torch.float64 else plain)(x, *args, **kwargs)

    return run


ada_layer_norm = _either(reference.ada_layer_norm, fused_layer_norm.ada_layer_norm)
gated_residual = _either(reference.gated_residual, fused_layer_norm.gated_residual)
layer_norm = _either(reference.layer_norm, fused_layer_norm.layer_norm)
residual_ada_layer_norm = _either(reference.residual_ada_layer_norm, fused_layer_norm.residual_ada_layer_norm)
residual_layer_norm = _either(reference.residual_layer_norm, fused_layer_norm.residual_layer_norm)
rms_norm = _either(reference.rms_norm, fused_rms_norm.rms_norm)
rms_norm_rope = _either(reference.rms_norm_rope, fused_rms_norm.rms_norm_rope)
