"""LayerNorm, modulation and gated residuals in Triton: one kernel forward and one backward, for every place in a block.

    forward    x' = x + gate y        out = LayerNorm(x') scale + shift
    backward   of both at once. The gradients of gate, scale and shift are summed over each program's own rows; the
               caller adds the sums of all programs.

A program computes several consecutive rows of one sample, one after the other, and keeps in registers what they share.
Each input is read once and each output written once. There are few partial sums, and they are added in a fixed order:
programs share none. Statistics are float32.

Which row of modulation a token uses, for the gate, and for scale and shift:

    PER_SAMPLE   the only one of its sample
    PER_TOKEN    its own
    BY_MASK      one of its sample's two, by the conditioning mask: row 1 where the mask is true, row 0 elsewhere
"""

import triton
import triton.language as tl

PER_SAMPLE, PER_TOKEN, BY_MASK = (tl.constexpr(i) for i in range(3))


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _modulation_row(row, ptr, offsets, GATE: tl.constexpr, MODULATION: tl.constexpr):
    """Index of the row of modulation that a token uses, int64."""
    if GATE == BY_MASK or MODULATION == BY_MASK:
        return tl.load(ptr + offsets).to(tl.int64)
    else:
        return tl.zeros([], tl.int64) + row


@triton.jit
def _share(rows, program, programs):
    """(first, end) of the rows that a program computes: the programs divide them as evenly as they can."""
    each, rest = rows // programs, rows % programs
    first = program * each + tl.minimum(program, rest)
    return first, first + each + (program < rest).to(tl.int32)


@triton.jit
def layer_norm_forward(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    mask_ptr,
    sum_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    L,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    shift_b,
    shift_t,
    mask_b,
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
    """Program (p, b) computes its share of the rows of sample b.

    x, y, sum, out: [B, L, D], contiguous. mean, rstd: [B, L]. mask: bytes, [B or 1, L]. gate, scale, shift: [B or 1, T,
    D]; _b and _t are their strides over samples and rows.
    AFFINE: out = LayerNorm scale + shift; otherwise out = LayerNorm (1 + scale) + shift. GATE, MODULATION: PER_SAMPLE,
    PER_TOKEN or BY_MASK.
    """
    b = tl.program_id(1).to(tl.int64)
    first, end = _share(L, tl.program_id(0), tl.num_programs(0))
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    if GATED and GATE == PER_SAMPLE:
        gate = _load(gate_ptr + b * gate_b, cols, inside)
    if NORM and MODULATION == PER_SAMPLE:
        scale = _load(scale_ptr + b * scale_b, cols, inside)
        shift = _load(shift_ptr + b * shift_b, cols, inside)
    for row in tl.range(first, end, num_stages=STAGES):
        start = (b * L + row) * D
        x = _load(x_ptr + start, cols, inside)
        mod_row = _modulation_row(row, mask_ptr, b * mask_b + row, GATE, MODULATION)
        if RESIDUAL:
            y = _load(y_ptr + start, cols, inside)
            if GATED:
                if GATE != PER_SAMPLE:
                    gate = _load(gate_ptr + b * gate_b + mod_row * gate_t, cols, inside)
                x += gate * y
            else:
                x += y
            rounded = x.to(sum_ptr.dtype.element_ty)  # the norm reads what later layers and backward read
            tl.store(sum_ptr + start + cols, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if NORM:
            if MODULATION != PER_SAMPLE:
                scale = _load(scale_ptr + b * scale_b + mod_row * scale_t, cols, inside)
                shift = _load(shift_ptr + b * shift_b + mod_row * shift_t, cols, inside)
            mean = tl.sum(x, 0) / D
            centred = tl.where(inside, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
            normed = centred * rstd
            out = normed * scale + shift if AFFINE else normed * (1 + scale) + shift
            tl.store(out_ptr + start + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(mean_ptr + b * L + row, mean)
            tl.store(rstd_ptr + b * L + row, rstd)


@triton.jit
def _accumulate(value, ptr, offsets, inside, total, masked_total, mod_row, ROWS: tl.constexpr):
    """Add one row's gradient of a modulation to the program's sums, or store it if each token has its own row."""
    if ROWS == PER_TOKEN:
        tl.store(ptr + offsets, value, mask=inside)
    elif ROWS == BY_MASK:
        is_masked = mod_row.to(tl.float32)  # 1 or 0; products are fewer instructions than selections
        masked_total += value * is_masked
        total += value * (1 - is_masked)
    else:
        total += value
    return total, masked_total


@triton.jit
def _store_sums(ptr, start, cols, inside, total, masked_total, D: tl.constexpr, ROWS: tl.constexpr):
    """Store this program's sums, one row or two, `start` elements from the pointer."""
    if ROWS != PER_TOKEN:
        tl.store(ptr + start + cols, total, mask=inside)
    if ROWS == BY_MASK:
        tl.store(ptr + start + D + cols, masked_total, mask=inside)


@triton.jit
def _add_run(ptr, start, cols, inside, total, mod_row, D: tl.constexpr):
    """Add the sums of a run of rows to what is stored of this row of modulation. Returns zeros, for the next run.

    No other program adds here, and of this one the same thread, one run after the other, so the order is fixed. An
    atomic addition needs no barrier, with which Triton would prefetch no rows, and no registers for what is stored.
    """
    tl.atomic_add(ptr + start + mod_row * D + cols, total, mask=inside, sem="relaxed", scope="cta")
    return tl.zeros_like(total)


@triton.jit
def layer_norm_backward(
    dsum_ptr,
    dout_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    mask_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_ptr,
    dgate_ptr,
    dscale_ptr,
    dshift_ptr,
    dbias_ptr,
    sum_rows,
    L,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    mask_b,
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
    BIAS_GRAD: tl.constexpr,
    HOIST: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Program (p, b) computes the same rows as forward.

    dsum, dout: gradients of x' and out. x: the input of the norm, x' where there is a residual. dx: gradient of x, and
    of y where there is no gate; without a norm it equals dsum and is not written. dy: gradient of y, with a gate.
    dgate, dscale, dshift, dbias: float32, the rows of each program's sums that begin at these pointers; a program has
    sum_rows rows in all. For PER_TOKEN [B, L, D]. Written only with GATE_GRAD, MODULATION_GRAD, BIAS_GRAD; dbias is the
    sum of y's gradient. HOIST: rows that are PER_SAMPLE stay in registers. RUNS: of what is BY_MASK one sum is in
    registers and not two: the program adds it to memory where the mask changes from one row to the next, which with
    masks of whole frames is seldom.
    """
    b = tl.program_id(1).to(tl.int64)
    first, end = _share(L, tl.program_id(0), tl.num_programs(0))
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    dgate = tl.zeros([BLOCK], tl.float32)
    dscale, dshift, dbias, masked_dgate, masked_dscale, masked_dshift = dgate, dgate, dgate, dgate, dgate, dgate
    sums = (b * tl.num_programs(0) + tl.program_id(0)) * sum_rows * D
    GATE_RUNS: tl.constexpr = RUNS and GATED and GATE_GRAD and GATE == BY_MASK
    MODULATION_RUNS: tl.constexpr = RUNS and NORM and MODULATION_GRAD and MODULATION == BY_MASK
    GATE_SUMS: tl.constexpr = PER_SAMPLE if GATE_RUNS else GATE
    MODULATION_SUMS: tl.constexpr = PER_SAMPLE if MODULATION_RUNS else MODULATION
    run = tl.load(mask_ptr + b * mask_b + first).to(tl.int64) if RUNS else first.to(tl.int64)
    if GATE_RUNS:
        _store_sums(dgate_ptr, sums, cols, inside, dgate, dgate, D, GATE)
    if MODULATION_RUNS:
        _store_sums(dscale_ptr, sums, cols, inside, dgate, dgate, D, MODULATION)
        _store_sums(dshift_ptr, sums, cols, inside, dgate, dgate, D, MODULATION)
    if RUNS:
        tl.debug_barrier()
    if GATED and HOIST and GATE == PER_SAMPLE:
        gate = _load(gate_ptr + b * gate_b, cols, inside)
    if NORM and HOIST and MODULATION == PER_SAMPLE:
        scale = _load(scale_ptr + b * scale_b, cols, inside)
    for row in tl.range(first, end, num_stages=STAGES):
        start = (b * L + row) * D
        mod_row = _modulation_row(row, mask_ptr, b * mask_b + row, GATE, MODULATION)
        if RUNS:
            if mod_row != run:
                if GATE_RUNS:
                    dgate = _add_run(dgate_ptr, sums, cols, inside, dgate, run, D)
                if MODULATION_RUNS:
                    dscale = _add_run(dscale_ptr, sums, cols, inside, dscale, run, D)
                    dshift = _add_run(dshift_ptr, sums, cols, inside, dshift, run, D)
                run = mod_row
        dx = _load(dsum_ptr + start, cols, inside) if RESIDUAL else tl.zeros([BLOCK], tl.float32)
        if NORM:
            dout = _load(dout_ptr + start, cols, inside)
            x = _load(x_ptr + start, cols, inside)
            rstd = tl.load(rstd_ptr + b * L + row)
            normed = tl.where(inside, (x - tl.load(mean_ptr + b * L + row)) * rstd, 0.0)
            if not HOIST or MODULATION != PER_SAMPLE:
                scale = _load(scale_ptr + b * scale_b + mod_row * scale_t, cols, inside)
            dnormed = dout * scale if AFFINE else dout + dout * scale
            mean_dnormed = tl.sum(dnormed, 0) / D
            mean_projection = tl.sum(dnormed * normed, 0) / D
            dx += (dnormed - mean_dnormed - normed * mean_projection) * rstd
            tl.store(dx_ptr + start + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if MODULATION_GRAD:
                dscale, masked_dscale = _accumulate(
                    dout * normed, dscale_ptr + start, cols, inside, dscale, masked_dscale, mod_row, MODULATION_SUMS
                )
                dshift, masked_dshift = _accumulate(
                    dout, dshift_ptr + start, cols, inside, dshift, masked_dshift, mod_row, MODULATION_SUMS
                )
        if GATED:
            if not HOIST or GATE != PER_SAMPLE:
                gate = _load(gate_ptr + b * gate_b + mod_row * gate_t, cols, inside)
            dy = dx * gate
            tl.store(dy_ptr + start + cols, dy.to(dy_ptr.dtype.element_ty), mask=inside)
            if BIAS_GRAD:
                dbias += dy
            if GATE_GRAD:
                y = _load(y_ptr + start, cols, inside)
                dgate, masked_dgate = _accumulate(
                    dx * y, dgate_ptr + start, cols, inside, dgate, masked_dgate, mod_row, GATE_SUMS
                )
        elif BIAS_GRAD:
            dbias += dx
    if RUNS:
        tl.debug_barrier()
    if GATE_RUNS:
        _add_run(dgate_ptr, sums, cols, inside, dgate, run, D)
    elif GATED and GATE_GRAD:
        _store_sums(dgate_ptr, sums, cols, inside, dgate, masked_dgate, D, GATE)
    if MODULATION_RUNS:
        _add_run(dscale_ptr, sums, cols, inside, dscale, run, D)
        _add_run(dshift_ptr, sums, cols, inside, dshift, run, D)
    elif NORM and MODULATION_GRAD:
        _store_sums(dscale_ptr, sums, cols, inside, dscale, masked_dscale, D, MODULATION)
        _store_sums(dshift_ptr, sums, cols, inside, dshift, masked_dshift, D, MODULATION)
    if BIAS_GRAD:
        _store_sums(dbias_ptr, sums, cols, inside, dbias, dbias, D, PER_SAMPLE)
