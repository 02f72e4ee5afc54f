"""Float8 matmuls, emulated: torchao's own, rounded as they should be, and in the right Linears."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from titan_video.config.job_config import Float8, Lora
from titan_video.distributed.float8 import apply_float8, float8_linear_fn
from titan_video.distributed.tensor_parallel import UnfusedLinear
from titan_video.lora.adapters import add_adapters
from titan_video.models import get_spec
from titan_video.models.layers import Linear
from titan_video.models.wan import SPEC, WanArgs, WanModel

EMULATED = Float8(enable=True, emulate=True)
ARGS = WanArgs(dim=48, num_heads=2, num_layers=1, ffn_dim=64, text_dim=8, text_len=5, freq_dim=16)


def is_float8(linear):
    return linear.linear_fn is not F.linear


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_matmul_is_that_of_torchaos_linear(recipe):
    """Values and all gradients, bit for bit; and near F.linear, but not it."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    def grads(multiply):
        torch.manual_seed(0)
        x, w, b = (
            torch.randn(2, 21, 32, requires_grad=True),
            torch.randn(48, 32, requires_grad=True),
            torch.randn(48, requires_grad=True),
        )
        y = multiply(x, w, b)
        y.mul(torch.randn_like(y)).sum().backward()
        return y.detach(), x.grad, w.grad, b.grad

    theirs = Float8Linear(32, 48, config=replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True))

    def oracle(x, w, b):
        return torch.func.functional_call(theirs, {"weight": w, "bias": b}, (x,))

    for ours, expected, exact in zip(
        grads(float8_linear_fn(replace(EMULATED, recipe_name=recipe))), grads(oracle), grads(F.linear), strict=True
    ):
        assert torch.equal(ours, expected)
        error = (ours - exact).norm() / exact.norm()
        assert error < 0.08
    assert error == 0  # the bias's gradient has no matmul in it
    x, w, b = torch.randn(4, 16), torch.randn(16, 16), torch.randn(16)
    linear_fn = float8_linear_fn(replace(EMULATED, recipe_name=recipe))
    assert not torch.equal(linear_fn(x, w), F.linear(x, w)) and torch.equal(linear_fn(x, w, b), linear_fn(x, w) + b)


def test_linears_of_the_blocks_and_no_other():
    model = WanModel(ARGS)
    apply_float8(model, SPEC.plan, EMULATED, "cpu")
    ours = {name for name, module in model.named_modules() if isinstance(module, Linear) and is_float8(module)}
    assert ours == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }

    model = WanModel(ARGS)
    apply_float8(model, SPEC.plan, replace(EMULATED, filter_fqns=("ffn.down", "cross_attn")), "cpu")
    kept = {name for name, module in model.named_modules() if isinstance(module, Linear) and not is_float8(module)}
    assert kept == {name for name in ours if "cross_attn" in name or name.endswith("ffn.down")}


def test_hunyuans_modulation_is_kept_by_default():
    spec = get_spec("hunyuan_video")
    with torch.device("meta"):
        model = spec.build(spec.flavors["debug"])
    apply_float8(model, spec.plan, EMULATED, "cpu")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith(tuple(spec.plan.blocks))
    }
    assert (
        {name for name, module in linears.items() if not is_float8(module)}
        == {name for name in linears if "modulation" in name}
        != set()
    )


def test_adapters_and_split_linears_multiply_in_float8():
    model = WanModel(ARGS)
    add_adapters(model, SPEC, Lora(enable=True, rank=2), torch.float32)
    apply_float8(model, SPEC.plan, EMULATED, "cpu")
    linear, x = model.blocks["0"].self_attn.q, torch.randn(3, 7, 48)
    with torch.no_grad():
        for p in linear.parameters():
            p.normal_()
    expected = linear.linear_fn(x, linear.weight, linear.bias) + linear.adapter(x)
    assert torch.equal(linear(x), expected) and not torch.equal(
        F.linear(x, linear.weight, linear.bias) + linear.adapter(x), expected
    )
    torch.testing.assert_close(UnfusedLinear(linear, (lambda y: y,))(x), expected)
    linear(x).sum().backward()
    assert linear.adapter.up.grad is not None and linear.weight.grad is None


def test_compiles_as_one_graph():
    linear = Linear(32, 48)
    linear.linear_fn = float8_linear_fn(EMULATED)
    x = torch.randn(5, 32)
    torch.testing.assert_close(torch.compile(linear, backend="aot_eager", fullgraph=True)(x), linear(x))


def test_what_it_refuses(monkeypatch):
    model = WanModel(ARGS)
    with pytest.raises(ValueError, match="compute capability 8.9"):
        apply_float8(model, SPEC.plan, Float8(enable=True), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="compute capability 8.9"):
        apply_float8(model, SPEC.plan, Float8(enable=True), "cuda")
    with pytest.raises(ValueError, match="float8.filter_fqns: 'head'"):
        apply_float8(model, SPEC.plan, replace(EMULATED, filter_fqns=("head",)), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    apply_float8(model, SPEC.plan, Float8(enable=True), "cuda")
    with pytest.raises(ValueError, match="self_attn.q is 12 x 48.*float8.filter_fqns"):
        apply_float8(model, SPEC.plan, Float8(enable=True), "cuda", tensor_parallel=4)
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(ValueError, match="torchao cannot be imported"):
        apply_float8(model, SPEC.plan, EMULATED, "cpu")
