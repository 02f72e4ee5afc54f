"""The memory-bound operators of a transformer block. `set_backend` chooses for the whole process how they are computed:

torch     plain torch operators, one after another (reference.py)
triton    one fused kernel each, forward and backward: the optional part triton/; float64 still runs in plain torch
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch

from titan_video.kernels import reference
from titan_video.kernels.reference import mean_square as mean_square
from titan_video.kernels.reference import upcast as upcast
from titan_video.tools.parts import resolve

TRITON_PART = "titan_video.kernels.triton"
FUSED = {
    "ada_layer_norm": f"{TRITON_PART}.layer_norm:ada_layer_norm",
    "ada_layer_norm_and_input": f"{TRITON_PART}.layer_norm:ada_layer_norm_and_input",
    "gated_residual": f"{TRITON_PART}.layer_norm:gated_residual",
    "gelu_linear": f"{TRITON_PART}.gelu:gelu_linear",
    "joined_linear": f"{TRITON_PART}.joined:joined_linear",
    "layer_norm": f"{TRITON_PART}.layer_norm:layer_norm",
    "merge_attention": f"{TRITON_PART}.merge:merge_attention",
    "project_and_norm": f"{TRITON_PART}.projections:project_and_norm",
    "residual_ada_layer_norm": f"{TRITON_PART}.layer_norm:residual_ada_layer_norm",
    "residual_layer_norm": f"{TRITON_PART}.layer_norm:residual_layer_norm",
    "rms_norm": f"{TRITON_PART}.rms_norm:rms_norm",
    "rms_norm_rope": f"{TRITON_PART}.rms_norm:rms_norm_rope",
}

_backend = "torch"
_fused: dict[str, Callable] = {}  # the operators of FUSED, loaded by the first set_backend("triton")


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend, "triton" or "torch", that `model.kernels = name` means on this device.

    "auto" is triton where it can run and torch elsewhere. ValueError: "triton" is asked for where it cannot run.
    """
    missing = "GPU" if device.type != "cuda" else "triton package" if find_spec("triton") is None else ""
    if name == "triton" and missing:
        raise ValueError(
            f"model.kernels: triton, but there is no {missing} here; choose torch, or auto, which is torch where "
            f"triton cannot run"
        )
    if name == "auto":
        return "torch" if missing or find_spec(TRITON_PART) is None else "triton"
    return name


def set_backend(name: str) -> None:
    """Compute with "triton" or "torch" from now on. ValueError: another name, or the optional part is not there."""
    global _backend
    if name not in ("triton", "torch"):
        raise ValueError(f"kernels: {name!r}; legal: triton, torch")
    if name == "triton" and not _fused:
        _fused.update({op: resolve(target, asked_by='model.kernels = "triton"') for op, target in FUSED.items()})
    _backend = name


def current_backend() -> str:
    """The backend in use: "torch" until `set_backend` is called."""
    return _backend


def fused_only(name: str, x: torch.Tensor) -> Callable | None:
    """An operator of FUSED that is no operator of reference.py, or None where x is computed by plain operators."""
    return _fused[name] if _backend == "triton" and x.dtype != torch.float64 else None


def _dispatched(plain: Callable) -> Callable:
    """`plain`, an operator of reference.py, or the fused one of its name, by the backend and by x's type."""

    @wraps(plain)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        use_fused = _backend == "triton" and x.dtype != torch.float64
        return (_fused[plain.__name__] if use_fused else plain)(x, *args, **kwargs)

    return run


ada_layer_norm = _dispatched(reference.ada_layer_norm)
ada_layer_norm_and_input = _dispatched(reference.ada_layer_norm_and_input)
gated_residual = _dispatched(reference.gated_residual)
layer_norm = _dispatched(reference.layer_norm)
residual_ada_layer_norm = _dispatched(reference.residual_ada_layer_norm)
residual_layer_norm = _dispatched(reference.residual_layer_norm)
rms_norm = _dispatched(reference.rms_norm)
rms_norm_rope = _dispatched(reference.rms_norm_rope)
