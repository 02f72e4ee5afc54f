"""The kernel of merge.py, in Triton."""

import triton
import triton.language as tl


@triton.jit
def merge_attention(
    out_ptr,
    part_ptr,
    lse_ptr,
    part_lse_ptr,
    merged_ptr,
    merged_lse_ptr,
    L,
    H,
    N,
    out_stride_b,
    out_stride_l,
    out_stride_h,
    part_stride_b,
    part_stride_l,
    part_stride_h,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program p merges rows [p ROWS, (p + 1) ROWS) of the N = B H L queries of all heads, in the order of lse.

    out, part: [B, L, H, K] of these strides. lse, part_lse, merged_lse: [B, H, L]. merged: [B, L, H, K], contiguous.
    WIDTH: K, rounded up to a power of 2.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    token, head, sample = (row % L).to(tl.int64), (row // L) % H, row // (L * H)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    part_lse = tl.load(part_lse_ptr + row, mask=exists, other=0.0)
    weight = tl.sigmoid(part_lse - lse)
    # log(exp(a) + exp(b)) = max + log(1 + exp(-|a - b|))
    total = tl.maximum(lse, part_lse) + tl.log(1 + tl.exp(-tl.abs(lse - part_lse)))
    tl.store(merged_lse_ptr + row, total, mask=exists)
    column = tl.arange(0, WIDTH)[None, :]
    inside = exists[:, None] & (column < K)
    out_row = sample * out_stride_b + token * out_stride_l + head * out_stride_h
    part_row = sample * part_stride_b + token * part_stride_l + head * part_stride_h
    out = tl.load(out_ptr + out_row[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.load(part_ptr + part_row[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    merged = out + weight[:, None] * (part - out)
    merged_row = ((sample * L + token) * H + head) * K
    tl.store(merged_ptr + merged_row[:, None] + column, merged.to(merged_ptr.dtype.element_ty), mask=inside)
