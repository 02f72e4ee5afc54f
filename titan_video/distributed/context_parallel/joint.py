"""Context parallel of one attention over video and text tokens (HunyuanVideo). Text is replicated on every rank."""

import torch
from torch import Tensor

from titan_video.distributed.collectives import all_gather
from titan_video.distributed.context_parallel.ring import RingAttention
from titan_video.distributed.context_parallel.ulysses import UlyssesAttention, heads_for_tokens, tokens_for_heads
from titan_video.models.spec import StepLayout


class JointRingAttention(RingAttention):
    """The same for video and text. Text is replicated: its queries join this rank's, its keys are a chunk that stays.

    Each rank has the text's full output and partial gradients, whose sum over the ranks is the gradient.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_q: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        text_mask: Tensor | None = None,
        layout: StepLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        queries = torch.cat([q, text_q], dim=1)
        out = self.attend(queries, k, v, layout, local_k=text_k, local_v=text_v, local_mask=text_mask)
        return out[:, : q.shape[1]], out[:, q.shape[1] :]


class JointUlyssesAttention(UlyssesAttention):
    """The same for video and text. Text is replicated: each rank takes its heads of it, and the output's are gathered.

    A rank has partial gradients of the text's q, k and v; their sum over the ranks is the gradient.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_q: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        text_mask: Tensor | None = None,
        layout: StepLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        group = self.select_group(layout)
        q, k, v = tokens_for_heads(q, k, v, group)
        text_q, text_k, text_v = (x.chunk(group.size, dim=2)[group.rank] for x in (text_q, text_k, text_v))
        out, text_out = self.inner(q, k, v, text_q, text_k, text_v, text_mask, layout)
        # Backward is a reduce-scatter: the ranks' partial gradients are summed where these heads were computed.
        text_out = text_out if group.size == 1 else all_gather(text_out, 2, group)
        return heads_for_tokens(out, group), text_out
