"""muP through the trainer: at the base's width it is the run without it; groups and values do not know the layout."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.helpers import run_ranks
from tests.integration_tests.test_resume import assert_same_checkpoint
from titan_video.config.job_config import ActivationCheckpoint, Compile, Optimizer, Parallelism, Training
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import keep_stages
from titan_video.distributed.utils import clean_name, initialise
from titan_video.models.wan import SPEC, WanArgs
from titan_video.optim.mup.parametrization import Parametrization
from titan_video.optim.optimizer import build_optimizer

SMALL = {
    "training.local_batch_size": 4,
    "data.buckets": "[[5, 32, 32]]",
    "checkpoint.interval": 1000,
    "ema.enable": "false",
}
AT_BASE = {"optimizer.parametrization": "mup", "optimizer.base_flavor": "debug"}
NARROW = {"optimizer.parametrization": "mup", "optimizer.base_flavor": "proxy-debug"}
FSDP2_TP2 = {"parallelism.tensor_parallel_degree": 2, "training.local_batch_size": 2}


@pytest.mark.parametrize(
    "world, options",
    [(1, {}), pytest.param(4, FSDP2_TP2, marks=pytest.mark.slow, id="fsdp2 x tp2")],
)
def test_at_the_width_of_the_base_it_is_the_run_without(world, options, front):
    options = SMALL | {"training.steps": 20} | options
    plain = front.run("plain", options, world).ok()
    mup = front.run("mup", options | AT_BASE, world).ok()
    assert "muP: width 128 is 1 x the 128 of debug" in mup.output
    assert mup.records == plain.records and len(plain.records) == 20
    assert_same_checkpoint(mup.checkpoint(20), plain.checkpoint(20))


def test_a_wider_model_resumes_and_is_another_run(front):
    options = SMALL | NARROW | {"training.steps": 6, "optimizer.name": "Muon"}
    whole = front.run("whole", options).ok()
    assert "hidden, Muon: lr 0.0015 (0.5 x), weight decay 0.02, 40 tensors" in whole.output
    front.run("stopped", options | {"training.steps": 3}).ok()
    standard = {"optimizer.parametrization": "standard", "optimizer.base_flavor": ""}
    again = front.run("stopped", options | standard).ok()
    assert "optimizer.parametrization stays 'mup', with which" in again.output
    assert again.records == whole.records
    assert_same_checkpoint(again.checkpoint(6), whole.checkpoint(6))
    plain = front.run("plain", options | standard).ok()
    assert [row["lr"] for row in plain.records] == [row["lr"] for row in whole.records]
    assert [row["loss"] for row in plain.records] != [row["loss"] for row in whole.records]
    start = {"checkpoint.initial_load_path": plain.checkpoint(6), "training.steps": 1}
    front.run("given", options | start).fails_with("config error", "optimizer.mup_finetune = true")
    tuned = front.run("given", options | start | {"optimizer.mup_finetune": "true"}).ok()
    assert "muP: width 128" in tuned.output and f"weights: from {plain.checkpoint(6)}" in tuned.output


ARGS = WanArgs(dim=128, num_heads=4, num_layers=2, ffn_dim=256, text_dim=10, text_len=5, freq_dim=32)
BASE = WanArgs(dim=32, num_heads=1, num_layers=2, ffn_dim=64, text_dim=10, text_len=5, freq_dim=32)
LAYOUTS = {
    "fsdp2": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "fsdp2 x tp2": {"dp_shard": 2, "tp": 2},
}
OURS = ("kind", "width_class", "lr_scale", "weight_decay", "eps", "lr")  # entries of a group


def groups_and_values(layout, name):
    """({parameter: entries of its group}, {parameter: full initial tensor}) of this rank."""
    dims = ParallelDims(**LAYOUTS.get(layout, {}))
    with torch.device("meta"):
        model = SPEC.build(ARGS)
    if layout != "one":
        meshes, section = dims.build_mesh("cpu"), Parallelism(pipeline_parallel_degree=dims.pp)
        if dims.pp > 1:
            keep_stages(model, SPEC.plan, meshes.pp, section, ARGS, 15)
        training = Training(mixed_precision_param="float32")
        parallelize(model, SPEC.plan, meshes, section, training, ActivationCheckpoint(), Compile())
    model.to_empty(device="cpu")
    mup = Parametrization(SPEC, ARGS, BASE)
    initialise(model, mup.init_parameter, seed=1)
    optimizer = build_optimizer(model, Optimizer(name=name), SPEC.plan.blocks, 0, mup.adjust_group)
    names = {p: clean_name(n) for n, p in model.named_parameters()}
    groups = {names[p]: [g.get(key) for key in OURS] for g in optimizer.param_groups for p in g["params"]}
    full = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for p, n in names.items()}
    return groups, full


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_and_initial_values_are_those_of_one_process(layout):
    world = 4 if layout == "fsdp2 x tp2" else 2
    expected_groups, expected = groups_and_values("one", "AdamW8bit")
    found = run_ranks(groups_and_values, world, layout, "AdamW8bit")
    assert set().union(*(groups for groups, _ in found)) == set(expected_groups)
    for groups, full in found:
        assert all(groups[name] == expected_groups[name] for name in groups)
        assert all(torch.equal(full[name], expected[name]) for name in full)
    assert {entries[1] for entries in expected_groups.values()} == {"input", "vector", "hidden", "output"}
