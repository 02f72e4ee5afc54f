"""RMSNorm, with or without RoPE after it, in Triton: one kernel forward and one backward.

A token is a tile of heads x head width, for one norm over all heads as for one norm per head, so that a token's cos and
sin are read once for all heads. Without RoPE, a norm over the full width has one head of that width. A program computes
several consecutive tokens, one after the other, and sums the weight's gradient over them; the caller adds the sums of
all programs. Statistics are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


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
def rms_norm_forward(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    mean_square_ptr,
    out_ptr,
    rstd_ptr,
    N,
    L,
    tokens_per_program,
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
):
    """Program p computes tokens [p tokens_per_program, (p + 1) tokens_per_program) of N, in samples of L.

    x, out: [N, H, K], contiguous. weight: [K] if PER_HEAD, else [H K]. cos_sin: pairs (cos, sin), [samples, L, K];
    cos_sin_b: its stride over samples, 0 where all samples have the same. rstd, and mean_square if HAS_MEAN_SQUARE:
    [N, H] if PER_HEAD, else [N]. HEADS, WIDTH: H and K rounded up to powers of 2.
    """
    first = tl.program_id(0) * tokens_per_program
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    inside = (heads < H) & (cols < K)
    row = heads if PER_HEAD else tl.zeros([1, 1], tl.int32)
    num_rows: tl.constexpr = H if PER_HEAD else 1
    start = tl.zeros([], tl.int64)  # makes offsets 64-bit
    weight = _weight(weight_ptr, heads, cols, inside, K, PER_HEAD)
    for token in tl.range(first, tl.minimum(first + tokens_per_program, N), num_stages=STAGES):
        n = start + token
        offsets = n * (H * K) + heads * K + cols
        x = _load(x_ptr, offsets, inside)
        if HAS_MEAN_SQUARE:
            square = _load(mean_square_ptr, n * num_rows + row, row < num_rows)
        else:
            square = _mean(x * x, H, K, PER_HEAD)
        rstd = tl.rsqrt(square + eps)
        tl.store(rstd_ptr + n * num_rows + row, rstd, mask=row < num_rows)
        out = x * rstd * weight
        if ROPE:
            pair_ptrs = cos_sin_ptr + (n // L) * cos_sin_b + (n % L) * K + 2 * pairs
            cos, sin = (
                tl.load(pair_ptrs, mask=2 * pairs < K, other=0.0),
                tl.load(pair_ptrs + 1, mask=2 * pairs < K, other=0.0),
            )
            out = _rotate(out, cos, sin, HEADS, WIDTH)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    dout_ptr,
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dmean_square_ptr,
    N,
    L,
    tokens_per_program,
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
):
    """Shapes as in forward. dmean_square: as mean_square.

    dweight: float32 sums of each program, [programs, K] if PER_HEAD, else [programs, H K].
    """
    first = tl.program_id(0) * tokens_per_program
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    inside = (heads < H) & (cols < K)
    row = heads if PER_HEAD else tl.zeros([1, 1], tl.int32)
    num_rows: tl.constexpr = H if PER_HEAD else 1
    start = tl.zeros([], tl.int64)  # makes offsets 64-bit
    weight = _weight(weight_ptr, heads, cols, inside, K, PER_HEAD)
    dweight = tl.zeros([HEADS, WIDTH], tl.float32)
    for token in tl.range(first, tl.minimum(first + tokens_per_program, N), num_stages=STAGES):
        n = start + token
        offsets = n * (H * K) + heads * K + cols
        x = _load(x_ptr, offsets, inside)
        dout = _load(dout_ptr, offsets, inside)
        rstd = _load(rstd_ptr, n * num_rows + row, row < num_rows)
        if ROPE:  # the inverse rotation
            pair_ptrs = cos_sin_ptr + (n // L) * cos_sin_b + (n % L) * K + 2 * pairs
            cos, sin = (
                tl.load(pair_ptrs, mask=2 * pairs < K, other=0.0),
                tl.load(pair_ptrs + 1, mask=2 * pairs < K, other=0.0),
            )
            dout = _rotate(dout, cos, -sin, HEADS, WIDTH)
        normed = x * rstd
        dnormed = dout * weight
        projection = _mean(dnormed * normed, H, K, PER_HEAD)
        if HAS_MEAN_SQUARE:
            dx = dnormed * rstd
            count: tl.constexpr = K if PER_HEAD else H * K
            tl.store(
                dmean_square_ptr + n * num_rows + row, -0.5 * count * rstd * rstd * projection, mask=row < num_rows
            )
        else:
            dx = (dnormed - normed * projection) * rstd
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT_GRAD:
            dweight += dout * normed
    if WEIGHT_GRAD:
        slot = tl.program_id(0).to(tl.int64)
        if PER_HEAD:
            sums = tl.sum(dweight, 0, keep_dims=True)
            tl.store(dweight_ptr + slot * K + cols, sums, mask=cols < K)
        else:
            tl.store(dweight_ptr + slot * (H * K) + heads * K + cols, dweight, mask=inside)
