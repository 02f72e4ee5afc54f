"""Numbers of few bits: 8-bit codes with a scale for each part of a row, and stochastic rounding to bfloat16.

Codes (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"): a row is cut into blocks of 64; a block
magnitude in it, its scale, and each element as the nearest of 256 shares of that, spaced evenly within each of seven
decades. Of AdamW's second moment it is the root that is kept: an element of a 1000th of its block's largest gradient
would have a square of a a square of a millionth, which is next to the smallest share, and an update out of all
proportion where it is rounded to 0.

Blocks lie in rows, and rows are what sharding deals out: codes and scales do not depend on the layout. torchao's 8-bit
    AdamW (0.18) keeps squares,
and its blocks run on over rows, so that most shards cannot be loaded on other numbers of ranks: docs/optimizers.md has
    what was measured.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


@cache
def shares(signed: bool, device: torch.device) -> Tensor:
    """The 256 shares, in order:

    0, 1, and the middles of 2^d equal parts (twice as many without a sign) of decade d - 6.
    """
    values = [0.0, 1.0]
    for d in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (d + (not signed)) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (d - 6)).tolist()
        values += middles + ([-x for x in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encode(x_RC: Tensor, codes_RC: Tensor, scale_RB: Tensor, signed: bool) -> None:
    """Fill codes and scales of a matrix, which is at least float32."""
    R, C = x_RC.shape
    x_RBb = F.pad(x_RC, (0, -C % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale_RB.copy_(x_RBb.abs().amax(-1))
    table = shares(signed, x_RC.device)
    x_RBb = x_RBb / scale_RB.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    nearest = torch.bucketize(x_RBb, ((table[1:] + table[:-1]) / 2).to(x_RBb.dtype), out_int32=True)
    codes_RC.copy_(nearest.flatten(-2)[:, :C])


def decode(codes_RC: Tensor, scale_RB: Tensor, signed: bool) -> Tensor:
    """The matrix, float32."""
    x_RC = shares(signed, codes_RC.device)[codes_RC.int()]
    return x_RC.mul_(scale_RB.repeat_interleave(BLOCK, dim=-1)[:, : codes_RC.shape[1]])


def stochastic_round(x: Tensor, first: tuple[int, ...], row: int, key: int) -> Tensor:
    """x, a vector or matrix of float32, as bfloat16: the neighbour above or below, each as likely as the other is far.

    first: index of x[0] or x[0, 0] in the whole tensor, whose rows have `row` elements. Chance is a function of key and
        index alone.
    """
    # bfloat16 is the upper half of float32: a number below 2^16, added to the lower half, carries as often as that half
    # is large.
    bits = x.float().view(torch.int32) + (_hash(_indices(x.shape, first, row, x.device), key) & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).bfloat16()


def _indices(shape: torch.Size, first: tuple[int, ...], row: int, device: torch.device) -> Tensor:
    """Place of each element in the whole tensor, int32, which wraps."""
    indices = [
        torch.arange(start, start + n, dtype=torch.int32, device=device) for start, n in zip(first, shape, strict=True)
    ]
    return indices[0] if len(indices) == 1 else indices[0].unsqueeze(1) * row + indices[1]


def _hash(x: Tensor, key: int) -> Tensor:
    """Mix int32 so that every bit of the result depends on every bit of x (the finaliser of MurmurHash3, public
    domain).
    """
    x = x ^ ((key & 0xFFFFFFFF) - 2**31)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift & (1 << 32 - shift) - 1)) * (factor - 2**32)
    return x ^ (x >> 16 & 0xFFFF)
