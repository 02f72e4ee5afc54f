"""Ulysses (Jacobs et al. 2023): ranks exchange tokens for heads before attention, and heads for tokens after it.

    q, k, v [B, L, H, K] --all-to-all--> [B, uL, H/u, K] -- attention -- [B, uL, H/u, K] --all-to-all--> [B, L, H, K]

u is the group's size, which divides H. Backward is two all-to-alls again. Letters as in models/layers.py.
"""

from einops import rearrange
from torch import Tensor, nn, stack
from torch.distributed._functional_collectives import all_to_all_single_autograd

from titan_video.distributed.collectives import ready
from titan_video.models.spec import RankGroup, StepLayout


def all_to_all(x: Tensor, group: RankGroup) -> Tensor:
    """Chunk i of dim 0 goes to rank i; the result holds the received chunks, in rank order. Backward is the same."""
    return ready(all_to_all_single_autograd(x.contiguous(), None, None, group.name))


class UlyssesAttention(nn.Module):
    """Attention over this rank's slice of the tokens.

    inner: the attention over the group's tokens and this rank's heads. group: used if the layout has none.
    """

    def __init__(self, group: RankGroup, inner: nn.Module):
        super().__init__()
        self.group, self.inner = group, inner

    def select_group(self, layout: StepLayout | None) -> RankGroup:
        return self.group if layout is None or layout.ulysses is None else layout.ulysses

    def forward(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, layout: StepLayout | None = None) -> Tensor:
        group = self.select_group(layout)
        q, k, v = tokens_for_heads(q_BLHK, k_BLHK, v_BLHK, group)
        return heads_for_tokens(self.inner(q, k, v, layout), group)


def tokens_for_heads(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, group: RankGroup) -> tuple[Tensor, ...]:
    """All tokens of the group, in order, with this rank's heads: [B, uL, H/u, K] each. One all-to-all for the three."""
    if group.size == 1:
        return q_BLHK, k_BLHK, v_BLHK
    # The destination rank comes first, so that what each rank receives is one contiguous piece.
    heads_first = [rearrange(x, "B L (u h) K -> u B L h K", u=group.size) for x in (q_BLHK, k_BLHK, v_BLHK)]
    received = all_to_all(stack(heads_first, dim=1), group)
    return rearrange(received, "source qkv B L h K -> qkv B (source L) h K").unbind(0)


def heads_for_tokens(x_BLHK: Tensor, group: RankGroup) -> Tensor:
    """The inverse, for one tensor."""
    if group.size == 1:
        return x_BLHK
    received = all_to_all(rearrange(x_BLHK, "B (u L) h K -> u B L h K", u=group.size), group)
    return rearrange(received, "source B L h K -> B L (source h) K")
