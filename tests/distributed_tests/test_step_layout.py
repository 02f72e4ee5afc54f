"""Micro-batches of one step on sequence groups of different sizes: loss and every gradient equal one process.

Blocks are fully checkpointed, and all forwards of a step run before its backward or interleaved with it. So a block
that is recomputed must use the layout of its own micro-batch, not the last one that was used.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from tests.helpers import build_denoising, randomized_init, run_ranks, whole_tensors
from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.data.batch import Batch
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline
from titan_video.distributed.pipeline_parallel.stages import keep_stages
from titan_video.distributed.sequence import SequenceShard, whole_sequence
from titan_video.distributed.utils import clean_name, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.spec import RankGroup, StepLayout
from titan_video.models.wan import SPEC, WanArgs, WanModel

ARGS = WanArgs(dim=32, num_heads=4, num_layers=3, ffn_dim=40, text_dim=12, text_len=5, freq_dim=16)
FULL, EAGER = ActivationCheckpoint(mode="full"), Compile()
LIMIT = 1e-10


@dataclass(frozen=True)
class Clip:
    """id: keys its latents, noise and text. grid: latent frames, height, width."""

    id: int
    grid: tuple[int, int, int]


LONG, MEDIUM, SHORT = (3, 6, 6), (3, 2, 10), (2, 4, 4)  # 27, 15 and 8 tokens
ALONE = RankGroup(name="", rank=0, size=1)


def make_batch(clip):
    ids = torch.tensor([clip.id])
    text = draw_noise(1, ids, (ARGS.text_len, ARGS.text_dim)).double()
    mask = torch.ones(1, ARGS.text_len, dtype=torch.bool)
    return Batch({"video": draw_noise(2, ids, (16, *clip.grid)).double()}, text, mask, ids)


def build_inputs(clip, shard):
    batch = make_batch(clip)
    noise = draw_noise(3, batch.sample_ids_B, (16, *clip.grid)).double()
    ids = batch.sample_ids_B
    task = build_denoising(SPEC, ARGS, shard)
    return task.add_noise(batch, noise, sigma_B=(ids + 1) / 20, weight_B=1 + ids / 10)


def loss_fn(prediction, inputs):
    return build_denoising(SPEC, ARGS).loss(prediction, inputs).sum()


def count(clips):
    return sum(build_denoising(SPEC, ARGS).num_loss_elements(make_batch(clip)) for clip in clips)


def get_gradients(model):
    return whole_tensors({clean_name(n): p.grad for n, p in model.named_parameters()})


def reference(clips):
    """(loss, gradients) of one process that has all clips."""
    model = WanModel(ARGS).double()
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    total = 0.0
    for clip in clips:
        inputs = build_inputs(clip, whole_sequence())
        loss = loss_fn(model(**inputs.kwargs), inputs) / count(clips)
        loss.backward()
        total += loss.item()
    return total, get_gradients(model)


def differences(result, expected):
    """Relative errors above the limit, by name."""
    (loss, grads), (ref_loss, ref_grads) = result, expected
    errors = {n: ((g - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n, g in grads.items()}
    errors["the loss"] = abs(loss - ref_loss) / ref_loss
    return {n: e for n, e in errors.items() if not e <= LIMIT}


def parallel_model(dims, compilation=EAGER):
    """(meshes, model, its pipeline or None) in float64."""
    meshes = dims.build_mesh("cpu")
    section = Parallelism(pipeline_parallel_degree=dims.pp)
    with torch.device("meta"):
        model = WanModel(ARGS).double()
    stages = keep_stages(model, SPEC.plan, meshes.pp, section, ARGS, 15) if dims.pp > 1 else None
    training = Training(mixed_precision_param="float64", mixed_precision_reduce="float64")
    parallelize(model, SPEC.plan, meshes, section, training, FULL, compilation)
    model.to_empty(device="cpu")
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    if dims.pp > 1:
        return meshes, model, Pipeline(model, stages, SPEC.plan, meshes.pp, section, torch.float64, torch.device("cpu"))
    return meshes, model, None


# ---- an accumulated step ----

ACCUMULATED = [Clip(0, MEDIUM), Clip(1, MEDIUM), Clip(2, LONG), Clip(3, MEDIUM), Clip(4, MEDIUM)]


def accumulated(axis, compilation):
    """On 4 ranks: clips 0, 1, 3 and 4 on groups of 2 ranks, those of the model's own meshes; clip 2 on all 4."""
    torch._dynamo.reset()
    meshes, model, _ = parallel_model(ParallelDims(dp_shard=2, **{axis: 2}), compilation)
    static = SequenceShard.from_meshes(meshes)
    wide = SequenceShard.from_meshes(ParallelDims(**{axis: 4}).build_mesh("cpu"))
    group = meshes.batch.get_local_rank()
    steps = [(ACCUMULATED[group], static), (ACCUMULATED[2], wide), (ACCUMULATED[3 + group], static)]
    assert [shard.size for _, shard in steps] == [2, 4, 2]
    losses = []
    for clip, shard in steps:
        inputs = build_inputs(clip, shard)
        losses.append(loss_fn(model(**inputs.kwargs), inputs) / count(ACCUMULATED))
    loss = sum(losses)
    loss.backward()  # of all micro-batches, in reverse order
    total = reduce_over(meshes.batch, reduce_over(meshes.sequence, loss.detach(), "sum"), "sum")
    return total.item(), get_gradients(model)


@pytest.mark.parametrize(
    "axis, compiled",
    [
        ("ulysses", False),
        ("ring", False),
        pytest.param("ulysses", True, marks=pytest.mark.slow),
        pytest.param("ring", True, marks=pytest.mark.slow),
    ],
)
def test_two_group_sizes_in_an_accumulated_step(axis, compiled):
    expected = reference(ACCUMULATED)
    compilation = Compile(enable=compiled, backend="aot_eager")
    for result in run_ranks(accumulated, 4, axis, compilation, timeout=400):
        assert differences(result, expected) == {}


# ---- a pipeline step ----

SHARED = [Clip(10 + i, MEDIUM) for i in range(3)]  # 15 tokens on 2 ranks: 8 rows each, one of them padding
OWN = [[Clip(20 + i, SHORT), Clip(30 + i, SHORT)] for i in range(3)]  # 8 tokens on one rank; a clip for each


def pipelined(axis):
    """On 4 ranks, pp2 x 2: clips on both ranks of the sequence axis between clips on one rank each."""
    meshes, model, pipeline = parallel_model(ParallelDims(pp=2, **{axis: 2}))
    static, rank = SequenceShard.from_meshes(meshes), meshes.sequence.get_local_rank()
    inputs = []
    for shared, own in zip(SHARED, OWN, strict=True):
        inputs.append(build_inputs(shared, static))
        alone = build_inputs(own[rank], whole_sequence())
        # Without a layout the blocks would take the groups that the model was built with.
        layout = StepLayout(alone.kwargs["x_BLP"].shape[1], ring=ALONE, ulysses=ALONE)
        if axis == "ring":
            layout = replace(layout, ring=one_rank_group())
        inputs.append(replace(alone, kwargs=alone.kwargs | {"layout": layout}))
    assert {i.kwargs["x_BLP"].shape[1] for i in inputs} == {8}
    num_elements = count(SHARED) + sum(count(clips) for clips in OWN)
    loss = pipeline.step(inputs, lambda v, i: loss_fn(v, inputs[i]) / num_elements)
    return reduce_over(meshes.sequence, loss, "sum").item(), get_gradients(model)


def one_rank_group():
    """A process group of this rank alone, which the ring's operator resolves by its name."""
    meshes = ParallelDims(dp_shard=torch.distributed.get_world_size()).build_mesh("cpu")
    return SequenceShard.from_meshes(meshes).ring


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_two_group_sizes_in_a_pipeline_step(axis):
    expected = reference(SHARED + [clip for clips in OWN for clip in clips])
    results = run_ranks(pipelined, 4, axis)
    assert set().union(*(grads for _, grads in results)) == set(expected[1])
    for result in results:
        assert differences(result, expected) == {}
