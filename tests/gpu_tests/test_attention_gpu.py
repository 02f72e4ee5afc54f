"""The CUDA backends of attention: each equals plain matmuls in float64, and the chosen one runs.

These tests have not been run on a GPU yet.
"""

import pytest
import torch

from tests.attention_cases import count_attention_ops
from titan_video.kernels import attention, sdpa
from titan_video.models.hunyuan_video.blocks import JointInnerAttention
from titan_video.models.layers import InnerAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
OPERATORS = {
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "flash": "aten::_scaled_dot_product_flash_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "math": "titan_video::attention",
}


@pytest.fixture(autouse=True)
def auto_backend():
    torch._dynamo.reset()
    yield
    attention._order = ()


def choose(backend, masked=False):
    """Set the backend, or skip the test where this GPU or installation does not have it."""
    if reason := attention._unavailable_reason(backend, CUDA):
        pytest.skip(reason)
    return attention.set_backend(backend, CUDA, torch.bfloat16, 64, masked)


def tensors(*lengths, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, n, 3, 64, device="cuda", generator=g).to(dtype).requires_grad_() for n in lengths]


def get_grads(outputs, inputs):
    return torch.autograd.grad(sum(x.float().square().sum() for x in outputs), inputs)


def in_float64(attention_module, inputs, *rest):
    """Outputs and gradients by plain matmuls in float64."""
    order = attention._order
    attention._order = ("math",)
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    outputs = attention_module(*inputs64, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs64)
    attention._order = order
    return [*outputs, *grads]


def assert_close(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert ((x.double() - y).norm() / y.norm()).item() <= 1e-2


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient", "flash3", "flash4", "flex", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_the_chosen_kernel(backend, compiled):
    chosen = choose(backend)
    inner = InnerAttention()
    if compiled:
        inner.compile(fullgraph=True)
    inputs = tensors(150, 170, 170)
    result = []

    def step():
        out = inner(*inputs)
        result[:] = [out, *get_grads([out], inputs)]

    try:
        runs = count_attention_ops(step)
        assert_close(result, in_float64(InnerAttention(), inputs))
    finally:
        if backend in ("flash3", "flash4"):
            from torch.nn.attention import restore_flash_attention_impl

            restore_flash_attention_impl()
    operator = OPERATORS.get("flash" if backend in ("flash3", "flash4") else chosen)
    kinds = {name for name in runs if name in OPERATORS.values()}
    assert kinds == ({operator} if operator else set())  # flex has no operator
    if operator:
        assert runs[operator] == runs[f"{operator}_backward"] == 1


@pytest.mark.parametrize("backend", ["auto", "cudnn", "efficient", "flex", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_joint_attention_with_a_mask(backend, compiled):
    choose(backend, masked=True)
    inner = JointInnerAttention()
    if compiled:
        inner.compile(fullgraph=True)
    inputs, mask = (
        tensors(*[150] * 3, *[50] * 3),
        torch.arange(50, device="cuda").expand(2, -1) < torch.tensor([[37], [50]], device="cuda"),
    )
    result = []

    def step():
        out = inner(*inputs, mask)
        result[:] = [*out, *get_grads(out, inputs)]

    runs = count_attention_ops(step)
    assert_close(result, in_float64(JointInnerAttention(), inputs, mask))
    if backend == "auto" and torch.cuda.get_device_capability()[0] in (9, 10):
        assert runs[OPERATORS["cudnn"]] == runs[OPERATORS["efficient"]] == 1


def test_a_mask_causes_no_host_device_synchronisation():
    for backend in ("auto", "cudnn", "efficient"):
        choose(backend, masked=True)
        inputs, mask = tensors(*[150] * 3, *[50] * 3), torch.arange(50, device="cuda").expand(2, -1) < 37
        JointInnerAttention()(*inputs, mask)
        torch.cuda.set_sync_debug_mode("error")
        try:
            get_grads(JointInnerAttention()(*inputs, mask), inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("length", [192, 256, 1000])
def test_queries_whose_scores_are_all_very_low(kernel, length, masked):
    """The log-sum-exp is about -100: exp of its negative is more than float32 holds."""
    if masked and not sdpa.BACKENDS[kernel].masks_keys:
        pytest.skip("no mask")
    if (kernel, masked, length % 128) == ("cudnn", True, 64) and torch.cuda.get_device_capability() == (9, 0):
        pytest.xfail("cuDNN's fault of pytorch issue 196678")
    q, k, v, grad = (x.detach().transpose(1, 2) for x in tensors(*[length] * 4))
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -105.0 * 64**0.5
    bias = attention._bias(torch.ones(2, length, dtype=torch.bool, device="cuda"), q) if masked else None
    backend = sdpa.BACKENDS[kernel]
    out, lse = backend.forward(q, k, v, bias)
    assert lse.max() < -88.8
    out64, lse64 = sdpa.math(*(x.double() for x in (q, k, v)), None)
    grad_q64, *grads64 = sdpa.math_backward(*(x.double() for x in (grad, q, k, v)), out64, lse64, None)
    grad_q, *grads = backend.backward(grad, q, k, v, out, lse, bias)
    assert grad_q.isfinite().all()
    # The first channel's gradient is a sum that is zero, of large numbers.
    assert_close((out, grad_q[..., 1:], *grads), (out64, grad_q64[..., 1:], *grads64))


@pytest.mark.parametrize(
    "kernel, dtype, masked",
    [
        ("flash", torch.bfloat16, False),
        ("cudnn", torch.bfloat16, False),
        ("cudnn", torch.bfloat16, True),
        ("efficient", torch.bfloat16, True),
        ("efficient", torch.float32, False),
    ],
)
def test_kernel_equals_plain_matmuls(kernel, dtype, masked):
    """On two chunks of keys: output and lse of each, and gradients from output and lse of both together."""
    q, k, v, grad = (
        torch.randn(2, 3, n, 64, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(n + i))
        for i, n in enumerate((70, 90, 90, 70))
    )
    bias = None
    if masked:
        bias = attention._bias(torch.arange(50, device="cuda").expand(2, -1) < 37, q)
    backend = sdpa.BACKENDS[kernel]
    full_bias = None if bias is None else torch.cat([bias, torch.zeros_like(bias[..., :40])], dim=-1)
    out, lse = sdpa.math(q.double(), k.double(), v.double(), full_bias)
    for keys, chunk_bias in ((slice(0, 50), bias), (slice(50, 90), None)):
        chunk = k[:, :, keys], v[:, :, keys]
        inputs64 = [x.double() for x in (q, *chunk)]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
        for got, expected in zip(backend.forward(q, *chunk, chunk_bias), sdpa.math(*inputs64, chunk_bias), strict=True):
            torch.testing.assert_close(got.double(), expected, **tolerance)
        grads = backend.backward(grad, q, *chunk, out.to(dtype), lse.float(), chunk_bias)
        for got, expected in zip(
            grads, sdpa.math_backward(grad.double(), *inputs64, out, lse, chunk_bias), strict=True
        ):
            torch.testing.assert_close(got.double(), expected, **tolerance)
