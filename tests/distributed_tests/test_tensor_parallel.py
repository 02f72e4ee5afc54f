"""Tensor parallel: equal to one process, initial weights, gradient norm and updates included; what is sent, counted; async mode."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import run_ranks
from titan_video.components.objective import compute_loss
from titan_video.components.optimizer import build_optimizer
from titan_video.config.job_config import ActivationCheckpoint, Compile, Optimizer, Parallelism, Training
from titan_video.data.batch import Batch
from titan_video.distributed.fsdp import apply_fsdp
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.tensor_parallel import apply_tensor_parallel
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanArgs, WanModel

# On 2 x 2 ranks FSDP deals 25 rows of ffn.up to 2 ranks: 13 and 12.
ARGS = WanArgs(dim=48, num_heads=4, num_layers=2, ffn_dim=50, text_dim=20, text_len=9, freq_dim=32)
ARGS_4 = WanArgs(dim=48, num_heads=4, num_layers=2, ffn_dim=52, text_dim=20, text_len=9, freq_dim=32)
LAYOUTS = {"tp2": {"tp": 2}, "tp4": {"tp": 4}, "fsdp2 tp2": {"dp_shard": 2, "tp": 2}, "hsdp2 tp2": {"dp_replicate": 2, "tp": 2}}
# (batch, latent grid): 6 tokens divide by 2 ranks but not by 4, 9 by neither, 12 by both
CASES = ((1, (1, 4, 6)), (2, (1, 6, 6)), (2, (3, 4, 4)))
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5}


def perturbed_init(name, tensor, generator):
    """The public initialisation has a head of zeros, through which no gradient would reach the blocks."""
    SPEC.init_parameter(name, tensor, generator)
    tensor.add_(torch.empty_like(tensor).normal_(0, 0.05, generator=generator))


def forward_backward(model, args, case, clips, shard=None):
    """Loss of `clips`, a list of sample ids, in micro-batches of the case's size."""
    batch_size, grid = case
    dtype = next(model.parameters()).dtype
    total = torch.zeros((), dtype=dtype)
    for i in range(0, len(clips), batch_size):
        ids = torch.tensor(clips[i : i + batch_size])
        text = draw_noise(1, ids, (args.text_len, args.text_dim)).to(dtype)
        batch = Batch(draw_noise(2, ids, (16, *grid)), text, torch.ones(len(ids), args.text_len, dtype=torch.bool), ids)
        noise = draw_noise(0, ids, (16, *grid))
        loss = compute_loss(model, args.patch, batch, noise, (ids + 1) / 9, 1 + ids / 10, shard).sum() / 1000
        loss.backward()
        total += loss.detach()
    return total


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, args, case, clips, shard=None):
    """Two steps: loss, gradients and norm of the first, weights before and after."""
    optimizer = build_optimizer(model, Optimizer(lr=1e-3, implementation="foreach"))
    before = {clean_name(n): whole(p).detach().clone() for n, p in model.named_parameters()}
    loss = forward_backward(model, args, case, clips, shard)
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    grads = {clean_name(n): whole(p.grad).clone() for n, p in model.named_parameters()}
    norm = clip_grad_norm(model, 0.1)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        forward_backward(model, args, case, clips, shard)
        clip_grad_norm(model, 0.1)
    return loss, grads, norm, before, {clean_name(n): whole(p).detach() for n, p in model.named_parameters()}


def sharded(args, dims, dtype=torch.float32, **options):
    meshes = ParallelDims(**dims).build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(args).to(dtype)
    options = {"parallelism": Parallelism(), "training": Training(mixed_precision_param="float32"), "checkpointing": ActivationCheckpoint(),
               "compilation": Compile(), **options}  # fmt: skip
    if dtype == torch.float64:
        apply_tensor_parallel(model, SPEC.plan, meshes.tp, async_mode=False)
        apply_fsdp(model, SPEC.plan, meshes, dtype, dtype, "default")
    else:
        parallelize(model, SPEC.plan, meshes, **options)
    model.to_empty(device="cpu")
    initialise(model, perturbed_init, 0)
    return model, meshes, SequenceShard(meshes.sequence, meshes.tp.size())


def train_rank(args, dims):
    results = []
    for dtype in DTYPES:
        for case in CASES:
            model, meshes, shard = sharded(args, dims, dtype)
            per_rank = 4 // meshes.batch.size()
            first = per_rank * meshes.batch.get_local_rank()
            loss, *rest = train(model, args, case, list(range(first, first + per_rank)), shard)
            results.append((reduce_over(meshes.batch, reduce_over(meshes.sequence, loss, "sum"), "sum"), *rest))
    return results if torch.distributed.get_rank() in (0, torch.distributed.get_world_size() - 1) else None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_equal_one_process(layout):
    dims = LAYOUTS[layout]
    args = ARGS_4 if layout == "tp4" else ARGS
    ranks = run_ranks(train_rank, 2 if layout == "tp2" else 4, args, dims)
    runs = [(dtype, case) for dtype in DTYPES for case in CASES]
    for i, (dtype, case) in enumerate(runs):
        model = WanModel(args).to(dtype)
        initialise(model, perturbed_init, 0)
        ref_loss, ref_grads, ref_norm, ref_before, ref_after = train(model, args, case, [0, 1, 2, 3])
        for loss, grads, norm, before, after in (rank[i] for rank in (ranks[0], ranks[-1])):
            limit = DTYPES[dtype]
            assert loss.item() == pytest.approx(ref_loss.item(), rel=limit)
            assert norm.item() == pytest.approx(ref_norm.item(), rel=limit)
            assert grads.keys() == ref_grads.keys()
            errors = {n: ((grads[n] - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n in grads}
            assert {n: e for n, e in errors.items() if not e <= limit} == {}
            assert all(torch.equal(before[n], ref_before[n]) for n in grads)
            # Adam divides by the gradient's size, so a small one's rounding counts in full: the first step of 1e-3 is the measure.
            errors = {n: (after[n] - ref_after[n]).abs().max().item() for n in grads}
            assert {n: e for n, e in errors.items() if not e <= (1e-12 if dtype == torch.float64 else 2e-5)} == {}
