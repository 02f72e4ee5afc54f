"""Attention: all backends give the same result, the chosen kernel runs, and what cannot run is refused."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.attention_cases import (
    BATCH,
    HEADS,
    LENGTH,
    TEXT,
    WIDTH,
    attention_by_softmax,
    count_attention_ops,
    joint_attention_by_softmax,
    joint_inputs,
    loss,
    pretend_gpu,
    tensors,
    text_mask,
)
from titan_video.config.job_config import ActivationCheckpoint
from titan_video.distributed.activation_checkpoint import apply_activation_checkpoint
from titan_video.kernels import attention, sdpa
from titan_video.kernels.attention import attend, attend_backward, merge, own_attention
from titan_video.models.hunyuan_video.blocks import JointInnerAttention
from titan_video.models.layers import InnerAttention
from titan_video.models.spec import ParallelPlan, StepLayout

CPU = torch.device("cpu")
FLASH, OWN = "aten::_scaled_dot_product_flash_attention_for_cpu", "titan_video::attention"


@pytest.fixture(autouse=True)
def auto_backend():
    torch._dynamo.reset()
    attention.set_backend("auto", CPU, torch.float32, WIDTH)
    yield
    attention.set_backend("auto", CPU, torch.float32, WIDTH)


class Executed(TorchDispatchMode):
    """Counts the operators that run. Entered first, it lies below the modes of checkpointing."""

    def __init__(self):
        super().__init__()
        self.runs = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func.name()] += 1
        return func(*args, **(kwargs or {}))


def layout(seq_len):
    return None if seq_len is None else StepLayout(seq_len)


# ---- values ----


@pytest.mark.parametrize(
    "backend, compiled", [("auto", False), ("flash", False), ("math", False), ("auto", True), ("math", True)]
)
def test_backends_equal_attention_by_softmax(backend, compiled):
    attention.set_backend(backend, CPU, torch.float64, WIDTH)
    inner = InnerAttention()
    if compiled:
        inner.compile(backend="aot_eager", fullgraph=True)
    for keys, seq_len in ((LENGTH, None), (TEXT, None), (LENGTH, 7)):
        q, k, v = tensors(LENGTH, keys, keys)
        out = inner(q, k, v, layout(seq_len))
        expected = attention_by_softmax(q, k[:, :seq_len], v[:, :seq_len])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        for ours, theirs in zip(*(torch.autograd.grad(loss(x), (q, k, v)) for x in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_joint_attention_ignores_masked_keys(backend, compiled):
    attention.set_backend(backend, CPU, torch.float64, WIDTH)
    inner = JointInnerAttention()
    if compiled:
        inner.compile(backend="aot_eager", fullgraph=True)
    for mask, seq_len in ((text_mask(), None), (text_mask(), 7), (torch.ones_like(text_mask()), None)):
        inputs = joint_inputs()
        out = inner(*inputs, mask, layout(seq_len))
        expected = joint_attention_by_softmax(*inputs, mask, seq_len or LENGTH)
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        for ours, theirs in zip(*(torch.autograd.grad(loss(*x), inputs) for x in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    unmasked = inner(*inputs)
    torch.testing.assert_close(unmasked[0], expected[0], rtol=0, atol=1e-13)


def test_bfloat16_is_rounded_once_after_the_parts_are_merged():
    inputs = joint_inputs(torch.bfloat16)
    out = JointInnerAttention()(*inputs, text_mask())
    expected = joint_attention_by_softmax(*(x.double() for x in inputs), text_mask(), LENGTH)
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=2**-8)


def test_text_whose_keys_are_all_masked_has_no_weight():
    q, k, v, more_k, more_v = tensors(LENGTH, LENGTH, LENGTH, TEXT, TEXT)
    mask = text_mask()
    mask[0] = False
    out = attention.joint_attention(q, k, v, more_k, more_v, mask)
    torch.testing.assert_close(out[0], attention.attention(q, k, v)[0], rtol=0, atol=1e-14)


def test_merged_parts_equal_attention_to_all_keys():
    q, k, v, grad = (x.detach() for x in tensors(LENGTH, LENGTH, LENGTH, LENGTH))
    whole, whole_lse = attend(q, k, v)
    parts = [attend(q, k[:, rows], v[:, rows]) for rows in (slice(0, 2), slice(2, None))]
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-14)
    grads = [attend_backward(grad, q, k[:, rows], v[:, rows], out, lse) for rows in (slice(0, 2), slice(2, None))]
    expected = attend_backward(grad, q, k, v, whole, whole_lse)
    for got, want in zip(
        (grads[0][0] + grads[1][0], *(torch.cat(pair, dim=1) for pair in zip(*(g[1:] for g in grads), strict=True))),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_own_operator_is_consistent_and_counts_its_flops():
    q, k, v, more_k, more_v = tensors(LENGTH, LENGTH, LENGTH, TEXT, TEXT)
    torch.library.opcheck(own_attention, (q, k, v))
    torch.library.opcheck(own_attention, (q, k, v, more_k, more_v, text_mask()))
    for more, keys in (((), LENGTH), ((more_k, more_v, text_mask()), LENGTH + TEXT)):
        with FlopCounterMode(display=False) as counter:
            out = own_attention(q, k, v, *more)[0]
            forward = counter.get_total_flops()
            out.sum().backward()
        matmul = 2 * BATCH * LENGTH * keys * HEADS * WIDTH
        assert (forward, counter.get_total_flops() - forward) == (2 * matmul, 5 * matmul)


# ---- what runs ----


@pytest.mark.parametrize("backend, kernel", [("auto", FLASH), ("flash", FLASH), ("math", OWN)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_chosen_kernel_runs(backend, kernel, compiled):
    attention.set_backend(backend, CPU, torch.float32, WIDTH)
    inner, joint = InnerAttention(), JointInnerAttention()
    if compiled:
        inner.compile(backend="aot_eager", fullgraph=True)
        joint.compile(backend="aot_eager", fullgraph=True)
    runs = count_attention_ops(lambda: loss(inner(*tensors(9, 9, 9, dtype=torch.float32))).backward())
    assert runs == {kernel: 1, f"{kernel}_backward": 1}
    runs = count_attention_ops(lambda: loss(*joint(*joint_inputs(torch.float32), text_mask())).backward())
    inside = {FLASH: 2, f"{FLASH}_backward": 2} if kernel == FLASH else {}
    assert runs == {OWN: 1, f"{OWN}_backward": 1, **inside}


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_saved_by_selective_checkpointing_is_not_recomputed(backend, compiled):
    attention.set_backend(backend, CPU, torch.float32, WIDTH)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.joint = InnerAttention(), JointInnerAttention()

        def forward(self, q, *rest):
            x = self.inner(q * 2, *rest[:2])
            return self.joint(x.sin(), *rest, text_mask())

    counts, reference = {}, []
    for mode in ("none", "full", "selective"):
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleDict({"0": Block()})
        section = ActivationCheckpoint(mode=mode, save=("attention",), save_min_kv=1)
        apply_activation_checkpoint(model, ParallelPlan(blocks=("blocks",)), section)
        if compiled:
            model.blocks["0"].compile(backend="aot_eager", fullgraph=True)
        inputs, grads = joint_inputs(torch.float32), []

        def step():
            grads[:] = torch.autograd.grad(loss(*model.blocks["0"](*inputs)), inputs)

        if compiled:
            counts[mode] = count_attention_ops(step)
        else:
            with Executed() as executed:
                step()
            counts[mode] = executed.runs
        reference = reference or list(grads)
        for ours, theirs in zip(grads, reference, strict=True):
            torch.testing.assert_close(ours, theirs)
    per_op = {mode: [count.get(name, 0) for name in (FLASH, OWN)] for mode, count in counts.items()}
    # Only the profiler sees torch's two kernels inside our operator.
    once = [0, 2] if backend == "math" else [3, 1] if compiled else [1, 1]
    assert per_op == {"none": once, "full": [2 * n for n in once], "selective": once}


def test_compiled_once_for_all_lengths():
    inner = InnerAttention()
    inner.compile(backend="eager", fullgraph=True)
    for length in (8, 11):
        inner(*tensors(length, length, length))
    with torch.compiler.set_stance("fail_on_recompile"):
        inner(*tensors(13, 13, 13))


# ---- what is refused ----


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "flash3", "flash4", "flex"])
def test_gpu_backends_are_refused_on_a_cpu(backend):
    with pytest.raises(
        ValueError, match=rf"model.attention: {backend}, but it runs on a GPU.*; legal here: auto, flash, math$"
    ):
        attention.set_backend(backend, CPU, torch.bfloat16, 128)
    assert attention._order == ("flash",)  # as before


@pytest.mark.parametrize(
    "backend, arguments, reason",
    [
        (
            "flash",
            (torch.bfloat16, 128, True),
            "takes no mask.*legal for this model: auto, cudnn, efficient, flex, math$",
        ),
        ("flash4", (torch.bfloat16, 128, True), "takes no mask"),
        (
            "cudnn",
            (torch.float32, 128, False),
            "float32 .*mixed_precision_param.*legal for this model: auto, efficient, flex, math$",
        ),
        ("efficient", (torch.float64, 128, False), "float64.*legal for this model: auto, math$"),
        ("cudnn", (torch.bfloat16, 160, False), "160 wide; legal for this model: auto, flash, efficient, flex, math$"),
        ("flash", (torch.bfloat16, 20, False), "20 wide; legal for this model: auto, math$"),
    ],
)
def test_models_that_a_backend_cannot_serve_are_refused(backend, arguments, reason):
    with pytest.raises(ValueError, match=f"model.attention: {backend}, but it .*{reason}"):
        attention.check(backend, *arguments)
    attention.check("auto", *arguments)
    attention.check("math", *arguments)


@pytest.mark.parametrize(
    "capability, deterministic, expected",
    [
        ((9, 0), False, ("cudnn", "flash", "efficient", "math")),
        ((10, 0), False, ("cudnn", "flash", "efficient", "math")),
        ((8, 0), False, ("flash", "efficient", "cudnn", "math")),
        ((12, 0), False, ("flash", "efficient", "cudnn", "math")),
        ((9, 0), True, ("flash", "efficient", "math")),
        ((7, 5), False, ("flash", "efficient", "math")),
    ],
)
def test_auto_depends_on_the_gpu(monkeypatch, capability, deterministic, expected):
    pretend_gpu(monkeypatch, capability, deterministic)
    cuda = torch.device("cuda")
    description = attention.set_backend("auto", cuda, torch.bfloat16, 128, masked=True)
    assert attention._order == expected
    assert description == f"{expected[0]}, for masked keys efficient"
    assert attention.set_backend("auto", cuda, torch.float32, 128) == "efficient"
    assert attention.set_backend("auto", cuda, torch.float64, 128, masked=True) == "math"
    assert attention._select_backend(expected, cuda, torch.bfloat16, 128, True) == "efficient"


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_a_named_backend_serves_models_without_masks(monkeypatch, name):
    pretend_gpu(monkeypatch, (9, 0))
    assert attention.set_backend(name, torch.device("cuda"), torch.bfloat16, 128) == name


def test_cudnn_is_refused_where_it_is_not_deterministic(monkeypatch):
    pretend_gpu(monkeypatch, (9, 0), deterministic=True)
    with pytest.raises(ValueError, match="cudnn, but its backward is not deterministic"):
        attention.set_backend("cudnn", torch.device("cuda"), torch.bfloat16, 128)


def test_without_the_optional_part_only_its_backends_are_missing(monkeypatch):
    monkeypatch.setattr(attention, "BACKENDS", dict(sdpa.BACKENDS))
    monkeypatch.setitem(sys.modules, attention.OPTIONAL_PART, None)  # import fails
    pretend_gpu(monkeypatch, (9, 0))
    for refuse in (attention.check, lambda name, *model: attention.set_backend(name, torch.device("cuda"), *model)):
        with pytest.raises(ValueError, match='model.attention = "flex": needs the optional part'):
            refuse("flex", torch.bfloat16, 128, False)
        with pytest.raises(ValueError, match=r"cudnn, but .*legal .*: auto, efficient, math$"):
            refuse("cudnn", torch.float32, 128, False)
