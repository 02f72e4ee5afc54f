"""gelu_linear equals gelu and linear, with every combination of frozen inputs, and saves one wide activation less."""

import pytest
import torch
import torch.nn.functional as F

from titan_video import kernels
from titan_video.kernels.triton import joined
from titan_video.kernels.triton.gelu import gelu_linear
from titan_video.kernels.triton.joined import joined_linear
from titan_video.models.layers import FeedForward


def draw(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_equals_gelu_and_linear(wanted):
    torch.manual_seed(0)
    u, weight, bias = (draw(*shape, grad=w) for shape, w in zip([(2, 5, 12), (7, 12), (7,)], wanted, strict=True))
    inputs = [t for t in (u, weight, bias) if t.requires_grad]
    a, b = gelu_linear(u, weight, bias), F.linear(F.gelu(u, approximate="tanh"), weight, bias)
    grad = torch.randn_like(a)
    assert torch.equal(a, b)
    for x, y in zip(torch.autograd.grad(a, inputs, grad), torch.autograd.grad(b, inputs, grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def saved_by(ffn, x):
    """(output, elements that autograd saves, without the weights)"""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
    ):
        out, _ = ffn(x)
    return out, sum(sizes.values()) - sum(p.numel() for p in (ffn.up.weight, ffn.down.weight))


@pytest.fixture
def fused():
    kernels.set_backend("triton")
    yield
    kernels.set_backend("torch")


def test_feed_forward_saves_its_widest_activation_once_with_fused_kernels(fused):
    torch.manual_seed(0)
    ffn, x = FeedForward(8, 32), draw(1, 6, 8, dtype=torch.float32)
    out, saved = saved_by(ffn, x)
    kernels.set_backend("torch")
    plain, saved_by_plain = saved_by(ffn, x)
    assert torch.equal(out, plain) and saved_by_plain - saved == 6 * 32


def test_compiled_it_saves_no_more(fused):
    """Its backward needs no gelu(u) of forward, so the compiler saves none."""
    torch._dynamo.reset()
    ffn, x = FeedForward(8, 32), draw(1, 6, 8, dtype=torch.float32)
    eager, saved = saved_by(ffn, x)
    ffn.compile(backend="aot_eager", fullgraph=True)
    compiled, saved_compiled = saved_by(ffn, x)
    assert torch.equal(compiled, eager) and saved_compiled == saved == 6 * (8 + 32)


@pytest.mark.parametrize(
    "change",
    [{"adapter": torch.nn.Linear(32, 8)}, {"linear_fn": lambda x, weight, bias: 2 * F.linear(x, weight, bias)}],
)
def test_feed_forward_with_an_adapter_or_another_matmul_uses_it(fused, change):
    ffn, x = FeedForward(8, 32), draw(1, 6, 8, dtype=torch.float32)
    before, _ = ffn(x)
    for name, value in change.items():
        setattr(ffn.down, name, value)
    assert not torch.equal(ffn(x)[0], before)


def test_the_single_block_of_hunyuan_video_does_not_save_what_it_joins(fused):
    """Its last product reads attention and GELU side by side; backward writes them so again."""
    torch.manual_seed(0)
    B, L, H, K, E = 1, 6, 2, 4, 16
    out, u = draw(B, L, H, K, dtype=torch.float32), draw(B, L, H * E, dtype=torch.float32)
    weight, bias = draw(5, H * (K + E), dtype=torch.float32), draw(5, dtype=torch.float32)

    def saved_elements(function):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
        ):
            y = function(out, u, weight, bias)
        return y, sum(sizes.values())

    def plain(out, u, weight, bias):
        hidden = F.gelu(u, approximate="tanh").unflatten(-1, (H, E))
        return F.linear(torch.cat([out, hidden], dim=-1).flatten(2), weight, bias)

    (y, saved), (expected, saved_by_plain) = saved_elements(joined_linear), saved_elements(plain)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    assert saved_by_plain - saved == L * H * E  # u instead of u and the joined tensor
    for op, args in ((joined.join_gelu, (out, u)), (joined.join_gelu_backward, (plain_join(out, u), out, u))):
        torch.library.opcheck(op, tuple(x.detach() for x in args))


def plain_join(out, u):
    return torch.cat([out, u.unflatten(-1, (out.shape[2], -1))], dim=-1).flatten(2)
