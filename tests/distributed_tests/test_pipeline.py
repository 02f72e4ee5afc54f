"""Pipeline parallel: loss, norm and every gradient equal one process for every schedule, and a forward gives its result on all ranks."""

from dataclasses import dataclass, field

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.helpers import run_ranks
from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, check_microbatches, keep_stages, split_blocks, state_bytes
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanArgs, WanModel

ARGS = WanArgs(dim=24, num_heads=2, num_layers=5, ffn_dim=40, text_dim=20, text_len=5, freq_dim=16)
NUM_SAMPLES = 8
LENGTHS = (6, 4)  # tokens of the clips of the first and the second step


@dataclass
class Inputs:
    x_BLP: torch.Tensor
    pos_BL3: torch.Tensor
    t_B: torch.Tensor
    text_BSD: torch.Tensor
    text_mask_BS: torch.Tensor
    target_BLP: torch.Tensor
    seq_len: int | None = None
    cond: dict = field(default_factory=dict)


def sample(i, num_tokens, dtype):
    ids = torch.tensor([i])
    x, target = (draw_noise(k, ids, (num_tokens, 64)).to(dtype) for k in (1, 2))
    pos = torch.arange(3 * num_tokens).reshape(1, num_tokens, 3)
    text = draw_noise(3, ids, (ARGS.text_len, ARGS.text_dim)).to(dtype)
    return Inputs(x, pos, torch.tensor([100.0 * i + 50]), text, torch.ones(1, ARGS.text_len, dtype=torch.bool), target)


def loss_of(v, target):
    return (v.to(torch.promote_types(v.dtype, torch.float32)) - target).square().sum() / (NUM_SAMPLES * target.numel())


def perturbed_init(name, tensor, generator):
    """The public initialisation has a head of zeros, through which no gradient would reach the blocks."""
    SPEC.init_parameter(name, tensor, generator)
    tensor.add_(torch.empty_like(tensor).normal_(0, 0.05, generator=generator))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference(dtype):
    """Loss, norm and gradients of each of the two steps, and the velocity of sample 0, of one process."""
    model = WanModel(ARGS)
    initialise(model, perturbed_init, 0)
    model.to(dtype)
    steps = []
    for num_tokens in LENGTHS:
        total = 0
        for i in range(NUM_SAMPLES):
            n = sample(i, num_tokens, dtype)
            loss = loss_of(model(n.x_BLP, n.pos_BL3, n.t_B, n.text_BSD), n.target_BLP)
            loss.backward()
            total += loss.item()
        steps.append((total, clip_grad_norm(model, 0.5).item(), {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad()
    n = sample(0, LENGTHS[0], dtype)
    with torch.no_grad():
        return steps, model(n.x_BLP, n.pos_BL3, n.t_B, n.text_BSD)


def build(pp, schedule, dtype, dp_shard=1, checkpointing="none", compiled=False):
    section = Parallelism(pipeline_parallel_degree=pp, pipeline_parallel_schedule=schedule)
    meshes = ParallelDims(pp=pp, dp_shard=dp_shard).build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(ARGS)
    stages = keep_stages(model, SPEC.plan, meshes.pp, section, ARGS, LENGTHS[0])
    training = Training(mixed_precision_param=dtype, mixed_precision_reduce="float64" if dtype == "float64" else "float32")
    compilation = Compile(enable=compiled, backend="aot_eager")
    model.to(torch.float64 if dtype == "float64" else torch.float32)
    parallelize(model, SPEC.plan, meshes, section, training, ActivationCheckpoint(mode=checkpointing), compilation)
    model.to_empty(device="cpu")
    initialise(model, perturbed_init, 0)
    return meshes, model, Pipeline(model, stages, SPEC.plan, meshes.pp, section, getattr(torch, dtype), torch.device("cpu"))


def run_pipeline(pp, schedule, dtype, **options):
    meshes, model, pipeline = build(pp, schedule, dtype, **options)
    tensors = torch.float64 if dtype == "float64" else torch.float32
    mine = range(meshes.batch.get_local_rank(), NUM_SAMPLES, meshes.batch.size())
    steps = []
    for num_tokens in LENGTHS:
        inputs = [sample(i, num_tokens, tensors) for i in mine]
        loss = pipeline.step(inputs, lambda v, i: loss_of(v, inputs[i].target_BLP))
        loss = reduce_over(meshes.batch, loss, "sum").item()
        norm = clip_grad_norm(model, 0.5, meshes.pp).item()
        steps.append((loss, norm, {clean_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    n = sample(0, LENGTHS[0], tensors)
    velocity = pipeline(n.x_BLP, n.pos_BL3, n.t_B, n.text_BSD, n.text_mask_BS, None)
    return steps, velocity, [clean_name(n) for n, _ in model.named_parameters()]


@pytest.fixture(scope="module")
def references():
    return {dtype: reference(getattr(torch, dtype)) for dtype in ("float64", "float32")}


CASES = {
    "GPipe": (2, "GPipe", "float64", {}),
    "1F1B": (2, "1F1B", "float64", {}),
    "Interleaved1F1B": (2, "Interleaved1F1B", "float64", {}),
    "InterleavedZeroBubble": (2, "InterleavedZeroBubble", "float32", {}),
    "IZB float64": (2, "InterleavedZeroBubble", "float64", {}),
    "IZB float64 full": (2, "InterleavedZeroBubble", "float64", {"checkpointing": "full"}),
    "IZB fsdp": (2, "InterleavedZeroBubble", "float64", {"dp_shard": 2}),
    "I1F1B fsdp": (2, "Interleaved1F1B", "float64", {"dp_shard": 2, "checkpointing": "full"}),
    "1F1B fsdp": (2, "1F1B", "float64", {"dp_shard": 2}),
    "pp4": (4, "1F1B", "float64", {}),
    "izb compile": (2, "InterleavedZeroBubble", "float64", {"compiled": True}),
    "1F1B compile": (2, "1F1B", "float64", {"compiled": True}),
    "1F1B float32": (2, "1F1B", "float32", {"checkpointing": "full"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case, references):
    pp, schedule, dtype, options = CASES[case]
    results = run_ranks(run_pipeline, pp * options.get("dp_shard", 1), pp, schedule, dtype, **options)
    limit = 1e-10 if dtype == "float64" else 2e-5
    ref_steps, ref_velocity = references[dtype]
    names = [name for ranks_steps, velocity, own in results for name in own]
    assert sorted(set(names)) == sorted(ref_steps[0][2])
    for steps, velocity, own in results:
        assert ((velocity - ref_velocity).norm() / ref_velocity.norm()).item() <= limit
        for (loss, norm, grads), (ref_loss, ref_norm, ref_grads) in zip(steps, ref_steps, strict=True):
            assert loss == pytest.approx(ref_loss, rel=limit) and norm == pytest.approx(ref_norm, rel=limit)
            assert sorted(grads) == sorted(own)
            errors = {n: ((grads[n] - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n in grads}
            assert {n: e for n, e in errors.items() if not e <= limit} == {}
