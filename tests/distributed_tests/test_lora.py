"""Adapters under every kind of layout: loss and every adapter's gradient equal one process; what a frozen weight costs; files and averages of sharded adapters."""

from dataclasses import replace

import pytest
import torch

from tests.distributed_tests.test_layouts import MODELS, WAYS, arguments, layout, whole
from tests.helpers import run_ranks
from titan_video.components.objective import compute_loss, model_inputs, predict, velocity_loss
from titan_video.config.job_config import Lora, Parallelism, Training
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.models.lora import add_adapters, is_adapter

# All targets of a family by default, and of HunyuanVideo its modulation too, whose outputs tensor parallel gathers.
LORA = Lora(enable=True, rank=3, alpha=4.5)
LORAS = {"wan": LORA, "hunyuan": replace(LORA, target_modules=(*MODELS["hunyuan"][0].lora_targets, "modulation.linear", "text_modulation.linear"))}
LAYOUTS = {
    "fsdp2": layout(dp_shard=2),
    "hsdp2x2": layout(dp_replicate=2, dp_shard=2),
    "tp2": layout(tp=2),
    "ulysses2": layout(ulysses=2),
    "ring2": layout(ring=2),
    "fsdp2 x tp2": layout(dp_shard=2, tp=2),
    "pp2": layout(pp=2),
    "pp2 zero bubble": layout({"pipeline_parallel_schedule": "InterleavedZeroBubble"}, pp=2),
}
NUM_BATCHES, COUNT = 4, 1e4


def init(spec):
    def fill(name, tensor, generator):
        if is_adapter(name):  # `up` too: through zeros no gradient would reach `down`
            tensor.normal_(0, 0.1, generator=generator)
        else:
            spec.init_parameter(name, tensor, generator)
            tensor.add_(torch.empty_like(tensor).normal_(0, 0.05, generator=generator))

    return fill


def build(name, dtype):
    """On the meta device, with adapters; float64 throughout where dtype is that."""
    spec, args = MODELS[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    try:
        with torch.device("meta"):
            model = spec.build(args)
    finally:
        torch.set_default_dtype(default)
    add_adapters(model, spec, LORAS[name], dtype)
    return model


def reference(name, dtype=torch.float64):
    (spec, args), model = MODELS[name], build(name, dtype).to_empty(device="cpu")
    initialise(model, init(spec), 0)
    loss = torch.zeros((), dtype=dtype)
    for i in range(NUM_BATCHES):
        positional, told = arguments(args, i, dtype)
        loss = loss + compute_loss(model, *positional, **told).sum() / COUNT
    loss.backward()
    assert all((p.grad is not None) == is_adapter(n) for n, p in model.named_parameters())
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, clip_grad_norm(model, 0.0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "step.pt"
    torch.save({name: reference(name) for name in LORAS}, path)
    return path


def prepare(name, layout, way, dtype, reduce="float32"):
    torch._dynamo.reset()
    (spec, args), meshes, kind = MODELS[name], layout.dims.build_mesh("cpu"), str(dtype).removeprefix("torch.")
    training = Training(mixed_precision_param=kind, mixed_precision_reduce=reduce)
    model, section = build(name, dtype), Parallelism(**layout.options)
    stages = keep_stages(model, spec.plan, meshes.pp, section, args, 15) if layout.dims.pp > 1 else None
    parallelize(model, spec.plan, meshes, section, training, *WAYS[way])
    model.to_empty(device="cpu")
    initialise(model, init(spec), 0)
    pipeline = Pipeline(model, stages, spec.plan, meshes.pp, section, dtype, torch.device("cpu")) if stages else None
    return model, meshes, pipeline


def run_step(name, layout, way):
    dtype, args = torch.float64, MODELS[name][1]
    model, meshes, pipeline = prepare(name, layout, way, dtype, "float64")
    shard, loss = SequenceShard(meshes.sequence, layout.dims.tp), torch.zeros((), dtype=dtype)
    rank, dp = meshes.batch.get_local_rank(), meshes.batch.size()

    def inputs_of(i):
        positional, told = arguments(args, i, dtype)
        return model_inputs(*positional, shard, **told)

    if pipeline:
        for parity in (0, 1):  # a pipeline's micro-batches have one shape
            inputs = [inputs_of(i) for i in range(parity, NUM_BATCHES, 2)]
            loss += pipeline.step(inputs, lambda v, i: velocity_loss(v, inputs[i]).sum() / COUNT)
    else:
        for i in range(rank, NUM_BATCHES, dp):
            inputs = inputs_of(i)
            micro = velocity_loss(predict(model, inputs), inputs).sum() / COUNT
            micro.backward()
            loss += micro.detach()
    loss = reduce_over(meshes.batch, reduce_over(meshes.sequence, loss, "sum"), "sum")
    norm = clip_grad_norm(model, 0.0, meshes.pp)
    return loss, {clean_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}, norm


def compare(layout, runs, path):
    """[(names of gradients, what differs from one process)] of one rank."""
    expected, report = torch.load(path), []
    for name, way in runs:
        loss, grads, norm = run_step(name, LAYOUTS[layout], way)
        ref_loss, ref_grads, ref_norm = expected[name]
        errors = {n: ((g - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n, g in grads.items()}
        errors |= {"the loss": abs(loss - ref_loss).item() / ref_loss.item(), "the norm": abs(norm - ref_norm).item() / ref_norm.item()}
        report.append((set(grads), {n: e for n, e in errors.items() if not e <= 1e-10}))
    return report


RUNS = {layout: [(name, "plain") for name in LORAS] for layout in LAYOUTS}
RUNS["fsdp2"] += [("wan", "selective"), ("wan", "compile")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, one_process):
    reports = run_ranks(compare, LAYOUTS[layout].world_size, layout, RUNS[layout], one_process, timeout=300)
    expected = torch.load(one_process)
    for i, (name, way) in enumerate(RUNS[layout]):
        assert [report[i][1] for report in reports] == [{}] * len(reports), (name, way)
        assert set().union(*(report[i][0] for report in reports)) == expected[name][1].keys()
