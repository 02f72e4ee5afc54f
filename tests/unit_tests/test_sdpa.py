"""The attention kernels: plain matmuls equal torch's fused kernel, and the CUDA kernels' signatures."""

import pytest
import torch

from tests.attention_cases import LENGTH, TEXT, tensors, text_mask
from titan_video.kernels import attention, sdpa


@pytest.mark.parametrize("masked", [False, True])
def test_math_kernel_equals_the_fused_one(masked):
    q, k, v, grad = (x.detach().transpose(1, 2) for x in tensors(LENGTH, TEXT, TEXT, LENGTH))
    bias = attention._bias(text_mask(), q) if masked else None
    out, lse = sdpa.cpu(q, k, v, bias)
    for fused, plain in zip((out, lse), sdpa.math(q, k, v, bias), strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-14)
    fused_grads, plain_grads = (f(grad, q, k, v, out, lse, bias) for f in (sdpa.cpu_backward, sdpa.math_backward))
    for fused, plain in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "kernel, masked", [("flash", False), ("cudnn", False), ("cudnn", True), ("efficient", False), ("efficient", True)]
)
def test_cuda_kernels_are_called_as_they_are_declared(kernel, masked):
    """Without a GPU: shapes only. tests/gpu_tests checks the values."""
    q, k = (torch.empty(2, 3, n, 16, device="meta", dtype=torch.bfloat16) for n in (40, 24))
    bias = attention._bias(torch.ones(2, 24, device="meta", dtype=torch.bool), q) if masked else None
    backend = sdpa.BACKENDS[kernel]
    out, lse = backend.forward(q, k, k, bias)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in backend.backward(q, q, k, k, out, lse, bias)] == [q.shape, k.shape, k.shape]
