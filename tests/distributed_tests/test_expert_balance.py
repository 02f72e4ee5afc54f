"""Three steps of a mixture of experts: every layout counts the same tokens for each expert, and ends with the same
biases, bit for bit.
"""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed_tests.test_layouts import (
    EXECUTION_MODES,
    LAYOUTS,
    MODELS,
    build,
    build_inputs,
    build_task,
    fill,
    num_elements,
)
from tests.helpers import run_ranks
from titan_video.config.job_config import JobConfig, Metrics, Parallelism, Training
from titan_video.config.sections.experts import Experts
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline
from titan_video.distributed.pipeline_parallel.stages import keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.models.experts import Router
from titan_video.training.expert_balance import ExpertBalance

NUM, STEPS, FLOAT64 = 8, 3, {"mixed_precision_param": "float64", "mixed_precision_reduce": "float64"}
IN_CI = [  # (layout, mode of running a block)
    ("fsdp2", "full"),
    ("tp2", "plain"),
    ("ring2", "full"),
    ("pp2", "selective"),
    ("pp2 x fsdp2 x ulysses2", "plain"),
]
SLOW = [
    ("fsdp2", "plain"),
    ("fsdp2", "selective"),
    ("hsdp2x2", "plain"),
    ("ring2", "plain"),
    ("ulysses4", "plain"),
    ("pp2", "plain"),
    ("fsdp2 x tp2", "full"),
]


class Log:
    """Keeps what is logged."""

    def __init__(self):
        self.scalars = []

    def log_scalars(self, step, scalars, name):
        self.scalars.append(scalars)


def three_steps(name, layout_name, mode):
    """({router: its load in each step, its bias}, numbers that are logged) of this rank.

    The model has a dense block and two with experts: of two stages each has some.
    """
    layout, m = LAYOUTS[layout_name], MODELS[name]
    m = replace(m, args=replace(m.args, num_layers=3))
    meshes, section = layout.dims.build_mesh("cpu"), Parallelism(**layout.options)
    model, stages = build(m, torch.float64), None
    if layout.dims.pp > 1:
        stages = keep_stages(model, m.spec.plan, meshes.pp, section, m.args, 15)
    parallelize(model, m.spec.plan, meshes, section, Training(**FLOAT64), *EXECUTION_MODES[mode])
    model.to_empty(device="cpu")
    fill(model, m)
    pipeline = stages and Pipeline(model, stages, m.spec.plan, meshes.pp, section, torch.float64, torch.device("cpu"))
    task = build_task(m.spec, m.args, SequenceShard.from_meshes(meshes))
    count, rank, dp = num_elements(task, NUM), meshes.batch.get_local_rank(), meshes.batch.size()

    def forward_backward():
        for parity in (0, 1):
            inputs = [build_inputs(task, i, torch.float64) for i in range(parity, NUM, 2)][rank::dp]
            if pipeline:
                pipeline.step(inputs, lambda v, i, inputs=inputs: task.loss(v, inputs[i]).sum() / count)
            for micro in () if pipeline else inputs:
                (task.loss(model(**micro.kwargs), micro).sum() / count).backward()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    config = JobConfig(experts=Experts(balance_rate=1e-2), metrics=Metrics(log_freq=1), training=Training(steps=STEPS))
    log = Log()
    balance, loads = ExpertBalance(config, model, optimizer, meshes, log, lambda step, run: run()), []
    for step in range(1, STEPS + 1):
        balance(step, forward_backward)
        loads.append(balance.load_RSE)
        optimizer.step()
        optimizer.zero_grad()
    found, routers = {}, {n: r for n, r in model.named_modules() if isinstance(r, Router)}
    for i, (router_name, router) in enumerate(routers.items()):
        bias = router.bias.full_tensor() if isinstance(router.bias, DTensor) else router.bias
        found[router_name] = [load[i] for load in loads], bias.detach()
    return found, log.scalars


@pytest.fixture(scope="module")
def one_process():
    return {name: run_ranks(three_steps, 1, name, "one", "plain")[0] for name in ("wan moe", "wan moe choice")}


@pytest.mark.parametrize("layout, mode", IN_CI + [pytest.param(*run, marks=pytest.mark.slow) for run in SLOW])
def test_counts_and_biases_are_those_of_one_process(layout, mode, one_process):
    expected, numbers = one_process["wan moe"]
    assert all(load.sum() == (NUM // 2) * (2 * 4 + 15) * 2 for loads, _ in expected.values() for load in loads)
    assert any(not torch.equal(loads[0], loads[2]) for loads, _ in expected.values())
    ranks = run_ranks(three_steps, LAYOUTS[layout].world_size, "wan moe", layout, mode, timeout=300)
    assert set().union(*(found for found, _ in ranks)) == expected.keys()
    for found, scalars in ranks:
        for name, (loads, bias) in found.items():
            assert all(torch.equal(a, b) for a, b in zip(loads, expected[name][0], strict=True)), (mode, name)
            assert torch.equal(bias, expected[name][1]), (mode, name)
        for a, b in zip(scalars, numbers, strict=True):
            assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("layout", [pytest.param("ring2", marks=pytest.mark.slow), "fsdp2 x tp2"])
def test_experts_choose_from_the_whole_clip(layout, one_process):
    """Each has equally many tokens, and the same ones, by noise level."""
    expected, _ = one_process["wan moe choice"]
    ranks = run_ranks(three_steps, LAYOUTS[layout].world_size, "wan moe choice", layout, "full", timeout=300)
    for found, _ in ranks:
        for name, (loads, _) in found.items():
            assert all(torch.equal(a, b) for a, b in zip(loads, expected[name][0], strict=True))
            assert all(load.sum(0).unique().numel() == 1 for load in loads)
