"""A mixture of experts in place of a block's feed-forward.

    residual -- norm -- router -- scores -- choose --+-- rows by expert -- dispatch -- weighted sum --+-- out
                                                     |                        |                       |
    modulated tokens --+-----------------------------+                     experts                    |
                       +-- shared expert -------------------------------------------------------------+

The router reads the normalised token before modulation, in float32. A score is a sigmoid; a token's experts are
weighted by their scores, divided by the sum of the chosen ones (DeepSeek-AI 2024, "DeepSeek-V3", eq. 12-15).

    token choice    each token takes the `top_k` experts of highest score + bias. The bias chooses and does not weigh:
                    it balances the load (Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for
                    mixture-of-experts"), see training/expert_balance.py. No token is dropped, so what becomes of a
                    token does not depend on the layout.
    expert choice   each expert takes its best tokens of the whole clip (Zhou et al. 2022, "Mixture-of-experts with
                    expert choice routing"). Scores are gathered from all ranks that share the clip.

Which rows go to which expert comes from one operator, `titan_video::choose_experts` or `titan_video::choose_tokens`,
whose result every mode of checkpointing saves: recomputed, one ulp of difference could route a token elsewhere. It also
counts the load, so a recomputed block is counted once.

Expert parallel replaces `MoE.dispatch`, as context parallel replaces `inner_attention`.

Letters: B batch, L tokens of this rank, D width, E experts, F expert width, K experts of a token, N rows: (token,
expert) pairs sorted by expert, S buckets of noise level.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_video.kernels.grouped import grouped_linear
from titan_video.kernels.reference import upcast
from titan_video.models.layers import FeedForward, local_shard
from titan_video.models.spec import ExpertArgs, StepLayout

NUM_LEVELS = 4  # buckets of noise level, of equal width in sigma, by which the load is counted


class Routing(NamedTuple):
    """What a block needs of its router: plain tensors, as the router belongs to the root.

    weight, bias: of the router. level: bucket of each clip's noise level. load: tokens of each expert so far, which
    the block adds to.
    """

    weight_ED: Tensor
    bias_E: Tensor
    level_B: Tensor
    load_SE: Tensor


class Router(nn.Module):
    """The router of one block.

    bias: set by balancing, not by gradients. load: (token, expert) pairs since it was last zeroed, on this rank.
    """

    def __init__(self, dim: int, args: ExpertArgs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(args.num_experts, dim))
        self.bias = nn.Parameter(torch.empty(args.num_experts), requires_grad=False)
        self.load_SE: Tensor | None = None

    def forward(self, t_B: Tensor) -> Routing:
        """What its block needs for clips at times t = 1000 sigma."""
        level_B = (t_B * (NUM_LEVELS / 1000)).long().clamp(0, NUM_LEVELS - 1)
        if self.load_SE is None:
            self.load_SE = torch.zeros(NUM_LEVELS, len(self.weight), dtype=torch.int64, device=t_B.device)
        return Routing(self.weight, self.bias, level_B, self.load_SE)

    def zero_load(self) -> None:
        if self.load_SE is not None:
            self.load_SE.zero_()


class Experts(nn.Module):
    """The routed experts: Linear, GELU (tanh form), Linear, each with weights of its own, stacked.

    A rank may hold some of the experts only: expert parallel shards dim 0 of each parameter.
    """

    def __init__(self, dim: int, args: ExpertArgs):
        super().__init__()
        E, width = args.num_experts, args.expert_dim
        self.up, self.up_bias = nn.Parameter(torch.empty(E, dim, width)), nn.Parameter(torch.empty(E, width))
        self.down, self.down_bias = nn.Parameter(torch.empty(E, width, dim)), nn.Parameter(torch.empty(E, dim))

    def forward(self, rows_ND: Tensor, counts_E: Tensor, num_rows: int | None = None) -> Tensor:
        """rows: sorted by this rank's experts. counts: rows of each, on the device. num_rows: their sum, which the host
        knows; None: all rows given. ValueError: there are more rows than that, or fewer.
        """
        num_rows = rows_ND.shape[0] if num_rows is None else num_rows
        up, up_bias = local_shard(self.up), local_shard(self.up_bias)
        down, down_bias = local_shard(self.down), local_shard(self.down_bias)
        hidden_NF = F.gelu(grouped_linear(rows_ND, up, up_bias, counts_E, num_rows), approximate="tanh")
        return grouped_linear(hidden_NF, down, down_bias, counts_E, num_rows)


class Dispatch(nn.Module):
    """Rows to the experts and back: here all experts are on this rank. Expert parallel replaces this module."""

    def forward(self, rows_ND: Tensor, counts_E: Tensor, experts: nn.Module) -> Tensor:
        """rows: sorted by expert; counts: of each of all experts, int64, on the device. Returns the experts' rows in
        the same order.
        """
        return experts(rows_ND, counts_E)


class MoE(nn.Module):
    """The experts of a block; see the top of the file. shared: an expert of all tokens, or None.

    routes: every mode of checkpointing saves the operators of `_DECISIONS` (distributed/activation_checkpoint.py).
    """

    routes = True

    def __init__(self, dim: int, args: ExpertArgs):
        super().__init__()
        self.args = args
        self.dispatch = Dispatch()
        self.experts = Experts(dim, args)
        self.shared = FeedForward(dim, args.shared_dim) if args.shared_dim else None

    def forward(
        self, y_BLD: Tensor, x_BLD: Tensor, routing: Routing, layout: StepLayout | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y: modulated tokens, for the experts. x: the residual, for the router. Returns as `linear_and_bias`."""
        normed_BLD = F.layer_norm(upcast(x_BLD), x_BLD.shape[-1:])
        scores_BLE = F.linear(normed_BLD, routing.weight_ED.to(normed_BLD.dtype)).sigmoid()
        route = self._expert_choice if self.args.expert_choice else self._token_choice
        routed_BLD = route(y_BLD, scores_BLE, routing, layout).to(y_BLD.dtype)
        if self.shared is None:
            return routed_BLD, None
        shared_BLD, bias = self.shared(y_BLD)
        return shared_BLD + routed_BLD, bias

    def _token_choice(self, y_BLD: Tensor, scores_BLE: Tensor, routing: Routing, layout: StepLayout | None) -> Tensor:
        B, L, K = *y_BLD.shape[:2], self.args.top_k
        biased_BLE = scores_BLE.detach() + routing.bias_E
        num_counted = num_tokens(layout, L) if torch.is_grad_enabled() else 0
        experts_BLK = choose_experts(biased_BLE, K, routing.level_B, num_counted, routing.load_SE)
        weights_BLK = self._weights(chosen := scores_BLE.gather(2, experts_BLK), chosen.sum(2, keepdim=True))
        experts_N = experts_BLK.flatten()
        order_N = experts_N.argsort(stable=True)
        inverse_N = order_N.argsort()
        counts_E = order_N.new_zeros(self.args.num_experts).scatter_add(0, experts_N, torch.ones_like(experts_N))
        rows_ND = Permute.apply(y_BLD.flatten(0, 1).repeat_interleave(K, dim=0), order_N, inverse_N)
        rows_ND = Permute.apply(self.dispatch(rows_ND, counts_E, self.experts), inverse_N, order_N)
        return (upcast(rows_ND).view(B, L, K, -1) * weights_BLK.unsqueeze(-1)).sum(2)

    def _expert_choice(self, y_BLD: Tensor, scores_BLE: Tensor, routing: Routing, layout: StepLayout | None) -> Tensor:
        group = layout.sequence if layout is not None else None
        seq_len = y_BLD.shape[1] if group is None else layout.seq_len
        per_expert = self.args.num_rows(seq_len) // self.args.num_experts
        name, size, rank = ("", 1, 0) if group is None else (group.name, group.size, group.rank)
        is_counted = torch.is_grad_enabled()
        tokens_N, counts_E = choose_tokens(
            scores_BLE.detach(), per_expert, seq_len, name, size, rank, routing.level_B, is_counted, routing.load_SE
        )
        y_TD, scores_TE = y_BLD.flatten(0, 1), scores_BLE.flatten(0, 1)
        experts = torch.arange(self.args.num_experts, device=counts_E.device)
        experts_N = experts.repeat_interleave(counts_E, output_size=tokens_N.shape[0])
        chosen_N = scores_TE[tokens_N, experts_N]
        sums_T = chosen_N.new_zeros(y_TD.shape[0]).index_add(0, tokens_N, chosen_N)
        rows_ND = upcast(self.dispatch(y_TD[tokens_N], counts_E, self.experts))
        rows_ND = rows_ND * self._weights(chosen_N, sums_T[tokens_N]).unsqueeze(1)
        return rows_ND.new_zeros(y_TD.shape).index_add(0, tokens_N, rows_ND).view(y_BLD.shape)

    def _weights(self, chosen: Tensor, sums: Tensor) -> Tensor:
        return chosen / (sums + 1e-20) * self.args.route_scale


def check(args: ExpertArgs, num_layers: int) -> None:
    """ValueError: no model of that many blocks can have these experts."""
    least = {"num_experts": 2, "top_k": 1, "expert_dim": 1, "shared_dim": 0, "first_dense": 0, "last_dense": 0}
    problems = [n for n, low in least.items() if type(getattr(args, n)) is not int or getattr(args, n) < low]
    problems += ["expert_choice"] * (type(args.expert_choice) is not bool)
    problems += ["route_scale"] * (type(args.route_scale) not in (int, float) or not 0 < args.route_scale < math.inf)
    if not problems and (args.top_k > args.num_experts or not args.blocks(num_layers)):
        problems = ["top_k"] if args.top_k > args.num_experts else ["first_dense", "last_dense"]
    if problems:
        raise ValueError(f"experts: {', '.join(problems)} cannot be, for {num_layers} blocks, in {args}")


class Permute(torch.autograd.Function):
    """x[order] for a permutation of the rows and its inverse: backward gathers too, where autograd would add."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND[order_N]

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grad_ND[inverse_N], None, None


def num_tokens(layout: StepLayout | None, length: int) -> int:
    """How many of this rank's rows are tokens; the rest, at the end, is padding."""
    if layout is None or layout.sequence is None:
        return length
    return min(max(layout.seq_len - layout.sequence.rank * length, 0), length)


@torch.library.custom_op("titan_video::choose_experts", mutates_args=("load_SE",))
def choose_experts(biased_BLE: Tensor, top_k: int, level_B: Tensor, num_counted: int, load_SE: Tensor) -> Tensor:
    """The experts of each token, [B, L, K]. The first `num_counted` tokens of each clip are added to the load."""
    experts_BLK = biased_BLE.topk(top_k, dim=-1).indices
    if num_counted:
        cells = level_B[:, None, None] * load_SE.shape[1] + experts_BLK[:, :num_counted]
        _add_counts(load_SE, cells.flatten())
    return experts_BLK


@choose_experts.register_fake
def _(biased_BLE, top_k, level_B, num_counted, load_SE):
    return biased_BLE.new_empty(*biased_BLE.shape[:2], top_k, dtype=torch.int64)


@torch.library.custom_op("titan_video::choose_tokens", mutates_args=("load_SE",))
def choose_tokens(
    scores_BLE: Tensor,
    per_expert: int,
    seq_len: int,
    group: str,
    size: int,
    rank: int,
    level_B: Tensor,
    is_counted: bool,
    load_SE: Tensor,
) -> tuple[Tensor, Tensor]:
    """This rank's tokens of each expert: their numbers in [B L], sorted by expert, and how many each expert has.

    Each expert takes `per_expert` tokens of each whole clip of `seq_len` tokens. group, size, rank: the ranks that
    share it; their scores are gathered. The host waits for the number of tokens.
    """
    B, L, E = scores_BLE.shape
    full_BLE = scores_BLE
    if size > 1:
        functional = torch.ops._c10d_functional
        full = functional.all_gather_into_tensor(scores_BLE.contiguous(), size, group)
        full_BLE = torch.cat(functional.wait_tensor(full).chunk(size), dim=1)
    best = full_BLE[:, :seq_len].topk(per_expert, dim=1).indices
    is_taken_BLE = torch.zeros_like(full_BLE, dtype=torch.bool).scatter_(1, best, True)
    own_EBL = is_taken_BLE[:, rank * L : (rank + 1) * L].permute(2, 0, 1)
    expert, clip, token = own_EBL.nonzero(as_tuple=True)
    if is_counted:
        _add_counts(load_SE, level_B[clip] * E + expert)
    return clip * L + token, own_EBL.sum((1, 2))


@choose_tokens.register_fake
def _(scores_BLE, per_expert, seq_len, group, size, rank, level_B, is_counted, load_SE):
    B, L, E = scores_BLE.shape
    num_rows = B * E * per_expert if size == 1 else torch.library.get_ctx().new_dynamic_size()
    return scores_BLE.new_empty(num_rows, dtype=torch.int64), scores_BLE.new_empty(E, dtype=torch.int64)


def _add_counts(load_SE: Tensor, cells: Tensor) -> None:
    load_SE.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
