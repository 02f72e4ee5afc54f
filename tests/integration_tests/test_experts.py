"""Whole runs of a mixture of experts: resume, layouts, export, sampling, balancing."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch

from tests.helpers import run_ranks
from tests.integration_tests.test_sample import decode, run_sample
from tests.integration_tests.test_variants import get_options, losses
from titan_video.checkpoint.manager import load_weights
from titan_video.models.spec import ExpertArgs
from titan_video.models.wan import SPEC, WanModel
from titan_video.weights.hf_storage import load_hf

STACKED = {"checkpoint.last_save_in_hf": "true", "checkpoint.export_format": "stacked"}


def options(flavor="moe-debug", **more):
    experts = {"model__kernels": "torch", "ema__enable": "true", "checkpoint__export_dtype": "float32"}
    return {**get_options("wan", flavor, **experts, **more), **STACKED, "experts.balance_rate": 0.01}


def weights(load, args):
    model = WanModel(args)
    load(model)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_mixture_resumes_bitwise_and_is_sampled_and_exported(front):
    whole = front.run("whole", options()).ok()
    front.run("parts", options(training__steps=2)).ok()
    parts = front.run("parts", options()).ok()
    assert losses(parts) == losses(whole) and parts.validations[3] == whole.validations[3]
    assert set(whole._rows("experts")[-1]["experts"]) >= {"load_max_over_mean", "load_entropy"}
    args = SPEC.flavors["moe-debug"]
    last, of_parts = (
        weights(lambda model, run=run: load_weights(run.checkpoint(3), model), args) for run in (whole, parts)
    )
    assert all(torch.equal(p, of_parts[name]) for name, p in last.items())
    assert {round(abs(x), 3) for x in last["routers.1.bias"].tolist()} != {0.0}
    exported = weights(lambda model: load_hf(model, whole.folder / "stacked", SPEC, args), args)
    assert torch.equal(exported["routers.2.bias"], last["routers.2.bias"])  # an average, but for the biases
    again = {"model.flavor": "hf", "model.hf_assets_path": whole.folder / "stacked", "checkpoint.enable": "false"}
    again |= {"checkpoint.initial_load_in_hf": "true", "checkpoint.last_save_in_hf": "false", "training.steps": 1}
    assert front.run("again", options() | again).ok().validations[0] == whole.validations[3]
    run_ranks(run_sample, 1, [whole.folder, "--prompt", "a red circle", "--out", front.root / "out.mp4"], init=False)
    assert decode(front.root / "out.mp4").shape == (9, 32, 32, 3)


def test_layouts_have_the_same_losses_and_loads(front):
    shared = {"training.global_batch_size": 2, "checkpoint.enable": "false", "ema.enable": "false"}
    shared |= {"validation.enable": "false", "checkpoint.last_save_in_hf": "false", "data.buckets": "[[9, 48, 48]]"}
    one = front.run("one", options() | shared | {"training.local_batch_size": 2}).ok()
    split = {"parallelism.context_parallel_degree": 2, "activation_checkpoint.mode": "full"}
    two = front.run("two", options() | shared | split | {"training.local_batch_size": 2}, world=2).ok()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    loads = [[row["experts"] for row in run._rows("experts")] for run in (one, two)]
    assert len(loads[0]) == 3
    for a, b in zip(*loads, strict=True):
        assert a == pytest.approx(b, rel=0.05)  # in float32 a token at a tie may have another expert


def crowded():
    """A hook: 16 experts, of which the first attracts all tokens."""
    SPEC.flavors["moe-debug"] = replace(SPEC.flavors["moe-debug"], experts=ExpertArgs(16, 2, 128, 256, first_dense=1))
    init = SPEC.init_parameter

    def init_parameter(name, tensor, *others):
        init(name, tensor, *others)
        if name.startswith("routers.") and name.endswith("bias"):
            tensor[0] = 1.0

    object.__setattr__(SPEC, "init_parameter", init_parameter)


@pytest.mark.slow
def test_balancing_on_the_shapes(front):
    """From 8 times the mean load to 1.5 within 200 steps; without balancing it stays above 4."""
    shapes = {"model.flavor": "moe-debug", "training.steps": 200, "training.local_batch_size": 32}
    shapes |= {"data.path": "embedded:shapes-240", "metrics.log_freq": 5, "checkpoint.enable": "false"}
    shapes |= {"lr_scheduler.warmup_steps": 50, "lr_scheduler.decay_ratio": 0.4}  # as the TOML has them
    numbers = {}
    for rate in (0.01, 0):
        program = front.start(f"rate{rate}", shapes | {"experts.balance_rate": rate}, hook=crowded)
        assert program.wait(timeout=1200) == 0
        lines = (front.root / f"rate{rate}" / "metrics.jsonl").read_text().splitlines()
        rows = [row["experts"]["load_max_over_mean"] for row in map(json.loads, lines) if "experts" in row]
        numbers[rate] = rows
        assert rows[0] == 8
    assert min(numbers[0.01]) <= 1.5 and median(numbers[0.01][-10:]) <= 1.6  # one step's clips: it goes up and down
    assert min(numbers[0]) > 4
