"""The attention backends: what runs, what is refused, and that all give the same."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from titan_video.config.job_config import ActivationCheckpoint
from titan_video.distributed.activation_checkpoint import apply_activation_checkpoint
from titan_video.kernels import attention
from titan_video.kernels.attention import attend, attend_backward, key_blocks, merge, own_attention
from titan_video.models.layers import InnerAttention, JointInnerAttention
from titan_video.models.spec import ParallelPlan

CPU = torch.device("cpu")
FLASH, OWN = "aten::_scaled_dot_product_flash_attention_for_cpu", "titan_video::attention"
BATCH, LENGTH, TEXT, HEADS, WIDTH = 2, 9, 5, 3, 16


@pytest.fixture(autouse=True)
def automatic():
    torch._dynamo.reset()
    attention.set_backend("auto", CPU, torch.float32, WIDTH)
    yield
    attention.set_backend("auto", CPU, torch.float32, WIDTH)


def tensors(*lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(BATCH, n, HEADS, WIDTH, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
        for n in lengths
    ]


def text_mask():
    return torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def joint_inputs(dtype=torch.float64):
    return tensors(*[LENGTH] * 3, *[TEXT] * 3, dtype=dtype)


def kernels_run(function):
    """How often each attention operator runs, by name, the second time; the profiler sees into compiled code and into
    our own operator.
    """
    function()  # compiles: what is traced is no run
    with torch.profiler.profile() as profile:
        function()
    return {
        e.key: e.count
        for e in profile.key_averages()
        if "attention" in e.key and e.key.startswith(("aten::", "titan_video::"))
    }


class Executed(TorchDispatchMode):
    """Entered first, it is beneath the modes of checkpointing, and sees what these do not answer themselves."""

    def __init__(self):
        super().__init__()
        self.runs = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func.name()] += 1
        return func(*args, **(kwargs or {}))


def written_out(q, k, v, keys=None):
    scores = torch.einsum("blhk,bshk->bhls", q, k) * WIDTH**-0.5
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    return torch.einsum("bhls,bshk->blhk", scores.softmax(-1), v)


def joint_written_out(q, k, v, text_q, text_k, text_v, mask, seq_len):
    keys = torch.ones(BATCH, seq_len, dtype=torch.bool)
    keys = torch.cat([keys, mask], dim=1)
    out = written_out(
        torch.cat([q, text_q], 1), torch.cat([k[:, :seq_len], text_k], 1), torch.cat([v[:, :seq_len], text_v], 1), keys
    )
    return out[:, :LENGTH], out[:, LENGTH:]


def loss(*outputs):
    return sum((x * torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()).sum() for x in outputs)


# ---- values ----


@pytest.mark.parametrize(
    "backend, compiled", [("auto", False), ("flash", False), ("math", False), ("auto", True), ("math", True)]
)
def test_backends_equal_attention_written_out(backend, compiled):
    attention.set_backend(backend, CPU, torch.float64, WIDTH)
    core = InnerAttention()
    if compiled:
        core.compile(backend="aot_eager", fullgraph=True)
    for keys, seq_len in ((LENGTH, None), (TEXT, None), (LENGTH, 7)):
        q, k, v = tensors(LENGTH, keys, keys)
        out = core(q, k, v, seq_len)
        expected = written_out(q, k[:, :seq_len], v[:, :seq_len])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        for ours, theirs in zip(*(torch.autograd.grad(loss(x), (q, k, v)) for x in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_joint_attention_leaves_out_what_the_mask_does(backend, compiled):
    attention.set_backend(backend, CPU, torch.float64, WIDTH)
    core = JointInnerAttention()
    if compiled:
        core.compile(backend="aot_eager", fullgraph=True)
    for mask, seq_len in ((text_mask(), None), (text_mask(), 7), (torch.ones_like(text_mask()), None)):
        inputs = joint_inputs()
        out = core(*inputs, mask, seq_len)
        expected = joint_written_out(*inputs, mask, seq_len or LENGTH)
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        for ours, theirs in zip(*(torch.autograd.grad(loss(*x), inputs) for x in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    whole = core(*inputs)  # without a mask
    torch.testing.assert_close(whole[0], expected[0], rtol=0, atol=1e-13)


def test_bfloat16_is_rounded_once_after_the_parts_are_merged():
    inputs = joint_inputs(torch.bfloat16)
    out = JointInnerAttention()(*inputs, text_mask())
    expected = joint_written_out(*(x.double() for x in inputs), text_mask(), LENGTH)
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=2**-8)


def test_a_text_of_which_nothing_counts_has_no_weight():
    q, k, v, more_k, more_v = tensors(LENGTH, LENGTH, LENGTH, TEXT, TEXT)
    mask = text_mask()
    mask[0] = False
    out = attention.joint_attention(q, k, v, more_k, more_v, mask)
    torch.testing.assert_close(out[0], attention.attention(q, k, v)[0], rtol=0, atol=1e-14)


def test_parts_merge_to_the_whole():
    q, k, v, grad = (x.detach() for x in tensors(LENGTH, LENGTH, LENGTH, LENGTH))
    whole, whole_lse = attend(q, k, v)
    parts = [attend(q, k[:, rows], v[:, rows]) for rows in (slice(0, 2), slice(2, None))]
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-14)
    grads = [attend_backward(grad, q, k[:, rows], v[:, rows], out, lse) for rows in (slice(0, 2), slice(2, None))]
    expected = attend_backward(grad, q, k, v, whole, whole_lse)
    for got, want in zip(
        (grads[0][0] + grads[1][0], *(torch.cat(pair, dim=1) for pair in zip(*(g[1:] for g in grads)))),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_own_operator_is_well_formed_and_counts_its_flops():
    q, k, v, more_k, more_v = tensors(LENGTH, LENGTH, LENGTH, TEXT, TEXT)
    torch.library.opcheck(own_attention, (q, k, v))
    torch.library.opcheck(own_attention, (q, k, v, more_k, more_v, text_mask()))
    for more, keys in (((), LENGTH), ((more_k, more_v, text_mask()), LENGTH + TEXT)):
        with FlopCounterMode(display=False) as counter:
            out = own_attention(q, k, v, *more)[0]
            forward = counter.get_total_flops()
            out.sum().backward()
        product = 2 * BATCH * LENGTH * keys * HEADS * WIDTH
        assert (forward, counter.get_total_flops() - forward) == (2 * product, 5 * product)


@pytest.mark.parametrize("masked", [False, True])
def test_math_kernel_equals_the_fused_one(masked):
    q, k, v, grad = (x.detach().transpose(1, 2) for x in tensors(LENGTH, TEXT, TEXT, LENGTH))
    bias = attention._bias(text_mask(), q) if masked else None
    out, lse = attention._cpu(q, k, v, bias)
    for fused, plain in zip((out, lse), attention._math(q, k, v, bias), strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-14)
    for fused, plain in zip(
        *(f(grad, q, k, v, out, lse, bias) for f in (attention._cpu_backward, attention._math_backward)), strict=True
    ):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "kernel, masked", [("flash", False), ("cudnn", False), ("cudnn", True), ("efficient", False), ("efficient", True)]
)
def test_cuda_kernels_are_called_as_they_are_declared(kernel, masked):
    """Without a GPU: shapes only. tests/gpu_tests has the values."""
    q, k = (torch.empty(2, 3, n, 16, device="meta", dtype=torch.bfloat16) for n in (40, 24))
    bias = attention._bias(torch.ones(2, 24, device="meta", dtype=torch.bool), q) if masked else None
    forward, backward = attention._KERNELS[kernel]
    out, lse = forward(q, k, k, bias)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in backward(q, q, k, k, out, lse, bias)] == [q.shape, k.shape, k.shape]


# ---- what runs ----


@pytest.mark.parametrize("backend, kernel", [("auto", FLASH), ("flash", FLASH), ("math", OWN)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_that_runs_is_the_one_chosen(backend, kernel, compiled):
    attention.set_backend(backend, CPU, torch.float32, WIDTH)
    core, joint = InnerAttention(), JointInnerAttention()
    if compiled:
        core.compile(backend="aot_eager", fullgraph=True)
        joint.compile(backend="aot_eager", fullgraph=True)
    runs = kernels_run(lambda: loss(core(*tensors(9, 9, 9, dtype=torch.float32))).backward())
    assert runs == {kernel: 1, f"{kernel}_backward": 1}
    runs = kernels_run(lambda: loss(*joint(*joint_inputs(torch.float32), text_mask())).backward())
    inside = {FLASH: 2, f"{FLASH}_backward": 2} if kernel == FLASH else {}
    assert runs == {OWN: 1, f"{OWN}_backward": 1, **inside}


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_selective_checkpointing_keeps_is_not_run_again(backend, compiled):
    attention.set_backend(backend, CPU, torch.float32, WIDTH)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.joint = InnerAttention(), JointInnerAttention()

        def forward(self, q, *rest):
            x = self.core(q * 2, *rest[:2])
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
            counts[mode] = kernels_run(step)
        else:
            with Executed() as executed:
                step()
            counts[mode] = executed.runs
        reference = reference or list(grads)
        for ours, theirs in zip(grads, reference, strict=True):
            torch.testing.assert_close(ours, theirs)
    per_op = {mode: [count.get(name, 0) for name in (FLASH, OWN)] for mode, count in counts.items()}
    # Only the profiler sees torch's two inside of ours.
    once = [0, 2] if backend == "math" else [3, 1] if compiled else [1, 1]
    assert per_op == {"none": once, "full": [2 * n for n in once], "selective": once}


def test_compiled_once_for_all_lengths():
    core = InnerAttention()
    core.compile(backend="eager", fullgraph=True)
    for length in (8, 11):
        core(*tensors(length, length, length))
    with torch.compiler.set_stance("fail_on_recompile"):
        core(*tensors(13, 13, 13))


# ---- what is refused ----


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "flash3", "flash4", "flex"])
def test_backends_of_gpus_are_refused_on_a_cpu(backend):
    with pytest.raises(
        ValueError, match=rf"model.attention: {backend}, but it runs on a GPU.*; legal here: auto, flash, math$"
    ):
        attention.set_backend(backend, CPU, torch.bfloat16, 128)
    assert attention._in_use == ("flash",)  # as before


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


class Gpu:
    """What `use` asks of a GPU."""

    def __init__(self, monkeypatch, capability, deterministic=False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)


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
def test_auto_goes_by_the_gpu(monkeypatch, capability, deterministic, expected):
    Gpu(monkeypatch, capability, deterministic)
    cuda = torch.device("cuda")
    words = attention.set_backend("auto", cuda, torch.bfloat16, 128, masked=True)
    assert attention._in_use == expected
    assert words == f"{expected[0]}, for masked keys efficient"
    assert attention.set_backend("auto", cuda, torch.float32, 128) == "efficient"
    assert attention.set_backend("auto", cuda, torch.float64, 128, masked=True) == "math"
    assert attention._select_backend(expected, cuda, torch.bfloat16, 128, True) == "efficient"


def test_a_gpu_that_a_backend_does_not_run_on_is_named(monkeypatch):
    Gpu(monkeypatch, (8, 0))
    cuda = torch.device("cuda")
    with pytest.raises(
        ValueError,
        match=r"flash3, but it does not run on this GPU \(a GPU\); legal here: auto, cudnn, flash, efficient, flex, "
        r"math$",
    ):
        attention.set_backend("flash3", cuda, torch.bfloat16, 128)
    Gpu(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match="flash3, but the package flash_attn_interface is not installed"):
        attention.set_backend("flash3", cuda, torch.bfloat16, 128)
    monkeypatch.setattr(attention, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="flash4, but the package flash_attn does not work here .*No module"):
        attention.set_backend("flash4", cuda, torch.bfloat16, 128)
    Gpu(monkeypatch, (9, 0), deterministic=True)
    with pytest.raises(ValueError, match="cudnn, but its backward is not deterministic"):
        attention.set_backend("cudnn", cuda, torch.bfloat16, 128)


# ---- flex ----


def test_blocks_of_keys_are_those_that_count():
    lengths = torch.tensor([[300], [256], [1]])
    blocks = key_blocks(torch.arange(300).expand(3, -1) < lengths, 200)
    assert blocks.to_dense()[:, 0].tolist() == [[[1, 1, 1]] * 2, [[1, 1, 0]] * 2, [[1, 0, 0]] * 2]
    assert blocks.full_kv_num_blocks[:, 0, 0].tolist() == [2, 2, 0]  # the last block of 300 keys is not a whole one
    assert blocks.kv_indices[2, 0, 0, 0] == 0 and blocks.kv_indices[0, 0, 0, 0] == 2
    assert blocks.seq_lengths == (200, 300)


def test_flex_leaves_out_what_the_mask_does(monkeypatch):
    """Forward only: it has no backward on a CPU. Not compiled: it is written out then, from the same mask."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", flex_attention)
    monkeypatch.setattr(attention, "_in_use", ("flex",))
    with torch.no_grad():
        inputs = [x.detach() for x in joint_inputs(torch.float32)]
        for ours, theirs in zip(
            JointInnerAttention()(*inputs, text_mask(), 7), joint_written_out(*inputs, text_mask(), 7), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        q, k, v = inputs[:3]
        torch.testing.assert_close(InnerAttention()(q, k, v), written_out(q, k, v))
