"""The fused operators against their definitions: cases for a CPU, for Triton's interpreter and for a GPU.

TRITON_INTERPRET=1 python -m tests.kernel_cases    runs all cases in the interpreter

The interpreter must be chosen before Triton is imported.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.kernels import reference  # noqa: E402
from titan_video.kernels.triton import launch
from titan_video.kernels.triton import layer_norm as fused_layer_norm
from titan_video.kernels.triton import rms_norm as fused_rms_norm

EPS = 1e-6
MODULATION = ("one row", "one row for all samples", "a row per token", "two rows and a mask")
# Samples, tokens, width and modulation in the interpreter. The last size has several programs of several tokens each.
SIZES = ((2, 3, 128, MODULATION), (3, 3, 384, MODULATION[1::2]), (1, 5, 1536, MODULATION[::2]))


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
    w, b = (rand(D, seed=i, dtype=dtype, device=device) for i in (2, 3))
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
            f"gated_residual, {kind}",
            lambda m, x, y, r, cond_mask=cond_mask: m.gated_residual(x, y, split(r)[2], cond_mask),
            (x, y, rows),
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


def cases(B, L, D, dtype, device="cpu", kinds=MODULATION):
    yield from ((fused_layer_norm, *case) for case in layer_norm_cases(B, L, D, dtype, device, kinds))
    yield from ((fused_rms_norm, *case) for case in rms_norm_cases(B, L, D, dtype, device))


def results(module, function, inputs):
    """Outputs, then gradients of the inputs. The gradients of the outputs are the same in every call and type."""
    outputs = function(module, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [
        rand(*out.shape, seed=11 + i, device=out.device, grad=False).bfloat16().to(out.dtype)
        for i, out in enumerate(outputs)
    ]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def exact(function, inputs):
    """Results of reference.py in float64."""
    return results(reference, function, [x.detach().double().requires_grad_() for x in inputs])


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def check(module, name, function, inputs, dtype, again=True):
    """Results equal the definition; with `again`, a second run gives the same bits."""
    found = results(module, function, inputs)
    for number, (a, b) in enumerate(zip(found, exact(function, inputs), strict=True)):
        assert a.shape == b.shape and error(a, b) < (5e-3 if dtype == torch.bfloat16 else 1e-6), (
            f"{name}, result {number}: {error(a, b)}"
        )
    for a, b in zip(found, results(module, function, inputs) if again else found, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"


def main():
    assert launch.interpreted(), "TRITON_INTERPRET=1 is not set"
    number = 0
    for B, L, D, kinds in SIZES:
        dtype = torch.bfloat16 if B == 2 else torch.float32
        for case in cases(B, L, D, dtype, kinds=kinds):
            check(*case, dtype, again=False)  # programs run one after the other, so two runs cannot differ
            number += 1
    print(f"{number} cases")


if __name__ == "__main__":
    main()
