"""A frozen base of codes and scales: how near it is, that gradients are those of its wide weights, that nothing wide is
kept, and how it is loaded and merged. Layouts: tests/distributed_tests/test_layouts.py.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.block_bytes import using
from tests.helpers import randomized_init
from titan_video.config.job_config import ActivationCheckpoint, JobConfig, Lora
from titan_video.distributed.activation_checkpoint import apply_activation_checkpoint
from titan_video.distributed.compile import apply_compile
from titan_video.distributed.utils import clean_name, initialise
from titan_video.lora.adapters import add_adapters, rules
from titan_video.lora.files import MergedWeights
from titan_video.lora.quantized_base import (
    CODE_DTYPES,
    dequantize,
    dequantized,
    fill_quantized,
    frozen_linear,
    quantize,
    quantize_base,
    quantized_linears,
)
from titan_video.lora.training import LoraState
from titan_video.models import get_spec
from titan_video.models.layers import is_adapter
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.weights.export.save import save_hf
from titan_video.weights.hf_storage import load_hf

ARGS = WanArgs(dim=128, num_heads=2, num_layers=2, ffn_dim=192, text_dim=16, text_len=8, freq_dim=32)
LORA = Lora(enable=True, rank=4, alpha=6.0)
TOKENS = 24
MODES = {
    "none": ActivationCheckpoint(),
    "full": ActivationCheckpoint(mode="full"),
    "selective": ActivationCheckpoint(mode="selective", save=("attention", "matmul"), save_min_kv=0),
    "offload": ActivationCheckpoint(mode="full", offload=True),
}


def fill(model, which):
    initialise(model, randomized_init(SPEC.init_parameter), 0, which)


def build(kind, dtype=torch.float32, section=MODES["none"], compiled=False):
    """kind "": the wide base, drawn; otherwise quantized from it."""
    with torch.device("meta"):
        model = WanModel(ARGS)
    add_adapters(model, SPEC, LORA, dtype)
    if kind:
        quantize_base(model, SPEC.plan, kind)
    apply_activation_checkpoint(model, SPEC.plan, section)
    if compiled:
        apply_compile(model, SPEC.plan, "aot_eager")
    model.to_empty(device="cpu")
    fill_quantized(model, fill) if kind else fill(model, lambda name: not is_adapter(name))
    initialise(model, randomized_init(SPEC.init_parameter), 0, is_adapter)
    return model


def wide_weights(model):
    return {name: dequantized(m.weight.detach(), m) for name, m in quantized_linears(model).items()}


def step(model):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, TOKENS, 64, generator=g), torch.randn(2, 8, 16, generator=g)
    positions = torch.arange(3 * TOKENS).view(1, TOKENS, 3)
    out = model(x_BLP=x, pos_BL3=positions, t_B=torch.tensor([100.0, 700.0]), text_BSD=text)
    out.float().square().sum().backward()
    return {clean_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=CODE_DTYPES)
def reference(request):
    """(kind, gradients of the adapters of a model whose base is what the codes stand for)"""
    wide, model = wide_weights(build(request.param)), build("")
    assert wide.keys() == {n for n, _ in model.named_parameters() if n.startswith("blocks.") and n.endswith(".weight")}
    for name, p in model.named_parameters():
        if name in wide:
            assert not torch.equal(p, wide[name])
            p.data.copy_(wide[name])
    return request.param, step(model)


def assert_near(grads, expected):
    assert grads.keys() == expected.keys() and len(grads) == 40
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_wide_base(reference, mode):
    kind, expected = reference
    assert_near(step(build(kind, section=MODES[mode])), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled(reference, mode):
    torch._dynamo.reset()
    kind, expected = reference
    assert_near(step(build(kind, section=MODES[mode], compiled=True)), expected)


def test_gradients_with_fused_kernels(reference):
    kind, expected = reference
    with using("triton"):
        grads = step(build(kind))
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@contextmanager
def saved():
    """Collects what autograd saves."""
    tensors = []

    def pack(x):
        tensors.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield tensors


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_wide_is_kept_for_backward(compiled):
    """Nor does the compiler keep it; gradients are still those of the wide base."""
    torch._dynamo.reset()
    shapes = {(128, 128), (192, 128), (128, 192)}
    grads = []
    for kind, is_compiled in (("", False), ("int8", False), ("int8", compiled)):
        model = build(kind, compiled=is_compiled)
        with saved() as tensors:
            grads.append(step(model))
        wide = [t for t in tensors if tuple(t.shape) in shapes and t.is_floating_point()]
        assert (len(wide) > 0) == (kind == "")
    assert_near(grads[2], grads[1])


def test_codes_are_near():
    torch.manual_seed(0)
    student = torch.distributions.StudentT(5.0).sample((64, 640))
    limits = {"int8": (0.0065, 0.0085), "float8": (0.027, 0.027)}  # of normal weights, of heavy tails
    for kind, expected in limits.items():
        for weight, limit in zip((torch.randn(64, 640), student), expected, strict=True):
            for dtype in (torch.float32, torch.bfloat16):
                codes, scale = quantize(weight, 10, CODE_DTYPES[kind], dtype)
                assert codes.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (64, 10)
                near = dequantize(codes.view(CODE_DTYPES[kind]), scale).float()
                assert (near - weight).norm() / weight.norm() < limit * (1.1 if dtype == torch.bfloat16 else 1)
    for dtype in CODE_DTYPES.values():  # a group of zeros, and values that the codes have
        exact = torch.tensor([[0.0, 0.0, 448.0, -224.0], [1.0, 0.5, 0.0, -1.0]])
        codes, scale = quantize(exact, 2, dtype, torch.float32)
        torch.testing.assert_close(dequantize(codes.view(dtype), scale), exact, rtol=0.01, atol=0)


def test_operator_is_well_formed():
    """Its schema, shapes on fake tensors, and autograd, by torch's own check."""
    codes, scale = quantize(torch.randn(6, 8), 2, torch.int8, torch.float32)
    x, bias = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6)
    torch.library.opcheck(frozen_linear, (x, codes, scale, bias))
    torch.library.opcheck(frozen_linear, (x, codes, scale, None))


def test_which_weights():
    for family, flavor in (("wan", "debug-i2v"), ("hunyuan_video", "debug")):
        spec = get_spec(family)
        with torch.device("meta"):
            model = spec.build(spec.flavors[flavor])
        linears = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(tuple(f"{path}." for path in spec.plan.blocks))
        }
        add_adapters(model, spec, LORA, torch.bfloat16)
        quantize_base(model, spec.plan, "int8")
        found = set(quantized_linears(model))
        assert found == {name for name in linears if "modulation" not in name} and (family == "wan") == (
            found == linears
        )
        for name, p in model.named_parameters():
            assert (p.dtype == torch.int8) == (name in found) and p.requires_grad == is_adapter(name)


def test_loaded_block_by_block_from_published_weights(tmp_path):
    """Never more than one block is wide, and codes are those of the published values."""
    source = WanModel(replace(ARGS, num_layers=3))
    initialise(source, randomized_init(SPEC.init_parameter), 0)
    save_hf(source, tmp_path, SPEC, source.args, torch.float32)
    with torch.device("meta"):
        model = WanModel(source.args)
    add_adapters(model, SPEC, LORA, torch.bfloat16)
    quantize_base(model, SPEC.plan, "int8")
    model.to_empty(device="cpu")
    wide = []

    def load(m, which):
        wide.append(
            {
                n.split(".")[1]
                for n, p in m.named_parameters()
                if n.endswith(".weight") and p.dtype != torch.int8 and n.startswith("blocks.")
            }
        )
        load_hf(m, tmp_path, SPEC, m.args, which=which)

    fill_quantized(model, load)
    assert wide == [set(), {"0"}, {"1"}, {"2"}]
    params, linears = dict(source.named_parameters()), quantized_linears(model)
    for name, linear in linears.items():
        codes, scale = quantize(params[name].detach(), linear.linear_fn.scale.shape[1], torch.int8, torch.bfloat16)
        assert torch.equal(linear.weight, codes) and torch.equal(linear.linear_fn.scale, scale)
    assert torch.equal(model.proj_out.weight, params["proj_out.weight"].bfloat16())


def test_merged_weights_are_the_wide_ones_and_the_adapters():
    model = build("int8")
    merged, wide = MergedWeights(model), wide_weights(model)
    assert set(merged) == {name for name, _ in WanModel(ARGS).named_parameters()}
    linear = model.blocks["1"].ffn.down
    update = LORA.alpha / LORA.rank * (linear.adapter.up @ linear.adapter.down)
    torch.testing.assert_close(merged["blocks.1.ffn.down.weight"], wide["blocks.1.ffn.down.weight"] + update)
    assert torch.equal(merged["proj_out.weight"], model.proj_out.weight)


def test_the_type_of_the_base_is_part_of_a_checkpoint():
    plain, int8 = LoraState(LORA, "x"), LoraState(replace(LORA, base_dtype="int8"), "x")
    int8.load_state_dict(int8.state_dict())
    plain.load_state_dict({"scale": 1.5, "frozen": "x"})  # of an earlier version
    for state, other in ((plain, int8), (int8, plain)):
        with pytest.raises(ValueError, match="lora.base_dtype is .*, but the checkpoint's adapters were trained with"):
            state.load_state_dict(other.state_dict())


def test_rules():
    config = JobConfig(lora=Lora(base_dtype="int8"))
    assert [line for line in rules(config, 1) if "lora.enable is false" in line and "set this to compute" in line]
    config = JobConfig(lora=replace(LORA, base_dtype="int8"))
    assert not [line for line in rules(config, 1) if "base_dtype" in line]
    config = replace(config, float8=replace(config.float8, enable=True))
    assert [line for line in rules(config, 1) if "float8.enable to false" in line]
