"""Launch of sum_kernels.py."""

import torch
from torch import Tensor

ROWS, BLOCK = 32, 64


def add_partial_sums(sums: Tensor, wide: int, dtype: torch.dtype, ends: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """(the first `wide` columns [groups, wide], float32, the others [groups, columns - wide] in `dtype`).

    sums: float32, of each program, [groups, programs, columns]; or [programs, columns], where each of `ends`, three at
    most, is the number of the program after a group's last. On a GPU and in Triton's interpreter only.
    """
    from titan_video.kernels.triton import sum_kernels

    groups, cols = len(ends) or sums.shape[0], sums.shape[-1]
    wide_sums, narrow_sums = sums.new_empty(groups, wide), sums.new_empty(groups, cols - wide, dtype=dtype)
    if cols:
        limits = (*ends, *[0] * (3 - len(ends))) if ends else (sums.shape[1], 0, 0)
        grid = -(-cols // BLOCK), groups
        constants = {"COLS": cols, "WIDE": wide, "EVEN": not ends, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": 4}
        sum_kernels.add_partial_sums[grid](sums, wide_sums, narrow_sums, *limits, **constants)
    return wide_sums, narrow_sums
