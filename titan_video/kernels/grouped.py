"""`titan_video::grouped_linear`: one Linear per expert, each for its own consecutive rows.

    rows of expert 0   x[0 : c0]         @ w[0] + b[0]
    rows of expert 1   x[c0 : c0 + c1]   @ w[1] + b[1]          c = counts
    ...

Float32, bfloat16 and float16 run on `torch.nn.functional.grouped_mm`, on a CPU and on a GPU. It does not take float64
or rows that are no multiple of 16 bytes: these run on the reference, a loop of matmuls, which has to know the counts on
the host.

`grouped_mm` leaves rows beyond the last count uninitialised, here and in gradients. So the caller says how many rows
the counts sum to, which the host knows without waiting for the device, and another number of rows is an error.

Letters: N rows, E experts, D inputs, F outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ALIGNMENT = 16  # bytes


@torch.library.custom_op("titan_video::grouped_linear", mutates_args=())
def grouped_linear(x_ND: Tensor, w_EDF: Tensor, b_EF: Tensor, counts_E: Tensor, num_rows: int) -> Tensor:
    """[N, F]. x: sorted by expert. counts: rows of each expert, integers on x's device. num_rows: their sum.

    ValueError: x has another number of rows; on a CPU also if the counts have another sum.
    """
    _check(x_ND, counts_E, num_rows)
    if not _is_fast(x_ND, w_EDF):
        return reference(x_ND, w_EDF, b_EF, counts_E)
    y_NF = F.grouped_mm(x_ND.contiguous(), w_EDF.contiguous(), offs=_ends(counts_E))
    return y_NF + b_EF.repeat_interleave(counts_E, dim=0, output_size=num_rows)


@grouped_linear.register_fake
def _(x_ND, w_EDF, b_EF, counts_E, num_rows):
    return x_ND.new_empty(x_ND.shape[0], w_EDF.shape[2])


@torch.library.custom_op("titan_video::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad_NF: Tensor, x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and b."""
    grad_NF, x_ND = grad_NF.contiguous(), x_ND.contiguous()
    if not _is_fast(x_ND, w_EDF):
        return _reference_backward(grad_NF, x_ND, w_EDF, counts_E)
    ends_E = _ends(counts_E)
    grad_x_ND = F.grouped_mm(grad_NF, w_EDF.transpose(1, 2), offs=ends_E)
    grad_w_EDF = F.grouped_mm(x_ND.t(), grad_NF, offs=ends_E)
    grad_b_EF = _sums(grad_NF, counts_E, ends_E)
    if x_ND.is_cuda and torch.cuda.get_device_capability(x_ND.device)[0] >= 10:
        _clear_without_rows((grad_w_EDF, grad_b_EF), counts_E)
    return grad_x_ND, grad_w_EDF, grad_b_EF


@grouped_linear_backward.register_fake
def _(grad_NF, x_ND, w_EDF, counts_E, num_rows):
    shape_EF = w_EDF.shape[0], w_EDF.shape[2]
    return (
        torch.empty_like(x_ND, memory_format=torch.contiguous_format),
        w_EDF.new_empty(w_EDF.shape),
        w_EDF.new_empty(shape_EF),
    )


def _setup_context(ctx, inputs, output):
    x_ND, w_EDF, _, counts_E, ctx.num_rows = inputs
    ctx.save_for_backward(x_ND, w_EDF, counts_E)


def _backward(ctx, grad_NF):
    x_ND, w_EDF, counts_E = ctx.saved_tensors
    return *grouped_linear_backward(grad_NF, x_ND, w_EDF, counts_E, ctx.num_rows), None, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)


# FLOPs, 2 per multiply-add: each row meets the matrix of one expert. Backward has two such products.


@register_flop_formula(torch.ops.titan_video.grouped_linear)
def _flops(x, w, *args, **kwargs) -> int:
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.titan_video.grouped_linear_backward)
def _backward_flops(grad, x, w, *args, **kwargs) -> int:
    return 2 * 2 * x[0] * w[1] * w[2]


def reference(x_ND: Tensor, w_EDF: Tensor, b_EF: Tensor, counts_E: Tensor) -> Tensor:
    """The same as a loop of matmuls, for any type. The host waits for the counts."""
    parts = x_ND.split(counts_E.tolist())
    return torch.cat([part @ w + b for part, w, b in zip(parts, w_EDF, b_EF, strict=True)])


def _reference_backward(
    grad_NF: Tensor, x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    counts = counts_E.tolist()
    grads, parts = grad_NF.split(counts), x_ND.split(counts)
    grad_x_ND = torch.cat([grad @ w.t() for grad, w in zip(grads, w_EDF, strict=True)])
    grad_w_EDF = torch.stack([part.t() @ grad for part, grad in zip(parts, grads, strict=True)])
    return grad_x_ND, grad_w_EDF, torch.stack([grad.sum(0) for grad in grads])


def _sums(grad_NF: Tensor, counts_E: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of each expert's rows, [E, F]."""
    if grad_NF.device.type == "cpu":
        return torch.stack([grad.sum(0) for grad in grad_NF.split(counts_E.tolist())])
    # As a product with ones, whose sums are float32 and in one order: an index_add would add in a random order.
    ones = grad_NF.new_ones(grad_NF.shape[0], _ALIGNMENT)
    return F.grouped_mm(ones.t(), grad_NF, offs=ends_E)[:, 0].contiguous()


def _clear_without_rows(grads_E: tuple[Tensor, ...], counts_E: Tensor) -> None:
    """Zero what belongs to experts without rows, in place. On Blackwell `grouped_mm` leaves it unwritten (pytorch issue
    172439).
    """
    for grad in grads_E:
        grad.masked_fill_((counts_E == 0).view(-1, *[1] * (grad.ndim - 1)), 0)


def _check(x_ND: Tensor, counts_E: Tensor, num_rows: int) -> None:
    found = {x_ND.shape[0]} | ({int(counts_E.sum())} if counts_E.device.type == "cpu" else set())
    if found != {num_rows}:
        raise ValueError(
            f"grouped_linear: {x_ND.shape[0]} rows for experts that take {num_rows}; rows beyond the last expert's "
            f"would be uninitialised memory"
        )


def _is_fast(x_ND: Tensor, w_EDF: Tensor) -> bool:
    if not x_ND.shape[0]:  # of a rank whose experts no token has chosen; `grouped_mm` refuses them
        return False
    widths = (size * x_ND.element_size() for size in w_EDF.shape[1:])
    return x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16) and not any(w % _ALIGNMENT for w in widths)


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0, dtype=torch.int32)
