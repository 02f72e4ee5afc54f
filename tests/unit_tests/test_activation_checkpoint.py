"""What is saved, what is recomputed, and that neither changes a gradient.

Layouts of several ranks: tests/distributed_tests.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import randomized_init
from titan_video import kernels
from titan_video.config.job_config import ActivationCheckpoint, CheckpointRange
from titan_video.distributed.activation_checkpoint import (
    CheckpointedBlock,
    apply_activation_checkpoint,
    block_sections,
    check_save_min_kv,
    recomputed_flops,
)
from titan_video.distributed.compile import apply_compile, num_graphs
from titan_video.distributed.offload import IN_FLIGHT
from titan_video.distributed.utils import initialise
from titan_video.models import hunyuan_video as hunyuan
from titan_video.models.spec import StepLayout
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.planner.dry_run.memory import saved_bytes_per_token

ARGS = WanArgs(dim=48, num_heads=2, num_layers=4, ffn_dim=96, text_dim=16, text_len=8, freq_dim=32)
TEXT, TOKENS = ARGS.text_len, 32
NONE, FULL = ActivationCheckpoint(), ActivationCheckpoint(mode="full")
SELECTIVE = ActivationCheckpoint(mode="selective", save_min_kv=20)
MATMUL = replace(SELECTIVE, save=("attention", "matmul"))
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    budget = torch._functorch.config.activation_memory_budget
    yield
    torch._functorch.config.activation_memory_budget = budget


def build(section, args=ARGS, backend=None, dtype=torch.float32):
    model = WanModel(args)
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    model.to(dtype)
    apply_activation_checkpoint(model, SPEC.plan, section)
    if backend:
        apply_compile(model, SPEC.plan, backend)
    return model


def forward(model, tokens=TOKENS, batch=2, seq_len=None):
    g = torch.Generator().manual_seed(tokens)
    x, text = torch.randn(batch, tokens, 64, generator=g), torch.randn(batch, TEXT, 16, generator=g)
    positions = torch.arange(3 * tokens).view(1, tokens, 3)
    layout = None if seq_len is None else StepLayout(seq_len)
    return model(x_BLP=x, pos_BL3=positions, t_B=1000 * torch.rand(batch, generator=g), text_BSD=text, layout=layout)


def gradients(model, **options):
    forward(model, **options).float().square().sum().backward()
    return {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}


def assert_equal(grads, reference):
    assert grads.keys() == reference.keys()
    assert [n for n in grads if not torch.equal(grads[n], reference[n])] == []


def assert_close(grads, reference):
    """The compiler's forms of some operators round differently."""
    errors = {n: ((grads[n] - reference[n]).norm() / reference[n].norm()).item() for n in reference}
    assert {n: e for n, e in errors.items() if not e <= 2e-5} == {}


@pytest.fixture(scope="module")
def plain():
    return gradients(build(NONE))


class Executed(TorchDispatchMode):
    """Counts what runs beneath all other modes: attention by number of keys, and matmuls with bias (forward only)."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is SDPA:
            self.count[args[1].shape[-2]] += 1
        if func is torch.ops.aten.addmm.default and args[1].shape[0] == 2 * TOKENS:
            self.count["addmm"] += 1
        return func(*args, **(kwargs or {}))


# per block: self-attention, cross-attention, matmuls of the video tokens (8: k and v of the text are smaller)
RUNS = {
    "none": (NONE, 1, 1, 8),
    "full": (FULL, 2, 2, 16),
    "selective": (SELECTIVE, 1, 2, 15),
    "attention alone": (replace(SELECTIVE, save=("attention",)), 1, 2, 16),
    "all attention": (replace(SELECTIVE, save_min_kv=0), 1, 1, 15),
    "down alone": (replace(SELECTIVE, save=("down",)), 2, 2, 15),
    "matmul": (MATMUL, 1, 2, 12),
    "matmul alone": (replace(SELECTIVE, save=("matmul",)), 2, 2, 12),
}


@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("offload", [False, True])
def test_runs_of_each_operator_and_equal_gradients(mode, offload, plain):
    section, *expected = RUNS[mode]
    if offload and section.mode == "none":
        pytest.skip("refused by the rules of the configuration")
    model = build(replace(section, offload=offload))
    with Executed() as executed:
        grads = gradients(model)
    # patch embedding and head are one matmul each
    num_runs = executed.count[TOKENS], executed.count[TEXT], executed.count["addmm"] - 2
    assert num_runs == tuple(n * ARGS.num_layers for n in expected)
    assert_equal(grads, plain)


@pytest.mark.parametrize("triton", [False, True], ids=["plain", "fused"])
def test_nine_of_ten_matmuls_run_again(triton):
    """With the default of `save`, as a counter of FLOPs sees it; in float64 with the gradients of no checkpointing."""
    args = replace(ARGS, num_layers=1)
    kernels.set_backend("triton" if triton else "torch")
    try:
        flops, grads = {}, {}
        for name, section in {"none": NONE, "full": FULL, "selective": SELECTIVE}.items():
            model = build(section, args, dtype=torch.float64)
            with FlopCounterMode(display=False) as counter:
                grads[name] = gradients(model)
            counts = counter.get_flop_counts()["Global"]
            flops[name] = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    finally:
        kernels.set_backend("torch")
    linear = args.block_flops(TOKENS, 2) - 4 * 2 * TOKENS * (TOKENS + TEXT) * args.dim
    assert flops["full"] - flops["none"] == linear
    assert flops["selective"] - flops["none"] == linear - 2 * 2 * TOKENS * args.dim * args.ffn_dim
    for n, grad in grads["none"].items():
        assert (grads["selective"][n] - grad).abs().max() <= 1e-12 * grad.abs().max()


def test_only_the_layers_listed(plain):
    for section in (FULL, SELECTIVE):
        model = build(replace(section, layers=(1, 3)))
        assert [isinstance(b, CheckpointedBlock) for b in model.blocks.values()] == [False, True, False, True]
        with Executed() as executed:
            assert_equal(gradients(model), plain)
        assert executed.count[TEXT] == 4 + 2
    with pytest.raises(
        ValueError, match=r"activation_checkpoint.layers: given \[1, 4\], but there is no block 4; legal: 0 to 3"
    ):
        build(replace(FULL, layers=(1, 4)))


def test_a_pipeline_stage_knows_its_blocks_by_the_whole_models_numbers():
    model = WanModel(ARGS)
    sections = block_sections(model, SPEC.plan, replace(FULL, layers=(1, 3)))
    del model.blocks["0"], model.blocks["1"]
    apply_activation_checkpoint(model, SPEC.plan, sections)
    assert [isinstance(b, CheckpointedBlock) for b in model.blocks.values()] == [False, True]


RANGES = (
    CheckpointRange(layers="0-1", mode="full"),
    CheckpointRange(layers="3", mode="selective", save=("attention", "matmul")),
)


def test_ranges_have_modes_of_their_own(plain):
    """Blocks 0 and 1 run again, 2 saves all, or with another mode of the section what that saves, and 3 its own."""
    for section, expected in (
        (replace(SELECTIVE, mode="none"), (6, 7, 16 + 16 + 8 + 12)),
        (SELECTIVE, (6, 8, 16 + 16 + 15 + 12)),
    ):
        model = build(replace(section, range=RANGES))
        with Executed() as executed:
            assert_equal(gradients(model), plain)
        assert (executed.count[TOKENS], executed.count[TEXT], executed.count["addmm"] - 2) == expected


def test_a_range_is_offloaded_alone(plain):
    model = build(replace(FULL, range=(CheckpointRange(layers="1-2", mode="full", offload=True),)))
    assert [b.offload is not None for b in model.blocks.values()] == [False, True, True, False]
    assert_equal(gradients(model), plain)
    offload = model.blocks["1"].offload
    assert offload is model.blocks["2"].offload and offload.num_offloaded == 2


def test_ranges_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match='activation_checkpoint.range: item 1: layers: given "2-4", but .* is 3; end'):
        build(replace(NONE, range=(CheckpointRange(layers="0"), CheckpointRange(layers="2-4"))))


def test_ranges_number_the_blocks_in_forward_order():
    """HunyuanVideo's double blocks come before its single blocks, and stages keep the numbers of the whole model."""
    with torch.device("meta"):
        model = hunyuan.SPEC.build(replace(hunyuan.SPEC.flavors["debug"], num_double_layers=2, num_single_layers=3))
    sections = block_sections(model, hunyuan.SPEC.plan, replace(NONE, range=(CheckpointRange(layers="1-3"),)))
    checkpointed = [name for name, section in sections.items() if section.mode == "full"]
    double, single = hunyuan.SPEC.plan.blocks
    assert checkpointed == [(double, "1"), (single, "0"), (single, "1")] and len(sections) == 5


def test_compiled_ranges():
    args = replace(ARGS, num_layers=2)
    ranges = tuple(replace(section, layers=str(block)) for block, section in enumerate(RANGES))
    model = build(replace(NONE, range=ranges), args, backend="aot_eager")
    assert_close(gradients(model), gradients(build(NONE, args)))


def test_parameter_names_do_not_change():
    names = set(WanModel(ARGS).state_dict())
    for section in (FULL, replace(MATMUL, offload=True)):
        model = build(section, backend="eager")
        assert set(model.state_dict()) == names
        model.load_state_dict(model.state_dict())


def test_backward_can_run_a_block_again_twice(plain):
    """As the zero-bubble schedule does, which takes gradients of inputs and of weights apart."""
    for section in (FULL, SELECTIVE, replace(MATMUL, offload=True)):
        model = build(section)
        loss = forward(model).square().sum()
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        second = torch.autograd.grad(loss, list(model.parameters()))
        names = [n.replace("_checkpoint_wrapped_module.", "") for n, _ in model.named_parameters()]
        assert_equal(dict(zip(names, first, strict=True)), plain)
        assert_equal(dict(zip(names, second, strict=True)), plain)


# ---- bytes ----


class Storages(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return out

    def alive(self):
        return sum(size for ref, size in self.bytes.items() if not ref.expired())


def bytes_alive(section, layers, tokens, dtype):
    model = build(section, replace(ARGS, num_layers=layers), dtype=dtype)
    with Storages() as storages:
        out = forward(model, tokens, batch=1)
        return storages.alive() + 0 * out.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_bytes_kept_equal_the_closed_form(mode, dtype):
    section = {"full": FULL, "selective": SELECTIVE}[mode]
    # The differences in tokens and in layers leave out what is there once, or once a layer.
    alive = {(n, t): bytes_alive(section, n, t, dtype) for n in (2, 5) for t in (32, 64)}
    measured = (alive[5, 64] - alive[5, 32] - alive[2, 64] + alive[2, 32]) / 3 / 32
    itemsize = dtype.itemsize
    assert measured == saved_bytes_per_token(ARGS.dim, ARGS.num_heads, section, itemsize)
    assert measured == {"full": ARGS.dim * itemsize, "selective": 3 * ARGS.dim * itemsize + 4 * ARGS.num_heads}[mode]


def test_no_closed_form_where_operators_decide():
    for section in (NONE, MATMUL):
        with pytest.raises(ValueError, match="dry run"):
            saved_bytes_per_token(48, 2, section, 2)


def test_flops_of_recomputation():
    whole, attention = ARGS.block_flops(100, 2), ARGS.num_layers * 4 * 2 * 100 * 100 * ARGS.dim
    assert recomputed_flops(NONE, ARGS, 100, 2) == 0 and recomputed_flops(FULL, ARGS, 100, 2) == whole
    down = ARGS.num_layers * 2 * 2 * 100 * ARGS.dim * ARGS.ffn_dim
    assert recomputed_flops(replace(SELECTIVE, save=("attention",)), ARGS, 100, 2) == whole - attention
    assert recomputed_flops(SELECTIVE, ARGS, 100, 2) == whole - attention - down
    assert recomputed_flops(replace(SELECTIVE, save=("attention", "matmul")), ARGS, 100, 2) == (whole - attention) / 2
    assert recomputed_flops(replace(FULL, layers=(1,)), ARGS, 100, 2) == whole / ARGS.num_layers
    halves = replace(FULL, range=(CheckpointRange(layers="1-2", mode="selective", save=("attention",)),))
    assert recomputed_flops(halves, ARGS, 100, 2) == whole - attention / 2


def test_the_compiler_is_kept_from_a_fusion_that_loses_gradients(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.triton, "mix_order_reduction", True)
    build(NONE, backend="inductor")
    assert not torch._inductor.config.triton.mix_order_reduction


# ---- a selection that selects nothing ----


@pytest.mark.parametrize(
    "save, error", [("attention", "no attention operator"), ("matmul", "fewer than two"), ("down", "no matmul")]
)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_selection_that_keeps_nothing_is_an_error(save, error, backend):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({"0": torch.nn.GELU()})
    apply_activation_checkpoint(model, SPEC.plan, replace(SELECTIVE, save=(save,)))
    if backend:
        apply_compile(model, SPEC.plan, backend)
    block = model.blocks["0"]
    with torch.no_grad():
        block(torch.ones(3))  # keeps nothing by nature
    with pytest.raises(ValueError, match=f"activation_checkpoint.save: {save}, .*{error}"):
        block(torch.ones(3, requires_grad=True))


def test_short_attention_only_is_no_error():
    model = build(replace(SELECTIVE, save_min_kv=33), replace(ARGS, num_layers=1))
    forward(model)  # a clip of 32 tokens; longer ones may come


def test_a_length_that_no_clip_has_is_refused():
    check_save_min_kv(replace(SELECTIVE, save_min_kv=33), 33, 4)
    check_save_min_kv(replace(FULL, save_min_kv=33), 32, 4)
    ranged = replace(FULL, save_min_kv=33, range=(CheckpointRange(layers="3", mode="selective"),))
    with pytest.raises(ValueError, match="activation_checkpoint.save_min_kv: given 33"):
        check_save_min_kv(ranged, 32, 4)
    with pytest.raises(ValueError, match="item 0: layers"):
        check_save_min_kv(ranged, 33, 3)
    with pytest.raises(
        ValueError, match="activation_checkpoint.save_min_kv: given 33, but the longest clip .* 32 tokens.* at most 32"
    ):
        check_save_min_kv(replace(SELECTIVE, save_min_kv=33), 32, 4)


# ---- offload ----


def offloader(model):
    return model.blocks["0"].offload


@pytest.mark.parametrize("mode, per_block", [("full", 1), ("selective", 3), ("matmul", 6)])
def test_offload_leaves_the_last_blocks_tensors_only(mode, per_block, plain):
    section = {"full": FULL, "selective": SELECTIVE, "matmul": MATMUL}[mode]
    model = build(replace(section, offload=True), replace(ARGS, num_layers=6))
    offload = offloader(model)
    offloaded, run_offload = [], offload.offload
    offload.offload = lambda x: offloaded.append(run_offload(x)) or offloaded[-1]
    loss = forward(model).square().sum()
    assert offload.num_offloaded == 6 * per_block  # neither the lse nor matmuls of the text
    on_device = [moved.device_tensor is not None for moved in offloaded]
    assert on_device == [False] * (6 - IN_FLIGHT) * per_block + [True] * IN_FLIGHT * per_block
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(moved.host.untyped_storage().data_ptr() not in weights for moved in offloaded)
    assert {moved.host.numel() for moved in offloaded} == {2 * TOKENS * ARGS.dim}

    # In backward one block's are copied back while another's are used.
    most, reload = 0, offload.reload

    def watch(moved):
        nonlocal most
        x = reload(moved)
        most = max(most, sum(m.device_tensor is not None for m in offloaded))
        return x

    offload.reload = watch
    loss.backward()
    assert offload.num_reloaded == (6 - IN_FLIGHT) * per_block
    assert most <= 2 * per_block
    assert all(moved.device_tensor is None for moved in offloaded)
    assert not any(block.in_flight for block in offload.in_flight)  # which would hold on to host memory


def test_offload_over_several_steps_and_micro_batches():
    reference, model = build(NONE), build(replace(MATMUL, offload=True))
    for tokens in (32, 48, 24):
        losses = [[forward(m, tokens, batch).square().sum() for batch in (1, 2)] for m in (reference, model)]
        for first, second in losses:  # both forwards come first, as in a pipeline
            first.backward()
            second.backward()
        grads = [
            {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in m.named_parameters()}
            for m in (reference, model)
        ]
        assert_equal(grads[1], grads[0])


# ---- compiled ----


def sdpa_runs(function):
    """Calls of the attention operator inside compiled code, which dispatch modes cannot watch."""
    with torch.profiler.profile() as profile:
        result = function()
    return result, sum(
        e.count for e in profile.key_averages() if e.key == "aten::_scaled_dot_product_flash_attention_for_cpu"
    )


COMPILED = {  # runs of attention per block, self and cross
    "none": (NONE, 2),
    "full": (replace(FULL, offload=True), 4),
    "selective": (replace(MATMUL, offload=True), 3),
}


@pytest.mark.parametrize("mode", COMPILED)
def test_compiled_equals_eager(mode, plain):
    section, runs = COMPILED[mode]
    before = num_graphs()
    model = build(section, backend="aot_eager")
    assert_close(gradients(model), plain)
    assert num_graphs() == before + 1  # for four blocks
    model.zero_grad()
    grads, count = sdpa_runs(lambda: gradients(model))
    assert_close(grads, plain)
    assert count == runs * ARGS.num_layers
    if section.offload:
        # Weights are saved by compiled code too. They stay, and so do small things.
        per_block = {"full": 1, "selective": 6}[mode]
        assert offloader(model).num_offloaded == 2 * per_block * ARGS.num_layers


def test_memory_budget_limits_what_is_saved():
    kept = {}
    for budget in (0.0, 0.4, 1.0):
        torch._dynamo.reset()
        model = build(
            ActivationCheckpoint(mode="memory_budget", memory_budget=budget), replace(ARGS, num_layers=1), "aot_eager"
        )
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
        ):
            loss = forward(model).square().sum()
        kept[budget] = sum(saved.values())
        loss.backward()
    assert kept[0.0] < kept[0.4] < kept[1.0]


@pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_lengths_batches_and_numbers_of_true_tokens_cost_few_graphs(blocks):
    model = build(NONE, replace(ARGS, num_layers=blocks), backend="eager")
    before = num_graphs()

    def run(tokens, batch, seq_len=None):
        forward(model, tokens, batch, seq_len).square().sum().backward()
        return num_graphs() - before

    assert run(24, 1) == 1  # for all blocks
    # The first block's tokens are a view of a product, where FSDP is not around, so it has graphs of its own once
    # lengths are not compiled in.
    assert run(32, 1) <= 1 + blocks
    assert run(24, 2) <= 1 + 2 * blocks
    assert run(32, 2) <= 1 + 3 * blocks
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (40, 48, 56):
            for batch in (1, 2):
                run(tokens, batch)
    num_before = run(32, 2, 31)
    assert run(40, 2, 33) <= num_before + blocks
    with torch.compiler.set_stance("fail_on_recompile"):
        for seq_len in (41, 43, 47):
            run(48, 2, seq_len)
