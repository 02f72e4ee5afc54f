"""One loss under every layout: loss and every gradient equal one process, for each layout of ONE table and each way of running a block."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.helpers import run_ranks
from titan_video.components.objective import compute_loss
from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.data.batch import Batch
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanArgs, WanModel

ARGS = WanArgs(dim=36, num_heads=3, num_layers=3, ffn_dim=50, text_dim=20, text_len=9, freq_dim=32)
LAYOUTS = {"fsdp1": (1, 1), "fsdp2": (1, 2), "fsdp3": (1, 3), "fsdp4": (1, 4), "hsdp2x2": (2, 2)}
WAYS = {
    "plain": {},
    "full": {"checkpointing": ActivationCheckpoint(mode="full")},
    "compile": {"compilation": Compile(enable=True, backend="aot_eager")},
    "full+compile": {"checkpointing": ActivationCheckpoint(mode="full"), "compilation": Compile(enable=True, backend="aot_eager")},
    "no reshard": {"parallelism": Parallelism(fsdp_reshard_after_forward="never")},
}
NUM_SAMPLES = 12


def sample(i, dtype):
    """Sample i of the step; odd ones have more tokens, so ranks hold unequal numbers of them."""
    grid = (2, 4, 6) if i % 2 else (1, 4, 4)
    ids = torch.tensor([i])
    text = draw_noise(1, ids, (ARGS.text_len, ARGS.text_dim))
    return Batch(draw_noise(2, ids, (16, *grid)), text.to(dtype), torch.ones(1, ARGS.text_len, dtype=torch.bool), ids)


def backward(model, mine, num_elements, dtype):
    total = torch.zeros((), dtype=dtype)
    for i in mine:
        batch = sample(i, dtype)
        noise = draw_noise(0, batch.sample_ids_B, tuple(batch.latents_BCFHW.shape[1:]))
        loss = compute_loss(model, ARGS.patch, batch, noise, torch.tensor([(i + 1) / 14]), torch.tensor([1 + i / 10])).sum() / num_elements
        loss.backward()
        total += loss.detach()
    return total


def reference(dtype=torch.float32):
    model = WanModel(ARGS)
    initialise(model, perturbed_init, 0)
    count = sum(sample(i, dtype).latents_BCFHW.numel() for i in range(NUM_SAMPLES))
    loss = backward(model, range(NUM_SAMPLES), count, dtype)
    return loss, {n: p.grad for n, p in model.named_parameters()}, clip_grad_norm(model, 0.0)


def perturbed_init(name, tensor, generator):
    """The public initialisation has a head of zeros, through which no gradient would reach the blocks."""
    SPEC.init_parameter(name, tensor, generator)
    tensor.add_(torch.empty_like(tensor).normal_(0, 0.05, generator=generator))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_layout(layout, way):
    mesh = ParallelDims(1, *LAYOUTS[layout]).build_mesh("cpu")
    options = {"parallelism": Parallelism(), "checkpointing": ActivationCheckpoint(), "compilation": Compile(), **WAYS[way]}
    with torch.device("meta"):
        model = WanModel(ARGS)
    parallelize(model, SPEC.plan, mesh, training=Training(mixed_precision_param="float32"), **options)
    model.to_empty(device="cpu")
    initialise(model, perturbed_init, 0)
    rank, size = mesh.batch.get_local_rank(), mesh.batch.size()
    mine = range(rank, NUM_SAMPLES, size)
    elements = torch.tensor(sum(sample(i, torch.float32).latents_BCFHW.numel() for i in mine))
    loss = reduce_over(mesh.batch, backward(model, mine, reduce_over(mesh.batch, elements, "sum").item(), torch.float32), "sum")
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    norm = clip_grad_norm(model, 0.0)
    return loss, {clean_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}, norm, missing


@pytest.fixture(scope="module")
def one_process():
    return reference()


@pytest.mark.parametrize("layout, way", [(layout, "plain") for layout in LAYOUTS] + [("fsdp2", way) for way in WAYS if way != "plain"] + [("hsdp2x2", "full")])
def test_layout_equals_one_process(layout, way, one_process):
    replicate, shard = LAYOUTS[layout]
    ref_loss, ref_grads, ref_norm = one_process
    for loss, grads, norm, missing in run_ranks(run_layout, replicate * shard, layout, way):
        assert missing == []
        assert loss.item() == pytest.approx(ref_loss.item(), rel=1e-6)
        assert norm.item() == pytest.approx(ref_norm.item(), rel=2e-5)
        assert grads.keys() == ref_grads.keys()
        errors = {n: ((grads[n] - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n in grads}
        assert {n: e for n, e in errors.items() if not e <= 2e-5} == {}


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
    batch = sample(1, torch.float32)
    compute_loss(model, ARGS.patch, batch, batch.latents_BCFHW, torch.tensor([0.5]), torch.ones(1)).sum().backward()
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
