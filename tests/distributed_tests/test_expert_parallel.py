"""Experts divided over ranks: loss, every gradient and the load of the experts equal one process."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.distributed_tests.test_layouts import (
    LIMITS,
    Layout,
    Model,
    build,
    build_inputs,
    build_task,
    fill,
    gradients,
    layout,
    num_elements,
)
from tests.helpers import run_ranks, whole_tensors
from titan_video.checkpoint.manager import CheckpointManager
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config.job_config import (
    ActivationCheckpoint,
    Checkpoint,
    Compile,
    Ema,
    JobConfig,
    Optimizer,
    Parallelism,
    Training,
)
from titan_video.config.sections.experts import Experts as ExpertsSection
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline
from titan_video.distributed.pipeline_parallel.stages import keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clip_grad_norm, gather_objects, initialise, reduce_over, to_local
from titan_video.models.spec import ExpertArgs
from titan_video.models.wan import SPEC as WAN
from titan_video.models.wan import WanArgs
from titan_video.optim.ema import EmaWeights
from titan_video.optim.optimizer import build_optimizer
from titan_video.training.expert_balance import ExpertBalance, direction

EXPERTS = ExpertArgs(num_experts=8, top_k=2, expert_dim=8, shared_dim=8, first_dense=0)
ARGS = WanArgs(dim=24, num_heads=4, num_layers=2, ffn_dim=16, text_dim=20, text_len=9, freq_dim=32, experts=EXPERTS)
MODEL = Model(WAN, ARGS)
CHOICE = replace(MODEL, args=replace(ARGS, experts=replace(EXPERTS, expert_choice=True)))
SAVED = ("attention", "down")
MODES = {
    "plain": ActivationCheckpoint(),
    "full": ActivationCheckpoint(mode="full"),
    "selective": ActivationCheckpoint(mode="selective", save=SAVED, save_min_kv=0),
    "exchange": ActivationCheckpoint(mode="selective", save=(*SAVED, "exchange"), save_min_kv=0),
}
# Experts that no token reaches: of the degree 2 one rank has no rows, of 4 two ranks, and one expert of another rank.
STARVED = (1, 4, 5, 6, 7)


def starve(model, experts):
    """Set the routers' biases so that these experts are never chosen, and the others by their scores."""
    with torch.no_grad():
        for router in model.routers.values():
            bias = torch.zeros(router.bias.shape)
            bias[list(experts)] = -10
            initialise(router, lambda name, full, generator: full.copy_(bias), 0, lambda name: name == "bias")


def loads(model):
    """Tokens of each expert by block, of all ranks together."""
    total = {}
    for of_rank in gather_objects({name: router.load_SE for name, router in model.routers.items()}):
        for name, load in of_rank.items():
            total[name] = total.get(name, 0) + load
    return total


def reference(num_batches, starved, choice):
    """(loss, gradients, norm, loads) of one process."""
    m = CHOICE if choice else MODEL
    model = build(m, torch.float64).to_empty(device="cpu")
    fill(model, m)
    starve(model, starved)
    task, total = build_task(WAN, ARGS), 0
    for i in range(num_batches):
        inputs = build_inputs(task, i, torch.float64)
        loss = task.loss(model(**inputs.kwargs), inputs).sum() / num_elements(task, num_batches)
        loss.backward()
        total += loss.detach()
    return total, gradients(model), clip_grad_norm(model, 0.0), {n: r.load_SE for n, r in model.routers.items()}


def prepare(layout, mode, starved=(), m=MODEL):
    """(model, pipeline, meshes) under a layout, with the weights that one process has."""
    meshes, section = layout.dims.build_mesh("cpu"), Parallelism(**layout.options)
    training = Training(mixed_precision_param="float64", mixed_precision_reduce="float64")
    model, pipelined = build(m, torch.float64), layout.dims.pp > 1
    stages = keep_stages(model, WAN.plan, meshes.pp, section, m.args, 15) if pipelined else None
    parallelize(model, WAN.plan, meshes, section, training, MODES[mode], Compile())
    model.to_empty(device="cpu")
    fill(model, m)
    starve(model, starved)
    pipeline = (
        Pipeline(model, stages, WAN.plan, meshes.pp, section, torch.float64, torch.device("cpu")) if stages else None
    )
    return model, pipeline, meshes


def forward_backward(model, pipeline, meshes, num):
    """The loss of a step, on every rank."""
    task, loss = build_task(WAN, ARGS, SequenceShard.from_meshes(meshes)), torch.zeros((), dtype=torch.float64)
    count, rank, dp = num_elements(task, num), meshes.batch.get_local_rank(), meshes.batch.size()
    if pipeline:
        for parity in (0, 1):  # a pipeline's micro-batches have one shape
            inputs = [build_inputs(task, i, torch.float64) for i in range(parity, num, 2)][rank::dp]
            loss += pipeline.step(inputs, lambda v, i: task.loss(v, inputs[i]).sum() / count)
    else:
        for i in range(rank, num, dp):
            inputs = build_inputs(task, i, torch.float64)
            micro = task.loss(model(**inputs.kwargs), inputs).sum() / count
            micro.backward()
            loss += micro.detach()
    return reduce_over(meshes.batch, reduce_over(meshes.sequence, loss, "sum"), "sum")


def compare(runs, path):
    """(names of parameters, what differs from one process) for each run, one after the other in one process group."""
    expected, report = torch.load(path), []
    for run in runs:
        ref_loss, ref_grads, ref_norm, ref_loads = expected[run.case]
        model, pipeline, meshes = prepare(run.layout, run.mode, run.starved, CHOICE if run.choice else MODEL)
        loss = forward_backward(model, pipeline, meshes, run.layout.num_batches)
        for _, p in (x for x in model.named_parameters() if ".experts." in x[0]):
            p.grad.mul_(run.factor)
        grads, norm = gradients(model), clip_grad_norm(model, 0.0, meshes.pp)
        errors = {
            n: ((g - ref_grads[n]).norm() / ref_grads[n].norm().clamp_min(1e-30)).item()
            for n, g in grads.items()
            if g is not None
        }
        errors |= {"loss": (loss / ref_loss - 1).abs().item(), "norm": (norm / ref_norm - 1).abs().item()}
        wrong = {n: e for n, e in errors.items() if not e <= LIMITS[torch.float64]}
        wrong |= {n: "no gradient" for n, g in grads.items() if g is None}
        found = loads(model)
        wrong |= {f"load {n}": found[n] for n, load in ref_loads.items() if not torch.equal(found[n], load)}
        report.append((set(grads), wrong))
    return report


@dataclass(frozen=True)
class Run:
    """starved: experts that no token reaches. factor: by which the gradients of experts are multiplied, wrongly.
    choice: experts choose tokens.
    """

    layout: Layout
    mode: str = "plain"
    starved: tuple[int, ...] = ()
    factor: float = 1.0
    choice: bool = False

    @property
    def case(self):
        """What the reference depends on: see `reference`."""
        return self.layout.num_batches, self.starved, self.choice


def check(world, runs, tmp_path):
    path = tmp_path / "reference.pt"
    torch.save({case: reference(*case) for case in {run.case for run in runs}}, path)
    for (_, starved, _), (_, _, _, found) in torch.load(path).items():
        for load_SE in found.values():
            assert {e for e, n in enumerate(load_SE.sum(0).tolist()) if n == 0} == set(starved)
    reports = run_ranks(compare, world, runs, path, timeout=1800)
    names = next(iter(torch.load(path).values()))[1].keys()
    for run, *by_rank in zip(runs, *reports, strict=True):
        assert set().union(*(found for found, _ in by_rank)) == names
        if run.factor == 1:
            assert [wrong for _, wrong in by_rank] == [{}] * world, run
        else:
            wrong = set().union(*(wrong for _, wrong in by_rank))
            assert wrong == {"norm", *(name for name in names if ".experts." in name)}


FOUR_RANKS = (
    Run(layout(dp_shard=2, ulysses=2, ep=4), "full", STARVED),
    Run(layout(dp_shard=2, tp=2, ep=2), "selective", STARVED),
    Run(layout(pp=2, dp_shard=2, ep=2), "exchange", factor=1 / 2),
)
EIGHT_RANKS = {
    "dp2 cp4": {"dp_shard": 2, "ring": 2, "ulysses": 2},
    "dp2 cp2 tp2": {"dp_shard": 2, "ulysses": 2, "tp": 2},
    "pp2 dp2 cp2": {"pp": 2, "dp_shard": 2, "ulysses": 2},
    "hsdp2x2 cp2": {"dp_replicate": 2, "dp_shard": 2, "ring": 2},
}


def test_experts_over_four_ranks_equal_one_process(tmp_path):
    """The last with a wrong factor, which is seen."""
    check(4, FOUR_RANKS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("attention", EIGHT_RANKS)
def test_experts_over_eight_ranks_equal_one_process(attention, ep, tmp_path):
    folded = layout(ep=ep, **EIGHT_RANKS[attention])
    modes = tuple(mode for mode in MODES if mode != "exchange" or ep > 1)
    runs = [Run(folded, mode, starved) for mode in modes for starved in ((), STARVED)]
    check(8, (*runs, *(Run(folded, mode, choice=True) for mode in modes)), tmp_path)


# ---- optimizers and checkpoints ----

BALANCE_RATE = 1e-3
NUM_BATCHES = 4  # one of each shape for two data-parallel ranks
PIPELINED = 8  # two of each


class Trained:
    """A model in a layout (None: this process alone) with its optimizer, EMA weights and checkpoints in `folder`."""

    def __init__(self, layout, folder, optimizer="AdamW", m=MODEL, num=NUM_BATCHES):
        self.layout, self.pipeline, self.meshes, self.num = layout, None, None, num
        if layout is None:
            self.model = build(m, torch.float64).to_empty(device="cpu")
            fill(self.model, m)
            starve(self.model, ())
        else:
            self.model, self.pipeline, self.meshes = prepare(layout, "plain", m=m)
        self.optimizer = build_optimizer(
            self.model, Optimizer(name=optimizer, lr=1e-2, weight_decay=0.1), WAN.plan.blocks, seed=7
        )
        if layout is not None:
            config = JobConfig(experts=ExpertsSection(balance_rate=BALANCE_RATE))
            ignored = SimpleNamespace(log_scalars=lambda *args: None)
            self.balance = ExpertBalance(config, self.model, self.optimizer, self.meshes, ignored, lambda _, run: run())
        self.ema = EmaWeights(self.model, Ema(enable=True, decay=0.5))
        self.states = {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer),
            "ema": self.ema,
        }
        section = Checkpoint(interval=1, async_mode="disabled", keep_latest_k=0)
        self.checkpoint = CheckpointManager(section, folder, self.states, {})

    def step(self, number):
        """The same micro-batches in all layouts. The norm of the gradients, which are clipped."""
        if self.layout is None:
            for router in self.model.routers.values():
                router.zero_load()
            task = build_task(WAN, ARGS)
            for i in range(self.num):
                inputs = build_inputs(task, i, torch.float64)
                (task.loss(self.model(**inputs.kwargs), inputs).sum() / num_elements(task, self.num)).backward()
        else:
            run = partial(forward_backward, self.model, self.pipeline, self.meshes, self.num)
            self.balance(number, run)
        norm = clip_grad_norm(self.model, 0.1, self.meshes.pp if self.meshes else None)
        self.optimizer.step()
        for router in self.model.routers.values() if self.layout is None else ():
            router.bias.data += BALANCE_RATE * direction(router.load_SE.sum(0))
        self.optimizer.zero_grad()
        self.ema.update(number)
        return norm.item()

    def biases(self):
        """Of the routers that this rank has."""
        return full({name: router.bias for name, router in self.model.routers.items()})

    def tensors(self):
        """This rank's parts of all that a checkpoint holds."""
        return {f"{kind}.{name}": t for kind, s in self.states.items() for name, t in s.state_dict().items()}

    def differences(self, reference, equal=torch.equal):
        """Names of those that are not this rank's part of the full tensors of `reference`."""
        wrong = []
        for name, t in self.tensors().items():
            expected = reference[name]
            if isinstance(t, DTensor):
                expected = distribute_tensor(expected, t.device_mesh, t.placements, src_data_rank=None).to_local()
            if not equal(to_local(t), expected):
                wrong.append(name)
        return wrong


EP4 = layout(dp_shard=2, ulysses=2, ep=4)


def full(tensors):
    return {name: t.detach().clone() for name, t in whole_tensors(tensors).items()}


def train_and_save(folder, num, steps, others):
    """On four ranks of experts: steps, a checkpoint and one more step; then from the checkpoint. Whether the last step
    was the same there, the checkpoint's tensors, the norms, the last biases of the routers, and `load` of others.
    """
    run = Trained(EP4, folder, num=num)
    norms = [run.step(i + 1) for i in range(steps)]
    run.checkpoint.save(steps, force=True)
    run.checkpoint.close()
    saved = full(run.tensors())
    norms.append(run.step(steps + 1))
    last = {name: to_local(t).clone() for name, t in run.tensors().items()}
    resumed = Trained(EP4, folder, num=num)
    assert resumed.checkpoint.load() == steps
    resumed.step(steps + 1)
    same = [name for name, t in resumed.tensors().items() if torch.equal(to_local(t), last[name])]
    if torch.distributed.get_rank() == 0:
        torch.save(saved, folder / "saved.pt")
    torch.distributed.barrier()
    return len(same) == len(last), norms, run.biases(), load(others, folder, num, steps)


def load(layouts, folder, num, steps):
    """What differs from the checkpoint's tensors after a load in each layout; norm and biases of another step."""
    found, reference = [], torch.load(folder / "saved.pt")
    for chosen in layouts:
        run = Trained(chosen, folder, num=num)
        with torch.no_grad():
            for p in run.model.parameters():
                to_local(p).fill_(float("nan"))
        assert run.checkpoint.load() == steps
        found.append((run.differences(reference), run.step(steps + 1), run.biases()))
    return found


def check_loads(others, worlds, tmp_path, num=NUM_BATCHES, steps=1):
    """others: layouts of four ranks. worlds: layouts by their number of ranks."""
    ranks = run_ranks(train_and_save, 4, tmp_path, num, steps, others, timeout=900)
    resumes, norms, biases, _ = ranks[0]
    assert resumes
    one = Trained(None, tmp_path / "none", num=num)
    assert [one.step(i + 1) for i in range(steps + 1)] == pytest.approx(norms, rel=1e-9)
    assert all(torch.equal(biases[name], bias) and bias.any() for name, bias in one.biases().items())
    found = load([None], tmp_path, num, steps) + [x for *_, of_rank in ranks for x in of_rank]
    for world, layouts in worlds.items():
        found += [x for of_rank in run_ranks(load, world, layouts, tmp_path, num, steps, timeout=900) for x in of_rank]
    assert [wrong for wrong, _, _ in found] == [[]] * len(found)
    assert all(torch.equal(bias, biases[name]) for _, _, own in found for name, bias in own.items())
    assert [norm for _, norm, _ in found] == pytest.approx([norms[-1]] * len(found), rel=1e-9)


def test_a_checkpoint_of_experts_loads_under_another_layout_and_resumes(tmp_path):
    check_loads([layout(dp_shard=2, tp=2, ep=2)], {}, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_experts_loads_under_all_layouts(tmp_path):
    check_loads(
        [layout(dp_shard=4), layout(dp_shard=2, tp=2, ep=2), layout(pp=2, dp_shard=2, ep=2)],
        {
            1: [layout()],
            2: [layout(dp_shard=2, ep=2), layout(dp_shard=2), layout(tp=2, ep=2), layout(pp=2)],
            8: [layout(dp_shard=2, ulysses=2, tp=2, ep=ep) for ep in (1, 2, 4, 8)]
            + [layout(pp=2, dp_shard=2, ulysses=2, ep=4), layout(dp_replicate=2, dp_shard=2, ulysses=2, ep=2)],
        },
        tmp_path,
        PIPELINED,
        steps=2,
    )


FEW = replace(MODEL, args=replace(ARGS, experts=replace(EXPERTS, num_experts=2, top_k=1)))
THREE = replace(MODEL, args=replace(ARGS, experts=replace(EXPERTS, num_experts=3, top_k=1)))
OPTIMIZERS = ("AdamW8bit", "Muon")


def optimize(layouts, folder, m):
    """What differs from one process after two steps by each optimizer in each layout."""
    found = []
    for name, chosen in ((name, chosen) for name in OPTIMIZERS for chosen in layouts):
        run, reference = Trained(chosen, folder / "none", name, m), torch.load(folder / f"{name}.pt")
        run.step(1), run.step(2)
        assert run.model.blocks["0"].moe.experts.up.placements[0].is_shard(1)
        found.append(run.differences(reference, lambda a, b: torch.allclose(a.double(), b.double(), 1e-7, 1e-9)))
    return found


@pytest.mark.parametrize(
    "world, m, layouts",
    [
        (2, THREE, [layout(dp_shard=2)]),
        pytest.param(4, FEW, [layout(dp_shard=2, ulysses=2, ep=ep) for ep in (1, 2)], marks=pytest.mark.slow),
    ],
    ids=["two ranks", "four ranks"],
)
def test_optimizers_of_experts_equal_one_process(world, m, layouts, tmp_path):
    """The ranks do not divide the experts: FSDP shards the rows of each, and Muon exchanges them."""
    for name in OPTIMIZERS:
        run = Trained(None, tmp_path / "none", name, m)
        run.step(1), run.step(2)
        kinds = {p: group["kind"] for group in run.optimizer.param_groups for p in group["params"]}
        experts = run.model.blocks["0"].moe.experts
        assert [kinds[p] for p in (experts.up, experts.down, experts.up_bias)] == [name, name, "AdamW"]
        torch.save(run.tensors(), tmp_path / f"{name}.pt")
    assert run_ranks(optimize, world, layouts, tmp_path, m, timeout=600) == [[[]] * 2 * len(layouts)] * world
