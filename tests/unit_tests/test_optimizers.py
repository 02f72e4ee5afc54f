"""All optimizers in one process: each against torch, torchao or a closed form."""

import copy

import pytest
import torch
from torch import nn

from titan_video.checkpoint.state import OptimizerState
from titan_video.config.job_config import LrScheduler, Optimizer
from titan_video.distributed.utils import clip_grad_norm, initialise
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.optim.in_backward import InBackward
from titan_video.optim.low_bit import BLOCK, codebook, dequantize, quantize, stochastic_round
from titan_video.optim.lr_scheduler import Scheduler
from titan_video.optim.mixed import MixedOptimizer
from titan_video.optim.muon import orthogonalize
from titan_video.optim.optimizer import OPTIONAL, build_optimizer
from titan_video.planner.dry_run.memory import state_bytes

ARGS = WanArgs(dim=96, num_heads=2, num_layers=2, ffn_dim=160, text_dim=8, text_len=5, freq_dim=16)
NAMES = ("AdamW", "AdamW8bit", "Muon")


def build_model_for(dtype=torch.float32):
    model = WanModel(ARGS)
    initialise(model, SPEC.init_parameter, 0)
    return model.to(dtype)


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = (
            torch.randn(p.shape, generator=generator).mul_(torch.rand(p.shape, generator=generator) ** 3).to(p.dtype)
        )


def train(model, optimizer, steps, first=1):
    for step in range(first, first + steps):
        give_gradients(model, step)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- 8 bits, stochastic rounding ----


@pytest.mark.parametrize("signed", [True, False])
def test_quantization_equals_torchaos(signed):
    quant = pytest.importorskip("torchao.optim.quant_utils")
    torch.testing.assert_close(
        codebook(signed, torch.device("cpu")), torch.tensor(quant.create_dynamic_map(signed)), rtol=1e-6, atol=0
    )
    x = torch.randn(7, 3 * BLOCK) ** 3
    x = x if signed else x.abs()
    codes, scale = torch.empty(7, 3 * BLOCK, dtype=torch.uint8), torch.empty(7, 3)
    quantize(x, codes, scale, signed)
    scaled, theirs = quant.scale_tensor(x, BLOCK)
    assert torch.equal(scale.flatten(), theirs)
    assert torch.equal(codes, quant.quantize_8bit_with_qmap(scaled, codebook(signed, torch.device("cpu"))))


def test_a_code_is_the_nearest_codebook_value_and_short_blocks_stand_alone():
    x = torch.randn(5, BLOCK + 9)
    x[2] = 0
    codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(5, 2)
    quantize(x, codes, scale, signed=True)
    assert torch.equal(scale[:, 1], x[:, BLOCK:].abs().amax(1))
    back = dequantize(codes, scale, signed=True)
    assert torch.equal(back[2], x[2])
    table = codebook(True, torch.device("cpu"))
    nearest = (x[0, :BLOCK, None] / scale[0, 0] - table).abs().min(-1).values * scale[0, 0]
    torch.testing.assert_close((back[0, :BLOCK] - x[0, :BLOCK]).abs(), nearest, atol=1e-7, rtol=1e-4)


def test_stochastic_rounding_is_unbiased_and_knows_no_layout():
    x = torch.full((4096, 16), 1.0 + 2**-7 * 0.3)  # bfloat16 has 1 and 1 + 2^-7
    up = (stochastic_round(x, (0, 0), 16, 1) > 1).float()
    assert set(stochastic_round(x, (0, 0), 16, 1).unique().tolist()) == {1.0, 1.0078125}
    assert up.mean().item() == pytest.approx(0.3, abs=0.01)
    # No pattern along rows, columns or keys.
    other = (stochastic_round(x, (0, 0), 16, 2) > 1).float()
    for a, b in ((up[1:], up[:-1]), (up[:, 1:], up[:, :-1]), (up, other)):
        assert (a * b).mean().item() == pytest.approx(0.09, abs=0.01)
    y = torch.randn(40, 24)
    full = stochastic_round(y, (0, 0), 24, 5)
    assert torch.equal(stochastic_round(y[7:19, 8:], (7, 8), 24, 5), full[7:19, 8:])
    assert torch.equal(stochastic_round(full.float(), (0, 0), 24, 6), full)
    assert torch.equal(stochastic_round(y[:, 3], (0,), 40, 5)[11:], stochastic_round(y[11:, 3], (11,), 40, 5))
    assert ((full.float() - y).abs() <= y.abs() * 2**-7).all()


# ---- updates ----


def test_adamw_of_the_mixed_optimizer_is_torchs():
    """With optimizer.name = Muon and no blocks, every parameter is updated by AdamW."""
    model, twin = build_model_for(), build_model_for()
    ours = build_optimizer(model, Optimizer(name="Muon", lr=0.01, weight_decay=0.1))
    assert isinstance(ours, MixedOptimizer) and {group["kind"] for group in ours.param_groups} == {"AdamW"}
    theirs = build_optimizer(twin, Optimizer(lr=0.01, weight_decay=0.1, implementation="for-loop"))
    a, b = train(model, ours, 4), train(twin, theirs, 4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7, msg=name)


def test_eight_bits_follow_float32():
    model, twin = build_model_for(), build_model_for()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    section = Optimizer(name="AdamW8bit", lr=0.01)
    a, b = train(model, build_optimizer(model, section), 8), train(twin, build_optimizer(twin, Optimizer(lr=0.01)), 8)
    for name in a:
        moved = (b[name] - start[name]).norm()
        error = (a[name] - b[name]).norm() / moved
        assert (0.001 < error < 0.05) if a[name].ndim == 2 and "modulation" not in name else error < 1e-5, (name, error)


@pytest.mark.parametrize("power", [0, 3])
def test_eight_bits_beside_torchaos(power):
    """As near to float32 as an independent 8-bit AdamW; and where gradients in a block differ by orders of magnitude,
    which that one, keeping the squares, does not survive, nearer."""
    optim, weight, moved = pytest.importorskip("torchao.optim"), torch.randn(64, 256), {}
    common = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.01}
    for kind in ("float32", "ours", "torchao"):
        p = nn.Parameter(weight.clone())
        holder = nn.ParameterDict({"p": p})
        if kind == "ours":
            optimizer = build_optimizer(holder, Optimizer(name="AdamW8bit", lr=0.01))
        else:
            optimizer = (torch.optim.AdamW if kind == "float32" else optim.AdamW8bit)([p], **common)
        with torch.compiler.set_stance("force_eager"):
            for step in range(20):
                generator = torch.Generator().manual_seed(step)
                p.grad = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** power
                optimizer.step()
        moved[kind] = p.detach() - weight
    ours, theirs = ((moved[kind] - moved["float32"]).norm() / moved["float32"].norm() for kind in ("ours", "torchao"))
    assert ours < 0.05 and (theirs > 1 if power else theirs == pytest.approx(ours, rel=0.5))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name, monkeypatch):
    results = []
    for size in (1 << 24, 1000):
        monkeypatch.setattr("titan_video.optim.mixed.CHUNK_ELEMENTS", size)
        model = build_model_for(torch.bfloat16)
        results.append(train(model, build_optimizer(model, Optimizer(name=name, lr=0.01), SPEC.plan.blocks), 1))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_singular_values_after_orthogonalize():
    for shape in ((48, 32), (32, 48)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert singular.min() > 0.6 and singular.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("momentum", [0.95, 0.0])
def test_muon_of_the_blocks_is_torchs(momentum):
    model = build_model_for()
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(
        model, Optimizer(name="Muon", lr=0.02, weight_decay=0.1, momentum=momentum), SPEC.plan.blocks
    )
    by_muon = {
        optimizer.names[p] for group in optimizer.param_groups if group["kind"] == "Muon" for p in group["params"]
    }
    assert by_muon == {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    matrices = [p for n, p in twin.named_parameters() if n in by_muon]
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    a, b = train(model, optimizer, 3), train(twin, theirs, 3)
    for name in by_muon:  # torch's steps are in bfloat16
        assert (
            torch.cosine_similarity((a[name] - start[name]).flatten(), (b[name] - start[name]).flatten(), dim=0) > 0.999
        ), name
        torch.testing.assert_close((a[name] - start[name]).norm(), (b[name] - start[name]).norm(), rtol=0.01, atol=0)
    assert all(not torch.equal(a[name], start[name]) for name in a)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_go_where_float32_weights_go(name):
    """Steps of a tenth of bfloat16's resolution: rounded to nearest, no weight would move."""

    def moved(dtype):
        layer = nn.ModuleDict({"blocks": nn.Linear(128, 64, bias=False)})
        with torch.no_grad():
            layer["blocks"].weight.fill_(1.0)
        layer.to(dtype)
        optimizer = build_optimizer(layer, Optimizer(name=name, lr=5e-4, weight_decay=0), ("blocks",))
        for _ in range(20):
            layer["blocks"].weight.grad = torch.eye(64, 128).add_(1).to(dtype)
            optimizer.step()
        assert all(
            slot == "step" or value.dtype != torch.bfloat16
            for slot, value in optimizer.state[layer["blocks"].weight].items()
        )
        return layer["blocks"].weight.detach().float() - 1

    low, high = moved(torch.bfloat16), moved(torch.float32)
    assert low.mean().item() == pytest.approx(high.mean().item(), rel=0.05) and high.mean().item() < -1e-4


# ---- lr_scale ----


def train_with_schedule(model, section, in_backward=False, **options):
    """Weights after three steps with a falling rate. Constant gradients, by way of a linear loss."""
    optimizer = build_optimizer(model, section, SPEC.plan.blocks, **options)
    scheduler = Scheduler(optimizer, LrScheduler(warmup_steps=0, decay_ratio=1.0), section.lr, total_steps=6)
    if in_backward:
        InBackward(optimizer)
    for step in range(1, 4):
        scheduler.set_step(step)
        generator = torch.Generator().manual_seed(step)
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize(
    "name, dtype, in_backward",
    [
        ("AdamW", torch.float32, False),
        ("AdamW", torch.float32, True),
        ("AdamW", torch.bfloat16, False),
        ("AdamW8bit", torch.float32, False),
        ("AdamW8bit", torch.float32, True),
        ("Muon", torch.float32, False),
    ],
)
def test_lr_scale_is_a_factor_on_the_rate(name, dtype, in_backward):
    def half_of_ffn(parameter, group):
        return {"lr_scale": 0.5} if ".ffn." in parameter else {}

    full, half = Optimizer(name=name, lr=0.02), Optimizer(name=name, lr=0.01)
    scaled, optimizer = train_with_schedule(build_model_for(dtype), full, in_backward, adjust_group=half_of_ffn)
    at_full_rate, plain = train_with_schedule(build_model_for(dtype), full, in_backward)
    at_half_rate, _ = train_with_schedule(build_model_for(dtype), half, in_backward)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5, 1.0}
    assert {group["lr_scale"] for group in plain.param_groups} == {1.0}
    for key, weight in scaled.items():
        expected = at_half_rate if ".ffn." in key else at_full_rate
        assert torch.equal(weight, expected[key]), key
    assert any(not torch.equal(at_half_rate[key], at_full_rate[key]) for key in scaled if ".ffn." in key)


def test_a_missing_optional_part_is_named(monkeypatch):
    monkeypatch.setitem(OPTIONAL, "mixed", "titan_video.optim.absent:MixedOptimizer")
    with pytest.raises(
        ValueError, match="optimizer.name = AdamW8bit: needs the optional part titan_video/optim/absent"
    ):
        build_optimizer(build_model_for(), Optimizer(name="AdamW8bit"))
    with pytest.raises(ValueError, match="training.dtype = bfloat16: needs the optional part"):
        build_optimizer(build_model_for(torch.bfloat16), Optimizer())


# ---- state ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_state(name, dtype):
    model = build_model_for(dtype)
    optimizer = build_optimizer(model, Optimizer(name=name), SPEC.plan.blocks)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert sum(t.nbytes for t in optimizer.state[p].values()) == state_bytes(group["kind"], tuple(p.shape)) + 4


class Meta:
    """What a checkpoint says of a tensor."""

    def __init__(self, t):
        self.size, self.properties = t.shape, t


@pytest.mark.parametrize("name", NAMES)
def test_state_resumes_bitwise_and_only_with_the_optimizer_that_wrote_it(name):
    section = Optimizer(name=name, lr=0.01)
    model = build_model_for(torch.bfloat16)
    optimizer = build_optimizer(model, section, SPEC.plan.blocks, seed=3)
    state = OptimizerState(model, optimizer)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    saved = {key: value.clone() for key, value in state.state_dict().items()}
    expected = train(model, optimizer, 2, first=3)

    resumed = build_optimizer(twin, section, SPEC.plan.blocks, seed=3)
    other = OptimizerState(twin, resumed)
    other.allocate({key: Meta(value) for key, value in saved.items()})
    live = other.state_dict()
    assert live.keys() == saved.keys()
    for key, value in live.items():
        assert value.shape == saved[key].shape and value.dtype == saved[key].dtype
        value.copy_(saved[key])
    got = train(twin, resumed, 2, first=3)
    assert all(torch.equal(got[key], expected[key]) for key in expected)

    wrong = build_optimizer(twin, Optimizer(name="AdamW" if name != "AdamW" else "Muon"), SPEC.plan.blocks)
    with pytest.raises(ValueError, match="optimizer that wrote it"):
        OptimizerState(twin, wrong).allocate({key: Meta(value) for key, value in saved.items()})


# ---- in backward ----


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_in_backward_equals_step_after_backward(name):
    def run(in_backward):
        model = build_model_for()
        optimizer = build_optimizer(model, Optimizer(name=name, lr=0.01))
        hooks = InBackward(optimizer) if in_backward else None
        norms = []
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            generator = torch.Generator().manual_seed(step)
            sum((p * torch.randn(p.shape, generator=generator)).square().sum() for p in model.parameters()).backward()
            if in_backward:
                assert all(p.grad is None for p in model.parameters())
            norms.append((hooks.grad_norm() if hooks else clip_grad_norm(model, 0.0)).item())
            optimizer.step()
            optimizer.zero_grad()
        return model, OptimizerState(model, optimizer).state_dict(), norms

    (model, state, norms), (twin, expected, expected_norms) = run(True), run(False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert norms == pytest.approx(expected_norms, rel=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Muon"])
def test_betas_of_the_configuration_reach_every_group(name):
    section = Optimizer(name=name, beta1=0.7, beta2=0.8)
    optimizer = build_optimizer(WanModel(SPEC.flavors["debug"]), section, SPEC.plan.blocks, 0)
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.7, 0.8)}
