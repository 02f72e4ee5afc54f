"""titan_video::grouped_linear: equal to a loop of matmuls, with gradients and FLOPs, and no row without an expert."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from titan_video.kernels.grouped import _clear_without_rows, grouped_linear, reference

COUNTS = {"some": [3, 0, 5, 2], "one": [10, 0, 0, 0], "none": [0, 0, 0, 0]}
WIDTHS = {"aligned": (16, 24), "unaligned": (9, 7)}


def drawn(num_rows, widths, dtype):
    g = torch.Generator().manual_seed(0)
    d, f = widths
    x, w, b = (torch.randn(*shape, generator=g) for shape in ((num_rows, d), (4, d, f), (4, f)))
    return [t.to(dtype).requires_grad_() for t in (x, w, b)], torch.randn(num_rows, f, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("counts", COUNTS)
def test_equals_the_loop_with_gradients(counts, widths, dtype):
    counts_E = torch.tensor(COUNTS[counts])
    num_rows = sum(COUNTS[counts])
    inputs, grad = drawn(num_rows, WIDTHS[widths], dtype)
    found = grouped_linear(*inputs, counts_E, num_rows)
    expected = reference(*inputs, counts_E)
    assert torch.equal(found, expected)
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    if counts == "some":
        x, w, b = inputs
        assert torch.allclose(found[3:8].double(), (x[3:8] @ w[2] + b[2]).double(), rtol=1e-2, atol=1e-2)


def test_gradients_of_experts_without_rows_are_cleared():
    """What the device leaves there may be anything."""
    w, b = torch.full((4, 2, 3), torch.nan), torch.full((4, 3), torch.inf)
    w[[0, 2, 3]], b[[0, 2, 3]] = 1.0, 2.0
    _clear_without_rows((w, b), torch.tensor(COUNTS["some"]))
    assert w.sum((1, 2)).tolist() == [6, 0, 6, 6] and b.sum(1).tolist() == [6, 0, 6, 6]


@pytest.mark.parametrize("rows", [9, 11])
def test_rows_without_an_expert_are_refused(rows):
    inputs, _ = drawn(rows, (16, 24), torch.float32)
    with pytest.raises(ValueError, match=f"{rows} rows for experts that take 10"):
        grouped_linear(*inputs, torch.tensor(COUNTS["some"]), 10)
    with pytest.raises(ValueError, match=f"for experts that take {rows}"):
        grouped_linear(*inputs, torch.tensor(COUNTS["some"]), rows)  # nor counts with another sum


@pytest.mark.parametrize("widths", WIDTHS)
def test_flops(widths):
    inputs, grad = drawn(10, WIDTHS[widths], torch.float32)
    product = 2 * 10 * WIDTHS[widths][0] * WIDTHS[widths][1]
    with FlopCounterMode(display=False) as counter:
        y = grouped_linear(*inputs, torch.tensor(COUNTS["some"]), 10)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        y.backward(grad)
    assert counter.get_total_flops() == 2 * product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operator_and_its_fake_agree(dtype):
    inputs, _ = drawn(10, (16, 24), dtype)
    torch.library.opcheck(grouped_linear, (*inputs, torch.tensor(COUNTS["some"]), 10))
