"""Kernels without reductions over a row, in Triton: backward of GELU, and a copy, each with the sums of its columns.

A program computes a block of columns of several rows, ROWS at a time, and sums over them what it writes; the caller
adds the sums of all programs.
"""

import triton
import triton.language as tl


@triton.jit
def column_backward(
    dout_ptr,
    u_ptr,
    du_ptr,
    hidden_ptr,
    sums_ptr,
    N,
    du_stride,
    sums_stride,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    HIDDEN: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    PART: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (c, p) computes columns [c BLOCK, (c + 1) BLOCK) of its share of the N rows.

    dout, u, hidden: [N, WIDTH]. du: the same with a stride of du_stride over rows. GELU: du = dout gelu'(u), in the
    tanh form; otherwise du = dout. HIDDEN: hidden = gelu(u). BIAS_GRAD: sums, [programs p, WIDTH], with a stride of
    sums_stride over programs, float32: the sums of du. PART: in rows of dout and hidden, SKIP other columns
    precede each PART of these; 0: none do.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    program, programs = tl.program_id(1), tl.num_programs(1)
    groups = (N + ROWS - 1) // ROWS
    joined, joined_width = cols, WIDTH
    if PART:
        joined, joined_width = cols + (cols // PART + 1) * SKIP, WIDTH + WIDTH // PART * SKIP
    each, rest = groups // programs, groups % programs
    first = program * each + tl.minimum(program, rest)
    end = first + each + (program < rest).to(tl.int32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    start = tl.zeros([], tl.int64)  # makes offsets 64-bit
    for group in tl.range(first, end, num_stages=STAGES):
        rows = (start + group) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (rows < N) & (cols < WIDTH)
        offsets, joined_offsets = rows * WIDTH + cols, rows * joined_width + joined
        du = tl.load(dout_ptr + joined_offsets, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            # gelu(u) = u s(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3), as tanh(z) = 2 s(2 z) - 1
            square = u * u
            s = tl.sigmoid(1.5957691216057308 * u * (1 + 0.044715 * square))
            if HIDDEN:
                tl.store(hidden_ptr + joined_offsets, (u * s).to(hidden_ptr.dtype.element_ty), mask=inside)
            du *= s + u * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * square)
        tl.store(du_ptr + rows * du_stride + cols, du.to(du_ptr.dtype.element_ty), mask=inside)
        if BIAS_GRAD:
            total += du
    if BIAS_GRAD:
        sums = sums_ptr + program.to(tl.int64) * sums_stride + cols
        tl.store(sums, tl.sum(total, 0, keep_dims=True), mask=cols < WIDTH)
