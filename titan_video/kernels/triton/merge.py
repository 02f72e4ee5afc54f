"""The merge of the attentions to two sets of keys (kernels/attention.py) in one pass over their outputs.

Plain operators keep the output in float32 between them and move about 30 bytes an element of a bfloat16 output. This
moves 6, and 12 more for each head of a token.
"""

import torch
from torch import Tensor

from titan_video.kernels import attention
from titan_video.kernels.reference import upcast
from titan_video.kernels.triton import launch

ROWS, WARPS = 16, 4  # with heads of 128 channels, 16 elements a thread: bfloat16's widest load, twice


def merge_attention(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, K], in the type of `out` and contiguous, and lse [B, H, L] of the attention to both sets.

    out, part [B, L, H, K], any strides; lse, part_lse [B, H, L], float32: of each set. `out` may be
    overwritten.
    """
    if not (out.is_cuda or launch.interpreted()):
        merged, merged_lse = attention.merge(upcast(out), lse, part, part_lse)
        return merged.to(out.dtype).contiguous(), merged_lse.contiguous()
    from titan_video.kernels.triton import merge_kernels

    B, L, H, K = out.shape
    out, part = (x if x.stride(-1) == 1 else x.contiguous() for x in (out, part))
    lse, part_lse = lse.contiguous(), part_lse.contiguous()
    merged, merged_lse = out.new_empty(out.shape), torch.empty_like(lse)
    grid = (-(-B * L * H // ROWS),)
    strides = {
        f"{name}_stride_{dim}": size
        for name, x in (("out", out), ("part", part))
        for dim, size in zip("blh", x.stride(), strict=False)
    }
    merge_kernels.merge_attention[grid](
        out,
        part,
        lse,
        part_lse,
        merged,
        merged_lse,
        L,
        H,
        B * H * L,
        **strides,
        K=K,
        WIDTH=launch.power_of_2(K),
        ROWS=ROWS,
        num_warps=WARPS,
    )
    return merged, merged_lse
