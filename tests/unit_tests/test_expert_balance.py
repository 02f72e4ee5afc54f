"""Balancing the experts of a mixture: the load evens out, an update that is left out leaves the biases, and what does
not go with a mixture is refused.
"""

import json

import pytest
import torch

from tests.helpers import run_ranks
from titan_video.config.check import check
from titan_video.config.job_config import JobConfig, Metrics, Training
from titan_video.config.manager import ConfigError, parse_args
from titan_video.config.sections.experts import Experts
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.experts import MoE, Router
from titan_video.models.spec import ExpertArgs
from titan_video.models.wan import SPEC
from titan_video.training import expert_balance
from titan_video.training.expert_balance import ExpertBalance, direction
from titan_video.training.fault_tolerance import NonFiniteGuard

EXPERTS = ExpertArgs(num_experts=16, top_k=2, expert_dim=16, shared_dim=16)
DIM = 16


class Log:
    def __init__(self):
        self.records = {}

    def log_scalars(self, step, scalars, name):
        self.records[step] = scalars
        assert name == "experts"


class Layer(torch.nn.Module):
    """A mixture that learns to be a rotation; its first expert attracts all tokens."""

    def __init__(self):
        super().__init__()
        self.router, self.moe = Router(DIM, EXPERTS), MoE(DIM, EXPERTS)
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.2)
        self.router.bias.data.zero_()[0] = 1.0
        self.target_DD = torch.linalg.qr(torch.randn(DIM, DIM)).Q

    def forward(self, x_BLD, t_B):
        return (self.moe(x_BLD, x_BLD, self.router(t_B))[0] - x_BLD @ self.target_DD).square().mean()


def train(rate, steps, bad_steps=()):
    """(the numbers of each step, the biases after it). bad_steps: those whose gradient norm is not finite."""
    torch.manual_seed(0)
    model, log, biases = Layer(), Log(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = JobConfig(experts=Experts(balance_rate=rate), metrics=Metrics(log_freq=1), training=Training(steps=steps))
    meshes = ParallelDims().build_mesh("cpu")
    balance = ExpertBalance(config, model, optimizer, meshes, log, lambda step, run: run())

    def forward_backward():
        total = torch.zeros(())
        for _ in range(2):
            loss = model(torch.randn(4, 128, DIM), 1000 * torch.rand(4))
            loss.backward()
            total += loss.detach()
        return total

    for step in range(1, steps + 1):
        loss = balance(step, forward_backward)
        assert balance.load_RSE.sum() == 2 * 4 * 128 * EXPERTS.top_k  # of this step alone
        norm = loss * (float("nan") if step in bad_steps else 1)
        NonFiniteGuard().update(optimizer, torch.stack([loss, loss, norm]))
        optimizer.zero_grad()
        biases.append(model.router.bias.detach().clone())
    return log.records, biases


def run_train(*args, **kwargs):
    return run_ranks(train, 1, *args, **kwargs)[0]


def test_the_load_evens_out():
    numbers, _ = run_train(2e-2, 100)
    assert numbers[1]["load_max_over_mean"] == 8  # all tokens at one of 16 experts, of which each token has two
    assert max(numbers[step]["load_max_over_mean"] for step in range(96, 101)) <= 1.5
    assert numbers[100]["load_entropy"] > 0.98


def test_without_balancing_it_does_not():
    numbers, biases = run_train(0.0, 50)
    assert min(n["load_max_over_mean"] for n in numbers.values()) > 4
    assert torch.equal(biases[0], biases[-1])


def test_a_step_that_is_left_out_leaves_the_biases():
    _, good = run_train(1e-2, 3)
    _, skipped = run_train(1e-2, 3, bad_steps=(2,))
    assert torch.equal(good[0], skipped[0]) and torch.equal(skipped[0], skipped[1])
    assert not torch.equal(good[0], good[1]) and not torch.equal(skipped[1], skipped[2])
    change = skipped[2] - skipped[1]
    assert change.abs().max() <= 2e-2 and abs(change.mean()) < 1e-7


def test_the_direction_is_that_of_the_load():
    assert direction(torch.tensor([4, 0, 2, 2])).tolist() == [-1, 1, 0, 0]
    assert direction(torch.tensor([6, 0, 0, 0])).tolist() == [-1.5, 0.5, 0.5, 0.5]
    assert direction(torch.tensor([3, 3, 3])).tolist() == [0, 0, 0]


def one_level():
    meshes = ParallelDims().build_mesh("cpu")
    load_RSE = torch.zeros(2, 4, 4, dtype=torch.int64)
    load_RSE[0, 1], load_RSE[1, 1] = torch.tensor([4, 0, 0, 0]), torch.tensor([1, 1, 1, 1])
    load_RSE[:, 3] = torch.tensor([0, 2, 2, 0])
    return expert_balance.describe(load_RSE, meshes), expert_balance.describe(None, meshes)


def test_numbers_by_noise_level():
    found, nothing = run_ranks(one_level, 1)[0]
    assert nothing == {}
    assert found["load_max_over_mean_sigma_0.25_to_0.5"] == 4 and found["load_entropy_sigma_0.25_to_0.5"] == 0.5
    assert found["load_max_over_mean_sigma_0.75_to_1"] == 2 and found["load_entropy_sigma_0.75_to_1"] == 0.5
    assert found["load_max_over_mean"] == pytest.approx(2.0) and len(found) == 6  # two levels have no token


DEBUG = ["--encoder.name", "debug", "--data.path", "embedded:shapes-4"]
REFUSED = [
    ("moe-debug", ["--lora.enable", "true"], "lora.enable: true, but there are no adapters of experts"),
    (
        "moe-debug",
        ["--activation_checkpoint.mode", "memory_budget", "--compile.enable", "true"],
        "mode: memory_budget, but the compiler might recompute",
    ),
    (
        "moe-debug",
        [
            "--parallelism.pipeline_parallel_degree",
            "2",
            "--parallelism.pipeline_parallel_schedule",
            "InterleavedZeroBubble",
        ],
        "InterleavedZeroBubble, but the backward of experts",
    ),
    ("moe-debug", ["--parallelism.tensor_parallel_degree", "3"], "does not divide the width 256 of the expert of all"),
    ("moe-debug-expert-choice", ["--compile.enable", "true"], "compile.enable: true, but the experts of"),
    ("moe-debug-expert-choice", ["--experts.balance_rate", "0.1"], "experts.balance_rate: has no effect"),
    ("debug", ["--experts.balance_rate", "0.1"], "experts: given, but model.flavor debug has no experts"),
]


@pytest.mark.parametrize("flavor, options, message", REFUSED)
def test_what_does_not_go_with_a_mixture_is_refused(flavor, options, message):
    config = parse_args([*DEBUG, "--model.flavor", flavor, *options])
    with pytest.raises(ConfigError, match=message):
        check(config, 6, files=False)
    check(parse_args([*DEBUG, "--model.flavor", flavor]), 2, files=False)


def test_a_section_for_a_folder_without_experts_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(SPEC.args_to_hf(SPEC.flavors["debug"])))
    argv = [*DEBUG, "--model.flavor", "hf", "--model.hf_assets_path", str(tmp_path)]
    with pytest.raises(ConfigError, match="experts: given, but model.flavor hf has no experts; remove the section"):
        check(parse_args([*argv, "--experts.balance_rate", "0.1"]), 1, files=False)
    check(parse_args(argv), 1, files=False)


def test_a_flavor_from_a_file_is_judged_when_the_run_is_built():
    config = parse_args([*DEBUG, "--model.flavor", "hf", "--lora.enable", "true"])
    with pytest.raises(ValueError, match="no adapters of experts, which model.flavor hf has"):
        expert_balance.build(config, SPEC.flavors["moe-debug"])
