"""Ulysses (Jacobs et al. 2023): before attention the ranks of a group exchange tokens for heads, after it heads for
tokens.

    q, k, v [B, L, H, K]  --one all-to-all-->  [B, uL, H/u, K]  -- inner core --  [B, uL, H/u, K]  --one all-to-all-->
    [B, L, H, K]

u is the group's size, which divides H. Backward is two all-to-alls again. Letters as in models/layers.py.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.distributed.collectives import all_gather, all_to_all


class UlyssesAttention(nn.Module):
    """An attention core over this rank's slice of the tokens. inner:

    the core that then sees the group's tokens and this rank's heads.
    """

    def __init__(self, mesh: DeviceMesh, inner: nn.Module):
        super().__init__()
        self.mesh, self.inner = mesh, inner

    def forward(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, seq_len: int | None = None) -> Tensor:
        q, k, v = tokens_for_heads(q_BLHK, k_BLHK, v_BLHK, self.mesh)
        return heads_for_tokens(self.inner(q, k, v, seq_len), self.mesh)


class JointUlyssesAttention(nn.Module):
    """The same for video and text. The text is whole on every rank: each takes its heads of it, and the output's are
    gathered.

    A rank has a part of the gradients of the text's q, k and v, of which the sum over the ranks is the gradient.
    """

    def __init__(self, mesh: DeviceMesh, inner: nn.Module):
        super().__init__()
        self.mesh, self.inner, self.size, self.rank = mesh, inner, mesh.size(), mesh.get_local_rank()

    def forward(
        self,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        text_q_BSHK: Tensor,
        text_k_BSHK: Tensor,
        text_v_BSHK: Tensor,
        text_mask_BS: Tensor | None = None,
        seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        video = tokens_for_heads(q_BLHK, k_BLHK, v_BLHK, self.mesh)
        text = (x.chunk(self.size, dim=2)[self.rank] for x in (text_q_BSHK, text_k_BSHK, text_v_BSHK))
        out, text_out = self.inner(*video, *text, text_mask_BS, seq_len)
        # Backward is a reduce-scatter: the ranks' parts of the gradient meet in the rank that computed these heads.
        return heads_for_tokens(out, self.mesh), all_gather(text_out, 2, self.mesh)


def tokens_for_heads(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """All tokens of the group, in order, with this rank's part of the heads: [B, uL, H/u, K] each.

    One all-to-all for the three.
    """
    size = mesh.size()
    # The destination comes first, so that each rank's part is one contiguous piece.
    packed = torch.stack([x.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4) for x in (q_BLHK, k_BLHK, v_BLHK)], dim=1)
    received = all_to_all(packed, mesh)  # [source, 3, B, L, H/u, K]
    return received.permute(1, 2, 0, 3, 4, 5).flatten(2, 3).unbind(0)


def heads_for_tokens(x_BLHK: Tensor, mesh: DeviceMesh) -> Tensor:
    """The inverse, for one tensor."""
    packed = x_BLHK.unflatten(1, (mesh.size(), -1)).transpose(0, 1).contiguous()
    received = all_to_all(packed, mesh)  # [source, B, L, H/u, K]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)
