"""Experts over ranks in whole programs: the dry run counts what the closed forms say; train.py trains and resumes."""

import pytest
import torch

from tests.helpers import ROOT
from tests.integration_tests.test_resume import iter_tensors
from titan_video.config.manager import parse_args
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models import get_args, get_spec
from titan_video.planner.dry_run.memory import state
from titan_video.planner.dry_run.run import dry_run, num_clip_tokens
from titan_video.planner.dry_run.traffic import expert_traffic

EP1 = {"parallelism.expert_parallel_degree": 1}
EP2 = {"parallelism.expert_parallel_degree": 2}
TP2, CP2 = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.context_parallel_degree": 2}
FULL = {"activation_checkpoint.mode": "full"}
EXCHANGE = {"activation_checkpoint.mode": "selective", "activation_checkpoint.save": "attention,exchange"}


def read(options):
    small = {"model.flavor": "moe-debug", "data.buckets": "[[17,128,128]]", "activation_checkpoint.save_min_kv": 100}
    options = small | {"model.kernels": "torch", "training.local_batch_size": 2} | options
    path = str(ROOT / "train_configs" / "debug.toml")
    return parse_args(["--job.config_file", path, *(f"--{k}={v}" for k, v in options.items())])


@pytest.mark.parametrize(
    "world_size, options, forwards",
    [
        pytest.param(4, EP2, 1, marks=pytest.mark.slow),
        (4, EP2 | FULL | {"optimizer.name": "AdamW8bit"}, 2),
        pytest.param(8, EP2 | TP2 | CP2 | EXCHANGE | {"optimizer.name": "Muon"}, 1, marks=pytest.mark.slow),
        # More ranks than experts of one of them.
        pytest.param(32, EP2 | {"optimizer.in_backward": "true", "training.max_norm": 0}, 1, marks=pytest.mark.slow),
    ],
)
def test_the_dry_run_counts_the_closed_forms(world_size, options, forwards):
    """forwards: how often a step sends the tokens forward."""
    config = read(options)
    spec = get_spec("wan")
    args = get_args(spec, "moe-debug", "", config.encoder.max_text_length)
    dims = ParallelDims.of(config.parallelism, world_size)
    report = dry_run(config, world_size)
    for kind, size in state(config, spec, args, dims).items():
        assert report.largest[kind] == pytest.approx(size, rel=0.01), kind
    tokens = 2 * -(-num_clip_tokens(config.data.buckets[0], spec, args) // dims.sequence)
    one_way = expert_traffic(args.experts.top_k * tokens, args.dim, degree=2, itemsize=4).sent
    numbers = 8 * args.experts.num_experts // 2
    layers, others = len(args.experts.blocks(args.num_layers)), 0
    if dims.ulysses > 1:
        without = dry_run(read(options | EP1), world_size)
        assert sum(report.flops.values()) == sum(without.flops.values()) and report.model_flops == without.model_flops
        others = exchanged(without)
    assert exchanged(report) - others == layers * ((forwards + 1) * one_way + forwards * numbers)


def exchanged(report):
    """Bytes that a rank sends in all-to-alls."""
    return sum(c.sent for c in report.collectives if c.kind == "all-to-all")


OPTIONS = {"model.flavor": "moe-debug", "training.steps": 2, "training.global_batch_size": 4}


def test_the_run_is_that_of_one_rank(shared_front):
    one = shared_front.run("experts1", OPTIONS).ok()
    two = shared_front.run("experts2", OPTIONS | EP2, 2).ok()
    assert [row["loss"] for row in two.records] == pytest.approx([row["loss"] for row in one.records], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        TP2 | FULL | {"activation_checkpoint.offload": "true"},
        CP2 | EXCHANGE | {"training.mixed_precision_param": "bfloat16", "optimizer.name": "Muon"},
        {"training.enable_cpu_offload": "true", "validation.enable": "true", "validation.freq": 2},
        {"parallelism.pipeline_parallel_degree": 2, "optimizer.name": "AdamW8bit"},
        {"optimizer.in_backward": "true", "training.max_norm": 0},
        {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"},
    ],
    ids=lambda options: "-".join(f"{name.partition('.')[2]} {value}" for name, value in options.items()) or "plain",
)
def test_a_run_resumes_bitwise(options, shared_front, request):
    """Four ranks: with each option stopped after two steps, and resumed."""
    shared = {"training.global_batch_size": 8, "activation_checkpoint.save_min_kv": 0}  # 4 ranks x 2 clips
    name, options = request.node.callspec.id, OPTIONS | EP2 | options | shared
    whole = shared_front.run(f"{name} whole", options | {"training.steps": 4}, 4).ok()
    shared_front.run(f"{name} stopped", options, 4).ok()
    resumed = shared_front.run(f"{name} stopped", options | {"training.steps": 4}, 4).ok()
    assert resumed.records == whole.records
    ours, theirs = (iter_tensors(run.checkpoint(4)) for run in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("moe.experts.up" in name for name in ours)
