"""Experts over ranks in whole programs: the dry run counts what the closed forms say; train.py trains and resumes."""

import pytest
import torch

from tests.helpers import ROOT
from tests.integration_tests.test_resume import iter_tensors
from titan_video.config.manager import parse_args
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models import get_args, get_spec
from titan_video.planner.dry_run import dry_run, num_clip_tokens
from titan_video.planner.memory import state
from titan_video.planner.traffic import expert_traffic

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
        (4, EP2, 1),
        (4, EP2 | FULL | {"optimizer.name": "AdamW8bit"}, 2),
        (8, EP2 | TP2 | CP2 | EXCHANGE | {"optimizer.name": "Muon"}, 1),
        (32, EP2 | {"optimizer.in_backward": "true", "training.max_norm": 0}, 1),  # more ranks than experts of one
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
    without = dry_run(read(options | {"parallelism.expert_parallel_degree": 1}), world_size)  # Ulysses' exchanges
    layers = len(args.experts.blocks(args.num_layers))
    assert exchanged(report) - exchanged(without) == layers * ((forwards + 1) * one_way + forwards * numbers)
    assert sum(report.flops.values()) == sum(without.flops.values()) and report.model_flops == without.model_flops


def exchanged(report):
    """Bytes that a rank sends in all-to-alls."""
    return sum(c.sent for c in report.collectives if c.kind == "all-to-all")


def test_the_run_is_that_of_one_rank_and_resumes(shared_front):
    """Two ranks of experts, stopped and resumed, and one rank."""
    options = {"model.flavor": "moe-debug", "training.steps": 4, "training.global_batch_size": 4}
    one = shared_front.run("experts1", options).ok()
    two = shared_front.run("experts2", options | EP2, 2).ok()
    shared_front.run("experts2 stopped", options | EP2 | {"training.steps": 2}, 2).ok()
    resumed = shared_front.run("experts2 stopped", options | EP2, 2).ok()
    assert [row["loss"] for row in two.records] == pytest.approx([row["loss"] for row in one.records], rel=1e-4)
    assert resumed.records == two.records
    whole, again = (iter_tensors(run.checkpoint(4)) for run in (two, resumed))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert any("moe.experts.up" in name for name in whole)
