"""RMSNorm, with or without RoPE after it, in Triton: one kernel forward and one backward, of one tensor or of two.

A token is a tile of heads x head width, for one norm over all heads as for one norm per head, so that a token's cos and
sin are read once for all heads. Without RoPE, a norm over the full width has one head of that width. A program computes
several consecutive tokens, one after the other, and sums the weight's gradient over them; the caller adds the sums of
all programs. Statistics are float32. PAIR: a second tensor, with a weight of its own, in the same launch: the first
programs0 programs compute the first one, the others the second.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_cos_sin(ptr, pairs, K: tl.constexpr):
    """Each pair (cos, sin) in one load of 8 bytes."""
    bits = tl.load(ptr.to(tl.pointer_type(tl.int64)) + pairs, mask=2 * pairs < K, other=0)
    return (bits & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), (bits >> 32).to(tl.int32).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _rotate(x, cos, sin, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Neighbouring pairs of the columns times cos + i sin."""
    a, b = tl.split(tl.reshape(x, [HEADS, WIDTH // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [HEADS, WIDTH])


@triton.jit
def _mean(x, H: tl.constexpr, K: tl.constexpr, PER_HEAD: tl.constexpr):
    """[HEADS, 1] or [1, 1]: the mean of each head's columns, or of all."""
    sums = tl.sum(x, 1, keep_dims=True)
    return sums / K if PER_HEAD else tl.sum(sums, 0, keep_dims=True) / (H * K)


@triton.jit
def _weight(ptr, heads, cols, inside, K: tl.constexpr, PER_HEAD: tl.constexpr):
    return _load(ptr, cols, inside & (heads >= 0)) if PER_HEAD else _load(ptr, heads * K + cols, inside)


@triton.jit
def _share(tokens, program, programs):
    """(first, end) of the tokens that a program computes: the programs divide them as evenly as they can."""
    each, rest = tokens // programs, tokens % programs
    first = program * each + tl.minimum(program, rest)
    return first, first + each + (program < rest).to(tl.int32)


@triton.jit(do_not_specialize=["programs0"])
def rms_norm_forward(
    x_ptr,
    x1_ptr,
    weight_ptr,
    weight1_ptr,
    cos_sin_ptr,
    mean_square_ptr,
    out_ptr,
    out1_ptr,
    rstd_ptr,
    rstd1_ptr,
    N,
    N1,
    programs0,
    L,
    cos_sin_b,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_MEAN_SQUARE: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Each program computes its share of the N tokens, in samples of L.

    x, out: [N, H, K], contiguous. weight: [K] if PER_HEAD, else [H K]. cos_sin: pairs (cos, sin), [samples, L, K];
    cos_sin_b: its stride over samples, 0 where all samples have the same. rstd, and mean_square if HAS_MEAN_SQUARE:
    [N, H] if PER_HEAD, else [N]. HEADS, WIDTH: H and K rounded up to powers of 2.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if PAIR:
        second = program >= programs0
        x_ptr, weight_ptr = tl.where(second, x1_ptr, x_ptr), tl.where(second, weight1_ptr, weight_ptr)
        out_ptr, rstd_ptr = tl.where(second, out1_ptr, out_ptr), tl.where(second, rstd1_ptr, rstd_ptr)
        N = tl.where(second, N1, N)
        program, programs = (
            tl.where(second, program - programs0, program),
            tl.where(second, programs - programs0, programs0),
        )
    first, end = _share(N, program, programs)
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    offsets, inside = heads * K + cols, (heads < H) & (cols < K)
    row = heads if PER_HEAD else tl.zeros([1, 1], tl.int32)
    num_rows: tl.constexpr = H if PER_HEAD else 1
    start = tl.zeros([], tl.int64)  # makes offsets 64-bit
    weight = _weight(weight_ptr, heads, cols, inside, K, PER_HEAD)
    for token in tl.range(first, end, num_stages=STAGES):
        n = start + token
        row_start = n * (H * K)
        x = _load(x_ptr + row_start, offsets, inside)
        if HAS_MEAN_SQUARE:
            square = _load(mean_square_ptr, n * num_rows + row, row < num_rows)
        else:
            square = _mean(x * x, H, K, PER_HEAD)
        rstd = tl.rsqrt(square + eps)
        tl.store(rstd_ptr + n * num_rows + row, rstd, mask=row < num_rows)
        out = x * rstd * weight
        if ROPE:
            cos, sin = _load_cos_sin(cos_sin_ptr + (n // L) * cos_sin_b + (n % L) * K, pairs, K)
            out = _rotate(out, cos, sin, HEADS, WIDTH)
        tl.store(out_ptr + row_start + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["programs0"])
def rms_norm_backward(
    dout_ptr,
    dout1_ptr,
    x_ptr,
    x1_ptr,
    weight_ptr,
    weight1_ptr,
    cos_sin_ptr,
    rstd_ptr,
    rstd1_ptr,
    dx_ptr,
    dx1_ptr,
    sums_ptr,
    dmean_square_ptr,
    dx_stride,
    dx1_stride,
    N,
    N1,
    programs0,
    L,
    cos_sin_b,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_MEAN_SQUARE: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Shapes as in forward. dmean_square: as mean_square. dx: [N, H K] with a stride of dx_stride over tokens.

    sums: float32, of each program: of dweight, [K] if PER_HEAD, else [H K], with WEIGHT_GRAD; then of dx, [H K], with
    BIAS_GRAD: the gradient of a bias that x holds.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if PAIR:
        second = program >= programs0
        dout_ptr, x_ptr = tl.where(second, dout1_ptr, dout_ptr), tl.where(second, x1_ptr, x_ptr)
        weight_ptr, rstd_ptr = tl.where(second, weight1_ptr, weight_ptr), tl.where(second, rstd1_ptr, rstd_ptr)
        dx_ptr, dx_stride = tl.where(second, dx1_ptr, dx_ptr), tl.where(second, dx1_stride, dx_stride)
        N = tl.where(second, N1, N)
        program, programs = (
            tl.where(second, program - programs0, program),
            tl.where(second, programs - programs0, programs0),
        )
    first, end = _share(N, program, programs)
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    offsets, inside = heads * K + cols, (heads < H) & (cols < K)
    row = heads if PER_HEAD else tl.zeros([1, 1], tl.int32)
    num_rows: tl.constexpr = H if PER_HEAD else 1
    start = tl.zeros([], tl.int64)  # makes offsets 64-bit
    weight = _weight(weight_ptr, heads, cols, inside, K, PER_HEAD)
    dweight = tl.zeros([HEADS, WIDTH], tl.float32)
    dbias = dweight
    for token in tl.range(first, end, num_stages=STAGES):
        n = start + token
        row_start = n * (H * K)
        x = _load(x_ptr + row_start, offsets, inside)
        dout = _load(dout_ptr + row_start, offsets, inside)
        rstd = _load(rstd_ptr, n * num_rows + row, row < num_rows)
        if ROPE:  # the inverse rotation
            cos, sin = _load_cos_sin(cos_sin_ptr + (n // L) * cos_sin_b + (n % L) * K, pairs, K)
            dout = _rotate(dout, cos, -sin, HEADS, WIDTH)
        dout *= rstd
        dx = dout * weight
        projection = _mean(dx * x, H, K, PER_HEAD)
        if HAS_MEAN_SQUARE:
            count: tl.constexpr = K if PER_HEAD else H * K
            tl.store(
                dmean_square_ptr + n * num_rows + row, -0.5 * count * rstd * rstd * projection, mask=row < num_rows
            )
        else:
            dx -= x * (projection * rstd * rstd)
        tl.store(dx_ptr + n * dx_stride + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if BIAS_GRAD:
            dbias += dx
        if WEIGHT_GRAD:
            dweight += dout * x
    weight_cols: tl.constexpr = (K if PER_HEAD else H * K) if WEIGHT_GRAD else 0
    sums_ptr += tl.program_id(0).to(tl.int64) * (weight_cols + (H * K if BIAS_GRAD else 0))
    if WEIGHT_GRAD:
        if PER_HEAD:
            tl.store(sums_ptr + cols, tl.sum(dweight, 0, keep_dims=True), mask=cols < K)
        else:
            tl.store(sums_ptr + offsets, dweight, mask=inside)
    if BIAS_GRAD:
        tl.store(sums_ptr + weight_cols + offsets, dbias, mask=inside)
