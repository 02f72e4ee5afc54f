import logging

import pytest
import torch

from titan_video.config.job_config import LrScheduler
from titan_video.optim.lr_scheduler import Scheduler, lr_factor, num_warmup_steps


def test_warm_up_stable_decay():
    section = LrScheduler(warmup_steps=4, decay_ratio=0.5, min_lr_factor=0.1)
    factors = [lr_factor(step, 20, section) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:10] == [1.0] * 6
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5) and factors[19] == pytest.approx(0.1)


@pytest.mark.parametrize("decay_type, half", [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)])
def test_decay_shapes(decay_type, half):
    section = LrScheduler(warmup_steps=0, decay_ratio=1.0, decay_type=decay_type)
    assert lr_factor(10, 20, section) == pytest.approx(half)
    assert lr_factor(20, 20, section) == pytest.approx(0.0)
    quarter = {"linear": 0.75, "sqrt": 0.5, "cosine": 0.5 + 0.5 * 0.5**0.5}[decay_type]
    assert lr_factor(5, 20, section) == pytest.approx(quarter)


def test_without_decay_the_rate_does_not_depend_on_the_number_of_steps():
    section = LrScheduler(warmup_steps=3, decay_ratio=0.0)
    assert [lr_factor(s, 10, section) for s in range(1, 11)] == [lr_factor(s, 1000, section) for s in range(1, 11)]


def test_scheduler_sets_every_group_by_its_lr_scale():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    lr = Scheduler(optimizer, LrScheduler(warmup_steps=10), peak_lr=0.5, total_steps=100).set_step(5)
    assert lr == 0.25 and [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]


def test_a_short_run_has_a_shorter_warm_up_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    section = LrScheduler(warmup_steps=200)
    assert [lr_factor(step, 100, section) for step in (1, 50, 100)] == [0.01, 0.5, 1.0]
    half = LrScheduler(warmup_steps=60, decay_ratio=0.5)
    assert [lr_factor(step, 100, half) for step in (25, 50, 75, 100)] == [0.5, 1.0, 0.5, 0.0]
    whole = LrScheduler(warmup_steps=200, decay_ratio=1.0)
    assert num_warmup_steps(100, whole) == 0 and lr_factor(50, 100, whole) == 0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    Scheduler(optimizer, section, peak_lr=1.0, total_steps=200)
    assert not caplog.records
    Scheduler(optimizer, half, peak_lr=1.0, total_steps=100)
    (notice,) = caplog.records
    assert "lr_scheduler.warmup_steps: 50 instead of 60" in notice.getMessage() and "100 steps" in notice.getMessage()
