"""Float8, 8-bit AdamW, Muon and the optimizer in backward on a GPU. These tests have not been run on one yet."""

import pytest
import torch
import torch.nn.functional as F

from tests.gpu_tests.test_train_gpu import bf16, cache, losses  # noqa: F401
from tests.optimizer_cases import CASES, check, check_codes
from titan_video.config.job_config import Float8
from titan_video.distributed.float8 import float8_linear_fn
from titan_video.optim.low_bit import dequantize, quantize, stochastic_round
from titan_video.optim.muon import orthogonalize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LOW = {"training__mixed_precision_param": "bfloat16", "debug__deterministic": "true"}


@pytest.mark.parametrize("tokens", [32, 45])  # a multiple of 16, or padded
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_matmuls_equal_the_emulated_ones(recipe, tokens):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    results = []
    for emulate in (False, True):
        torch.manual_seed(0)
        x, w = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (tokens, 128))
        y = float8_linear_fn(Float8(enable=True, recipe_name=recipe, emulate=emulate))(x, w)
        y.mul(torch.randn_like(y)).sum().backward()
        results.append((y, x.grad, w.grad))
    for real, emulated in zip(*results, strict=True):
        assert (real - emulated).norm() < 0.01 * emulated.norm()
    assert (results[0][0] - F.linear(x, w)).norm() < 0.08 * F.linear(x, w).norm()


def test_low_bit_states_equal_those_on_the_host():
    x = torch.randn(100, 200)
    codes, scales = (
        [torch.empty(shape, dtype=dtype, device=d) for d in ("cpu", "cuda")]
        for shape, dtype in (((100, 200), torch.uint8), ((100, 4), torch.float32))
    )
    for i, device in enumerate(("cpu", "cuda")):
        quantize(x.to(device), codes[i], scales[i], signed=True)
    assert torch.equal(scales[0], scales[1].cpu()) and (codes[0].int() - codes[1].cpu().int()).abs().max() <= 1
    torch.testing.assert_close(
        dequantize(codes[0], scales[0], True), dequantize(codes[1], scales[1], True).cpu(), rtol=0.2, atol=1e-3
    )
    assert torch.equal(stochastic_round(x, (3, 5), 200, 9), stochastic_round(x.cuda(), (3, 5), 200, 9).cpu())


@pytest.mark.parametrize("name, dtype", [case for case in CASES if case[0] != "Muon"])
def test_kernels_equal_the_plain_updates(name, dtype):
    check(name, dtype, "cuda")


def test_codes_of_the_kernels_are_those_of_plain_torch():
    check_codes("cuda")


def test_orthogonal_in_bfloat16():
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(512, 256, device="cuda").bfloat16()).float())
    assert singular.min() > 0.5 and singular.max() < 1.4


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer__name": "AdamW8bit"},
        {"optimizer__name": "Muon"},
        {"training__dtype": "bfloat16"},
        {"float8__enable": "true"},
        {"float8__enable": "true", "float8__recipe_name": "rowwise", "compile__enable": "true"},
        {
            "training__dtype": "bfloat16",
            "optimizer__name": "AdamW8bit",
            "optimizer__in_backward": "true",
            "training__max_norm": 0,
        },
    ],
)
def test_each_follows_adamw(options, bf16, cache, tmp_path):  # noqa: F811
    run = losses(tmp_path / "run", cache, **LOW, **options)
    assert run[0] == pytest.approx(bf16[0], rel=1e-2) and sum(run[-4:]) < 1.1 * sum(bf16[-4:])


def test_in_backward_is_the_same_run_and_resumes(cache, tmp_path):  # noqa: F811
    options = {**LOW, "training__max_norm": 0}
    plain = losses(tmp_path / "plain", cache, **options)
    losses(tmp_path / "run", cache, **options, optimizer__in_backward="true", training__steps=5)
    assert losses(tmp_path / "run", cache, **options, optimizer__in_backward="true") == plain
