"""One loss under every layout: loss and every gradient equal one process, for each layout of ONE table and each way of running a block.

Every layout runs the same step: micro-batches of two shapes, of one and of two clips, one of 15 tokens, which no degree above 1 but 3 and 5
divides, dealt out over the data-parallel ranks, so that these hold unequal numbers of tokens.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.helpers import run_ranks
from titan_video.components.objective import compute_loss, model_inputs, velocity_loss
from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.data.batch import Batch
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanArgs, WanModel

ARGS = WanArgs(dim=72, num_heads=12, num_layers=4, ffn_dim=60, text_dim=20, text_len=9, freq_dim=32)


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh, and options of [parallelism]."""

    dims: ParallelDims
    options: dict = field(default_factory=dict)

    @property
    def world_size(self):
        d = self.dims
        return d.pp * d.dp * d.sequence


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
COMPILED = Compile(enable=True, backend="aot_eager")
WAYS = {
    "plain": (ActivationCheckpoint(), Compile()),
    "full": (FULL, Compile()),
    "selective": (SELECTIVE, Compile()),
    "compile": (ActivationCheckpoint(), COMPILED),
    "selective+compile": (SELECTIVE, COMPILED),
    "full+compile": (FULL, COMPILED),
}
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
NUM_BATCHES = 12  # as many for each data-parallel rank, of 1, 2, 3 or 4


def micro_batch(i, dtype):
    """Micro-batch i of the step: even ones are two clips of 4 tokens, odd ones one of 15."""
    grid, B = ((1, 4, 4), 2) if i % 2 == 0 else ((3, 2, 10), 1)
    ids = torch.arange(B) + 10 * i
    text = draw_noise(1, ids, (ARGS.text_len, ARGS.text_dim)).to(dtype)
    return Batch(draw_noise(2, ids, (16, *grid)).to(dtype), text, torch.ones(B, ARGS.text_len, dtype=torch.bool), ids)


def arguments(i, dtype):
    """What the objective needs beside the model: (patch, batch, noise, levels, weights)."""
    batch = micro_batch(i, dtype)
    noise = draw_noise(0, batch.sample_ids_B, tuple(batch.latents_BCFHW.shape[1:])).to(dtype)
    return ARGS.patch, batch, noise, (batch.sample_ids_B + 1) / 100, 1 + batch.sample_ids_B / 50


def num_elements(batches):
    return sum(micro_batch(i, torch.float32).latents_BCFHW.numel() for i in batches)


def build(dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return WanModel(ARGS)
    finally:
        torch.set_default_dtype(default)


def perturbed_init(name, tensor, generator):
    """The public initialisation has a head of zeros, through which no gradient would reach the blocks."""
    SPEC.init_parameter(name, tensor, generator)
    tensor.add_(torch.empty_like(tensor).normal_(0, 0.05, generator=generator))


def reference(dtype):
    model = build(dtype).to_empty(device="cpu")
    initialise(model, perturbed_init, 0)
    loss = sum(compute_loss(model, *arguments(i, dtype)).sum() for i in range(NUM_BATCHES)) / num_elements(range(NUM_BATCHES))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, clip_grad_norm(model, 0.0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "step.pt"
    torch.save({dtype: reference(dtype) for dtype in LIMITS}, path)
    return path


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_step(layout, way, dtype):
    """(loss, {name: gradient}, norm, names without a gradient) of one step, on every rank the same but for a pipeline's names."""
    torch._dynamo.reset()
    meshes, kind = layout.dims.build_mesh("cpu"), str(dtype).removeprefix("torch.")
    checkpointing, compilation = WAYS[way]
    section, training = Parallelism(**layout.options), Training(mixed_precision_param=kind, mixed_precision_reduce=kind)
    model, pipelined = build(dtype), layout.dims.pp > 1
    stages = keep_stages(model, SPEC.plan, meshes.pp, section, ARGS, 15) if pipelined else None
    parallelize(model, SPEC.plan, meshes, section, training, checkpointing, compilation)
    model.to_empty(device="cpu")
    initialise(model, perturbed_init, 0)
    mine = range(meshes.batch.get_local_rank(), NUM_BATCHES, meshes.batch.size())
    count = num_elements(range(NUM_BATCHES))
    shard, loss = SequenceShard(meshes.sequence, layout.dims.tp), torch.zeros((), dtype=dtype)
    if pipelined:
        pipeline = Pipeline(model, stages, SPEC.plan, meshes.pp, section, dtype, torch.device("cpu"))
        for parity in (0, 1):  # a pipeline's micro-batches have one shape
            inputs = [model_inputs(*arguments(i, dtype), shard) for i in range(NUM_BATCHES) if i % 2 == parity][meshes.batch.get_local_rank() :: meshes.batch.size()]
            loss += pipeline.step(inputs, lambda v, i: velocity_loss(v, inputs[i]).sum() / count)
        mine = ()
    for i in mine:
        micro = compute_loss(model, *arguments(i, dtype), shard).sum() / count
        micro.backward()
        loss += micro.detach()
    loss = reduce_over(meshes.batch, reduce_over(meshes.sequence, loss, "sum"), "sum")
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    norm = clip_grad_norm(model, 0.0, meshes.pp)
    return loss, {clean_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}, norm, missing


def compare(name, runs, path):
    """{(way, type): (names of parameters, what differs from one process)} of one rank."""
    expected, report = torch.load(path), {}
    for way, dtype in runs:
        loss, grads, norm, missing = run_step(LAYOUTS[name], way, dtype)
        ref_loss, ref_grads, ref_norm = expected[dtype]
        errors = {n: ((g - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n, g in grads.items()}
        errors |= {"the loss": abs(loss - ref_loss).item() / ref_loss.item(), "the norm": abs(norm - ref_norm).item() / ref_norm.item()}
        wrong = {n: e for n, e in errors.items() if not e <= LIMITS[dtype]} | dict.fromkeys(missing, "no gradient")
        report[way, dtype] = set(grads), wrong
    return report


def check(name, runs, path):
    reports = run_ranks(compare, LAYOUTS[name].world_size, name, runs, path, timeout=600)
    names = torch.load(path)[torch.float64][1].keys()
    for run in runs:
        assert set().union(*(report[run][0] for report in reports)) == names
        assert [report[run][1] for report in reports] == [{}] * len(reports), (name, run)


EAGER = ("plain", "full", "selective")
COMPILED_WAYS = tuple(way for way in WAYS if way not in EAGER)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, one_process):
    check(name, [(way, torch.float64) for way in EAGER] + [("plain", torch.float32)], one_process)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].world_size == 2])
def test_compiled_layout_equals_one_process(name, one_process):
    check(name, [(way, torch.float64) for way in (COMPILED_WAYS if name == "fsdp2" else ("selective+compile",))], one_process)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_table(name, dtype, one_process):
    check(name, [(way, dtype) for way in WAYS], one_process)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 x tp2"])
def test_weights_that_stay_gathered(name, one_process):
    reports = run_ranks(kept_gathered, LAYOUTS[name].world_size, name, one_process)
    assert all(wrong == {} for report in reports for _, wrong in report.values())


def kept_gathered(name, path):
    LAYOUTS[name].options["fsdp_reshard_after_forward"] = "never"
    return compare(name, [("plain", torch.float64)], path)


def weights_after_init():
    mesh = ParallelDims(dp_shard=torch.distributed.get_world_size()).build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(ARGS)
    parallelize(model, SPEC.plan, mesh, Parallelism(), Training(), ActivationCheckpoint(mode="full"), Compile())
    model.to_empty(device="cpu")
    initialise(model, SPEC.init_parameter, 0)
    return {clean_name(n): p.full_tensor() for n, p in model.named_parameters()}


def test_initial_weights_do_not_depend_on_the_layout():
    single = WanModel(ARGS)
    initialise(single, SPEC.init_parameter, 0)
    for weights in run_ranks(weights_after_init, 3):
        assert all(torch.equal(weights[n], p) for n, p in single.named_parameters())
    other = WanModel(ARGS)
    initialise(other, SPEC.init_parameter, 1)
    assert not torch.equal(other.time_proj.weight, single.time_proj.weight)


def dtypes_inside():
    """Types that the parts of the model compute in under bfloat16 mixed precision."""
    mesh = ParallelDims(dp_shard=2).build_mesh("cpu")
    model = WanModel(ARGS)
    parallelize(model, SPEC.plan, mesh, Parallelism(), Training(mixed_precision_param="bfloat16"), ActivationCheckpoint(), Compile())
    initialise(model, perturbed_init, 0)
    seen = {}

    def watch(name):
        def before(module, args):
            seen[name] = {"weights": {p.dtype for p in module.parameters()}, "args": [a.dtype for a in args if a is not None]}

        def after(module, args, out):
            seen[name]["out"] = out.dtype

        return before, after

    for name in ("time_embedder", "time_proj", "blocks.1", "patch_embedding"):
        before, after = watch(name)
        model.get_submodule(name).register_forward_pre_hook(before)
        model.get_submodule(name).register_forward_hook(after)
    compute_loss(model, *arguments(1, torch.float32)).sum().backward()
    return seen, {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}


def test_mixed_precision_keeps_time_and_modulation_in_float32():
    seen, masters = run_ranks(dtypes_inside, 2)[0]
    assert masters == {torch.float32}
    for name in ("time_embedder", "time_proj"):
        assert seen[name]["out"] == torch.float32 and seen[name]["weights"] == {torch.float32}
    assert seen["patch_embedding"]["out"] == torch.bfloat16
    assert seen["blocks.1"]["weights"] == {torch.bfloat16}
    x, text, modulation, rotations = seen["blocks.1"]["args"]
    assert (x, text, modulation, rotations) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.complex64)
