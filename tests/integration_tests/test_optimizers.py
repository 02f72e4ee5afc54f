"""The embedded default learns with every optimizer and in low precision, through the trainer; a stopped run resumes bit
for bit.
"""

import pytest

from tests.integration_tests.test_resume import assert_same_checkpoint
from titan_video.config.values import tomllib

STEPS = {
    "training.steps": 24,
    "training.max_norm": 0,
    "ema.enable": "true",
    "ema.decay": 0.9,
    "checkpoint.interval": 1000,
}
BFLOAT16 = {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"}
FLOAT8 = {"float8.enable": "true", "float8.emulate": "true", "float8.recipe_name": "rowwise"}
IN_BACKWARD = {"optimizer.in_backward": "true"}
LOW = {**BFLOAT16, **IN_BACKWARD, "optimizer.name": "AdamW8bit"}


def losses(run):
    return [row["loss"] for row in run.records]


@pytest.fixture(scope="module")
def adamw(shared_front):
    run = shared_front.run("adamw", STEPS).ok()
    assert sum(losses(run)[-6:]) < 0.9 * sum(losses(run)[:6])
    return run


def test_in_backward_is_the_same_run(shared_front, adamw):
    run = shared_front.run("in_backward", STEPS | IN_BACKWARD).ok()
    assert losses(run) == losses(adamw)
    assert [row["grad_norm"] for row in run.records] == pytest.approx(
        [row["grad_norm"] for row in adamw.records], rel=1e-5
    )
    assert_same_checkpoint(run.checkpoint(24), adamw.checkpoint(24))


@pytest.mark.parametrize(
    "options",
    [pytest.param({"optimizer.name": "AdamW8bit"}, marks=pytest.mark.slow), {"optimizer.name": "Muon"}, FLOAT8],
    ids=["AdamW8bit", "Muon", "float8"],
)
def test_others_learn_as_well(front, adamw, options):
    run = front.run("other", STEPS | options).ok()
    assert losses(run)[0] == pytest.approx(losses(adamw)[0], rel=1e-2) and losses(run)[1:] != losses(adamw)[1:]
    assert sum(losses(run)[-6:]) < 1.05 * sum(losses(adamw)[-6:])


@pytest.mark.slow
def test_low_precision_learns_and_resumes_bitwise(front, adamw):
    """All at once: bfloat16 weights, 8-bit moments, updates in backward, EMA weights in float32."""
    full = front.run("full", STEPS | LOW).ok()
    assert sum(losses(full)[-6:]) < 1.05 * sum(losses(adamw)[-6:])
    front.run("stopped", STEPS | LOW | {"training.steps": 9}).ok()
    again = front.run("stopped", STEPS | LOW).ok()
    assert again.records == full.records
    assert_same_checkpoint(again.checkpoint(24), full.checkpoint(24))
    front.run("stopped", STEPS | BFLOAT16 | {"training.steps": 30}).fails_with(
        "resume with the optimizer that wrote it"
    )


def test_an_optimizer_by_name_a_robust_loss_and_epochs(front):
    """A run of one epoch on one rank; the same begun on two ranks, and resumed on one."""
    options = {"optimizer.name": "torch.optim.NAdam", "optimizer.args.momentum_decay": 0.01}
    options |= {"training.loss": "pseudo_huber", "training.huber_c": 0.5, "training.max_norm": 0.1}
    epoch = {"training.steps": 10000, "training.epochs": 1, "lr_scheduler.warmup_steps": 4}
    whole = front.run("whole", options | epoch).ok()
    assert "training.epochs: 1 epochs of 12 clips = 6 steps" in whole.output and len(whole.records) == 6
    config = tomllib.loads((whole.folder / "config.toml").read_text())
    assert (config["training"]["steps"], config["training"]["epochs"]) == (6, 0)
    assert config["optimizer"]["args"] == {"momentum_decay": 0.01}
    assert [row["lr"] for row in whole.records][3:] == 3 * [config["optimizer"]["lr"]]
    two = {"training.local_batch_size": 1, "training.steps": 4, "lr_scheduler.warmup_steps": 4}
    front.run("begun", options | two, world=2).ok()
    resumed = front.run("begun", options | epoch).ok()
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in resumed.records] == pytest.approx([row[key] for row in whole.records], rel=1e-4)
    squared = front.run("squared", {"training.steps": 1}).ok()
    assert whole.records[0]["loss"] < 0.7 * squared.records[0]["loss"]


def test_attention_and_kernels_are_chosen_by_name(front, adamw):
    run = front.run("math", STEPS | {"training.steps": 4, "model.attention": "math", "model.kernels": "torch"}).ok()
    assert "attention: math" in run.output
    assert losses(run) == pytest.approx(losses(adamw)[:4], rel=1e-4)
    front.run("triton", STEPS | {"model.kernels": "triton"}).fails_with(
        "model.kernels: triton, but there is no GPU here"
    )
    front.run("cudnn", STEPS | {"model.attention": "cudnn"}).fails_with(
        "model.attention: cudnn, but", "legal here: auto, flash, math"
    )
