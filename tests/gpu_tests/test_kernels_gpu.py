"""The fused kernels on a GPU: error against float64, the same bits in every run, tensors of more than 2^31 elements."""

from importlib.util import find_spec

import pytest
import torch

from tests.kernel_cases import EPS, MERGES, cases, check, check_merge, definition, error, exact, rand, results
from titan_video.kernels.triton import layer_norm as fused_layer_norm
from titan_video.kernels.triton import rms_norm as fused_rms_norm

gpu = pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU and triton")
pytestmark = [pytest.mark.gpu, gpu]
NUMBER = len(list(cases(2, 5, 96, torch.float32)))


@pytest.mark.parametrize("width", [128, 384, 1536, 3072, 5120, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_kernels_equal_the_definition_and_repeat_themselves(width, dtype):
    """Over more rows than there are programs, odd in number; `check` runs each twice."""
    for case in cases(3, 1001, width, dtype, "cuda"):
        check(*case, torch.bfloat16 if dtype != torch.float32 else dtype)


@pytest.mark.parametrize("number", range(NUMBER))
def test_error_is_not_above_that_of_the_compiled_reference(number):
    module, name, function, inputs = list(cases(1, 4097, 1536, torch.bfloat16, "cuda"))[number]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: function(definition(module), *inputs), fullgraph=True)
    ours, theirs = results(module, function, inputs), results(module, lambda _, *inputs: compiled(*inputs), inputs)
    for i, (a, b, expected) in enumerate(zip(ours, theirs, exact(module, function, inputs), strict=True)):
        assert error(a, expected) <= 1.1 * error(b, expected) + 1e-7, (
            f"{name}, result {i}: {error(a, expected)}, compiled reference {error(b, expected)}"
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_attentions_in_one_pass_equals_the_plain_operators(transposed):
    for sizes in (*MERGES, (1, 20_001, 24, 128, torch.bfloat16)):
        check_merge(*sizes, device="cuda", transposed=transposed)


def test_more_elements_than_an_int32_counts():
    """The last rows are those of a short tensor of their own. 26 GB."""
    L, D = 2**31 // 5120 + 1000, 5120
    x = torch.zeros(1, L, D, dtype=torch.bfloat16, device="cuda")
    x[:, -50:] = rand(1, 50, D, seed=0, dtype=torch.bfloat16, device="cuda", grad=False)
    tail = x[:, -50:].clone().requires_grad_()
    row, weight = rand(1, 1, D, seed=1, device="cuda", grad=False), rand(D, seed=2, device="cuda", grad=False)
    for run in (
        lambda x: fused_layer_norm.residual_ada_layer_norm(x, x, row, row, row, EPS)[1],
        lambda x: fused_rms_norm.rms_norm(x, weight, EPS),
    ):
        x = x.detach().requires_grad_()
        out, expected = run(x), run(tail)
        assert torch.equal(out[:, -50:], expected)
        [dx], [expected_dx] = (torch.autograd.grad(y, z, torch.ones_like(y)) for y, z in ((out, x), (expected, tail)))
        assert torch.equal(dx[:, -50:], expected_dx)
        del out, dx
