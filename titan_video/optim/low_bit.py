"""Low-precision numbers for optimizers: 8-bit block-wise quantization, and stochastic rounding to bfloat16.

Quantization (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): a row is cut into blocks of 64
elements. A block stores its largest magnitude, the scale, and for each element the index of the nearest of 256 codebook
values times that scale. The codebook is dynamic: seven decades, evenly spaced values within each.

AdamW's second moment is stored as its square root. If one gradient of a block is 1000 times smaller than the largest,
its square is a million times smaller: that is the smallest codebook value, and rounding it to 0 would make the update
of that element far too large.

Blocks lie within rows, and sharding splits rows, so codes and scales do not depend on the layout. torchao's 8-bit AdamW
(0.18) stores the square, and its blocks run across rows, so that most of its shards cannot be loaded on another number
of ranks: docs/optimizers.md has the measurements.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_video.distributed.utils import to_local

BLOCK = 64  # elements of a row that share one scale


@cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic codebook in rising order, float32 [256].

    They are 0, 1, and for each decade d of 0..6 the midpoints of 2^d equal intervals (2^(d+1) if unsigned) between
    0.1 and 1, times 10^(d-6); with both signs if signed.
    """
    values = [0.0, 1.0]
    for d in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (d + (not signed)) + 1, dtype=torch.float64)
        midpoints = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (d - 6)).tolist()
        values += midpoints + ([-x for x in midpoints] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def codebooks(device: torch.device) -> Tensor:
    """The signed and the unsigned codebook, float32 [2, 256]."""
    return torch.stack([codebook(True, device), codebook(False, device)])


@torch.no_grad()
def new_slot(p: Tensor, slot: str) -> Tensor:
    """Zeros for a tensor (not "step") of the 8-bit state of a parameter, sharded like it. Blocks split evenly."""
    if not slot.endswith("_scale"):
        return torch.zeros_like(p, dtype=torch.uint8)
    shape = torch.Size((*p.shape[:-1], -(-p.shape[-1] // BLOCK)))
    local = to_local(p)
    zeros = torch.zeros(*local.shape[:-1], shape[-1] * local.shape[-1] // p.shape[-1], device=p.device)
    if not isinstance(p, DTensor):
        return zeros
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def quantize(x_RC: Tensor, codes_RC: Tensor, scale_RB: Tensor, signed: bool) -> None:
    """Write the codes (uint8) and block scales (float32) of a matrix (float32 or float64) into the given tensors.

    Shapes: R rows, or several dims of them, C columns, B = ceil(C / 64) blocks in a row.
    """
    C = x_RC.shape[-1]
    x_RBb = F.pad(x_RC, (0, -C % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale_RB.copy_(x_RBb.abs().amax(-1))
    values = codebook(signed, x_RC.device)
    x_RBb = x_RBb / scale_RB.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes_RBb = torch.bucketize(x_RBb, ((values[1:] + values[:-1]) / 2).to(x_RBb.dtype), out_int32=True)
    codes_RC.copy_(codes_RBb.flatten(-2)[..., :C])


def dequantize(codes_RC: Tensor, scale_RB: Tensor, signed: bool) -> Tensor:
    """The matrix [R, C], float32."""
    x_RC = codebook(signed, codes_RC.device)[codes_RC.int()]
    return x_RC.mul_(scale_RB.repeat_interleave(BLOCK, dim=-1)[..., : codes_RC.shape[-1]])


def stochastic_round(x: Tensor, offsets: tuple[int, ...], row_length: int, key: int) -> Tensor:
    """x, a float32 vector or matrix, as bfloat16: rounded up or down at random, without bias.

    offsets: index of x's first element in the global tensor. row_length: elements in a row of the global tensor.
    The random number of an element is a function of `key` and its global index, so it does not depend on the layout.
    """
    # bfloat16 is the upper half of float32. A random number below 2^16, added to the lower half, carries into the upper
    # half with the right probability.
    bits = x.float().view(torch.int32) + (_hash(_indices(x.shape, offsets, row_length, x.device), key) & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).bfloat16()


def _indices(shape: torch.Size, offsets: tuple[int, ...], row_length: int, device: torch.device) -> Tensor:
    """Flat index of each element in the global tensor, int32 (it wraps around)."""
    indices = [
        torch.arange(start, start + size, dtype=torch.int32, device=device)
        for start, size in zip(offsets, shape, strict=True)
    ]
    return indices[0] if len(indices) == 1 else indices[0].unsqueeze(1) * row_length + indices[1]


def _hash(x: Tensor, key: int) -> Tensor:
    """Mix int32 so that every output bit depends on every input bit (the finaliser of MurmurHash3, public domain)."""
    x = x ^ ((key & 0xFFFFFFFF) - 2**31)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift & (1 << 32 - shift) - 1)) * (factor - 2**32)
    return x ^ (x >> 16 & 0xFFFF)
