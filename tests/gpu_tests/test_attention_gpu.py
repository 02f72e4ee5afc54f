"""The CUDA backends of attention: each against plain arithmetic, and that the one chosen is the one that runs.

Never run on a GPU yet.
"""

import pytest
import torch

from tests.unit_tests.test_attention import kernels_run
from titan_video.kernels import attention
from titan_video.models.layers import InnerAttention, JointInnerAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
OPERATORS = {
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "flash": "aten::_scaled_dot_product_flash_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "math": "titan_video::attention",
}


@pytest.fixture(autouse=True)
def automatic():
    torch._dynamo.reset()
    yield
    attention._in_use = ()


def use(backend, masked=False):
    """Choose, or skip where this GPU or this installation has no such backend."""
    if reason := attention._unavailable_reason(backend, CUDA):
        pytest.skip(reason)
    return attention.set_backend(backend, CUDA, torch.bfloat16, 64, masked)


def tensors(*lengths, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, n, 3, 64, device="cuda", generator=g).to(dtype).requires_grad_() for n in lengths]


def get_grads(outputs, inputs):
    return torch.autograd.grad(sum(x.float().square().sum() for x in outputs), inputs)


def in_float64(core, inputs, *rest):
    """Outputs and gradients by plain arithmetic."""
    chosen, attention._in_use = attention._in_use, ("math",)
    upcast = [x.detach().double().requires_grad_() for x in inputs]
    outputs = core(*upcast, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), upcast)
    attention._in_use = chosen
    return [*outputs, *grads]


def assert_close(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert ((x.double() - y).norm() / y.norm()).item() <= 1e-2


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient", "flash3", "flash4", "flex", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_the_kernel_that_runs(backend, compiled):
    chosen = use(backend)
    core = InnerAttention()
    if compiled:
        core.compile(fullgraph=True)
    inputs = tensors(150, 170, 170)
    result = []

    def step():
        out = core(*inputs)
        result[:] = [out, *get_grads([out], inputs)]

    try:
        runs = kernels_run(step)
        assert_close(result, in_float64(InnerAttention(), inputs))
    finally:
        if backend in ("flash3", "flash4"):
            from torch.nn.attention import restore_flash_attention_impl

            restore_flash_attention_impl()
    operator = OPERATORS.get("flash" if backend in ("flash3", "flash4") else chosen)
    kinds = {name for name in runs if name in OPERATORS.values()}
    assert kinds == ({operator} if operator else set())  # flex is no operator
    if operator:
        assert runs[operator] == runs[f"{operator}_backward"] == 1


@pytest.mark.parametrize("backend", ["auto", "cudnn", "efficient", "flex", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_joint_attention_with_a_mask(backend, compiled):
    use(backend, masked=True)
    core = JointInnerAttention()
    if compiled:
        core.compile(fullgraph=True)
    inputs, mask = (
        tensors(*[150] * 3, *[50] * 3),
        torch.arange(50, device="cuda").expand(2, -1) < torch.tensor([[37], [50]], device="cuda"),
    )
    result = []

    def step():
        out = core(*inputs, mask)
        result[:] = [*out, *get_grads(out, inputs)]

    runs = kernels_run(step)
    assert_close(result, in_float64(JointInnerAttention(), inputs, mask))
    if backend == "auto" and torch.cuda.get_device_capability()[0] in (9, 10):
        assert runs[OPERATORS["cudnn"]] == runs[OPERATORS["efficient"]] == 1


def test_the_host_never_waits_for_a_mask():
    for backend in ("auto", "cudnn", "efficient"):
        use(backend, masked=True)
        inputs, mask = tensors(*[150] * 3, *[50] * 3), torch.arange(50, device="cuda").expand(2, -1) < 37
        JointInnerAttention()(*inputs, mask)
        torch.cuda.set_sync_debug_mode("error")
        try:
            get_grads(JointInnerAttention()(*inputs, mask), inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
def test_kernel_equals_plain_arithmetic(kernel, dtype, masked):
    """On two chunks of keys:

    outputs and lse of each, and the gradients that come from output and lse of both together.
    """
    q, k, v, grad = (
        torch.randn(2, 3, n, 64, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(n + i))
        for i, n in enumerate((70, 90, 90, 70))
    )
    bias = None
    if masked:
        bias = attention._bias(torch.arange(50, device="cuda").expand(2, -1) < 37, q)
    forward, backward = attention._KERNELS[kernel]
    whole_bias = None if bias is None else torch.cat([bias, torch.zeros_like(bias[..., :40])], dim=-1)
    out, lse = attention._math(q.double(), k.double(), v.double(), whole_bias)
    for keys, chunk_bias in ((slice(0, 50), bias), (slice(50, 90), None)):
        chunk = k[:, :, keys], v[:, :, keys]
        upcast = [x.double() for x in (q, *chunk)]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
        for got, expected in zip(forward(q, *chunk, chunk_bias), attention._math(*upcast, chunk_bias)):
            torch.testing.assert_close(got.double(), expected, **tolerance)
        grads = backward(grad, q, *chunk, out.to(dtype), lse.float(), chunk_bias)
        for got, expected in zip(grads, attention._math_backward(grad.double(), *upcast, out, lse, chunk_bias)):
            torch.testing.assert_close(got.double(), expected, **tolerance)
