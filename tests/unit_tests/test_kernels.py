"""The reference operators against their definitions in float64, eager and traced, and the choice of a backend."""

import sys

import pytest
import torch

from titan_video import kernels
from titan_video.kernels import ada_layer_norm, gated_residual, layer_norm, rms_norm, rms_norm_rope

B, L, H, K = 2, 7, 3, 8
D = H * K


def norm64(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def rms64(x, w):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w


def rope64(x, angles):
    """Definition: the pair (2i, 2i + 1) of every head is rotated by angle i."""
    x, out = x.unflatten(-1, (H, K)), torch.empty(*x.shape[:2], H, K, dtype=torch.float64)
    for i in range(K // 2):
        a, b, t = x[..., 2 * i], x[..., 2 * i + 1], angles[..., i, None]
        out[..., 2 * i], out[..., 2 * i + 1] = a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos()
    return out


def cases():
    g = torch.Generator().manual_seed(0)
    x, y, w, b = (torch.randn(*s, generator=g) for s in ((B, L, D), (B, L, D), (D,), (D,)))
    per_sample, per_token = torch.randn(3, B, 1, D, generator=g), torch.randn(3, B, L, D, generator=g)
    angles = torch.randn(1, L, K // 2, generator=g) * 3
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    for name, (scale, shift, gate) in (("per sample", per_sample), ("per token", per_token)):
        yield (
            f"ada_layer_norm {name}",
            ada_layer_norm,
            (x, scale, shift, 1e-6),
            norm64(x.double()) * (1 + scale.double()) + shift.double(),
        )
        yield f"gated_residual {name}", gated_residual, (x, y, gate), x.double() + y.double() * gate.double()
    yield "layer_norm", layer_norm, (x, w, b, 1e-6), norm64(x.double()) * w.double() + b.double()
    yield "rms_norm", rms_norm, (x, w, 1e-6), rms64(x.double(), w.double())
    square = (x.double() ** 2).mean(-1, keepdim=True).float()
    yield "rms_norm with its statistic as input", rms_norm, (x, w, 1e-6, square), rms64(x.double(), w.double())
    yield (
        "rms_norm_rope with its statistic as input",
        rms_norm_rope,
        (x, w, freqs_cis, 1e-6, square),
        rope64(rms64(x.double(), w.double()), angles.double()),
    )
    heads, w_head = x.unflatten(-1, (H, K)), w[:K]
    yield (
        "rms_norm_rope per head",
        rms_norm_rope,
        (heads, w_head, freqs_cis, 1e-6),
        rope64(rms64(heads.double(), w_head.double()).flatten(2), angles.double()),
    )
    yield (
        "rms_norm_rope",
        rms_norm_rope,
        (x, w, freqs_cis, 1e-6),
        rope64(rms64(x.double(), w.double()), angles.double()),
    )


@pytest.fixture(autouse=True)
def reset_compiler():
    """All operators share one wrapper function, and dynamo compiles one function only a limited number of times."""
    torch._dynamo.reset()


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("name, op, args, expected", list(cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_operator_equals_its_definition(name, op, args, expected, traced):
    run = torch.compile(op, backend="aot_eager", fullgraph=True) if traced else op
    torch.testing.assert_close(run(*args).double(), expected, atol=2e-6, rtol=2e-6)
    low = run(
        args[0].bfloat16(),
        *(a.bfloat16() if name.startswith("gated") and i == 0 else a for i, a in enumerate(args[1:])),
    )
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_gradient_of_norm_and_rope(traced):
    _, op, (x, w, freqs_cis, eps), _ = list(cases())[-1]
    run = torch.compile(op, backend="aot_eager", fullgraph=True) if traced else op
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    weight = torch.randn(B, L, H, K, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((run(x, w, freqs_cis, eps) * weight).sum(), (x, w))
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = torch.autograd.grad((rope64(rms64(x64, w64), freqs_cis.angle().double()) * weight).sum(), (x64, w64))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_without_the_optional_part_auto_is_torch_and_triton_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_fused", {})
    for module in [kernels.TRITON_PART, *(name for name in sys.modules if name.startswith(f"{kernels.TRITON_PART}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # import fails
    assert kernels.resolve_backend("auto", torch.device("cuda")) == "torch"
    with pytest.raises(
        ValueError, match='model.kernels = "triton": needs the optional part titan_video/kernels/triton'
    ):
        kernels.set_backend("triton")
    assert kernels.current_backend() == "torch"
