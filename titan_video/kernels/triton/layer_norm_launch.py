"""What the operators of layer_norm.py compute: a launch of the Triton kernels on a GPU, closed_form.py on a CPU.

A tensor that is not needed is None as an argument and empty as a result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_video.kernels.triton import closed_form, launch
from titan_video.kernels.triton.sums import add_partial_sums

OptionalTensor = Tensor | None

# GATE and MODULATION of layer_norm_kernels.py, which only a process with triton can import.
PER_SAMPLE, PER_TOKEN, BY_MASK = range(3)
# Above this width, the three sums of a backward with gate and norm leave no registers for the modulation, nor for a
# fourth sum, nor for two sums of each by a mask.
MAX_HOISTED_WIDTH = 4096


@dataclass(frozen=True)
class Sums:
    """Where the gradients of gate, scale, shift and bias are, in this order, among what backward returns.

    tokens   [k, B, L, D] float32   of modulation with a row for each token
    wide     [B, rows, D] float32   of other modulation, summed over a sample's tokens
    narrow   [B, rows, D]           of LayerNorm's weight and bias, and of the bias that y already holds; rounded to
                                    narrow_type where there is one sample, else float32
    gate_rows, scale_rows: 0 where no gradient is needed. affine: scale and shift are a weight and a bias.
    """

    gate_rows: int
    gate_kind: int
    scale_rows: int
    scale_kind: int
    affine: bool
    bias: bool
    narrow_type: torch.dtype

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(place, rows) of each: of gate, scale, shift and bias, with 0 rows for one without a gradient."""
        gate = "tokens" if self.gate_kind == PER_TOKEN else "wide"
        scale = "tokens" if self.scale_kind == PER_TOKEN else "narrow" if self.affine else "wide"
        modulation = [(gate, self.gate_rows), (scale, self.scale_rows), (scale, self.scale_rows)]
        return [*modulation, ("narrow", int(self.bias))]

    @property
    def per_token(self) -> int:
        return sum(place == "tokens" and rows > 0 for place, rows in self.parts)

    @property
    def wide_rows(self) -> int:
        return sum(rows for place, rows in self.parts if place == "wide")

    @property
    def rows(self) -> int:
        return sum(rows for place, rows in self.parts if place != "tokens")

    def place(self, tokens: Tensor, rows: Tensor) -> list[Tensor]:
        """Where each of the four begins: in tokens, or in the rows [B, programs, rows, D]."""
        places, next_token, next_row = [], 0, 0
        for place, count in self.parts:
            if place == "tokens":
                places.append(tokens[next_token] if count else rows)
                next_token += count > 0
            else:
                places.append(rows[:, :, next_row:] if count else rows)
                next_row += count
        return places

    def split(self, tokens: Tensor, wide: Tensor, narrow: Tensor) -> list[OptionalTensor]:
        """The four gradients, [B, T, D]."""
        found, start = [], {"tokens": 0, "wide": 0, "narrow": 0}
        for place, count in self.parts:
            first = start[place]
            start[place] += (count > 0) if place == "tokens" else count
            if not count:
                found.append(None)
            elif place == "tokens":
                found.append(tokens[first])
            else:
                found.append((wide if place == "wide" else narrow)[:, first : first + count])
        return found


def forward(
    x: Tensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    shift: OptionalTensor,
    cond_mask: OptionalTensor,
    affine: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    """(x', normalised x', mean, rstd): x' = x + gate y if there is a y, the others if there is a scale."""
    if not (x.is_cuda or launch.interpreted()):
        return closed_form.layer_norm_forward(x, y, gate, scale, shift, cond_mask, affine, eps)
    from titan_video.kernels.triton import layer_norm_kernels

    x, y = _contiguous(x), _contiguous(y)
    gate, scale, shift = (_with_dense_rows(rows) for rows in (gate, scale, shift))
    mask = _as_bytes(cond_mask)
    B, L, D = x.shape
    total = torch.empty_like(x if y is not None else x[:0])
    out = torch.empty_like(x if scale is not None else x[:0])
    statistics_shape = (B, L) if scale is not None else 0
    mean, rstd = (torch.empty(statistics_shape, dtype=torch.float32, device=x.device) for _ in range(2))
    read_per_row = [x, y, *(rows for rows in (gate, scale, shift) if not _has_one_row(rows))]
    constants = _constants(x, y, gate, scale, mask, read_per_row, False) | {"AFFINE": affine}
    sizes = (L, *_strides(gate), *_strides(scale), *_strides(shift), _sample_stride(mask), eps)
    args = (x, y, gate, scale, shift, mask, total, out, mean, rstd, *sizes)
    kernel = layer_norm_kernels.layer_norm_forward
    kernel[(_programs(kernel, args, constants, x), B)](*args, **constants)
    return total, out, mean, rstd


def backward(
    dsum: OptionalTensor,
    dout: OptionalTensor,
    x: OptionalTensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    cond_mask: OptionalTensor,
    mean: OptionalTensor,
    rstd: OptionalTensor,
    affine: bool,
    sums: Sums,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, tokens, wide, narrow), empty where there is no such input or its gradient is not needed.

    The last three hold the gradients of modulation, weights and bias: see `Sums`.
    """
    like = dsum if dout is None else dout
    if not (like.is_cuda or launch.interpreted()):
        return closed_form.layer_norm_backward(dsum, dout, x, y, gate, scale, cond_mask, mean, rstd, affine, sums)
    from titan_video.kernels.triton import layer_norm_kernels

    dsum, dout, x, y = (_contiguous(t) for t in (dsum, dout, x, y))
    gate_rows, scale_rows, mask = _with_dense_rows(gate), _with_dense_rows(scale), _as_bytes(cond_mask)
    B, L, D = like.shape
    dx, dy = (_empty_dense(like if exists else like[:0]) for exists in (x is not None, gate is not None))
    hoist = gate is None or scale is None or D <= MAX_HOISTED_WIDTH
    modulation = [rows for rows in (gate_rows, scale_rows) if not (hoist and _has_one_row(rows))]
    read_per_row = [dsum, dout, x, y, *modulation]
    constants = _constants(like, dsum, gate_rows, scale_rows, mask, read_per_row, True) | {
        "AFFINE": affine,
        "GATE_GRAD": sums.gate_rows > 0,
        "MODULATION_GRAD": sums.scale_rows > 0,
        "BIAS_GRAD": sums.bias and hoist,
        "HOIST": hoist,
        "RUNS": mask is not None and not hoist,
    }
    inputs = (dsum, dout, x, y, gate_rows, scale_rows, mask, mean, rstd, dx, dy)
    sizes = (L, *_strides(gate_rows), *_strides(scale_rows), _sample_stride(mask))
    placeholder = like.new_empty(0, dtype=torch.float32)
    kernel = layer_norm_kernels.layer_norm_backward
    programs = _programs(kernel, (*inputs, *[placeholder] * 4, sums.rows, *sizes), constants, like)
    tokens = like.new_empty(sums.per_token, B, L, D, dtype=torch.float32)
    partial = like.new_empty(B, programs, sums.rows, D, dtype=torch.float32)
    kernel[(programs, B)](*inputs, *sums.place(tokens, partial), sums.rows, *sizes, **constants)
    grads = add_partial_sums(partial.flatten(2), sums.wide_rows * D, sums.narrow_type)
    wide, narrow = (grad.view(B, -1, D) for grad in grads)
    if sums.bias and not hoist:
        narrow[:, -1] = dy.sum(1, dtype=torch.float32)
    return dx, dy, tokens, wide, narrow


def _constants(
    x: Tensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    mask: OptionalTensor,
    read_per_row: list[OptionalTensor],
    backward: bool,
) -> dict:
    """The constants of a kernel. read_per_row: the tensors that it reads for each row."""
    L, D = x.shape[1:]
    gate_kind = modulation_kind(gate, mask, L)
    has_many_sums = backward and gate is not None and scale is not None and gate_kind != PER_TOKEN
    block = max(launch.power_of_2(D), 128)
    row_bytes = block * sum(t.element_size() for t in read_per_row if t is not None)
    return {
        "D": D,
        "BLOCK": block,
        "STAGES": launch.stages(row_bytes),
        "RESIDUAL": y is not None,
        "GATED": gate is not None,
        "NORM": scale is not None,
        "GATE": gate_kind,
        "MODULATION": modulation_kind(scale, mask, L),
        # The sums of a gate and of a norm, of a row of more than 4,096 elements, do not fit in 8 warps' registers.
        "num_warps": launch.warps(block, backward, 16 if has_many_sums else 8),
    }


def _programs(kernel: Any, args: tuple, constants: dict, x: Tensor) -> int:
    """Programs for each sample."""
    B, L = x.shape[:2]
    return max(min(launch.num_programs(kernel, args, constants, x.device) // B, L), 1)


def modulation_kind(rows: OptionalTensor, cond_mask: OptionalTensor, num_tokens: int) -> int:
    """PER_SAMPLE, PER_TOKEN or BY_MASK. ValueError: the number of rows fits none of them."""
    if _has_one_row(rows):
        return PER_SAMPLE
    if rows.shape[1] != (num_tokens if cond_mask is None else 2):
        raise ValueError(
            f"modulation of {rows.shape[1]} rows for {num_tokens} tokens; legal: 1, 2 with cond_mask_BL, or one for "
            f"each token without"
        )
    return PER_TOKEN if cond_mask is None else BY_MASK


def _has_one_row(rows: OptionalTensor) -> bool:
    return rows is None or rows.shape[1] == 1


def _contiguous(x: OptionalTensor) -> OptionalTensor:
    return None if x is None else x.contiguous()


def _empty_dense(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _with_dense_rows(rows: OptionalTensor) -> OptionalTensor:
    """Modulation with stride 1 in the last dim; samples and rows keep their strides, so that views are not copied."""
    return rows if rows is None or rows.stride(-1) == 1 else rows.contiguous()


def _as_bytes(cond_mask: OptionalTensor) -> OptionalTensor:
    return None if cond_mask is None else cond_mask.contiguous().view(torch.uint8)


def _sample_stride(x: OptionalTensor) -> int:
    """0 where all samples share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _strides(rows: OptionalTensor) -> tuple[int, int]:
    """Of samples and of rows of modulation, 0 where there is only one."""
    return _sample_stride(rows), 0 if _has_one_row(rows) else rows.stride(1)
