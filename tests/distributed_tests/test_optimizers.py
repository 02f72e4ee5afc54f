"""Every optimizer under sharding: three steps equal one process, and its state resumes bit for bit, also in another
layout.
"""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from tests.helpers import randomized_init, run_ranks, whole_tensors
from titan_video.checkpoint.manager import CheckpointManager
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config.job_config import (
    ActivationCheckpoint,
    Checkpoint,
    Compile,
    Float8,
    Flow,
    Optimizer,
    Parallelism,
    Training,
)
from titan_video.data.batch import Batch
from titan_video.distributed.float8 import apply_float8
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, keep_stages
from titan_video.distributed.sequence import SequenceShard, whole_sequence
from titan_video.distributed.utils import clip_grad_norm, initialise
from titan_video.flow.matching import FlowMatching
from titan_video.flow.noise import draw_noise
from titan_video.models.layers import cast_params
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.optim.in_backward import InBackward
from titan_video.optim.optimizer import build_optimizer
from titan_video.tasks.denoising import Denoising

ARGS = WanArgs(dim=128, num_heads=2, num_layers=2, ffn_dim=256, text_dim=10, text_len=5, freq_dim=32)
LAYOUTS = {
    "fsdp2": {"dp_shard": 2},
    "pp2": {"pp": 2},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
    "fsdp2 x tp2": {"dp_shard": 2, "tp": 2},
}
NAMES = ("AdamW", "AdamW8bit", "Muon")
EVERY = (*NAMES, "torch.optim.NAdam")  # and one of another package, by name
NUM_BATCHES = 4
NO_FLOAT8 = Float8()


class Run:
    """A model in a layout ("one": this process alone), and its optimizer.

    dtype: of everything; "bfloat16": of the weights only.
    """

    def __init__(self, layout, name, dtype="float64", in_backward=False, float8=NO_FLOAT8):
        dims = ParallelDims(**{**LAYOUTS, "tp2": {"tp": 2}}.get(layout, {}))
        self.meshes = None if layout == "one" else dims.build_mesh("cpu")
        self.dtype = torch.float32 if dtype == "bfloat16" else getattr(torch, dtype)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        with torch.device("meta"):
            self.model = WanModel(ARGS)
        torch.set_default_dtype(default)
        self.pipeline = None
        cast_params(self.model, SPEC.plan.fp32, getattr(torch, dtype))
        if self.meshes:
            section, pp = Parallelism(pipeline_parallel_degree=dims.pp), self.meshes.pp
            stages = keep_stages(self.model, SPEC.plan, pp, section, ARGS, 15) if dims.pp > 1 else None
            reduce = "float32" if dtype == "bfloat16" else dtype
            training = Training(mixed_precision_param=dtype, mixed_precision_reduce=reduce)
            parallelize(
                self.model, SPEC.plan, self.meshes, section, training, ActivationCheckpoint(), Compile(), float8=float8
            )
        elif float8.enable:
            apply_float8(self.model, SPEC.plan, float8, "cpu")
        self.model.to_empty(device="cpu")
        if self.meshes and stages:
            self.pipeline = Pipeline(self.model, stages, SPEC.plan, pp, section, self.dtype, torch.device("cpu"))
        initialise(self.model, randomized_init(SPEC.init_parameter), 0)
        self.optimizer = build_optimizer(
            self.model, Optimizer(name=name, lr=1e-2, weight_decay=0.1), SPEC.plan.blocks, seed=7
        )
        shard = SequenceShard.from_meshes(self.meshes) if self.meshes else whole_sequence()
        self.task = Denoising(SPEC, ARGS, FlowMatching(Flow()), shard, torch.device("cpu"))
        self.hooks = InBackward(self.optimizer) if in_backward else None
        self.state = OptimizerState(self.model, self.optimizer)

    def checkpoint(self, folder):
        states = {"model": ModelState(self.model), "optimizer": self.state}
        return CheckpointManager(
            Checkpoint(interval=1, async_mode="disabled", keep_latest_k=0), Path(folder), states, {}
        )

    def step(self):
        """Of the same four clips in every layout. Returns the norm of the gradients."""
        batches = range(NUM_BATCHES)
        if self.meshes and not self.pipeline:
            batches = range(self.meshes.batch.get_local_rank(), NUM_BATCHES, self.meshes.batch.size())
        inputs = [self.inputs(i) for i in batches]
        if self.pipeline:
            self.pipeline.step(inputs, lambda v, i: self.task.loss(v, inputs[i]).sum())
        elif self.hooks:
            sum(self.loss(i) for i in inputs).backward()
        else:
            for i in inputs:
                self.loss(i).backward()
        norm = (
            self.hooks.grad_norm()
            if self.hooks
            else clip_grad_norm(self.model, 0.0, self.meshes.pp if self.meshes else None)
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def inputs(self, i):
        ids = torch.tensor([i])
        latents, noise = (draw_noise(seed, ids, (16, 3, 2, 10)).to(self.dtype) for seed in (1, 2))
        text, mask = (
            draw_noise(3, ids, (ARGS.text_len, ARGS.text_dim)).to(self.dtype),
            torch.ones(1, ARGS.text_len, dtype=torch.bool),
        )
        return self.task.add_noise(Batch({"video": latents}, text, mask, ids), noise, (ids + 1) / 6)

    def loss(self, inputs):
        return self.task.loss(self.model(**inputs.kwargs), inputs).sum()

    def tensors(self):
        """Full tensors of weights and state."""
        live = {**ModelState(self.model).state_dict(), **self.state.state_dict()}
        return {name: t.detach().clone() for name, t in whole_tensors(live).items()}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Three steps; the state after two as step-2."""
    folder = tmp_path_factory.mktemp("one")
    for name in EVERY:
        run = Run("one", name)
        norms = [run.step(), run.step()]
        run.checkpoint(folder / name).save(2)
        norms.append(run.step())
        torch.save({"tensors": run.tensors(), "norms": norms}, folder / f"{name}.pt")
    return folder


def differences(tensors, expected):
    """Names of the tensors that differ. 8-bit codes may be neighbours if an element lies between two values."""
    wrong = []
    for name, t in tensors.items():
        if t.dtype == torch.uint8:
            apart = (t.int() - expected[name].int()).abs()
            same = apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
        else:
            error = (t - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)
            same = error < (1e-6 if t.dtype == torch.float32 else 1e-9)
        wrong += [] if same else [name]
    return wrong


def three_steps(layout, names, folder):
    """Names of what differs from one process in this layout."""
    wrong, run = [], None
    for name in names:
        expected = torch.load(folder / f"{name}.pt")
        run = Run(layout, name)
        norms = [run.step(), run.step()]
        run.checkpoint(folder / layout / name).save(2)
        norms.append(run.step())
        tensors = run.tensors()
        wrong += [f"{name}: {key}" for key in differences(tensors, expected["tensors"])]
        wrong += [] if norms == pytest.approx(expected["norms"], rel=1e-6) else [f"{name}: norms {norms}"]

        again = Run(layout, name)
        assert again.checkpoint(folder / layout / name).load() == 2
        again.step()
        wrong += [f"{name} resumed: {key}" for key, t in again.tensors().items() if not torch.equal(t, tensors[key])]

        # What one process wrote: its tensors bit for bit, and its third step.
        other = Run(layout, name)
        assert other.checkpoint(folder / name).load() == 2
        other.step()
        wrong += [f"{name} from one process: {key}" for key in differences(other.tensors(), expected["tensors"])]
    return wrong


@pytest.mark.parametrize(
    "layout, names",
    [
        ("fsdp2", EVERY),
        ("pp2", ("AdamW8bit", "Muon")),
        pytest.param("pp2", ("AdamW", "torch.optim.NAdam"), marks=pytest.mark.slow),
        pytest.param("hsdp2x2", EVERY, marks=pytest.mark.slow),
        pytest.param("fsdp2 x tp2", EVERY, marks=pytest.mark.slow),
    ],
)
def test_three_steps_equal_one_process(layout, names, one_process):
    world = 4 if "x" in layout else 2
    assert run_ranks(three_steps, world, layout, names, one_process, timeout=250) == [[]] * world
    for name in names:  # back to one process
        run, expected = Run("one", name), torch.load(one_process / f"{name}.pt")["tensors"]
        assert run.checkpoint(one_process / layout / name).load() == 2
        run.step()
        assert not differences(run.tensors(), expected), name


def in_backward_and_bfloat16(folder):
    wrong = []
    for name in ("AdamW", "AdamW8bit"):
        plain, hooked = Run("fsdp2", name), Run("fsdp2", name, in_backward=True)
        # One backward of both micro-batches, as it must be with hooks.
        plain_norm, hooked_norm = 0.0, 0.0
        for _ in range(2):
            inputs = [plain.inputs(i) for i in range(plain.meshes.batch.get_local_rank(), NUM_BATCHES, 2)]
            sum(plain.loss(i) for i in inputs).backward()
            plain_norm = clip_grad_norm(plain.model, 0.0).item()
            plain.optimizer.step()
            plain.optimizer.zero_grad()
            hooked_norm = hooked.step()
            assert all(p.grad is None for p in hooked.model.parameters())
        expected = plain.tensors()
        wrong += [
            f"{name} in backward: {key}" for key, t in hooked.tensors().items() if not torch.equal(t, expected[key])
        ]
        wrong += (
            []
            if hooked_norm == pytest.approx(plain_norm, rel=1e-6)
            else [f"{name} in backward: norm {hooked_norm}, {plain_norm}"]
        )
    for name in NAMES:
        run = Run("fsdp2", name, "bfloat16")
        assert {p.dtype for p in run.model.blocks.parameters()} == {
            torch.bfloat16
        } and run.model.head_modulation.dtype == torch.float32
        start = run.tensors()
        run.step()
        run.checkpoint(folder / name).save(1)
        run.step()
        tensors = run.tensors()
        expected = torch.load(folder / f"{name}.pt")
        for key, p in run.model.named_parameters():
            # One process adds up gradients in another order, and bfloat16 rounds them: a few weights round otherwise.
            moved = (tensors[key].double() - start[key].double()).norm()
            apart = (tensors[key].double() - expected[key].double()).norm()
            wrong += (
                [f"{name} bfloat16: {key} {apart / moved}"]
                if p.dtype == torch.bfloat16 and p.ndim == 2 and apart > 0.35 * moved
                else []
            )
        again = Run("fsdp2", name, "bfloat16")
        assert again.checkpoint(folder / name).load() == 1
        again.step()
        wrong += [
            f"{name} bfloat16 resumed: {key}" for key, t in again.tensors().items() if not torch.equal(t, tensors[key])
        ]
    return wrong


def test_in_backward_and_bfloat16_weights(tmp_path):
    for name in NAMES:
        run = Run("one", name, "bfloat16")
        run.step()
        run.step()
        torch.save(run.tensors(), tmp_path / f"{name}.pt")
    assert run_ranks(in_backward_and_bfloat16, 2, tmp_path, timeout=250) == [[], []]


def rounded(folder):
    """One weight, replicated and sharded by rows or columns, after a step with stochastic rounding."""
    mesh = ParallelDims(dp_replicate=2, tp=2).build_mesh("cpu").world["dp_replicate", "tp"]
    from torch.distributed.tensor import Replicate, Shard

    full = torch.load(folder / "weight.pt")
    parts = []
    for placement in (Shard(0), Shard(1)):
        p = torch.nn.Parameter(distribute_tensor(full.bfloat16(), mesh, [Replicate(), placement], src_data_rank=None))
        holder = torch.nn.ParameterDict({"w": p})
        optimizer = build_optimizer(holder, Optimizer(name="AdamW8bit", lr=1e-3), seed=5)
        p.grad = distribute_tensor(full.bfloat16(), mesh, [Replicate(), placement], src_data_rank=None)
        optimizer.step()
        parts.append(p.full_tensor().detach())
    return parts


def test_rounding_is_the_same_wherever_an_element_lies(tmp_path):
    full = torch.randn(12, 256)
    torch.save(full, tmp_path / "weight.pt")
    p = torch.nn.Parameter(full.bfloat16())
    optimizer = build_optimizer(torch.nn.ParameterDict({"w": p}), Optimizer(name="AdamW8bit", lr=1e-3), seed=5)
    p.grad = full.bfloat16()
    optimizer.step()
    assert not torch.equal(p, full.bfloat16())
    for parts in run_ranks(rounded, 4, tmp_path):
        assert all(torch.equal(part, p) for part in parts)


def narrow_columns():
    mesh = ParallelDims(tp=2).build_mesh("cpu").tp
    from torch.distributed.tensor import Shard

    p = torch.nn.Parameter(distribute_tensor(torch.randn(4, 96), mesh, [Shard(1)], src_data_rank=None))
    with pytest.raises(ValueError, match="gives each rank 48 of w's rows; set parallelism.tensor_parallel_degree"):
        build_optimizer(torch.nn.ParameterDict({"w": p}), Optimizer(name="AdamW8bit"))


def test_blocks_that_do_not_fit_a_split_are_refused():
    run_ranks(narrow_columns, 2)


# ---- float8 ----


RECIPES = ("tensorwise", "rowwise")


def float8_run(layout, recipe):
    return Run(layout, "AdamW", "float32", float8=Float8(enable=True, recipe_name=recipe, emulate=True))


def float8_steps(layouts, folder):
    """By layout and recipe, how far weights and norms of two steps are from those of one process."""
    return {(layout, recipe): float8_apart(layout, recipe, folder) for layout in layouts for recipe in RECIPES}


def float8_apart(layout, recipe, folder):
    run, expected = float8_run(layout, recipe), torch.load(folder / f"{recipe}.pt")
    norms = [run.step(), run.step()]
    tensors = run.tensors()
    moved = max(
        ((tensors[name] - expected["tensors"][name]).norm() / moved).item() for name, moved in expected["moved"].items()
    )
    return moved, max(abs(a / b - 1) for a, b in zip(norms, expected["norms"], strict=True))


def test_float8_under_sharding(tmp_path):
    """Under FSDP all scales equal those of one process, because it gathers full weights.

    Under tensor parallel each shard has its own scale, so results agree only within the precision of float8.
    """
    plain = Run("one", "AdamW", "float32")
    exact = [plain.step(), plain.step()]
    for recipe in RECIPES:
        run = float8_run("one", recipe)
        start, norms = run.tensors(), [run.step(), run.step()]
        assert norms != pytest.approx(exact, rel=1e-5) and norms == pytest.approx(exact, rel=0.1)
        tensors = run.tensors()
        moved = {name: (tensors[name] - t).norm().item() for name, t in start.items()}
        torch.save({"tensors": tensors, "norms": norms, "moved": moved}, tmp_path / f"{recipe}.pt")
    for apart in run_ranks(float8_steps, 2, ("fsdp2", "tp2"), tmp_path):
        for (layout, _), (moved, norm) in apart.items():
            if layout == "fsdp2":
                assert moved < 0.02 and norm < 1e-3, apart
            else:
                assert max(moved, norm) > 1e-6 and norm < 0.1, apart
