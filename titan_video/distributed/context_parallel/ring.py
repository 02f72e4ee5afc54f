"""Ring attention (Liu et al. 2023): chunks of keys and values pass every rank, and partial results are merged.

    step 0: own chunk     step 1: chunk of the previous rank     ...     step n-1: chunk of the next rank
    the next chunk is sent while this one is computed

One `torch.library` op, forward and backward: checkpointing and compile see a single attention, whose output and lse can
be saved. In backward the gradient of a chunk's keys and values is summed in float32 (float64 for float64).
Letters as in models/layers.py; n ranks.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.flop_counter import register_flop_formula

from titan_video.kernels import upcast
from titan_video.kernels.attention import attend, attend_backward, merge
from titan_video.models.spec import RankGroup, StepLayout

# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RingAttention(nn.Module):
    """Attention over this rank's chunk of the tokens; rank i of the ring holds chunk i.

    group: used where a micro-batch's layout has none. rotate: "alltoall" passes each chunk from neighbour to neighbour;
    two are held at any time; "allgather" fetches all at once: one collective instead of n - 1, memory for n
    chunks.
    """

    def __init__(self, group: RankGroup, rotate: str):
        super().__init__()
        if rotate not in ("alltoall", "allgather"):
            raise ValueError(
                f'parallelism.context_parallel_rotate_method: given {rotate!r}; legal: "alltoall", "allgather"'
            )
        self.group, self.rotate = group, rotate

    def forward(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, layout: StepLayout | None = None) -> Tensor:
        return self.attend(q_BLHK, k_BSHK, v_BSHK, layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: StepLayout | None, **local: Tensor | None) -> Tensor:
        """local: keys and values that only this rank's queries attend to; see `ring_attention`."""
        group = self.group if layout is None or layout.ring is None else layout.ring
        seq_len = group.size * k.shape[1] if layout is None else layout.seq_len
        return ring_attention(q, k, v, seq_len, group.name, self.rotate, **local)[0]


@torch.library.custom_op("titan_video::ring_attention", mutates_args=())
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_len: int,
    group: str,
    rotate: str,
    local_k: Tensor | None = None,
    local_v: Tensor | None = None,
    local_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, L, H, K] to the first seq_len keys of all ranks and to keys of this rank alone.

    k, v: this rank's chunk [B, S, H, K]; all ranks' are equally long. local_k, local_v: [B, T, H, K], keys that only
    this rank's queries attend to; local_mask [B, T] says which of them count (None: all). group: name of the process
    group. Returns the output [B, L, H, K] and its lse [B, H, L].
    """
    out = lse = None
    process_group = _resolve_process_group(group)
    for owner, (k_chunk, v_chunk) in _chunks(torch.stack([k, v]), process_group, rotate):
        parts = []
        if valid := _num_valid(owner, k.shape[1], seq_len):
            parts.append(attend(q, k_chunk[:, :valid], v_chunk[:, :valid]))
        if owner == process_group.rank() and local_k is not None:
            parts.append(attend(q, local_k, local_v, local_mask))
        for part_out, part_lse in parts:
            out, lse = (upcast(part_out), part_lse) if out is None else merge(out, lse, part_out, part_lse)
    return out.to(q.dtype).contiguous(), lse.contiguous()


@ring_attention.register_fake
def _(q, k, v, seq_len, group, rotate, local_k=None, local_v=None, local_mask=None):
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_type)


@torch.library.custom_op("titan_video::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_len: int,
    group: str,
    rotate: str,
    local_k: Tensor | None = None,
    local_v: Tensor | None = None,
    local_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v stacked, and of local_k and local_v stacked (empty without these)."""
    process_group = _resolve_process_group(group)
    kv, grad_out = torch.stack([k, v]), grad_out.contiguous()
    grad_q = torch.zeros_like(upcast(q), memory_format=torch.contiguous_format)
    grad_local = q.new_empty(0)
    sums = (_GatheredSums if rotate == "allgather" else _PassedSums)(kv, process_group)
    for owner, (k_chunk, v_chunk) in _chunks(kv, process_group, rotate):
        parts = ()
        if valid := _num_valid(owner, k.shape[1], seq_len):
            part_q, *parts = attend_backward(grad_out, q, k_chunk[:, :valid], v_chunk[:, :valid], out, lse)
            grad_q += part_q
        if owner == process_group.rank() and local_k is not None:
            part_q, *local = attend_backward(grad_out, q, local_k, local_v, out, lse, local_mask)
            grad_q += part_q
            grad_local = torch.stack(local)
        for total, part in zip(sums.sum_for(owner), parts, strict=False):
            total[:, :valid] += part
        sums.sent(owner)
    return grad_q.to(q.dtype), sums.local_sum().to(k.dtype), grad_local


@ring_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, seq_len, group, rotate, local_k=None, local_v=None, local_mask=None):
    return (
        q.new_empty(q.shape),
        k.new_empty(2, *k.shape),
        q.new_empty(0) if local_k is None else local_k.new_empty(2, *local_k.shape),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.seq_len, ctx.group, ctx.rotate, *local = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *local)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *local = ctx.saved_tensors
    grads = ring_attention_backward(grad_out, q, k, v, out, lse, ctx.seq_len, ctx.group, ctx.rotate, *local)
    grad_local = (None, None) if local[0] is None else grads[2].unbind(0)
    return grads[0], *grads[1].unbind(0), None, None, None, *grad_local, None


ring_attention.register_autograd(_backward, setup_context=_setup_context)


# FLOPs on this rank, 2 per multiply-add: the memory-budget mode of activation checkpointing weighs the op by them.


@register_flop_formula(torch.ops.titan_video.ring_attention)
def _flops(q, k, v, seq_len, group, rotate, local_k=None, *args, **kwargs) -> int:
    return 2 * _matmul_flops(q, seq_len, local_k)


@register_flop_formula(torch.ops.titan_video.ring_attention_backward)
def _backward_flops(grad_out, q, k, v, out, lse, seq_len, group, rotate, local_k=None, *args, **kwargs) -> int:
    """Five matmuls: the scores again, and the gradients of probabilities, q, k and v."""
    return 5 * _matmul_flops(q, seq_len, local_k)


def _matmul_flops(q_shape: tuple[int, ...], seq_len: int, local_k_shape: tuple[int, ...] | None) -> int:
    """Of one matmul of queries x keys x head width."""
    return 2 * math.prod(q_shape) * (seq_len + (local_k_shape[1] if local_k_shape else 0))


def _num_valid(owner: int, chunk: int, seq_len: int) -> int:
    """Keys of rank `owner`'s chunk that are tokens; padding is at the end of the clip."""
    return min(max(seq_len - owner * chunk, 0), chunk)


def _chunks(kv: Tensor, group: dist.ProcessGroup, rotate: str) -> Iterator[tuple[int, Tensor]]:
    """(owner, its keys and values) for every rank of the ring: this one, the one before, ...

    The next transfer runs while a chunk is used.
    """
    rank, size = group.rank(), group.size()
    if rotate == "allgather":
        gathered = kv.new_empty(size, *kv.shape)
        work = _all_gather(gathered.flatten(0, 1), kv, group=group, async_op=True)
        yield rank, kv
        work.wait()
        for i in range(1, size):
            yield (rank - i) % size, gathered[(rank - i) % size]
    else:
        for i in range(size):
            receive = _pass_on(kv, group) if i < size - 1 else None
            yield (rank - i) % size, kv
            if receive:
                kv = receive()


def _pass_on(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start sending x to the next rank of the ring; return a function that waits for what the previous rank sent."""
    rank, size = group.rank(), group.size()
    received, flat = torch.empty_like(x), x.view(-1)
    # An all-to-all of one chunk to one rank: gloo and NCCL order it with the other collectives of the group.
    send_splits, receive_splits = (
        [flat.numel() * (i == peer % size) for i in range(size)] for peer in (rank + 1, rank - 1)
    )
    work = dist.all_to_all_single(received.view(-1), flat, receive_splits, send_splits, group=group, async_op=True)

    def receive() -> Tensor:
        work.wait()
        return received

    return receive


class _PassedSums:
    """Gradient sums that follow their chunk around the ring; each rank adds its part, and the owner gets the total.

    What a rank adds for its own chunk is never sent.
    """

    def __init__(self, kv: Tensor, group: dist.ProcessGroup):
        self.group, self.local, self.receive = group, torch.zeros_like(upcast(kv)), None

    def sum_for(self, owner: int) -> Tensor:
        if owner == self.group.rank():
            return self.local
        self.sum = self.receive() if self.receive else torch.zeros_like(self.local)
        return self.sum

    def sent(self, owner: int) -> None:
        if owner != self.group.rank():
            self.receive = _pass_on(self.sum, self.group)

    def local_sum(self) -> Tensor:
        return self.local.add_(self.receive()) if self.receive else self.local


class _GatheredSums:
    """Gradient sums of all chunks, held until all are complete and then reduce-scattered."""

    def __init__(self, kv: Tensor, group: dist.ProcessGroup):
        self.group, self.sums = group, upcast(kv).new_zeros(group.size(), *kv.shape)

    def sum_for(self, owner: int) -> Tensor:
        return self.sums[owner]

    def sent(self, owner: int) -> None:
        pass

    def local_sum(self) -> Tensor:
        total = torch.empty_like(self.sums[0])
        _reduce_scatter(total, self.sums.flatten(0, 1), group=self.group)
        return total
