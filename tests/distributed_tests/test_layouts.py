"""One loss under every layout: loss and every gradient equal one process, for each layout of ONE table and each mode
of running a block.

A step has micro-batches of two shapes, of one and of two clips. One has 15 tokens, which only the degrees 3 and 5
divide. They are distributed over the data-parallel ranks, so that these hold unequal numbers of tokens.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.helpers import build_denoising, randomized_init, run_ranks, whole_tensors
from titan_video.config.job_config import ActivationCheckpoint, CheckpointRange, Compile, Lora, Parallelism, Training
from titan_video.data.batch import Batch
from titan_video.distributed.activation_checkpoint import block_sections
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline
from titan_video.distributed.pipeline_parallel.stages import keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.lora.adapters import add_adapters
from titan_video.lora.quantized_base import CODE_DTYPES, fill_quantized, quantize_base
from titan_video.models.hunyuan_video import SPEC as HUNYUAN
from titan_video.models.hunyuan_video import HunyuanVideoArgs
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ExpertArgs, ModelSpec
from titan_video.models.wan import SPEC as WAN
from titan_video.models.wan import WanArgs, WanModel

ARGS = WanArgs(dim=72, num_heads=12, num_layers=4, ffn_dim=60, text_dim=20, text_len=9, freq_dim=32)
EXPERTS = ExpertArgs(num_experts=8, top_k=2, expert_dim=24, shared_dim=12, first_dense=1)
HUNYUAN_ARGS = HunyuanVideoArgs(
    dim=72,
    num_heads=12,
    num_double_layers=2,
    num_single_layers=2,
    ffn_dim=60,
    text_dim=20,
    text_len=9,
    pooled_dim=7,
    axes_dim=(2, 2, 2),
)
LORA = Lora(enable=True, rank=3, alpha=4.5)
# Also HunyuanVideo's modulation: tensor parallel gathers its outputs.
MORE_TARGETS = (*HUNYUAN.lora_targets, "modulation.linear", "text_modulation.linear")


@dataclass(frozen=True)
class Model:
    spec: ModelSpec
    args: WanArgs | HunyuanVideoArgs
    lora: Lora = Lora()


MODELS = {
    "wan": Model(WAN, ARGS),
    "wan i2v": Model(WAN, replace(ARGS, in_channels=36, image_dim=10, image_len=257)),
    "wan flf2v": Model(WAN, replace(ARGS, in_channels=36, image_dim=10, image_len=514, image_positions=True)),
    "wan A14B i2v": Model(WAN, replace(ARGS, in_channels=36)),
    "wan ti2v": Model(WAN, replace(ARGS, clean_first_frame=True)),
    "wan moe": Model(WAN, replace(ARGS, experts=EXPERTS)),
    "wan moe choice": Model(WAN, replace(ARGS, experts=replace(EXPERTS, expert_choice=True))),
    "hunyuan": Model(HUNYUAN, HUNYUAN_ARGS),
    "hunyuan concat": Model(
        HUNYUAN, replace(HUNYUAN_ARGS, in_channels=33, guidance=False, image_condition="latent_concat")
    ),
    "hunyuan replace": Model(HUNYUAN, replace(HUNYUAN_ARGS, image_condition="token_replace")),
    "wan lora": Model(WAN, ARGS, LORA),
    "wan lora int8": Model(WAN, replace(ARGS, dim=768, ffn_dim=256), replace(LORA, base_dtype="int8")),
    "hunyuan lora": Model(HUNYUAN, HUNYUAN_ARGS, replace(LORA, target_modules=MORE_TARGETS)),
}


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh, and options of [parallelism]."""

    dims: ParallelDims
    options: dict = field(default_factory=dict)

    @property
    def world_size(self):
        d = self.dims
        return d.pp * d.dp * d.sequence

    @property
    def num_batches(self):
        """Micro-batches of a step: one of each shape for a data-parallel rank; in a pipeline one more than stages."""
        d = self.dims
        return 2 * d.dp * (d.pp + 1 if d.pp > 1 else 1)


def layout(options=None, **degrees):
    return Layout(ParallelDims(**degrees), options or {})


GATHERED = {"context_parallel_rotate_method": "allgather"}
LAYOUTS = {
    "one": layout(),
    "fsdp2": layout(dp_shard=2),
    "fsdp3": layout(dp_shard=3),
    "fsdp4": layout(dp_shard=4),
    "hsdp2x2": layout(dp_replicate=2, dp_shard=2),
    "tp2": layout(tp=2),
    "tp4": layout(tp=4),
    "ulysses2": layout(ulysses=2),
    "ulysses3": layout(ulysses=3),
    "ulysses4": layout(ulysses=4),
    "ring2": layout(ring=2),
    "ring2 gathered": layout(GATHERED, ring=2),
    "ring4": layout(ring=4),
    "ring4 gathered": layout(GATHERED, ring=4),
    "unified2x2": layout(ring=2, ulysses=2),
    "unified2x4": layout(ring=2, ulysses=4),
    "pp2": layout(pp=2),
    "pp4": layout(pp=4),
    "pp2 uneven": layout({"pipeline_parallel_split": (0, 1)}, pp=2),
    "pp3 uneven": layout({"pipeline_parallel_split": (0, 2, 3)}, pp=3),
    "pp2 zero bubble": layout({"pipeline_parallel_schedule": "InterleavedZeroBubble"}, pp=2),
    "tp2 x ulysses2": layout(tp=2, ulysses=2),
    "tp2 x ring2": layout(tp=2, ring=2),
    "fsdp2 x ulysses2": layout(dp_shard=2, ulysses=2),
    "fsdp2 x ring2": layout(dp_shard=2, ring=2),
    "fsdp2 x tp2": layout(dp_shard=2, tp=2),
    "hsdp2x2 x ulysses2": layout(dp_replicate=2, dp_shard=2, ulysses=2),
    "fsdp2 x tp2 x ring2": layout(dp_shard=2, tp=2, ring=2),
    "pp2 x fsdp2 x ulysses2": layout(pp=2, dp_shard=2, ulysses=2),
}
FULL, SELECTIVE = ActivationCheckpoint(mode="full"), ActivationCheckpoint(mode="selective", save_min_kv=0)
# Each block of the model of two blocks has a range; of that of four, two have the section's mode.
RANGES = (
    CheckpointRange(layers="0", mode="full", offload=True),
    CheckpointRange(layers="1-1", mode="selective", save=("attention",)),
)
COMPILED = Compile(enable=True, backend="aot_eager")
EXECUTION_MODES = {
    "plain": (ActivationCheckpoint(), Compile()),
    "full": (FULL, Compile()),
    "selective": (SELECTIVE, Compile()),
    "ranges": (replace(SELECTIVE, range=RANGES), Compile()),
    "compile": (ActivationCheckpoint(), COMPILED),
    "selective+compile": (SELECTIVE, COMPILED),
    "ranges+compile": (replace(SELECTIVE, range=RANGES), COMPILED),
}
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}


def micro_batch(args, i, dtype):
    """Micro-batch i of the step: two clips of 4 tokens where i is even, one of 15 where it is odd.

    The texts differ in length.
    """
    grid, B = ((2, 4, 2), 2) if i % 2 == 0 else ((3, 2, 10), 1)
    ids, c = torch.arange(B) + 10 * i, args.conditioning

    def drawn(seed, *shape):
        return draw_noise(seed, ids, shape).to(dtype)

    cond = (
        {"cond_latents_BCFHW": drawn(3, 16, grid[0] if c.form == "mask_first" else 1, *grid[1:])}
        if c.num_cond_frames
        else {}
    )
    cond |= {"image_BSD": drawn(4, args.image_len, args.image_dim)} if c.image_tokens else {}
    cond |= {"pooled_text_BD": drawn(5, args.pooled_dim)} if c.pooled_text else {}
    mask = torch.arange(args.text_len) < (3 + ids % 5).unsqueeze(1)
    return Batch(
        {"video": drawn(2, 16, *grid)}, drawn(1, args.text_len, args.text_dim) * mask.unsqueeze(-1), mask, ids, cond
    )


def build_task(spec, args, shard=None):
    return build_denoising(spec, args, shard, guidance_scale=3.0)


def build_inputs(task, i, dtype):
    """Micro-batch i at noise levels and with loss weights that depend on its samples."""
    batch = micro_batch(task.args, i, dtype)
    noise = draw_noise(0, batch.sample_ids_B, tuple(batch.streams["video"].shape[1:])).to(dtype)
    ids = batch.sample_ids_B
    return task.add_noise(batch, noise, sigma_B=(ids + 1) / 130, weight_B=1 + ids / 50)


def num_elements(task, num_batches):
    return sum(task.num_loss_elements(micro_batch(task.args, i, torch.float32)) for i in range(num_batches))


def model_for(name, layout):
    """A pipeline has four stages at most, and a block for each; other layouts are shown by two blocks."""
    m = MODELS[name]
    if layout.dims.pp > 1 or not isinstance(m.args, WanArgs):
        return m
    return replace(m, args=replace(m.args, num_layers=2))


def build(m, dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = m.spec.build(m.args)
    finally:
        torch.set_default_dtype(default)
    if m.lora.enable:
        add_adapters(model, m.spec, m.lora, dtype)
    if m.lora.base_dtype in CODE_DTYPES:
        quantize_base(model, m.spec.plan, m.lora.base_dtype)
    return model


def fill(model, m):
    init = randomized_init(m.spec.init_parameter)
    if m.lora.base_dtype not in CODE_DTYPES:
        return initialise(model, init, 0)
    fill_quantized(model, lambda model, which: initialise(model, init, 0, which))
    initialise(model, init, 0, is_adapter)


def gradients(model):
    """By name, whole.

    None for a trained parameter that has none; a frozen one that has one is there, which is an error too.
    """
    params = model.named_parameters()
    return whole_tensors({clean_name(n): p.grad for n, p in params if p.requires_grad or p.grad is not None})


def reference(m, num_batches, dtype):
    model = build(m, dtype).to_empty(device="cpu")
    fill(model, m)
    task, losses = build_task(m.spec, m.args), []
    for i in range(num_batches):
        inputs = build_inputs(task, i, dtype)
        losses.append(task.loss(model(**inputs.kwargs), inputs).sum())
    loss = sum(losses) / num_elements(task, num_batches)
    loss.backward()
    return loss.detach(), gradients(model), clip_grad_norm(model, 0.0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(name of a model, name of a layout) -> file with what one process gets from the same step, made at first use."""
    folder = tmp_path_factory.mktemp("reference")

    def path(name, layout):
        num, m = LAYOUTS[layout].num_batches, model_for(name, LAYOUTS[layout])
        file = folder / f"{name}-{num}-{getattr(m.args, 'num_layers', '')}.pt"
        if not file.exists():
            torch.save({dtype: reference(m, num, dtype) for dtype in LIMITS}, file)
        return file

    return path


def run_step(name, layout, mode, dtype):
    """(loss, gradients, norm) of one step, on every rank the same but for a pipeline's names."""
    torch._dynamo.reset()
    # A graph for any length takes three times as long to trace as two for one length each; one mode on two ranks shows
    # that it is right, for each family.
    dynamic = mode == "ranges+compile" and layout.world_size <= 2 and name in ("wan", "hunyuan")
    torch._dynamo.config.automatic_dynamic_shapes = dynamic
    m = model_for(name, layout)
    spec, args, plan = m.spec, m.args, m.spec.plan
    meshes, kind = layout.dims.build_mesh("cpu"), str(dtype).removeprefix("torch.")
    checkpointing, compilation = EXECUTION_MODES[mode]
    section, training = Parallelism(**layout.options), Training(mixed_precision_param=kind, mixed_precision_reduce=kind)
    model, pipelined = build(m, dtype), layout.dims.pp > 1
    sections = block_sections(model, plan, checkpointing)
    stages = keep_stages(model, plan, meshes.pp, section, args, 15) if pipelined else None
    parallelize(model, plan, meshes, section, training, sections, compilation)
    model.to_empty(device="cpu")
    fill(model, m)
    num = layout.num_batches
    task, loss = build_task(spec, args, SequenceShard.from_meshes(meshes)), torch.zeros((), dtype=dtype)
    count, rank, dp = num_elements(task, num), meshes.batch.get_local_rank(), meshes.batch.size()
    if pipelined:
        pipeline = Pipeline(model, stages, plan, meshes.pp, section, dtype, torch.device("cpu"))
        for parity in (0, 1):  # a pipeline's micro-batches have one shape
            inputs = [build_inputs(task, i, dtype) for i in range(parity, num, 2)][rank::dp]
            loss += pipeline.step(inputs, lambda v, i: task.loss(v, inputs[i]).sum() / count)
    else:
        for i in range(rank, num, dp):
            inputs = build_inputs(task, i, dtype)
            micro = task.loss(model(**inputs.kwargs), inputs).sum() / count
            micro.backward()
            loss += micro.detach()
    loss = reduce_over(meshes.batch, reduce_over(meshes.sequence, loss, "sum"), "sum")
    return loss, gradients(model), clip_grad_norm(model, 0.0, meshes.pp)


def compare(name, layout, runs, path):
    """{(mode, type): (names of parameters, what differs from one process)} of one rank."""
    expected, report = torch.load(path), {}
    for mode, dtype in runs:
        loss, grads, norm = run_step(name, LAYOUTS[layout], mode, dtype)
        ref_loss, ref_grads, ref_norm = expected[dtype]
        errors = {
            n: ((g - ref_grads[n]).norm() / ref_grads[norm_reference(n)].norm()).item()
            for n, g in grads.items()
            if g is not None
        }
        errors |= {
            "the loss": abs(loss - ref_loss).item() / ref_loss.item(),
            "the norm": abs(norm - ref_norm).item() / ref_norm.item(),
        }
        wrong = {n: e for n, e in errors.items() if not e <= LIMITS[dtype]} | {
            n: "no gradient" for n, g in grads.items() if g is None
        }
        report[mode, dtype] = set(grads), wrong
    return report


def norm_reference(name):
    """The parameter that sets the scale for an error of the gradient of `name`.

    A bias of keys without a norm after it changes no output: its gradient is rounding error.
    """
    return name.replace(".k.bias", ".v.bias") if name.startswith("text_refiner.") else name


def check(name, layout, runs, one_process):
    path = one_process(name, layout)
    reports = run_ranks(compare, LAYOUTS[layout].world_size, name, layout, runs, path, timeout=600)
    names = torch.load(path)[torch.float64][1].keys()
    for run in runs:
        assert set().union(*(report[run][0] for report in reports)) == names
        assert [report[run][1] for report in reports] == [{}] * len(reports), (name, layout, run)


EAGER = ("plain", "full", "selective", "ranges")
COMPILED_MODES = tuple(mode for mode in EXECUTION_MODES if mode not in EAGER)
# The suite compiles these; without checkpointing, adapters.
COMPILED_IN_CI = (("fsdp2", "ranges+compile"), ("ring2", "selective+compile"))
# Of the models beside the first, in the suite; `test_whole_table` has all of them.
SOME_LAYOUTS = ("tp2", "ulysses2", "ring2", "pp2")
# What the suite leaves out of `test_layout_equals_one_process` is in `test_whole_table`.
# Of those of two ranks and of those of four and eight.
FULL_LAYOUTS = ("fsdp2", "tp2", "ulysses2", "ring2", "pp2", "pp2 zero bubble")
FULL_LAYOUTS += ("unified2x2", "fsdp2 x tp2", "tp2 x ring2", "pp2 x fsdp2 x ulysses2")
RANGED_LAYOUTS = ("fsdp2", "tp2", "pp2", "pp2 uneven")
FLOAT32_LAYOUTS = ("one", "fsdp2", "tp2", "ulysses2", "ring2", "pp2")
EXPERT_LAYOUTS = ("fsdp2", *SOME_LAYOUTS, "tp2 x ring2")
# Both families under tensor parallel, where they have other plans; the sequence axes do not see adapters.
LORA_LAYOUTS = {
    "wan lora": ("fsdp2", "tp2", "ring2", "fsdp2 x tp2", "pp2 zero bubble"),
    "hunyuan lora": ("hsdp2x2", "tp2", "ulysses2", "pp2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, one_process):
    left_out = {"full": layout not in FULL_LAYOUTS, "ranges": layout not in RANGED_LAYOUTS}
    runs = [(mode, torch.float64) for mode in EAGER if not left_out.get(mode)]
    check("wan", layout, runs + [("plain", torch.float32)] * (layout in FLOAT32_LAYOUTS), one_process)


def modes_for(layout, name="wan"):
    """Zero bubble is refused with compile and with experts, compile with experts that choose."""
    if "zero bubble" in layout:
        return () if name.startswith("wan moe") else EAGER
    return EAGER if name == "wan moe choice" else tuple(EXECUTION_MODES)


TWO_RANKS = [name for name in LAYOUTS if LAYOUTS[name].world_size == 2 and modes_for(name) == tuple(EXECUTION_MODES)]


@pytest.mark.parametrize(
    "layout, mode",
    [
        pytest.param(layout, mode, marks=() if (layout, mode) in COMPILED_IN_CI else pytest.mark.slow)
        for layout in TWO_RANKS
        for mode in COMPILED_MODES
    ],
)
def test_compiled_layout_equals_one_process(layout, mode, one_process):
    check("wan", layout, [(mode, torch.float64)], one_process)


OTHER_MODELS = dict.fromkeys(("wan i2v", "wan ti2v", "hunyuan replace"), SOME_LAYOUTS) | {"hunyuan": ("tp2", "pp2")}


@pytest.mark.parametrize("name, layout", [(name, layout) for name in OTHER_MODELS for layout in OTHER_MODELS[name]])
def test_other_models_equal_one_process(name, layout, one_process):
    check(name, layout, [("plain", torch.float64)], one_process)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_equal_one_process(layout, one_process):
    modes = {"fsdp2": EAGER, "tp2 x ring2": ("full",)}.get(layout, ("plain", "selective"))
    check("wan moe", layout, [(mode, torch.float64) for mode in modes], one_process)


@pytest.mark.parametrize("layout", ["tp2", "ring2"])
def test_experts_that_choose_equal_one_process(layout, one_process):
    """They choose from the tokens of all ranks."""
    check("wan moe choice", layout, [(mode, torch.float64) for mode in ("plain", "full")], one_process)


@pytest.mark.parametrize("name, layout", [(name, layout) for name in LORA_LAYOUTS for layout in LORA_LAYOUTS[name]])
def test_adapters_equal_one_process(name, layout, one_process):
    check(
        name,
        layout,
        [
            (mode, torch.float64)
            for mode in (("plain", "selective", "compile") if (name, layout) == ("wan lora", "fsdp2") else ("plain",))
        ],
        one_process,
    )


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "ulysses2"])
def test_quantized_base_equals_one_process(layout, one_process):
    check("wan lora int8", layout, [("plain", torch.float64)], one_process)


ONE_OF_EACH_KIND = ("wan", "wan moe", "hunyuan", "wan lora")


def whole_table_runs(name, layout):
    """All modes without compilation in float64. On up to two ranks, where each axis is met alone, in float32 too.

    A block is traced on each rank, in each mode, which takes ten times as long as the step. So a case has one compiled
    mode; it changes from each model to the next and from each layout to the next. Layouts of more ranks have it with a
    model of each kind.
    """
    modes, is_small = modes_for(layout, name), LAYOUTS[layout].world_size <= 2
    runs = [(mode, torch.float64) for mode in EAGER if mode in modes]
    if is_small and not name.startswith("wan moe"):  # in float32 tokens of nearly equal scores may have other experts
        runs += [(mode, torch.float32) for mode in EAGER]
    place = list(MODELS).index(name) + list(LAYOUTS).index(layout)
    mode = COMPILED_MODES[place % len(COMPILED_MODES)]
    return runs + [(mode, torch.float64)] * (mode in modes and (is_small or name in ONE_OF_EACH_KIND))


@pytest.mark.slow
@pytest.mark.parametrize("name, layout", [(n, lay) for n in MODELS for lay in LAYOUTS if whole_table_runs(n, lay)])
def test_whole_table(name, layout, one_process):
    check(name, layout, whole_table_runs(name, layout), one_process)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2 x tp2"])
def test_weights_that_stay_gathered(layout, one_process):
    reports = run_ranks(run_gathered, LAYOUTS[layout].world_size, layout, one_process("wan", layout))
    assert all(wrong == {} for report in reports for _, wrong in report.values())


def run_gathered(layout, path):
    LAYOUTS[layout].options["fsdp_reshard_after_forward"] = "never"
    return compare("wan", layout, [("plain", torch.float64)], path)


def weights_after_init():
    mesh = ParallelDims(dp_shard=torch.distributed.get_world_size()).build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(ARGS)
    parallelize(model, WAN.plan, mesh, Parallelism(), Training(), ActivationCheckpoint(mode="full"), Compile())
    model.to_empty(device="cpu")
    initialise(model, WAN.init_parameter, 0)
    return whole_tensors({clean_name(n): p.detach() for n, p in model.named_parameters()})


def test_initial_weights_do_not_depend_on_the_layout():
    single = WanModel(ARGS)
    initialise(single, WAN.init_parameter, 0)
    for weights in run_ranks(weights_after_init, 3):
        assert all(torch.equal(weights[n], p) for n, p in single.named_parameters())
    other = WanModel(ARGS)
    initialise(other, WAN.init_parameter, 1)
    assert not torch.equal(other.time_proj.weight, single.time_proj.weight)


def dtypes_inside():
    """Types that the parts of the model compute in under bfloat16 mixed precision."""
    mesh = ParallelDims(dp_shard=2).build_mesh("cpu")
    model = WanModel(ARGS)
    parallelize(
        model,
        WAN.plan,
        mesh,
        Parallelism(),
        Training(mixed_precision_param="bfloat16"),
        ActivationCheckpoint(),
        Compile(),
    )
    initialise(model, randomized_init(WAN.init_parameter), 0)
    seen = {}

    def watch(name):
        def before(module, args):
            seen[name] = {
                "weights": {p.dtype for p in module.parameters()},
                "args": [a.dtype for a in args if a is not None],
            }

        def after(module, args, out):
            seen[name]["out"] = out.dtype

        return before, after

    for name in ("time_embedder", "time_proj", "blocks.1", "patch_embedding"):
        before, after = watch(name)
        model.get_submodule(name).register_forward_pre_hook(before)
        model.get_submodule(name).register_forward_hook(after)
    task = build_task(WAN, ARGS)
    inputs = build_inputs(task, 1, torch.float32)
    task.loss(model(**inputs.kwargs), inputs).sum().backward()
    return seen, {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}


def test_mixed_precision_keeps_time_and_modulation_in_float32():
    seen, masters = run_ranks(dtypes_inside, 2)[0]
    assert masters == {torch.float32}
    for name in ("time_embedder", "time_proj"):
        assert seen[name]["out"] == torch.float32 and seen[name]["weights"] == {torch.float32}
    assert seen["patch_embedding"]["out"] == torch.bfloat16
    assert seen["blocks.1"]["weights"] == {torch.bfloat16}
    x, text, modulation, freqs_cis = seen["blocks.1"]["args"]
    assert (x, text, modulation, freqs_cis) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.complex64)
