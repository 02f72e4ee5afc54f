"""The frozen weights of the blocks' Linears in one byte each: codes of int8 or float8, and scales.

    weight [out, in]   ->   codes, int8 [out, in]   x   scale, [out, in / group]

A scale is shared by GROUP neighbouring weights of a row. With one scale a row, int8 loses twice as much where weights
have heavy tails: the error of the matrix is 2.1 % against 0.8 % for Student's t of five degrees of freedom, and 0.9 %
against 0.6 % for normal weights. Float8 (e4m3), whose error is relative, loses 2.6 % either way.

Codes and scales are frozen parameters: FSDP and tensor parallel shard them like the weight. Codes of float8 are kept as
int8 of the same bits, because a mixed-precision policy casts what is floating point.

`titan_video::frozen_linear` makes the wide weight in forward, and again in backward. It is an operator of its own so
that neither autograd nor the compiler keeps the wide weight in between (torchao's tensors do: autograd saves what they
are dequantized to). Quantized are all Linears of the blocks but those of modulation; norms, modulation, embeddings and
the head keep their type.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from math import gcd

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.library import custom_op

from titan_video.distributed.utils import clean_name, to_local
from titan_video.models.layers import Linear, is_adapter, local_shard
from titan_video.models.spec import ParallelPlan

GROUP = 64
CODE_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(wide: Tensor, columns: int, code_dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes as int8, scale) of [out, in] weights whose scales have `columns` columns.

    The scale is rounded to its type first, so that its rounding is in no weight.
    """
    groups = wide.float().unflatten(1, (columns, -1))
    largest = LARGEST[code_dtype]
    scale = (groups.abs().amax(-1) / largest).to(scale_dtype)
    ratio = groups / torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    ratio = ratio.round() if code_dtype == torch.int8 else ratio
    return ratio.clamp(-largest, largest).to(code_dtype).view(torch.int8).flatten(1), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The wide weight [out, in], in the scale's type. codes: in their own type."""
    wide = codes.to(scale.dtype)
    wide.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1))
    return wide


# ---- the operator ----


@custom_op("titan_video::frozen_linear", mutates_args=())
def frozen_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, wide weight, bias). Only x gets a gradient."""
    rows, wide = x.flatten(0, -2), dequantize(codes, scale).t()
    y = torch.mm(rows, wide) if bias is None else torch.addmm(bias, rows, wide)
    return y.view(*x.shape[:-1], -1)


@frozen_linear.register_fake
def _(x, codes, scale, bias):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@custom_op("titan_video::frozen_linear_backward", mutates_args=())
def frozen_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return torch.mm(grad.flatten(0, -2), dequantize(codes, scale)).view(*grad.shape[:-1], -1)


@frozen_linear_backward.register_fake
def _(grad, codes, scale):
    return grad.new_empty(*grad.shape[:-1], codes.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    _, codes, scale, _ = inputs
    ctx.save_for_backward(codes, scale)


def _autograd(ctx, grad):
    grad_x = frozen_linear_backward(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, None


frozen_linear.register_autograd(_autograd, setup_context=_setup_context)


class QuantizedMatmul(nn.Module):
    """`linear_fn` of a Linear whose `weight` holds codes: it has their scales."""

    def __init__(self, weight: Tensor, code_dtype: torch.dtype):
        super().__init__()
        self.code_dtype = code_dtype
        shape = weight.shape[0], weight.shape[1] // gcd(weight.shape[1], GROUP)
        self.scale = nn.Parameter(weight.new_empty(shape), requires_grad=False)

    def forward(self, x: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
        return frozen_linear(x, codes.view(self.code_dtype), local_shard(self.scale), bias)


# ---- the model ----


def quantize_base(model: nn.Module, plan: ParallelPlan, name: str) -> None:
    """Give the blocks' Linears, in place, room for codes and scales. Their weights are frozen and on the meta device.

    name: of lora.base_dtype. `fill_quantized` fills them.
    """
    for path in plan.blocks:
        for where, linear in model.get_submodule(path).named_modules():
            if isinstance(linear, Linear) and "modulation" not in where:
                linear.linear_fn = QuantizedMatmul(linear.weight, CODE_DTYPES[name])
                codes = torch.empty_like(linear.weight, dtype=torch.int8)
                linear.weight = nn.Parameter(codes, requires_grad=False)


def is_added(name: str) -> bool:
    """Whether a parameter, by its clean name, is not the architecture's: of an adapter, or the scales of a weight."""
    return is_adapter(name) or name.endswith(".linear_fn.scale")


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """{name of the weight: its module}"""
    modules = {clean_name(f"{name}.weight"): module for name, module in model.named_modules()}
    return {name: m for name, m in modules.items() if isinstance(getattr(m, "linear_fn", None), QuantizedMatmul)}


Fill = Callable[[nn.Module, Callable[[str], bool]], None]


@torch.no_grad()
def fill_quantized(model: nn.Module, fill: Fill, at_once: bool = False) -> None:
    """Fill the frozen weights of a model that `quantize_base` has changed, sharded or not.

    fill(model, which): fills the parameters that `which` accepts by name. It is called for what is not quantized, then
    for each block: the block's weights are float32 in host memory meanwhile. at_once: it is called once, for all.
    """
    linears = quantized_linears(model)
    if at_once:
        with _wide_weights(linears):
            return fill(model, lambda name: not is_added(name))
    fill(model, lambda name: name not in linears and not is_added(name))
    for _, names in groupby(linears, key=lambda name: name.split(".", 2)[:2]):
        block = {name: linears[name] for name in names}
        with _wide_weights(block):
            fill(model, block.__contains__)


@contextmanager
def _wide_weights(linears: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the weights are wide; at the end they are quantized."""
    codes = {name: linear.weight for name, linear in linears.items()}
    for name, linear in linears.items():
        linear._parameters["weight"] = nn.Parameter(_wide_like(codes[name]), requires_grad=False)
    try:
        yield
        for name, linear in linears.items():
            found, scale = to_local(codes[name]), to_local(linear.linear_fn.scale)
            if found.numel():
                if found.shape[1] % scale.shape[1]:
                    raise ValueError(
                        f"lora.base_dtype: {name} has {found.shape[1]} columns on this rank, which are no whole groups "
                        f"of weights; set it to compute, or lower parallelism.tensor_parallel_degree"
                    )
                wide = to_local(linear.weight).to(found.device)
                new = quantize(wide, scale.shape[1], linear.linear_fn.code_dtype, scale.dtype)
                found.copy_(new[0]), scale.copy_(new[1])
    finally:
        for name, linear in linears.items():
            linear._parameters["weight"] = codes[name]


def _wide_like(codes: Tensor) -> Tensor:
    """Float32 in host memory, sharded like the codes."""
    wide = torch.empty(to_local(codes).shape, dtype=torch.float32)
    if not isinstance(codes, DTensor):
        return wide
    mesh, placements = codes.device_mesh, codes.placements
    return DTensor.from_local(wide, mesh, placements, run_check=False, shape=codes.shape, stride=codes.stride())


def dequantized(codes: Tensor, linear: nn.Module) -> Tensor:
    """The whole wide weight of `linear`; codes, all of them, may be of another device."""
    scale = linear.linear_fn.scale
    scale = scale.full_tensor() if isinstance(scale, DTensor) else scale
    return dequantize(codes.view(linear.linear_fn.code_dtype), scale.detach())
