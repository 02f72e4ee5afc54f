"""A mixture of experts: what it computes, what it counts and what checkpointing keeps of its decisions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import randomized_init
from titan_video.config.job_config import ActivationCheckpoint
from titan_video.distributed.activation_checkpoint import apply_activation_checkpoint
from titan_video.distributed.compile import apply_compile
from titan_video.distributed.utils import initialise
from titan_video.models.experts import NUM_LEVELS, MoE, Router, num_tokens
from titan_video.models.spec import ExpertArgs, RankGroup, StepLayout
from titan_video.models.wan import SPEC, WanArgs, WanModel

EXPERTS = ExpertArgs(num_experts=6, top_k=2, expert_dim=24, shared_dim=12, route_scale=1.5)
ARGS = WanArgs(dim=48, num_heads=4, num_layers=3, ffn_dim=60, text_dim=20, text_len=9, freq_dim=32, experts=EXPERTS)
KINDS = {"token choice": EXPERTS, "expert choice": replace(EXPERTS, expert_choice=True)}


def build(args, dtype=torch.float64):
    torch.set_default_dtype(dtype)
    try:
        model = WanModel(args)
    finally:
        torch.set_default_dtype(torch.float32)
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    return model


def inputs(args, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    axes = [torch.arange(n) for n in (2, 3, 2)]
    pos_BL3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)
    x_BLP, text_BSD = (torch.randn(2, *shape, generator=g).to(dtype) for shape in ((12, 64), (9, args.text_dim)))
    return {"x_BLP": x_BLP, "pos_BL3": pos_BL3, "t_B": torch.tensor([100.0, 990.0]), "text_BSD": text_BSD}


def naive(moe, router, y_BLD, x_BLD):
    """Token by token and expert by expert."""
    e, experts = moe.args, moe.experts
    out = torch.zeros_like(y_BLD)
    for b in range(y_BLD.shape[0]):
        scores_LE = (F.layer_norm(x_BLD[b], x_BLD.shape[-1:]) @ router.weight.T).sigmoid()
        taken = torch.zeros_like(scores_LE, dtype=torch.bool)
        if e.expert_choice:
            per_expert = -(-e.top_k * len(scores_LE) // e.num_experts)
            for i in range(e.num_experts):
                taken[scores_LE[:, i].sort(descending=True).indices[:per_expert], i] = True
        else:
            for token, row in enumerate(scores_LE + router.bias):
                taken[token, row.sort(descending=True).indices[: e.top_k]] = True
        for token, chosen in enumerate(taken):
            total = scores_LE[token][chosen].sum()
            for i in chosen.nonzero().flatten().tolist():
                hidden = F.gelu(y_BLD[b, token] @ experts.up[i] + experts.up_bias[i], approximate="tanh")
                weight = scores_LE[token, i] / total * e.route_scale
                out[b, token] += weight * (hidden @ experts.down[i] + experts.down_bias[i])
    return out + moe.shared(y_BLD)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_tokens(kind):
    torch.manual_seed(0)
    moe, router = MoE(8, KINDS[kind]).double(), Router(8, KINDS[kind]).double()
    for p in (*moe.parameters(), *router.parameters()):
        torch.nn.init.normal_(p)
    y, x = (torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, expected = moe(y, x, router(torch.tensor([10.0, 900.0])))[0], naive(moe, router, y, x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    trained = [y, x, router.weight, *moe.parameters()]
    grad = torch.randn_like(found)
    pairs = zip(torch.autograd.grad(found, trained, grad), torch.autograd.grad(expected, trained, grad), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in pairs)
    assert router.load_SE[0].sum() == router.load_SE[NUM_LEVELS - 1].sum() == KINDS[kind].num_rows(7)


def test_first_and_last_blocks_may_stay_dense():
    model = WanModel(replace(ARGS, experts=replace(EXPERTS, first_dense=1, last_dense=1)))
    assert [block.moe is None for block in model.blocks.values()] == [True, False, True]
    assert [block.ffn is None for block in model.blocks.values()] == [False, True, False]
    assert list(model.routers) == ["1"]


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_active_experts(kind):
    args = replace(ARGS, experts=replace(KINDS[kind], first_dense=1))
    model = build(args, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs(args, torch.float32))
    # The counter does not know the CPU's attention.
    attention = args.num_layers * 4 * 2 * 12 * (12 + args.text_len) * args.dim
    assert counter.get_total_flops() + attention == args.flops(12, batch=2)
    assert args.flops(12) < replace(args, experts=replace(args.experts, top_k=3)).flops(12)
    assert args.flops(12) - replace(args, experts=replace(args.experts, num_experts=12)).flops(12) < 0  # the router


def test_flavors_have_the_active_size_of_their_dense_ones():
    for moe, dense in (("moe-debug", "debug"), ("moe-1.3B", "t2v-1.3B")):
        e, ffn_dim = SPEC.flavors[moe].experts, SPEC.flavors[dense].ffn_dim
        assert e.top_k * e.expert_dim + e.shared_dim == ffn_dim == SPEC.flavors[moe].ffn_dim


def test_initial_weights():
    args = SPEC.flavors["moe-debug"]
    model = WanModel(args)
    initialise(model, SPEC.init_parameter, 0)
    experts, router = model.blocks["1"].moe.experts, model.routers["1"]
    bound = (6 / (args.dim + args.experts.expert_dim)) ** 0.5
    for stacked in (experts.up, experts.down):
        assert stacked.abs().max() <= bound and stacked.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not torch.equal(stacked[0], stacked[1])
    assert not experts.up_bias.any() and not experts.down_bias.any() and not router.bias.any()
    assert router.weight.any() and router.weight.requires_grad and not router.bias.requires_grad


MODES = {
    "none": ActivationCheckpoint(),
    "full": ActivationCheckpoint(mode="full"),
    "selective": ActivationCheckpoint(mode="selective", save_min_kv=0),
    "matmul": ActivationCheckpoint(mode="selective", save=("matmul",)),
}


def one_step(kind, mode, disturb=False, compiled=False):
    """(gradients, load) of a forward and backward; disturb: the router decides otherwise when a block is recomputed."""
    args = replace(ARGS, experts=KINDS[kind])
    model = build(args)
    apply_activation_checkpoint(model, SPEC.plan, MODES[mode])
    if compiled:
        torch._dynamo.reset()
        apply_compile(model, SPEC.plan, "aot_eager")
    v = model(**inputs(args))
    if disturb:
        for router in model.routers.values():
            router.bias.data += torch.linspace(-9, 9, EXPERTS.num_experts)
    v.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return list(grads.values()), [router.load_SE for router in model.routers.values()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_block_decides_alike_and_counts_once(kind, mode):
    expected, load = one_step(kind, "none")
    grads, counted = one_step(kind, mode, disturb=mode != "none")
    assert all(torch.equal(a, b) for a, b in zip(load, counted, strict=True))
    assert load[0].sum() == 2 * KINDS[kind].num_rows(12)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    "mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "selective"))]
)
def test_compiled_equals_eager(mode):
    expected, load = one_step("token choice", "none")
    grads, counted = one_step("token choice", mode, compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(load, counted, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_without_gradient_are_not_counted(kind):
    model = build(replace(ARGS, experts=KINDS[kind]))
    with torch.no_grad():
        model(**inputs(ARGS))
    assert not any(router.load_SE.any() for router in model.routers.values())


def test_padding_is_not_counted():
    layouts = [StepLayout(10, sequence=RankGroup("", rank, 4)) for rank in range(4)]  # 3 rows a rank
    assert [num_tokens(layout, 3) for layout in layouts] == [3, 3, 3, 1]
    assert num_tokens(StepLayout(2, sequence=RankGroup("", 3, 4)), 1) == 0
    assert num_tokens(None, 5) == num_tokens(StepLayout(5), 5) == 5
    model = build(ARGS)
    layout = StepLayout(12 + 2, sequence=RankGroup("", 1, 2))  # 12 rows a rank, of which two here are tokens
    model(**inputs(ARGS), layout=layout)
    assert model.routers["0"].load_SE.sum() == 2 * 2 * EXPERTS.top_k
