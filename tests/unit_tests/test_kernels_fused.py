"""The fused operators without a GPU: in closed form, in Triton's interpreter, and in the models that call them."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from tests.kernel_cases import EPS, MERGES, cases, check, check_merge, modulation, rand
from titan_video import kernels
from titan_video.kernels import reference
from titan_video.kernels.triton import layer_norm as fused_layer_norm
from titan_video.kernels.triton import layer_norm_launch
from titan_video.kernels.triton import rms_norm as fused_rms_norm
from titan_video.models.hunyuan_video.model import HunyuanVideoArgs, HunyuanVideoModel
from titan_video.models.layers import positions
from titan_video.models.spec import TokenShape
from titan_video.models.wan.model import WanArgs, WanModel

B, L, D = 2, 5, 96


def numbers(version_string):
    return tuple(int(n) for n in version_string.split(".")[:2])


TRITON = numbers(version("triton")) if find_spec("triton") else None
OPS = torch.ops.titan_video


@pytest.fixture
def fused():
    kernels.set_backend("triton")
    yield
    kernels.set_backend("torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("number", range(len(list(cases(B, L, D, torch.float32)))))
def test_closed_form_equals_the_definition(number, dtype):
    check(*list(cases(B, L, D, dtype))[number], dtype)


@pytest.mark.skipif(TRITON is None, reason="needs the triton package")
@pytest.mark.skipif(
    TRITON is not None and TRITON < (3, 7) and numbers(np.__version__) >= (2, 4),
    reason="Triton 3.6 interprets with NumPy before 2.4",
)
@pytest.mark.parametrize("which, least", [("some", 90), pytest.param("all", 129, marks=pytest.mark.slow)])
def test_kernels_equal_the_definition_in_the_interpreter(which, least):
    """Forward and backward. In a process of its own: the interpreter is chosen when Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernel_cases", which]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[0]) >= least  # cases


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", MERGES, ids=str)
def test_merging_attentions_in_one_pass_equals_the_plain_operators(sizes, transposed):
    check_merge(*sizes, transposed=transposed)


def test_attention_to_masked_text_merges_in_one_pass(monkeypatch, fused):
    """HunyuanVideo's joint attention, on any device; the result is the plain one."""
    q, k, v = (rand(2, 6, 3, 32, seed=i, dtype=torch.bfloat16, grad=False) for i in range(3))
    mask, calls = torch.tensor([[True, True, False], [True, False, False]]), []
    merge = kernels._fused["merge_attention"]
    monkeypatch.setitem(kernels._fused, "merge_attention", lambda *args: calls.append(1) or merge(*args))
    found = OPS.attention(q, k, v, k[:, :3], v[:, :3], mask)
    assert len(calls) == 1
    kernels.set_backend("torch")
    plain = OPS.attention(q, k, v, k[:, :3], v[:, :3], mask)
    assert len(calls) == 1 and all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


def op_calls():
    """(operator, arguments) of each forward and backward operator."""
    x, y, dout = (rand(B, L, D, seed=i, dtype=torch.bfloat16) for i in range(3))
    rows, cond_mask = modulation("two rows and a mask", B, L, D, "cpu")
    shift, scale, gate = (r.detach().requires_grad_() for r in rows.unbind(2))
    weight, bias = (rand(1, 1, D, seed=i) for i in (3, 4))
    mean, rstd = rand(B, L, seed=5, grad=False), rand(B, L, seed=6, grad=False).abs()
    yield OPS.norm, (x, scale, shift, cond_mask, False, EPS)
    yield OPS.norm, (x, weight, bias, None, True, EPS)
    yield OPS.norm_backward, (None, dout.detach(), x.detach(), scale.detach(), cond_mask, mean, rstd, False, True)
    yield OPS.norm_backward, (dout.detach(), dout.detach(), x.detach(), weight.detach(), None, mean, rstd, True, False)
    y_bias = rand(D, seed=7)
    yield OPS.residual_norm, (x, y, gate, scale, shift, cond_mask, y_bias, False, EPS)
    yield OPS.residual_norm, (x, y, None, weight, bias, None, None, True, EPS)
    yield (
        OPS.residual_norm_backward,
        (
            dout.detach(),
            dout.detach(),
            x.detach(),
            y.detach(),
            gate.detach(),
            scale.detach(),
            cond_mask,
            mean,
            rstd,
            False,
            True,
            True,
            torch.bfloat16,
        ),
    )
    yield (
        OPS.residual_norm_backward,
        (
            dout.detach(),
            dout.detach(),
            x.detach(),
            None,
            None,
            weight.detach(),
            None,
            mean,
            rstd,
            True,
            False,
            False,
            None,
        ),
    )
    yield OPS.gated_residual, (x, y, gate, cond_mask)
    yield OPS.gated_residual, (x, y, gate, cond_mask, y_bias)
    yield OPS.gated_residual_backward, (dout.detach(), y.detach(), gate.detach(), cond_mask, True, torch.float32)
    yield OPS.gelu_backward, (dout.detach(), x.detach(), True, torch.bfloat16)
    yield OPS.gelu_backward, (dout.detach(), x.detach(), False, None)
    heads, w, angles = rand(B, L, 3, 32, seed=8), rand(32, seed=9), rand(1, L, 16, seed=10, grad=False)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    yield OPS.rms_norm, (heads, w, freqs_cis, None, EPS)
    plain, w_plain, rstd = heads.detach(), w.detach(), rand(B, L, 3, seed=12, grad=False)
    yield OPS.rms_norm_pair, (plain, plain, w_plain, w_plain, freqs_cis, EPS)
    for joint in (True, False):
        args = (plain, plain, plain, plain, plain, w_plain, w_plain, freqs_cis, rstd, rstd, joint)
        yield OPS.project_backward, args
    yield OPS.rms_norm, (heads, rand(96, seed=9), None, rand(B, L, 1, seed=11).detach().abs().requires_grad_(), EPS)
    yield (
        OPS.rms_norm_backward,
        (plain, plain, w_plain, freqs_cis, rstd, False, True),
    )
    yield (
        OPS.rms_norm_backward,
        (
            heads.detach(),
            heads.detach(),
            rand(96, seed=9).detach(),
            None,
            rand(B, L, 1, seed=12, grad=False),
            True,
            False,
        ),
    )


@pytest.mark.parametrize("op, args", list(op_calls()), ids=lambda v: getattr(v, "__name__", ""))
def test_operators_are_declared_as_they_behave(op, args):
    """Schema, shapes under tracing, gradients traced and not."""
    torch.library.opcheck(op.default, args)


def saved_bytes(run):
    """(bytes that autograd saves, each tensor once; result of run())"""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(saved.values()), out


def test_only_inputs_and_statistics_are_saved():
    x, y = (rand(B, L, D, seed=i, dtype=torch.bfloat16) for i in range(2))
    row, weight = rand(B, 1, D, seed=3), rand(D, seed=4, dtype=torch.bfloat16)
    tokens, number = 2 * B * L * D, 4 * B * L
    angles = rand(1, L, 16, seed=6, grad=False)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    r = 4 * B * D
    assert saved_bytes(lambda: fused_layer_norm.ada_layer_norm(x, row, row.detach(), EPS))[0] == tokens + r + 2 * number
    assert (
        saved_bytes(lambda: fused_layer_norm.residual_ada_layer_norm(x, y, None, row, row, EPS))[0]
        == tokens + r + 2 * number
    )
    assert (
        saved_bytes(lambda: fused_layer_norm.residual_layer_norm(x, y, row, weight, weight, EPS))[0]
        == 2 * tokens + r + 2 * D + 2 * number
    )
    assert (
        saved_bytes(lambda: fused_layer_norm.residual_layer_norm(x, y, row.detach(), weight, weight, EPS))[0]
        == tokens + r + 2 * D + 2 * number
    )
    assert saved_bytes(lambda: fused_layer_norm.gated_residual(x, y, row.detach()))[0] == r
    assert (
        saved_bytes(lambda: fused_rms_norm.rms_norm_rope(x, weight, freqs_cis, EPS))[0]
        == tokens + 2 * D + 8 * L * 16 + number
    )


def test_modulation_of_a_wrong_number_of_rows_is_refused():
    x, row = rand(B, L, D, seed=0), rand(B, 3, D, seed=1)
    with pytest.raises(ValueError, match="modulation of 3 rows for 5 tokens"):
        layer_norm_launch.modulation_kind(row, None, L)
    with pytest.raises(RuntimeError):
        fused_layer_norm.ada_layer_norm(x, row, row, EPS)


def test_resolve_and_set_backend():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (
        kernels.resolve_backend("auto", cpu)
        == kernels.resolve_backend("torch", cpu)
        == kernels.resolve_backend("torch", gpu)
        == "torch"
    )
    assert kernels.resolve_backend("auto", gpu) == ("torch" if find_spec("triton") is None else "triton")
    with pytest.raises(ValueError, match="model.kernels: triton, but there is no GPU here; choose torch"):
        kernels.resolve_backend("triton", cpu)
    with pytest.raises(ValueError, match="legal: triton, torch"):
        kernels.set_backend("auto")
    assert kernels.current_backend() == "torch"


def test_float64_runs_in_plain_torch(fused):
    x, row = rand(B, L, D, seed=0).detach().double(), rand(B, 1, D, seed=1).detach().double()
    assert torch.equal(kernels.ada_layer_norm(x, row, row, EPS), reference.ada_layer_norm(x, row, row, EPS))
    assert kernels.ada_layer_norm(x, row, row, EPS).dtype == torch.float64


def wan_inputs(args):
    shape = TokenShape(2, 2, 3)
    cond_mask_BL = (torch.arange(shape.num_tokens) < 6).unsqueeze(0)
    return {
        "x_BLP": rand(B, shape.num_tokens, 4 * args.in_channels, seed=1, grad=False),
        "pos_BL3": positions(shape),
        "t_B": torch.tensor([900.0, 300.0]),
        "text_BSD": rand(B, args.text_len, args.text_dim, seed=2, grad=False),
        "cond_mask_BL": cond_mask_BL,
    }


def hunyuan_inputs(args):
    pooled = rand(B, args.pooled_dim, seed=3, grad=False)
    return wan_inputs(args) | {"pooled_text_BD": pooled, "guidance_B": torch.tensor([6000.0, 1000.0])}


WAN = WanArgs(
    dim=48,
    num_heads=4,
    num_layers=2,
    ffn_dim=80,
    text_dim=20,
    text_len=7,
    freq_dim=32,
    in_channels=5,
    out_channels=5,
    clean_first_frame=True,
)
HUNYUAN = HunyuanVideoArgs(
    dim=48,
    num_heads=4,
    num_double_layers=1,
    num_single_layers=1,
    ffn_dim=96,
    in_channels=5,
    out_channels=5,
    text_dim=20,
    text_len=7,
    pooled_dim=12,
    axes_dim=(4, 4, 4),
    num_refiner_layers=1,
    image_condition="token_replace",
)


def output_and_gradients(model, inputs):
    out = model(**inputs)
    loss = (out * rand(*out.shape, seed=4, grad=False)).sum()
    return [out, *torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("with_cond", [True, False], ids=["conditioning frame", "no conditioning"])
@pytest.mark.parametrize(
    "model_class, args, make_inputs", [(WanModel, WAN, wan_inputs), (HunyuanVideoModel, HUNYUAN, hunyuan_inputs)]
)
def test_models_compute_the_same_with_both_backends_and_compiled(model_class, args, make_inputs, with_cond):
    """Every output and gradient is equal. Compiled, each block is one graph that contains the operators."""
    modes = ["torch", "triton"]
    if with_cond or model_class is WanModel:  # HunyuanVideo's blocks take long to compile
        modes.append("compiled")
    model = model_class(args)
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, seed=i, grad=False) * 0.2 + (p.ndim == 1)
    inputs = make_inputs(args)
    if not with_cond:
        inputs["cond_mask_BL"] = None
    found = {}
    try:
        for name in modes:
            kernels.set_backend("torch" if name == "torch" else "triton")
            if name == "compiled":
                graphs = set()
                backend = recording_backend(graphs)
                for block in [
                    m for m in model.modules() if type(m).__name__ in ("Block", "DoubleBlock", "SingleBlock")
                ]:
                    block.compile(backend=backend, fullgraph=True)
            found[name] = output_and_gradients(model, inputs)
    finally:
        kernels.set_backend("torch")
    for name in modes[1:]:
        for a, b in zip(found[name], found["torch"], strict=True):
            assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 2e-5 * b.norm() + 1e-4), name
    assert "compiled" not in modes or {"residual_norm", "rms_norm_pair", "gated_residual", "norm"} <= graphs


def recording_backend(operators):
    """aot_eager; the names of our operators in its graphs are added to `operators`."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, example_inputs):
        for part in graph.modules():  # an autograd.Function is a graph in the graph
            nodes = part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ()
            operators.update(str(n.target).split(".")[1] for n in nodes if "titan_video" in str(n.target))
        return aot_eager(graph, example_inputs)

    return backend


@pytest.mark.skipif(TRITON is None, reason="needs the triton package")
@pytest.mark.parametrize(
    "options",
    [
        '--widths 128 --names "AdaLN" "residual, AdaLN" "gated residual" "RMSNorm per head, RoPE of q and k" "GELU"',
        '--widths 5120 --names "gated residual, LayerNorm" "RMSNorm, RoPE"',
        '--widths 5120 --names "gated residual, AdaLN, mask"',
        '--widths 5120 --names "gated residual, LayerNorm, per token"',
        pytest.param("--widths 128", marks=pytest.mark.slow),
        pytest.param(
            '--widths 3072 --names "gated residual, AdaLN, mask" "RMSNorm per head, RoPE"', marks=pytest.mark.slow
        ),
        pytest.param('--widths 5120 --names "gated residual, LayerNorm, mask"', marks=pytest.mark.slow),
    ],
    ids=["others", "5120", "5120 mask", "5120 per token", "all", "3072", "5120 LayerNorm, mask"],
)
def test_kernels_compile_for_hopper_as_the_page_says(options, capsys):
    """The largest kernels at the widths of real models, and one of each other kind.

    No registers spill. With the Triton version that wrote the page, each row equals the page's.
    """
    from benchmarks.kernel_builds import main

    main(shlex.split(options))
    _, _, *rows = capsys.readouterr().out.splitlines()
    committed = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    assert len(rows) == (37 if options == "--widths 128" else options.count('"') - ("GELU" in options))
    for row in rows:
        assert row in committed or TRITON != (3, 7), row
        assert row.split("|")[-2].strip() == "0", row  # spilled


@pytest.mark.skipif(TRITON != (3, 7), reason="other versions of triton compile otherwise")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_issue_fewer_instructions_than_a_copy_allows_and_fill_a_wave(direction):
    """At the width of Wan 1.3B, of two kernels that are near the limit; the next test has the others."""
    from benchmarks import kernel_builds

    for name in ("RMSNorm, RoPE of q and k", "GELU"):
        b = kernel_builds.build(name, direction, 1536)
        if b is None:
            assert (name, direction) == ("GELU", "forward")
            continue
        assert b.spilled == 0 and b.issue_ratio >= (1.35 if direction == "forward" else 1.5), b
        assert all(0.98 <= kernel_builds.waves(b, tokens) <= 1 for tokens in kernel_builds.LENGTHS), b


BUILDS = (
    *("AdaLN", "AdaLN, mask", "AdaLN, per token", "LayerNorm", "gated residual", "residual, AdaLN"),
    *(f"gated residual, {norm}{form}" for norm in ("LayerNorm", "AdaLN") for form in ("", ", mask", ", per token")),
    *(f"RMSNorm{head}{rope}" for head in ("", " per head") for rope in ("", ", RoPE", ", RoPE of q and k")),
    "GELU",
)


def test_every_kernel_of_the_committed_builds_is_within_the_limits():
    """Those of other widths and kernels: `python benchmarks/kernel_builds.py --json` writes the file."""
    from benchmarks import kernel_builds

    builds = json.loads((ROOT / "benchmarks" / "results" / "kernel_builds.json").read_text())["builds"]
    directions = {name: ("backward",) if name == "GELU" else ("forward", "backward") for name in BUILDS}
    expected = {(name, d, width) for name in BUILDS for d in directions[name] for width in kernel_builds.WIDTHS}
    assert {(b["name"], b["direction"], b["width"]) for b in builds} == expected and len(builds) == len(expected)
    assert set(kernel_builds.operators(128)) == set(BUILDS) and {1536, 3072, 5120} < set(kernel_builds.WIDTHS)
    for b in builds:
        assert b["spilled"] == 0, b
        assert b["width"] != 1536 or b["issue_ratio"] >= (1.35 if b["direction"] == "forward" else 1.5), b
        assert all(0.95 <= n <= 1 for n in b["waves"].values()), b
