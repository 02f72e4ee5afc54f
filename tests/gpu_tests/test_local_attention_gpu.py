"""The CUDA kernels that a ring runs on, each against plain arithmetic."""

import pytest
import torch

from titan_video.distributed.context_parallel import local_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("kernel, dtype, masked", [
    ("flash", torch.bfloat16, False),
    ("cudnn", torch.bfloat16, False),
    ("cudnn", torch.bfloat16, True),
    ("efficient", torch.bfloat16, True),
    ("efficient", torch.float32, False),
])  # fmt: skip
def test_kernel_equals_plain_arithmetic(kernel, dtype, masked):
    """On two chunks of keys: outputs and lse of each, and the gradients that come from output and lse of both together."""
    q, k, v, grad = (torch.randn(2, 3, n, 64, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(n + i))
                     for i, n in enumerate((70, 90, 90, 70)))  # fmt: skip
    bias = None
    if masked:
        bias = local_attention._bias(torch.arange(50, device="cuda").expand(2, -1) < 37, q)
    forward, backward = (getattr(local_attention, f"_{kernel}{suffix}") for suffix in ("", "_backward"))
    whole_bias = None if bias is None else torch.cat([bias, torch.zeros_like(bias[..., :40])], dim=-1)
    out, lse = local_attention._math(q.double(), k.double(), v.double(), whole_bias)
    for keys, chunk_bias in ((slice(0, 50), bias), (slice(50, 90), None)):
        chunk = k[:, :, keys], v[:, :, keys]
        wide = [x.double() for x in (q, *chunk)]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
        for got, expected in zip(forward(q, *chunk, chunk_bias), local_attention._math(*wide, chunk_bias)):
            torch.testing.assert_close(got.double(), expected, **tolerance)
        grads = backward(grad, q, *chunk, out.to(dtype), lse.float(), chunk_bias)
        for got, expected in zip(grads, local_attention._math_backward(grad.double(), *wide, out, lse, chunk_bias)):
            torch.testing.assert_close(got.double(), expected, **tolerance)
