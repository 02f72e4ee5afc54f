"""LayerNorm, modulation and residuals in Triton: one kernel forward, one backward, which serve every seam of a block.

    forward    x' = x + gate y        out = LayerNorm(x') scale + shift
    backward   of both at once; the gradients of gate, scale and shift as sums over each program's own rows, which the caller adds up

A program takes a run of rows of one sample, one row after the other, and holds in registers what all of them share. So
each input is read and each output written once, and there are few partial sums; they are added in a fixed order,
without atomics. Statistics are float32.

Which row of modulation a token has is one of three, for the gate and for scale and shift each:
    ONE     that of its sample
    EACH    its own
    CLEAN   of its sample's two, by the mask: 1 for a clean token, 0 for others
"""

import triton
import triton.language as tl

ONE, EACH, CLEAN = (tl.constexpr(i) for i in range(3))


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _token(row, ptr, at, GATE: tl.constexpr, MODULATION: tl.constexpr):
    """Number of the row of modulation that a token has, int64."""
    if GATE == CLEAN or MODULATION == CLEAN:
        return tl.load(ptr + at).to(tl.int64)
    else:
        return tl.zeros([], tl.int64) + row


@triton.jit
def layer_norm_forward(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    clean_ptr,
    sum_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    L,
    run,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    shift_b,
    shift_t,
    clean_b,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    GATE: tl.constexpr,
    MODULATION: tl.constexpr,
):
    """Program (p, b): rows p run to (p + 1) run of sample b.

    x, y, sum, out: [B, L, D], contiguous; mean, rstd: [B, L]. Of gate, scale and shift the strides of sample and row;
        clean: bytes.
    AFFINE: out is LayerNorm scale + shift, otherwise LayerNorm (1 + scale) + shift. GATE, MODULATION: see the top of
        the file.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * run
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    if GATED and GATE == ONE:
        gate = _load(gate_ptr + b * gate_b, cols, inside)
    if NORM and MODULATION == ONE:
        scale = _load(scale_ptr + b * scale_b, cols, inside)
        shift = _load(shift_ptr + b * shift_b, cols, inside)
    for row in tl.range(first, tl.minimum(first + run, L), num_stages=STAGES):
        at = (b * L + row) * D + cols
        x = _load(x_ptr, at, inside)
        token = _token(row, clean_ptr, b * clean_b + row, GATE, MODULATION)
        if RESIDUAL:
            y = _load(y_ptr, at, inside)
            if GATED:
                if GATE != ONE:
                    gate = _load(gate_ptr + b * gate_b + token * gate_t, cols, inside)
                x += gate * y
            else:
                x += y
            rounded = x.to(sum_ptr.dtype.element_ty)  # the norm sees what later layers see, and what backward will read
            tl.store(sum_ptr + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if NORM:
            if MODULATION != ONE:
                scale = _load(scale_ptr + b * scale_b + token * scale_t, cols, inside)
                shift = _load(shift_ptr + b * shift_b + token * shift_t, cols, inside)
            mean = tl.sum(x, 0) / D
            centred = tl.where(inside, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
            normed = centred * rstd
            out = normed * scale + shift if AFFINE else normed * (1 + scale) + shift
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(mean_ptr + b * L + row, mean)
            tl.store(rstd_ptr + b * L + row, rstd)


@triton.jit
def _gather(value, ptr, at, inside, total, of_clean, token, ROWS: tl.constexpr):
    """Account for one row's gradient of a modulation:

    written, if it is the row's own, else added to a program's sums.
    """
    if ROWS == EACH:
        tl.store(ptr + at, value, mask=inside)
    elif ROWS == CLEAN:
        of_clean += tl.where(token != 0, value, 0.0)
        total += tl.where(token != 0, 0.0, value)
    else:
        total += value
    return total, of_clean


@triton.jit
def _store_sums(ptr, slot, cols, inside, total, of_clean, D: tl.constexpr, ROWS: tl.constexpr):
    """slot: the number of this program among all. The sums are [programs, T, D]."""
    if ROWS == ONE:
        tl.store(ptr + slot * D + cols, total, mask=inside)
    if ROWS == CLEAN:
        tl.store(ptr + slot * 2 * D + cols, total, mask=inside)
        tl.store(ptr + (slot * 2 + 1) * D + cols, of_clean, mask=inside)


@triton.jit
def layer_norm_backward(
    dsum_ptr,
    dout_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    clean_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_ptr,
    dgate_ptr,
    dscale_ptr,
    dshift_ptr,
    L,
    run,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    clean_b,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    GATE: tl.constexpr,
    MODULATION: tl.constexpr,
    GATE_GRAD: tl.constexpr,
    MODULATION_GRAD: tl.constexpr,
    HELD: tl.constexpr,
):
    """Program (p, b) takes the rows that it takes forward.

    dsum, dout: gradients of x' and out; x: what was normalised, x' where there is a residual. dx: gradient of x, and
        without a gate of y;
    dy: of y, with one. Without norm dx is dsum and is not written. dgate, dscale, dshift: float32; [programs, D] for
    ONE, [programs, 2, D] for CLEAN, [B, L, D] for EACH; not written unless GATE_GRAD, MODULATION_GRAD. HELD: what is
    ONE stays in registers.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * run
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    dgate = tl.zeros([BLOCK], tl.float32)
    dscale, dshift, clean_dgate, clean_dscale, clean_dshift = dgate, dgate, dgate, dgate, dgate
    if GATED and HELD and GATE == ONE:
        gate = _load(gate_ptr + b * gate_b, cols, inside)
    if NORM and HELD and MODULATION == ONE:
        scale = _load(scale_ptr + b * scale_b, cols, inside)
    for row in tl.range(first, tl.minimum(first + run, L), num_stages=STAGES):
        at = (b * L + row) * D + cols
        token = _token(row, clean_ptr, b * clean_b + row, GATE, MODULATION)
        dx = _load(dsum_ptr, at, inside) if RESIDUAL else tl.zeros([BLOCK], tl.float32)
        if NORM:
            dout = _load(dout_ptr, at, inside)
            x = _load(x_ptr, at, inside)
            rstd = tl.load(rstd_ptr + b * L + row)
            normed = tl.where(inside, (x - tl.load(mean_ptr + b * L + row)) * rstd, 0.0)
            if not HELD or MODULATION != ONE:
                scale = _load(scale_ptr + b * scale_b + token * scale_t, cols, inside)
            dnormed = dout * scale if AFFINE else dout * (1 + scale)
            along_one = tl.sum(dnormed, 0) / D
            along_normed = tl.sum(dnormed * normed, 0) / D
            dx += (dnormed - along_one - normed * along_normed) * rstd
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if MODULATION_GRAD:
                dscale, clean_dscale = _gather(
                    dout * normed, dscale_ptr, at, inside, dscale, clean_dscale, token, MODULATION
                )
                dshift, clean_dshift = _gather(dout, dshift_ptr, at, inside, dshift, clean_dshift, token, MODULATION)
        if GATED:
            if not HELD or GATE != ONE:
                gate = _load(gate_ptr + b * gate_b + token * gate_t, cols, inside)
            tl.store(dy_ptr + at, (dx * gate).to(dy_ptr.dtype.element_ty), mask=inside)
            if GATE_GRAD:
                y = _load(y_ptr, at, inside)
                dgate, clean_dgate = _gather(dx * y, dgate_ptr, at, inside, dgate, clean_dgate, token, GATE)
    slot = b * tl.num_programs(0) + tl.program_id(0)
    if GATED and GATE_GRAD:
        _store_sums(dgate_ptr, slot, cols, inside, dgate, clean_dgate, D, GATE)
    if NORM and MODULATION_GRAD:
        _store_sums(dscale_ptr, slot, cols, inside, dscale, clean_dscale, D, MODULATION)
        _store_sums(dshift_ptr, slot, cols, inside, dshift, clean_dshift, D, MODULATION)
