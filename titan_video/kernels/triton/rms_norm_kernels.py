"""RMSNorm, with or without rotation after it (RoPE), in Triton: one kernel forward, one backward.

A token is a tile of heads x head width, whether one norm runs over all heads or one over each: then a rotation is read
once for all heads. Without rotation a norm over the whole width has one head of that width. A program takes a run of
tokens, one after the other, and adds up other, and adds up the weight's gradient over them; the caller adds up these
sums. Statistics are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(x, cos, sin, HEADS: tl.constexpr, WIDTH: tl.constexpr):
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
def rms_norm_forward(
    x_ptr,
    weight_ptr,
    rotations_ptr,
    mean_square_ptr,
    out_ptr,
    rstd_ptr,
    N,
    L,
    run,
    rotations_b,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROPE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Program p: tokens p run to (p + 1) run of N, in samples of L.

    x, out: [N, H, K], contiguous; weight: [K] if PER_HEAD, else [H K]; rotations: (cos, sin) pairs, [samples, L, K],
    with their stride of a sample, which is 0 where all have the same. mean_square, which counts if GIVEN, and rstd: [N,
    H] if PER_HEAD, else [N].
    HEADS, WIDTH: H and K rounded up to powers of 2.
    """
    first = tl.program_id(0) * run
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    inside = (heads < H) & (cols < K)
    row = heads if PER_HEAD else tl.zeros([1, 1], tl.int32)
    num_rows: tl.constexpr = H if PER_HEAD else 1
    start = tl.zeros([], tl.int64)
    weight = _weight(weight_ptr, heads, cols, inside, K, PER_HEAD)
    for token in tl.range(first, tl.minimum(first + run, N), num_stages=STAGES):
        n = start + token
        at = n * (H * K) + heads * K + cols
        x = _load(x_ptr, at, inside)
        if GIVEN:
            square = _load(mean_square_ptr, n * num_rows + row, row < num_rows)
        else:
            square = _mean(x * x, H, K, PER_HEAD)
        rstd = tl.rsqrt(square + eps)
        tl.store(rstd_ptr + n * num_rows + row, rstd, mask=row < num_rows)
        out = x * rstd * weight
        if ROPE:
            turns = rotations_ptr + (n // L) * rotations_b + (n % L) * K + 2 * pairs
            cos, sin = tl.load(turns, mask=2 * pairs < K, other=0.0), tl.load(turns + 1, mask=2 * pairs < K, other=0.0)
            out = _turn(out, cos, sin, HEADS, WIDTH)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    dout_ptr,
    x_ptr,
    weight_ptr,
    rotations_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dmean_square_ptr,
    N,
    L,
    run,
    rotations_b,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROPE: tl.constexpr,
    GIVEN: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    """As forward. dweight:

    float32 sums of each program, [programs, K] if PER_HEAD, else [programs, H K]; dmean_square: as mean_square.
    """
    first = tl.program_id(0) * run
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    inside = (heads < H) & (cols < K)
    row = heads if PER_HEAD else tl.zeros([1, 1], tl.int32)
    num_rows: tl.constexpr = H if PER_HEAD else 1
    start = tl.zeros([], tl.int64)
    weight = _weight(weight_ptr, heads, cols, inside, K, PER_HEAD)
    dweight = tl.zeros([HEADS, WIDTH], tl.float32)
    for token in tl.range(first, tl.minimum(first + run, N), num_stages=STAGES):
        n = start + token
        at = n * (H * K) + heads * K + cols
        x = _load(x_ptr, at, inside)
        dout = _load(dout_ptr, at, inside)
        rstd = _load(rstd_ptr, n * num_rows + row, row < num_rows)
        if ROPE:  # back: the same angles, the other way
            turns = rotations_ptr + (n // L) * rotations_b + (n % L) * K + 2 * pairs
            cos, sin = tl.load(turns, mask=2 * pairs < K, other=0.0), tl.load(turns + 1, mask=2 * pairs < K, other=0.0)
            dout = _turn(dout, cos, -sin, HEADS, WIDTH)
        normed = x * rstd
        dnormed = dout * weight
        along = _mean(dnormed * normed, H, K, PER_HEAD)
        if GIVEN:
            dx = dnormed * rstd
            count: tl.constexpr = K if PER_HEAD else H * K
            tl.store(dmean_square_ptr + n * num_rows + row, -0.5 * count * rstd * rstd * along, mask=row < num_rows)
        else:
            dx = (dnormed - normed * along) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT_GRAD:
            dweight += dout * normed
    if WEIGHT_GRAD:
        slot = tl.program_id(0).to(tl.int64)
        if PER_HEAD:
            sums = tl.sum(dweight, 0, keep_dims=True)
            tl.store(dweight_ptr + slot * K + cols, sums, mask=cols < K)
        else:
            tl.store(dweight_ptr + slot * (H * K) + heads * K + cols, dweight, mask=inside)
