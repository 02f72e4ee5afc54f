"""What the operators of layer_norm.py compute: a launch of the Triton kernels on a GPU, closed_form.py on a CPU.

A tensor that is not needed is None as an argument and empty as a result.
"""

import torch
from torch import Tensor

from titan_video.kernels.triton import closed_form, launch

OptionalTensor = Tensor | None

# GATE and MODULATION of layer_norm_kernels.py, which only a process with triton can import.
PER_SAMPLE, PER_TOKEN, BY_MASK = range(3)
# Above this width, the three sums of a backward with gate and norm leave no registers for the modulation.
MAX_HOISTED_WIDTH = 4096


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
    constants, rows_per_program = _launch_options(x, y, gate, scale, mask, read_per_row)
    layer_norm_kernels.layer_norm_forward[(-(-L // rows_per_program), B)](
        x,
        y,
        gate,
        scale,
        shift,
        mask,
        total,
        out,
        mean,
        rstd,
        L,
        rows_per_program,
        *_strides(gate),
        *_strides(scale),
        *_strides(shift),
        _sample_stride(mask),
        eps,
        AFFINE=affine,
        **constants,
    )
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
    gate_grad: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift), empty where there is no such input or its gradient is not needed."""
    like = dsum if dout is None else dout
    if not (like.is_cuda or launch.interpreted()):
        return closed_form.layer_norm_backward(
            dsum, dout, x, y, gate, scale, cond_mask, mean, rstd, affine, gate_grad, modulation_grad
        )
    from titan_video.kernels.triton import layer_norm_kernels

    dsum, dout, x, y = (_contiguous(t) for t in (dsum, dout, x, y))
    gate_rows, scale_rows, mask = _with_dense_rows(gate), _with_dense_rows(scale), _as_bytes(cond_mask)
    B, L, D = like.shape
    dx, dy = (_empty_dense(like if exists else like[:0]) for exists in (x is not None, gate is not None))
    hoist = gate is None or scale is None or D <= MAX_HOISTED_WIDTH
    modulation = [rows for rows in (gate_rows, scale_rows) if not (hoist and _has_one_row(rows))]
    constants, rows_per_program = _launch_options(
        like, dsum, gate_rows, scale_rows, mask, [dsum, dout, x, y, *modulation]
    )
    programs = -(-L // rows_per_program)
    gate_like, scale_like = gate if gate_grad else None, scale if modulation_grad else None
    gate_sums = _empty_sums(gate_like, constants["GATE"], like, programs)
    scale_sums, shift_sums = (_empty_sums(scale_like, constants["MODULATION"], like, programs) for _ in range(2))
    layer_norm_kernels.layer_norm_backward[(programs, B)](
        dsum,
        dout,
        x,
        y,
        gate_rows,
        scale_rows,
        mask,
        mean,
        rstd,
        dx,
        dy,
        gate_sums,
        scale_sums,
        shift_sums,
        L,
        rows_per_program,
        *_strides(gate_rows),
        *_strides(scale_rows),
        _sample_stride(mask),
        AFFINE=affine,
        GATE_GRAD=gate_grad,
        MODULATION_GRAD=modulation_grad,
        HOIST=hoist,
        **constants,
    )
    return dx, dy, _add(gate_sums, gate_like), _add(scale_sums, scale_like), _add(shift_sums, scale_like)


def _launch_options(
    x: Tensor,
    y: OptionalTensor,
    gate: OptionalTensor,
    scale: OptionalTensor,
    mask: OptionalTensor,
    read_per_row: list[OptionalTensor],
) -> tuple[dict, int]:
    """The constants of a kernel, and the rows per program. read_per_row: the tensors that it reads for each row."""
    B, L, D = x.shape
    block = max(launch.power_of_2(D), 128)
    num_warps = launch.warps(block)
    row_bytes = block * sum(t.element_size() for t in read_per_row if t is not None)
    constants = {
        "D": D,
        "BLOCK": block,
        "STAGES": launch.stages(row_bytes),
        "RESIDUAL": y is not None,
        "GATED": gate is not None,
        "NORM": scale is not None,
        "GATE": modulation_kind(gate, mask, L),
        "MODULATION": modulation_kind(scale, mask, L),
        "num_warps": num_warps,
    }
    return constants, launch.rows_per_program(L, B, num_warps, x.device)


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


def _empty_sums(modulation: OptionalTensor, kind: int, like: Tensor, programs: int) -> Tensor:
    """Memory for a modulation's gradient: each program's sums [B, programs, T, D], or each token's [B, 1, L, D]."""
    if modulation is None:
        return like.new_empty(0, dtype=torch.float32)
    B, L, D = like.shape
    shape = (B, 1, L, D) if kind == PER_TOKEN else (B, programs, modulation.shape[1], D)
    return like.new_empty(shape, dtype=torch.float32)


def _add(sums: Tensor, modulation: OptionalTensor) -> Tensor:
    """The gradient of a modulation from the sums of all programs."""
    if sums.numel() == 0:
        return sums
    total = sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1)
    if modulation.shape[0] == 1 < total.shape[0]:
        total = total.sum(0, keepdim=True)
    return total.to(modulation.dtype)
