"""FSDP units are data of the plan: a nested unit changes no gradient, and a mesh that does not exist is an error."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.distributed_tests.test_step_layout import (
    ARGS,
    MEDIUM,
    Clip,
    build_inputs,
    count,
    differences,
    get_gradients,
    loss_fn,
    reference,
)
from tests.helpers import randomized_init, run_ranks
from titan_video.config.job_config import ActivationCheckpoint, Compile, Parallelism, Training
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name, initialise, reduce_over
from titan_video.models.wan import SPEC, WanModel

CLIPS = [Clip(0, MEDIUM), Clip(1, MEDIUM)]


def run_units(units):
    """(names of the FSDP units, loss and gradients) of a step of one clip per rank."""
    meshes = ParallelDims(dp_shard=2).build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(ARGS).double()
    training = Training(mixed_precision_param="float64", mixed_precision_reduce="float64")
    plan = replace(SPEC.plan, units=units)
    checkpointing = ActivationCheckpoint(mode="full")
    parallelize(model, plan, meshes, Parallelism(), training, checkpointing, Compile())
    model.to_empty(device="cpu")
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    names = {clean_name(name) for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    inputs = build_inputs(CLIPS[meshes.batch.get_local_rank()], SequenceShard.from_meshes(meshes))
    loss = loss_fn(model(**inputs.kwargs), inputs) / count(CLIPS)
    loss.backward()
    return names, (reduce_over(meshes.batch, loss.detach(), "sum").item(), get_gradients(model))


def test_a_nested_unit_changes_no_gradient():
    expected = reference(CLIPS)
    nested = {"blocks.*.ffn": "fsdp", **SPEC.plan.units}
    (names, plain), (_, other_plain) = run_ranks(run_units, 2, SPEC.plan.units)
    assert differences(plain, expected) == differences(other_plain, expected) == {}
    for nested_names, result in run_ranks(run_units, 2, nested):
        assert nested_names - names == {f"blocks.{i}.ffn" for i in range(ARGS.num_layers)} and names < nested_names
        assert differences(result, expected) == {}


def unknown_mesh():
    with pytest.raises(AssertionError, match="ParallelPlan.units: 'blocks.\\*' is sharded over 'expert_fsdp', .*fsdp"):
        run_units({**SPEC.plan.units, "blocks.*": "expert_fsdp"})


def test_an_unknown_mesh_is_named():
    run_ranks(unknown_mesh, 2)
