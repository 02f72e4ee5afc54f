"""LayerNorm, modulation and gated residuals as operators of torch: on a GPU one Triton kernel each, forward and
backward.

    op               forward                                                      kept for backward
    norm             x -> LayerNorm(x) scale + shift                              x, scale, mean and 1/deviation of each row
    residual_norm    x, y -> x' = x + gate y, LayerNorm(x') scale + shift         x', scale, these two; y where the gate learns, gate
    gated_residual   x, y -> x + gate y                                           y where the gate learns, gate

scale is a weight (affine), or 1 + scale is (modulated). Shapes and meaning of modulation and of cond_mask_BL: reference.py;
modulation with one row for all. No gradient is added up by atomics: results are the same from run to run. On a CPU the
ops compute the same in plain torch; layer_norm_triton.py says how it is done on a GPU.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from titan_video.kernels.triton import closed_form as plain
from titan_video.kernels.triton import launch

Rows = Tensor | None


# ---- the interface, as reference.py has it ----


def ada_layer_norm(
    x_BLD: Tensor, scale_BTD: Tensor, shift_BTD: Tensor, eps: float, cond_mask_BL: Rows = None
) -> Tensor:
    return norm(x_BLD, scale_BTD, shift_BTD, cond_mask_BL, False, eps)[0]


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return norm(x_BLD, weight_D[None, None], bias_D[None, None], None, True, eps)[0]


def residual_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Rows,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    cond_mask_BL: Rows = None,
) -> tuple[Tensor, Tensor]:
    return residual_norm(x_BLD, y_BLD, gate_BTD, weight_D[None, None], bias_D[None, None], cond_mask_BL, True, eps)[:2]


def residual_ada_layer_norm(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BTD: Rows,
    scale_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    cond_mask_BL: Rows = None,
) -> tuple[Tensor, Tensor]:
    return residual_norm(x_BLD, y_BLD, gate_BTD, scale_BTD, shift_BTD, cond_mask_BL, False, eps)[:2]


# ---- operators ----


@custom_op("titan_video::norm", mutates_args=())
def norm(
    x: Tensor, scale: Tensor, shift: Tensor, clean: Rows, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean [B, L], 1/deviation [B, L])"""
    return _forward(x, None, None, scale, shift, clean, affine, eps)[1:]


@custom_op("titan_video::norm_backward", mutates_args=())
def norm_backward(
    dout: Tensor, x: Tensor, scale: Tensor, clean: Rows, mean: Tensor, rstd: Tensor, affine: bool, modulation_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift); the last two are empty unless modulation_grad."""
    dx, _, _, dscale, dshift = _backward(
        None, dout, x, None, None, scale, clean, mean, rstd, affine, False, modulation_grad
    )
    return dx, dscale, dshift


@custom_op("titan_video::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor, y: Tensor, gate: Rows, scale: Tensor, shift: Tensor, clean: Rows, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', normalised, mean [B, L], 1/deviation [B, L])"""
    return _forward(x, y, gate, scale, shift, clean, affine, eps)


@custom_op("titan_video::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    dsum: Tensor,
    dout: Tensor,
    x: Tensor,
    y: Rows,
    gate: Rows,
    scale: Tensor,
    clean: Rows,
    mean: Tensor,
    rstd: Tensor,
    affine: bool,
    gate_grad: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift); empty are dy without a gate, where it is dx, dgate unless gate_grad, the last
    two unless modulation_grad.
    """
    return _backward(dsum, dout, x, y, gate, scale, clean, mean, rstd, affine, gate_grad, modulation_grad)


@custom_op("titan_video::gated_residual", mutates_args=())
def gated_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BTD: Tensor, cond_mask_BL: Rows = None) -> Tensor:
    return _forward(x_BLD, y_BLD, gate_BTD, None, None, cond_mask_BL, False, 0.0)[0]


@custom_op("titan_video::gated_residual_backward", mutates_args=())
def gated_residual_backward(dsum: Tensor, y: Rows, gate: Tensor, clean: Rows, gate_grad: bool) -> tuple[Tensor, Tensor]:
    """(dy, dgate); dgate is empty unless gate_grad."""
    return _backward(dsum, None, None, y, gate, None, clean, None, None, False, gate_grad, False)[1:3]


# ---- what they compute ----


def _forward(
    x: Tensor, y: Rows, gate: Rows, scale: Rows, shift: Rows, clean: Rows, affine: bool, eps: float
) -> tuple[Tensor, ...]:
    """(x', normalised, mean, 1/deviation), empty where there is none."""
    if not (x.is_cuda or launch.interpreted()):
        return plain.layer_norm_forward(x, y, gate, scale, shift, clean, affine, eps)
    from titan_video.kernels.triton import layer_norm_kernels as layer_norm_triton

    x, y, gate, scale, shift, clean = _dense(x), _dense(y), _rows(gate), _rows(scale), _rows(shift), _mask(clean)
    B, L, D = x.shape
    total, out = (torch.empty_like(x if has else x[:0]) for has in (y is not None, scale is not None))
    mean, rstd = (
        torch.empty((B, L) if scale is not None else 0, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    options, run = _options(
        x, y, gate, scale, clean, (x, y), [rows for rows in (gate, scale, shift) if not _single(rows)]
    )
    layer_norm_triton.layer_norm_forward[(-(-L // run), B)](
        x,
        y,
        gate,
        scale,
        shift,
        clean,
        total,
        out,
        mean,
        rstd,
        L,
        run,
        *_strides(gate),
        *_strides(scale),
        *_strides(shift),
        _sample_stride(clean),
        eps,
        AFFINE=affine,
        **options,
    )
    return total, out, mean, rstd


def _backward(
    dsum: Rows,
    dout: Rows,
    x: Rows,
    y: Rows,
    gate: Rows,
    scale: Rows,
    clean: Rows,
    mean: Rows,
    rstd: Rows,
    affine: bool,
    gate_grad: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift), empty where there is none or where it is not asked for."""
    like = dsum if dout is None else dout
    if not (like.is_cuda or launch.interpreted()):
        return plain.layer_norm_backward(
            dsum, dout, x, y, gate, scale, clean, mean, rstd, affine, gate_grad, modulation_grad
        )
    from titan_video.kernels.triton import layer_norm_kernels as layer_norm_triton

    dsum, dout, x, y, clean = _dense(dsum), _dense(dout), _dense(x), _dense(y), _mask(clean)
    gate_rows, scale_rows = _rows(gate), _rows(scale)
    B, L, D = like.shape
    dx, dy = (
        torch.empty_like(like if has else like[:0], memory_format=torch.contiguous_format)
        for has in (x is not None, gate is not None)
    )
    held = gate is None or scale is None or D <= 4096  # three sums of the widest rows leave no registers for modulation
    each = [rows for rows in (gate_rows, scale_rows) if rows is not None and not (held and _single(rows))]
    options, run = _options(like, dsum, gate_rows, scale_rows, clean, (dsum, dout, x, y), each)
    programs = -(-L // run)
    kinds = options["GATE"], options["MODULATION"], options["MODULATION"]
    wanted = [
        rows if needed else None
        for rows, needed in ((gate, gate_grad), (scale, modulation_grad), (scale, modulation_grad))
    ]
    sums = [_partial(rows, kind, like, programs) for rows, kind in zip(wanted, kinds, strict=True)]
    layer_norm_triton.layer_norm_backward[(programs, B)](
        dsum,
        dout,
        x,
        y,
        gate_rows,
        scale_rows,
        clean,
        mean,
        rstd,
        dx,
        dy,
        *sums,
        L,
        run,
        *_strides(gate_rows),
        *_strides(scale_rows),
        _sample_stride(clean),
        AFFINE=affine,
        GATE_GRAD=gate_grad,
        MODULATION_GRAD=modulation_grad,
        HELD=held,
        **options,
    )
    return dx, dy, *(_summed(part, rows) for part, rows in zip(sums, wanted, strict=True))


def _options(
    x: Tensor, y: Rows, gate: Rows, scale: Rows, clean: Rows, streams: tuple, modulation: list
) -> tuple[dict, int]:
    """The kernels' constants, and how many rows a program takes. streams, modulation: what is read for each row."""
    B, L, D = x.shape
    block = max(launch.power_of_2(D), 128)
    num_warps = launch.warps(block)
    row_bytes = sum(t.element_size() for t in streams if t is not None)
    row_bytes += sum(t.element_size() for t in modulation if t is not None)
    options = {
        "D": D,
        "BLOCK": block,
        "STAGES": launch.stages(row_bytes * block),
        "RESIDUAL": y is not None,
        "GATED": gate is not None,
        "NORM": scale is not None,
        "GATE": _kind(gate, clean, L),
        "MODULATION": _kind(scale, clean, L),
        "num_warps": num_warps,
    }
    return options, launch.run_length(L, B, num_warps, x.device)


def _single(rows: Rows) -> bool:
    return rows is None or rows.shape[1] == 1


def _kind(rows: Rows, clean: Rows, L: int) -> int:
    """ONE, EACH or CLEAN of layer_norm_triton.py. ValueError if there are not as many rows as there should be."""
    if _single(rows):
        return 0
    if rows.shape[1] != (L if clean is None else 2):
        raise ValueError(
            f"modulation of {rows.shape[1]} rows for {L} tokens; legal: 1, 2 with cond_mask_BL, or one for each "
            f"token without"
        )
    return 1 if clean is None else 2


def _dense(x: Rows) -> Rows:
    return None if x is None else x.contiguous()


def _rows(rows: Rows) -> Rows:
    """Modulation whose rows are dense, wherever they are."""
    return rows if rows is None or rows.stride(-1) == 1 else rows.contiguous()


def _mask(clean: Rows) -> Rows:
    return None if clean is None else clean.contiguous().view(torch.uint8)


def _sample_stride(x: Rows) -> int:
    """0 where all samples have the same."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _strides(rows: Rows) -> tuple[int, int]:
    return _sample_stride(rows), 0 if _single(rows) else rows.stride(1)


def _partial(rows: Rows, kind: int, like: Tensor, programs: int) -> Tensor:
    """Room for the gradient of modulation: that of each token, or each program's sums."""
    if rows is None:
        return like.new_empty(0, dtype=torch.float32)
    B, L, D = like.shape
    return like.new_empty((B, 1, L, D) if kind == 1 else (B, programs, rows.shape[1], D), dtype=torch.float32)


def _summed(part: Tensor, rows: Rows) -> Tensor:
    if part.numel() == 0:
        return part
    total = part.squeeze(1) if part.shape[1] == 1 else part.sum(1)
    return (total.sum(0, keepdim=True) if rows.shape[0] == 1 < total.shape[0] else total).to(rows.dtype)


# ---- shapes, for tracing; gradients ----


@norm.register_fake
def _(x, scale, shift, clean, affine, eps):
    return x.new_empty(x.shape), *_statistics(x)


@norm_backward.register_fake
def _(dout, x, scale, clean, mean, rstd, affine, modulation_grad):
    return x.new_empty(x.shape), _like(scale, modulation_grad), _like(scale, modulation_grad)


@residual_norm.register_fake
def _(x, y, gate, scale, shift, clean, affine, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_statistics(x)


@residual_norm_backward.register_fake
def _(dsum, dout, x, y, gate, scale, clean, mean, rstd, affine, gate_grad, modulation_grad):
    dy = x.new_empty(x.shape if gate is not None else 0)
    return (
        x.new_empty(x.shape),
        dy,
        _like(gate if gate_grad else scale, gate_grad),
        _like(scale, modulation_grad),
        _like(scale, modulation_grad),
    )


@gated_residual.register_fake
def _(x_BLD, y_BLD, gate_BTD, cond_mask_BL=None):
    return x_BLD.new_empty(x_BLD.shape)


@gated_residual_backward.register_fake
def _(dsum, y, gate, clean, gate_grad):
    return dsum.new_empty(dsum.shape), _like(gate, gate_grad)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


def _like(rows: Tensor, wanted: bool) -> Tensor:
    return rows.new_empty(rows.shape) if wanted else rows.new_empty(0, dtype=torch.float32)


def _keep_norm(ctx, inputs, output) -> None:
    x, scale, _, clean, ctx.affine, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.modulation_grad = any(ctx.needs_input_grad[1:3])
    ctx.save_for_backward(x, scale, clean, mean, rstd)


def _norm_gradients(ctx, dout, *_):
    x, scale, clean, mean, rstd = ctx.saved_tensors
    dx, *modulation = norm_backward(dout, x, scale, clean, mean, rstd, ctx.affine, ctx.modulation_grad)
    return dx, *(modulation if ctx.modulation_grad else (None, None)), None, None, None


def _keep_residual_norm(ctx, inputs, output) -> None:
    _, y, gate, scale, _, clean, ctx.affine, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.gate_grad, ctx.modulation_grad = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:5])
    ctx.save_for_backward(total, y if ctx.gate_grad else None, gate, scale, clean, mean, rstd)


def _residual_norm_gradients(ctx, dsum, dout, *_):
    total, y, gate, scale, clean, mean, rstd = ctx.saved_tensors
    dsum, dout = (torch.zeros_like(total) if grad is None else grad for grad in (dsum, dout))
    dx, dy, dgate, *modulation = residual_norm_backward(
        dsum, dout, total, y, gate, scale, clean, mean, rstd, ctx.affine, ctx.gate_grad, ctx.modulation_grad
    )
    modulation = modulation if ctx.modulation_grad else (None, None)
    return dx, dx if gate is None else dy, dgate if ctx.gate_grad else None, *modulation, None, None, None


def _keep_gated_residual(ctx, inputs, output) -> None:
    _, y, gate, clean = inputs
    ctx.gate_grad = ctx.needs_input_grad[2]
    ctx.save_for_backward(y if ctx.gate_grad else None, gate, clean)


def _gated_residual_gradients(ctx, dsum):
    y, gate, clean = ctx.saved_tensors
    dy, dgate = gated_residual_backward(dsum, y, gate, clean, ctx.gate_grad)
    return dsum, dy, dgate if ctx.gate_grad else None, None


norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
residual_norm.register_autograd(_residual_norm_gradients, setup_context=_keep_residual_norm)
gated_residual.register_autograd(_gated_residual_gradients, setup_context=_keep_gated_residual)
