"""The fused operators against their definitions: cases for a CPU, for Triton's interpreter and for a GPU.

TRITON_INTERPRET=1 python -m tests.kernel_cases          runs all cases in the interpreter
TRITON_INTERPRET=1 python -m tests.kernel_cases some     each operator with each modulation, as CI does

The interpreter must be chosen before Triton is imported.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.kernels import attention, reference  # noqa: E402
from titan_video.kernels.triton import gelu, joined, launch, layer_norm_launch, merge, projections
from titan_video.kernels.triton import layer_norm as fused_layer_norm
from titan_video.kernels.triton import rms_norm as fused_rms_norm

EPS = 1e-6
fused_products = SimpleNamespace(
    gelu_linear=gelu.gelu_linear,
    joined_linear=joined.joined_linear,
    project_and_norm=projections.project_and_norm,
)
MODULATION = ("one row", "one row for all samples", "a row per token", "two rows and a mask")
# Samples, tokens, width and modulation in the interpreter. The last size has several programs of several tokens each.
SIZES = ((2, 3, 128, MODULATION), (3, 3, 384, MODULATION[1::2]), (1, 5, 1536, MODULATION[::2]))
SOME_SIZES = (SIZES[0], (1, 5, 1536, MODULATION[:1]))
# Of layer_norm_cases alone, computed as rows that are so wide that not all sums are in registers. The mask changes
# within each program.
AS_WIDE = (1, 10, 384, MODULATION[2:])


def rand(*shape, seed, dtype=torch.float32, device="cpu", grad=True):
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=device).to(dtype).requires_grad_(grad)


def modulation(kind, B, L, D, device):
    """(shift, scale and gate [samples, T, 3, D], conditioning mask or None)"""
    samples, T = (1 if "all samples" in kind else B), {"a row per token": L, "two rows and a mask": 2}.get(kind, 1)
    # A strided view, as in a block.
    rows = rand(samples, T, 3, D, seed=7, device=device)
    cond_mask = torch.arange(L, device=device).expand(B, L) % 3 == 1 if T == 2 else None
    return rows, cond_mask


def layer_norm_cases(B, L, D, dtype, device="cpu", kinds=MODULATION):
    """(name, function of a module and inputs, inputs); the module is reference.py or the fused one."""
    x, y = (rand(B, L, D, seed=i, dtype=dtype, device=device) for i in range(2))
    w, b, c = (rand(D, seed=i, dtype=dtype, device=device) for i in (2, 3, 4))
    for kind in kinds:
        rows, cond_mask = modulation(kind, B, L, D, device)

        def split(rows):
            return rows.unbind(2)

        yield (
            f"ada_layer_norm, {kind}",
            lambda m, x, r, cond_mask=cond_mask: m.ada_layer_norm(x, *split(r)[:2], EPS, cond_mask),
            (x, rows),
        )
        yield (
            f"ada_layer_norm_and_input, {kind}",
            lambda m, x, r, cond_mask=cond_mask: m.ada_layer_norm_and_input(x, *split(r)[:2], EPS, cond_mask),
            (x, rows),
        )
        yield (
            f"gated_residual, {kind}",
            lambda m, x, y, r, cond_mask=cond_mask: m.gated_residual(x, y, split(r)[2], cond_mask),
            (x, y, rows),
        )
        yield (
            f"gated_residual of y with a bias, {kind}",
            lambda m, x, y, r, b, cond_mask=cond_mask: m.gated_residual(x, y, split(r)[2], cond_mask, b),
            (x, y, rows, b),
        )
        yield (
            f"residual_layer_norm of y with a bias, gate of {kind}",
            lambda m, x, y, r, w, b, c, cond_mask=cond_mask: m.residual_layer_norm(
                x, y, split(r)[2], w, b, EPS, cond_mask, c
            ),
            (x, y, rows, w, b, c),
        )
        yield (
            f"residual_layer_norm, gate of {kind}",
            lambda m, x, y, r, w, b, cond_mask=cond_mask: m.residual_layer_norm(
                x, y, split(r)[2], w, b, EPS, cond_mask
            ),
            (x, y, rows, w, b),
        )
        yield (
            f"residual_ada_layer_norm, {kind}",
            lambda m, x, y, r, cond_mask=cond_mask: m.residual_ada_layer_norm(
                x, y, split(r)[2], *split(r)[:2], EPS, cond_mask
            ),
            (x, y, rows),
        )
    rows, cond_mask = modulation(kinds[-1], B, L, D, device)
    yield (
        "residual_ada_layer_norm, no gate",
        lambda m, x, y, r: m.residual_ada_layer_norm(x, y, None, *split(r)[:2], EPS, cond_mask),
        (x, y, rows),
    )
    yield (
        "residual_ada_layer_norm of y with a bias, no gate",
        lambda m, x, y, r, c: m.residual_ada_layer_norm(x, y, None, *split(r)[:2], EPS, cond_mask, c),
        (x, y, rows, c),
    )
    yield (
        "residual_layer_norm, no gate",
        lambda m, x, y, w, b: m.residual_layer_norm(x, y, None, w, b, EPS),
        (x, y, w, b),
    )
    yield "layer_norm", lambda m, x, w, b: m.layer_norm(x, w, b, EPS), (x, w, b)


def rms_norm_cases(B, L, D, dtype, device="cpu", K=32):
    """As `layer_norm_cases`: one norm over all D / K heads, and one per head."""
    x, w, w_head = (rand(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(((B, L, D), (D,), (K,))))
    square = (rand(B, L, 1, seed=5, device=device).detach().square() + 0.5).requires_grad_()

    def heads(x):
        return x.unflatten(-1, (-1, K))

    for samples in sorted({1, B}):
        angles = rand(samples, L, K // 2, seed=6, device=device, grad=False) * 3
        freqs_cis = torch.polar(torch.ones_like(angles), angles)
        kind = f"freqs_cis of {samples} samples"
        yield f"rms_norm_rope, {kind}", lambda m, x, w, r=freqs_cis: m.rms_norm_rope(x, w, r, EPS), (x, w)
        yield (
            f"rms_norm_rope per head, {kind}",
            lambda m, x, w, r=freqs_cis: m.rms_norm_rope(heads(x), w, r, EPS),
            (x, w_head),
        )
        yield (
            f"rms_norm_rope with its statistic as input, {kind}",
            lambda m, x, w, s, r=freqs_cis: m.rms_norm_rope(x, w, r, EPS, s),
            (x, w, square),
        )
    yield "rms_norm", lambda m, x, w: m.rms_norm(x, w, EPS), (x, w)
    yield "rms_norm per head", lambda m, x, w: m.rms_norm(heads(x), w, EPS), (x, w_head)
    yield "rms_norm with its statistic as input", lambda m, x, w, s: m.rms_norm(x, w, EPS, s), (x, w, square)


class PlainProducts:
    """The definition of gelu.py, joined.py and projections.py, by autograd."""

    @staticmethod
    def gelu_linear(u, weight, bias, u_bias):
        return F.linear(F.gelu(u + (u_bias - u_bias.detach()), approximate="tanh"), weight, bias)

    @staticmethod
    def joined_linear(out, u, weight, bias):
        hidden = F.gelu(u, approximate="tanh").unflatten(-1, (out.shape[2], -1))
        return F.linear(torch.cat([out, hidden], dim=-1).flatten(2), weight, bias)

    @staticmethod
    def project_and_norm(x, context, weights, biases, norms, freqs_cis, head_dim, eps):
        sources = (x, *[x if context is None else context] * 2)
        q, k, v = (
            F.linear(t, w, b).unflatten(-1, (-1, head_dim)) for t, w, b in zip(sources, weights, biases, strict=True)
        )
        shape = (lambda t: t) if norms[0].shape[0] == head_dim else (lambda t: t.flatten(2))
        if freqs_cis is None:
            q, k = (reference.rms_norm(shape(t), n, eps).view_as(t) for t, n in zip((q, k), norms, strict=True))
        else:
            q, k = (reference.rms_norm_rope(shape(t), n, freqs_cis, eps) for t, n in zip((q, k), norms, strict=True))
        return q, k, v


def product_cases(B, L, D, dtype, device="cpu", K=32):
    """As `layer_norm_cases`, of the operators with products; their definition is PlainProducts."""

    def draw(*shape, seed, scale=1.0):
        return (rand(*shape, seed=seed, device=device, grad=False) * scale).to(dtype).requires_grad_()

    u, weight, bias, u_bias = (
        draw(B, L, 2 * D, seed=0),
        draw(D, 2 * D, seed=1, scale=D**-0.5),
        *(draw(n, seed=2) for n in (D, 2 * D)),
    )
    out, v = rand(B, L, 2, K, seed=4, dtype=dtype, device=device), rand(B, L, 6 * K, seed=5, dtype=dtype, device=device)
    product = rand(D, 8 * K, seed=6, dtype=dtype, device=device)
    yield "joined_linear", lambda m, o, v, w, b: m.joined_linear(o, v, w, b), (out, v, product, bias)
    yield "gelu_linear", lambda m, u, w, b, c: m.gelu_linear(u, w, b, c), (u, weight, bias, u_bias)
    x, context = draw(B, L, 64, seed=3), draw(B, 2, 64, seed=4)
    weights, biases = [draw(D, 64, seed=i, scale=0.125) for i in (5, 6, 7)], [draw(D, seed=i) for i in (8, 9, 10)]
    angles = rand(1, L, K // 2, seed=6, device=device, grad=False) * 3
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    for name, width in (("all heads", D), ("per head", K)):
        norms = [draw(width, seed=i) for i in (11, 12)]
        yield (
            f"project_and_norm, {name}, RoPE",
            lambda m, x, *p: m.project_and_norm(x, None, p[:3], p[3:6], p[6:], freqs_cis, K, EPS),
            (x, *weights, *biases, *norms),
        )
        yield (
            f"project_and_norm, {name}, context",
            lambda m, x, c, *p: m.project_and_norm(x, c, p[:3], p[3:6], p[6:], None, K, EPS),
            (x, context, *weights, *biases, *norms),
        )


def cases(B, L, D, dtype, device="cpu", kinds=MODULATION):
    yield from ((fused_products, *case) for case in product_cases(B, L, D, dtype, device))
    yield from ((fused_layer_norm, *case) for case in layer_norm_cases(B, L, D, dtype, device, kinds))
    yield from ((fused_rms_norm, *case) for case in rms_norm_cases(B, L, D, dtype, device))


def check_merge(B, L, H, K, dtype, device="cpu", transposed=False):
    """One pass gives what the plain operators give in float64. transposed: the kernel's layout is [B, H, L, K]."""
    shape = (B, H, L, K) if transposed else (B, L, H, K)
    out, part = (rand(*shape, seed=i, dtype=dtype, device=device, grad=False) for i in (1, 2))
    out, part = (x.transpose(1, 2) if transposed else x for x in (out, part))
    lse, part_lse = (3 * rand(B, H, L, seed=i, device=device, grad=False) for i in (3, 4))
    part_lse[:, 0, 0] = -1e38  # all keys of a part are masked
    found, found_lse = merge.merge_attention(out.clone(), lse, part, part_lse)
    expected, expected_lse = attention.merge(out.double(), lse.double(), part.double(), part_lse.double())
    assert found.dtype == dtype and found.is_contiguous() and found.shape == (B, L, H, K)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    torch.testing.assert_close(found_lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[:, 0, 0], out[:, 0, 0])


MERGES = ((2, 5, 3, 128, torch.bfloat16), (1, 7, 2, 96, torch.float32), (1, 40, 1, 64, torch.bfloat16))


def results(module, function, inputs):
    """Outputs, then gradients of the inputs. The gradients of the outputs are the same in every call and type."""
    outputs = function(module, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [
        rand(*out.shape, seed=11 + i, device=out.device, grad=False).bfloat16().to(out.dtype)
        for i, out in enumerate(outputs)
    ]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def definition(module):
    return PlainProducts if module is fused_products else reference


def exact(module, function, inputs):
    """Results of the definition in float64."""
    return results(definition(module), function, [x.detach().double().requires_grad_() for x in inputs])


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def check(module, name, function, inputs, dtype, again=True):
    """Results equal the definition; with `again`, a second run gives the same bits."""
    found = results(module, function, inputs)
    for number, (a, b) in enumerate(zip(found, exact(module, function, inputs), strict=True)):
        assert a.shape == b.shape and error(a, b) < (5e-3 if dtype == torch.bfloat16 else 1e-6), (
            f"{name}, result {number}: {error(a, b)}"
        )
    for a, b in zip(found, results(module, function, inputs) if again else found, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"


def main(sizes):
    assert launch.interpreted(), "TRITON_INTERPRET=1 is not set"
    number = 0
    for B, L, D, kinds in sizes:
        dtype = torch.bfloat16 if B == 2 else torch.float32
        for case in cases(B, L, D, dtype, kinds=kinds):
            check(*case, dtype, again=False)  # programs run one after the other, so two runs cannot differ
            number += 1
    B, L, D, kinds = AS_WIDE
    with mock.patch.object(layer_norm_launch, "MAX_HOISTED_WIDTH", 0):
        for case in layer_norm_cases(B, L, D, torch.float32, kinds=kinds):
            check(fused_layer_norm, *case, torch.float32, again=False)
            number += 1
    for sizes in MERGES:
        for transposed in (False, True):
            check_merge(*sizes, transposed=transposed)
            number += 1
    print(f"{number} cases")


if __name__ == "__main__":
    main(SOME_SIZES if sys.argv[1:] == ["some"] else SIZES)
