"""Launches of column_kernels.py, on a GPU and in Triton's interpreter."""

import torch
from torch import Tensor

from titan_video.kernels.triton import launch
from titan_video.kernels.triton.sums import add_partial_sums

BLOCK, ROWS = 256, 4  # 8 elements a thread: bfloat16's widest load


def launch_gelu_backward(
    dout: Tensor, u: Tensor, hidden: bool, bias_type: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, gelu(u), dbias [F]); the last two are empty unless they are asked for."""
    dout, u = dout.contiguous(), u.contiguous()
    du, out = torch.empty_like(u), torch.empty_like(u if hidden else u[:0])
    rows, width = u.numel() // u.shape[-1], u.shape[-1]
    run = Columns(dout, u, du, out, rows, width, width, bias_type is not None)
    sums = u.new_empty(run.programs, width if bias_type is not None else 0, dtype=torch.float32)
    run(sums)
    dbias = add_partial_sums(sums[None], 0, bias_type or torch.float32)[1]
    return du, out, dbias.flatten()


def launch_joined_backward(dout: Tensor, u: Tensor, joined: Tensor, heads: tuple[int, int]) -> Tensor:
    """du [..., F]; gelu(u) is written to its columns of `joined`.

    heads: (columns of a head's u, columns before them in dout and `joined`).
    """
    dout, u, du = dout.contiguous(), u.contiguous(), u.new_empty(u.shape)
    rows, width = u.numel() // u.shape[-1], u.shape[-1]
    run = Columns(dout, u, du, joined, rows, width, width, False, heads)
    run(u.new_empty(run.programs, 0, dtype=torch.float32))
    return du


class Columns:
    """One launch. u None: a copy. out, hidden, stride, heads: see the kernel's du, hidden, du_stride, (PART, SKIP)."""

    def __init__(
        self,
        dout: Tensor,
        u: Tensor | None,
        out: Tensor,
        hidden: Tensor | None,
        rows: int,
        width: int,
        stride: int,
        bias_grad: bool,
        heads: tuple[int, int] = (0, 0),
    ):
        from titan_video.kernels.triton import column_kernels

        self.kernel = column_kernels.column_backward
        self.tensors, self.sizes = (dout, u, out, hidden), (rows, stride)
        self.constants = {
            "WIDTH": width,
            "GELU": u is not None,
            "HIDDEN": hidden is not None and hidden.numel() > 0,
            "BIAS_GRAD": bias_grad,
            "PART": heads[0],
            "SKIP": heads[1],
            "ROWS": ROWS,
            "BLOCK": BLOCK,
            "STAGES": 3,
            "num_warps": ROWS,
        }
        self.blocks = -(-width // BLOCK)
        args = (*self.tensors, dout.new_empty(0, dtype=torch.float32), *self.sizes, width)
        programs = launch.num_programs(self.kernel, args, self.constants, dout.device)
        self.programs = max(min(programs // self.blocks, -(-rows // ROWS)), 1)

    def __call__(self, sums: Tensor) -> None:
        """sums: float32 [programs, width], of any stride over programs."""
        grid = self.blocks, self.programs
        self.kernel[grid](*self.tensors, sums, *self.sizes, sums.stride(0), **self.constants)
