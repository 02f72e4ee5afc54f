"""Pipeline parallel: loss, norm and every gradient equal one process for every schedule, and a forward gives its
result on all ranks.
"""

import gc
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from tests.helpers import randomized_init, run_ranks
from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline
from titan_video.distributed.pipeline_parallel.stages import check_microbatches, keep_stages, split_blocks
from titan_video.distributed.utils import clean_name, clip_grad_norm, initialise, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.planner.dry_run.traffic import state_bytes
from titan_video.tasks.task import ModelInputs

ARGS = WanArgs(dim=24, num_heads=2, num_layers=5, ffn_dim=40, text_dim=20, text_len=5, freq_dim=16)
NUM_SAMPLES = 8
LENGTHS = (6, 4)  # tokens of the clips of the first and the second step


# ---- the split, on one process ----


@pytest.mark.parametrize(
    "num_blocks, num_stages, first, last, sizes",
    [
        (30, 4, 0.1, 0.1, [7, 8, 8, 7]),
        (5, 2, 0.0, 0.0, [2, 3]),
        (6, 4, 0.0, 0.0, [1, 1, 2, 2]),
        (40, 1, 0.0, 0.0, [40]),
        (8, 2, 3.0, 1.0, [3, 5]),
        (4, 4, 9.0, 9.0, [1, 1, 1, 1]),
    ],
)
def test_blocks_are_split_by_cost(num_blocks, num_stages, first, last, sizes):
    ranges = split_blocks(num_blocks, num_stages, first, last)
    assert [len(r) for r in ranges] == sizes
    assert [i for r in ranges for i in r] == list(range(num_blocks))


def test_no_split_has_a_cheaper_costliest_stage():
    def costliest(sizes):
        return max(n + first * (s == 0) + last * (s == len(sizes) - 1) for s, n in enumerate(sizes))

    for num_blocks, num_stages, first, last in itertools.product((3, 5, 8), (1, 2, 3), (0.0, 0.3, 2.5), (0.0, 1.2)):
        best = min(
            costliest(c) for c in itertools.product(range(1, num_blocks + 1), repeat=num_stages) if sum(c) == num_blocks
        )
        assert costliest([len(r) for r in split_blocks(num_blocks, num_stages, first, last)]) == pytest.approx(best)


@pytest.mark.parametrize(
    "schedule, illegal, nearest",
    [
        ("GPipe", (), ""),
        ("1F1B", (1, 2, 3), "nearest: 4"),
        ("Interleaved1F1B", (9, 11, 13, 14), ""),
        ("InterleavedZeroBubble", (9, 11, 13, 14), ""),
    ],
)
def test_numbers_of_micro_batches(schedule, illegal, nearest):
    section = Parallelism(pipeline_parallel_degree=4, pipeline_parallel_schedule=schedule)
    for n in range(1, 15):
        if n in illegal:
            with pytest.raises(
                ValueError, match=r"training.global_batch_size.*pipeline_parallel_microbatch_size.*" + nearest
            ):
                check_microbatches(section, n)
        else:
            check_microbatches(section, n)
    if 9 in illegal:
        with pytest.raises(ValueError, match="a multiple of 4 .* nearest: 8 or 10"):
            check_microbatches(section, 9)


# ---- on ranks ----


@dataclass(frozen=True)
class Inputs(ModelInputs):
    target_BLP: torch.Tensor


def sample(i, num_tokens, dtype):
    ids = torch.tensor([i])
    x, target = (draw_noise(k, ids, (num_tokens, 64)).to(dtype) for k in (1, 2))
    pos = torch.arange(3 * num_tokens).reshape(1, num_tokens, 3)
    text = draw_noise(3, ids, (ARGS.text_len, ARGS.text_dim)).to(dtype)
    kwargs = {
        "x_BLP": x,
        "pos_BL3": pos,
        "t_B": torch.tensor([100.0 * i + 50]),
        "text_BSD": text,
        "text_mask_BS": torch.ones(1, ARGS.text_len, dtype=torch.bool),
        "layout": None,
    }
    return Inputs(kwargs, target_BLP=target)


def loss_fn(v, target):
    return (v.to(target.dtype) - target).square().sum() / (NUM_SAMPLES * target.numel())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference(dtype, param_dtype=None):
    """Loss, norm and clipped gradients of each of the two steps, and the velocity of sample 0, of the whole model.

    param_dtype: with FSDP's mixed precision, over all ranks.
    """
    model = WanModel(ARGS)
    if param_dtype:
        mixed = Training(mixed_precision_param=param_dtype)
        meshes = ParallelDims(dp_shard=dist.get_world_size()).build_mesh("cpu")
        parallelize(model, SPEC.plan, meshes, Parallelism(), mixed, ActivationCheckpoint(mode="none"), Compile())
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    model.to(dtype)
    steps = []
    for num_tokens in LENGTHS:
        total = 0
        for i in range(dist.get_rank(), NUM_SAMPLES, dist.get_world_size()) if param_dtype else range(NUM_SAMPLES):
            n = sample(i, num_tokens, dtype)
            loss = loss_fn(model(**n.kwargs), n.target_BLP)
            loss.backward()
            total += loss.item()
        if param_dtype:
            total = reduce_over(meshes.batch, torch.tensor(total, dtype=torch.float64), "sum").item()
        steps.append(
            (total, clip_grad_norm(model, 0.5).item(), {n: whole(p.grad) for n, p in model.named_parameters()})
        )
        model.zero_grad()
    n = sample(0, LENGTHS[0], dtype)
    with torch.no_grad():
        return steps, model(**n.kwargs)


class Strided(WanModel):
    """The same function, with gradients and outputs between stages that are views."""

    def trunk(self, x_BLD, *args, **kwargs):
        x_BLD = torch.cat([x_BLD, torch.zeros_like(x_BLD)], dim=-1)[..., : ARGS.dim]
        x_BLD, *rest = super().trunk(x_BLD, *args, **kwargs)
        return torch.cat([x_BLD, x_BLD], dim=-1)[..., : ARGS.dim], *rest


def build(pp, schedule, dtype, dp_shard=1, mode="none", compiled=False, model_class=WanModel):
    section = Parallelism(pipeline_parallel_degree=pp, pipeline_parallel_schedule=schedule)
    meshes = ParallelDims(pp=pp, dp_shard=dp_shard).build_mesh("cpu")
    with torch.device("meta"):
        model = model_class(ARGS)
    stages = keep_stages(model, SPEC.plan, meshes.pp, section, ARGS, LENGTHS[0])
    master = torch.float64 if dtype == "float64" else torch.float32
    model.to(master)
    training = Training(mixed_precision_param=dtype, mixed_precision_reduce=str(master)[6:])
    compilation = Compile(enable=compiled, backend="aot_eager")
    parallelize(model, SPEC.plan, meshes, section, training, ActivationCheckpoint(mode=mode), compilation)
    model.to_empty(device="cpu")
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    return (
        meshes,
        model,
        Pipeline(model, stages, SPEC.plan, meshes.pp, section, getattr(torch, dtype), torch.device("cpu")),
        master,
    )


def run_one(case):
    """Two steps and a forward. Everything that a rank knows afterwards."""
    meshes, model, pipeline, master = build(**case)
    mine = range(meshes.batch.get_local_rank(), NUM_SAMPLES, meshes.batch.size())
    steps, sent = [], []
    send_ops = PipelineStage.get_fwd_send_ops, PipelineStage.get_bwd_send_ops

    def recording(get):
        def get_ops(stage, i):
            ops = get(stage, i)
            sent.append(sum(op.tensor.numel() * op.tensor.element_size() for op in ops))
            return ops

        return get_ops

    PipelineStage.get_fwd_send_ops, PipelineStage.get_bwd_send_ops = (recording(get) for get in send_ops)
    try:
        for num_tokens in LENGTHS:
            inputs = [sample(i, num_tokens, master) for i in mine]
            loss = pipeline.step(inputs, lambda v, i: loss_fn(v, inputs[i].target_BLP))
            loss = reduce_over(meshes.batch, loss, "sum").item()
            norm = clip_grad_norm(model, 0.5, meshes.pp).item()
            steps.append(
                (loss, norm, {clean_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})
            )
            model.zero_grad()
    finally:
        PipelineStage.get_fwd_send_ops, PipelineStage.get_bwd_send_ops = send_ops
    n = sample(0, LENGTHS[0], master)
    velocity = pipeline(**n.kwargs)
    gc.collect()
    stages = [o for o in gc.get_objects() if isinstance(o, PipelineStage)]
    state = pipeline.state(n)
    own = [clean_name(n) for n, _ in model.named_parameters()]
    return SimpleNamespace(
        steps=steps,
        velocity=velocity,
        own=own,
        sent=sum(sent),
        state_bytes=state_bytes(state),
        types=[str(t.dtype)[6:] for t in state],
        num_stages=pipeline.num_stages,
        stages_alive=len(stages),
    )


def run_all(cases):
    return {name: run_one(case) for name, case in cases.items()}


def refusal():
    with pytest.raises(ValueError, match="InterleavedZeroBubble .* compile.enable"):
        build(2, "InterleavedZeroBubble", "float32", compiled=True)


TWO = {
    "gpipe": {"schedule": "GPipe", "dtype": "float64"},
    "1f1b": {"schedule": "1F1B", "dtype": "float64"},
    "interleaved": {"schedule": "Interleaved1F1B", "dtype": "float64"},
    "zero bubble": {"schedule": "InterleavedZeroBubble", "dtype": "float64", "mode": "full"},
    "zero bubble, views": {"schedule": "InterleavedZeroBubble", "dtype": "float64", "model_class": Strided},
    "1f1b, full, float32": {"schedule": "1F1B", "dtype": "float32", "mode": "full"},
    "1f1b, bfloat16": {"schedule": "1F1B", "dtype": "bfloat16"},
}
FOUR = {
    "pp4": {"pp": 4, "schedule": "1F1B", "dtype": "float64"},
    "pp2 x fsdp2, interleaved": {"schedule": "Interleaved1F1B", "dtype": "float64", "dp_shard": 2, "mode": "full"},
}
SLOW_TWO = {
    "1f1b, views": {"schedule": "1F1B", "dtype": "float64", "model_class": Strided},
    "zero bubble, float32": {"schedule": "InterleavedZeroBubble", "dtype": "float32"},
    "interleaved, compiled": {"schedule": "Interleaved1F1B", "dtype": "float32", "compiled": True},
    "zero bubble, bfloat16": {"schedule": "InterleavedZeroBubble", "dtype": "bfloat16", "mode": "full"},
}
SLOW_FOUR = {
    "pp2 x fsdp2, 1f1b": {"schedule": "1F1B", "dtype": "float64", "dp_shard": 2},
    "pp2 x fsdp2, zero bubble": {"schedule": "InterleavedZeroBubble", "dtype": "float64", "dp_shard": 2},
    "pp2 x fsdp2, zero bubble, full, float32": {
        "schedule": "InterleavedZeroBubble",
        "dtype": "float32",
        "dp_shard": 2,
        "mode": "full",
    },
}
GROUPS = ((2, TWO), (4, FOUR), (2, SLOW_TWO), (4, SLOW_FOUR))  # (ranks, cases that run on the same ranks)
CASES = {name: {"pp": 2, **case} for _, group in GROUPS for name, case in group.items()}
QUICK = (*TWO, *FOUR)
LIMITS = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 1e-4}


@pytest.fixture(scope="module")
def results():
    """name -> what each rank knows. The cases of a group run at first use: a rank costs more to start than a case."""
    found = {}

    def result(name):
        if name not in found:
            world, names = next((world, group) for world, group in GROUPS if name in group)
            ranks = run_ranks(run_all, world, {name: CASES[name] for name in names}, timeout=300)
            found.update({name: [rank[name] for rank in ranks] for name in names})
        return found[name]

    return result


@pytest.fixture(scope="module")
def expected():
    """By type: the result of one process. For bfloat16, where roundings differ, that of FSDP without a pipeline."""
    mixed = run_ranks(reference, 2, torch.float32, "bfloat16")[0]
    return {"float64": reference(torch.float64), "float32": reference(torch.float32), "bfloat16": mixed}


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES])
def test_equals_one_process(name, expected, results):
    limit = LIMITS[CASES[name]["dtype"]]
    ref_steps, ref_velocity = expected[CASES[name]["dtype"]]
    for rank in results(name):
        assert ((rank.velocity - ref_velocity).norm() / ref_velocity.norm()).item() <= limit
        for (loss, norm, grads), (ref_loss, ref_norm, ref_grads) in zip(rank.steps, ref_steps, strict=True):
            assert loss == pytest.approx(ref_loss, rel=limit) and norm == pytest.approx(ref_norm, rel=limit)
            assert sorted(grads) == sorted(rank.own), "a parameter without a gradient"
            errors = {n: ((grads[n] - ref_grads[n]).norm() / ref_grads[n].norm()).item() for n in grads}
            assert {n: e for n, e in errors.items() if not e <= limit} == {}


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES])
def test_parameters_are_partitioned_across_ranks(name, expected, results):
    groups = {tuple(rank.own) for rank in results(name)}
    assert len(groups) == CASES[name]["pp"]
    assert sorted(n for names in groups for n in names) == sorted(expected["float64"][0][0][2])


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES])
def test_bytes_between_stages(name, results):
    """State of a clip of L tokens: x and text in the blocks' type, time and its projection in float32 at least.

    Forward sends it to the next stage, backward sends its gradient back.
    """
    case, ranks = CASES[name], results(name)
    low, upcast = {"float64": (8, 8), "float32": (4, 4), "bfloat16": (2, 4)}[case["dtype"]]

    def formula(num_tokens):
        return low * ARGS.dim * (num_tokens + ARGS.text_len) + upcast * 7 * ARGS.dim

    assert [rank.state_bytes for rank in ranks] == [formula(LENGTHS[0])] * len(ranks)
    boundaries = ranks[0].num_stages - 1
    assert sum(rank.sent for rank in ranks) == 2 * boundaries * NUM_SAMPLES * sum(formula(n) for n in LENGTHS)


def test_time_stays_in_float32_between_stages(results):
    assert results("1f1b, bfloat16")[0].types == ["bfloat16", "float32", "float32", "bfloat16"]


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES])
def test_stages_of_old_shapes_are_gone(name, results):
    ranks = results(name)
    assert [rank.stages_alive for rank in ranks] == [ranks[0].num_stages // CASES[name]["pp"]] * len(ranks)


def test_zero_bubble_refuses_compiled_blocks():
    run_ranks(refusal, 2)
