"""FSDP units are data of the plan: a nested unit changes no gradient, and a mesh that does not exist is an error. How
gradients are reduced.
"""

from dataclasses import replace
from types import SimpleNamespace

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
from titan_video.distributed import fsdp
from titan_video.distributed.fsdp import apply_fsdp
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
    with pytest.raises(AssertionError, match="ParallelPlan.units: 'blocks.\\*': 'elsewhere' not in .*fsdp"):
        run_units({**SPEC.plan.units, "blocks.*": "elsewhere"})


def test_an_unknown_mesh_is_named():
    run_ranks(unknown_mesh, 2)


def run_reduction(reduce):
    """{parameter: full gradient} after two micro-batches in float32, and the types of the gradients."""
    meshes = ParallelDims(dp_shard=2).build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(ARGS)
    training = Training(mixed_precision_param="float32", mixed_precision_reduce=reduce)
    parallelize(model, SPEC.plan, meshes, Parallelism(), training, ActivationCheckpoint(mode="none"), Compile())
    model.to_empty(device="cpu")
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    clip = build_inputs(CLIPS[meshes.batch.get_local_rank()], SequenceShard.from_meshes(meshes))
    for _ in range(2):
        (loss_fn(model(**clip.kwargs), clip) / count(CLIPS)).backward()
    return get_gradients(model), {p.grad.dtype for p in model.parameters()}


def test_reduction_in_bfloat16_rounds_the_blocks_alone():
    """Times and modulation keep float32; gradients accumulate in float32 either way."""
    [(exact, types), _] = run_ranks(run_reduction, 2, "float32")
    [(rounded, other_types), _] = run_ranks(run_reduction, 2, "bfloat16")
    assert types == other_types == {torch.float32}
    in_float32 = ("time", "head_modulation", "modulation")
    for name, gradient in exact.items():
        error = ((rounded[name] - gradient).norm() / gradient.norm().clamp_min(1e-20)).item()
        if name.startswith(in_float32):
            assert error < 1e-6, (name, error)
        elif name.startswith("blocks."):
            assert 1e-5 < error < 1e-2, (name, error)


def no_symmetric_memory():
    with pytest.raises(
        ValueError, match="parallelism.enable_fsdp_symm_mem: true, but this run is on cpu; leave it false"
    ):
        meshes = ParallelDims(dp_shard=2).build_mesh("cpu")
        apply_fsdp(WanModel(ARGS), SPEC.plan, meshes, torch.float32, torch.float32, "default", symmetric_memory=True)


def test_symmetric_memory_is_refused_without_gpus():
    """torch itself would not: gloo takes the call."""
    run_ranks(no_symmetric_memory, 2)


def test_symmetric_memory_is_asked_of_every_unit(monkeypatch):
    """On a GPU each unit asks torch for it, after the order to sum: only sums are reduced in that memory."""
    asked = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **_: Unit.of(module, asked))
    monkeypatch.setattr(fsdp, "FSDPModule", Unit)
    meshes = SimpleNamespace(
        world=SimpleNamespace(device_type="cuda"),
        fsdp=SimpleNamespace(shape=(2,)),
        fsdp_root=SimpleNamespace(),
        expert_fsdp=None,
    )
    meshes.fsdp_root.size = lambda: 2
    with torch.device("meta"):
        model = WanModel(ARGS)
    apply_fsdp(model, SPEC.plan, meshes, torch.bfloat16, torch.float32, "default", symmetric_memory=True)
    names = [call for call, _ in asked]
    units = {id(module) for _, module in asked}
    assert names == ["divide", "sum", "symmetric"] * len(units) and len(units) > ARGS.num_layers


class Unit:
    """Stands in for FSDPModule."""

    @staticmethod
    def of(module, asked):
        module.__class__ = type("Unit", (module.__class__, Unit), {"asked": asked})

    def set_gradient_divide_factor(self, factor):
        self.asked.append(("divide", self))

    def set_force_sum_reduction_for_comms(self, enable):
        self.asked.append(("sum", self))

    def set_symm_mem_for_comm(self):
        self.asked.append(("symmetric", self))

    def set_modules_to_forward_prefetch(self, modules):
        pass

    set_modules_to_backward_prefetch = set_modules_to_forward_prefetch
