"""Checkpoints over ranks: other layouts, errors on all ranks at once, and saves that are killed."""

import pickle
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers import run_ranks, start_ranks
from tests.unit_tests.test_checkpoint import reseal
from titan_video.checkpoint import files
from titan_video.checkpoint.manager import CheckpointManager, load_weights
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config.job_config import Checkpoint
from titan_video.tools.files import StorageError


class Counter:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Weights:
    """Tensors of one value, large enough that a kill falls into the writing of them."""

    def __init__(self):
        self.values = {f"w{i}": torch.zeros(50_000 + i) for i in range(8)}

    def state_dict(self):
        return self.values

    def fill(self, value):
        for tensor in self.values.values():
            tensor.fill_(value)


class Model(nn.Module):
    """5 and 7 rows do not divide by the ranks; `scale` belongs to the root."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"0": nn.Linear(6, 5), "1": nn.Linear(5, 7), "2": nn.Linear(7, 1)})
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        for block in self.blocks.values():
            x = torch.tanh(block(x))
        return x * self.scale.sum()


def build(mesh_shape, wrapped=False):
    names = ("dp_shard",) if len(mesh_shape) == 1 else ("dp_replicate", "dp_shard")
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    torch.manual_seed(0)
    model = Model()
    if wrapped:
        model.blocks["1"] = checkpoint_wrapper(model.blocks["1"])
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def manager(folder, model, optimizer, counter=None, **section):
    tensors = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    return CheckpointManager(Checkpoint(**{"interval": 1, **section}), folder, tensors, {"train": counter or Counter()})


def full(manager):
    tensors = manager._live_tensors()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def save_ranks(folder, mode):
    """Save, and continue training while the checkpoint is written."""
    model, optimizer = build((2,))
    train(model, optimizer, range(3))
    saver = manager(folder, model, optimizer, Counter(samples=12), async_mode=mode)
    values = full(saver)
    assert saver.save(3)
    train(model, optimizer, range(3, 6))
    assert not torch.equal(full(saver)["model.blocks.0.weight"], values["model.blocks.0.weight"])
    saver.close()
    return values


def load_ranks(folder, mesh_shape):
    model, optimizer = build(mesh_shape, wrapped=True)
    counter = Counter()
    loader = manager(folder, model, optimizer, counter)
    assert loader.load() == 3 and counter.state == {"samples": 12}
    values = full(loader)
    other, _ = build(mesh_shape)
    assert load_weights(folder / "step-3", other) == 3
    return values, {name: p.full_tensor() for name, p in ModelState(other).state_dict().items()}


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_two_ranks_to_any_layout(tmp_path, mode):
    saved = run_ranks(save_ranks, 2, tmp_path, mode)[0]
    assert (
        len(saved) == 7 + 21
        and {"model.blocks.0.weight", "model.scale", "optimizer.blocks.1.bias.exp_avg"} <= saved.keys()
    )
    assert sorted(path.name for path in (tmp_path / "step-3").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    for shape in ((1,), (4,), (2, 2)) if mode == "async" else ((2,),):
        for values, weights in run_ranks(load_ranks, torch.Size(shape).numel(), tmp_path, shape):
            assert values.keys() == saved.keys() and all(torch.equal(values[name], saved[name]) for name in saved)
            assert all(torch.equal(weights[name], saved[f"model.{name}"]) for name in weights)


def save_after_forward(folder):
    """Validation leaves the root's parameters gathered; names and shards are the same."""
    model, optimizer = build((2,))
    train(model, optimizer, range(1))
    saver = manager(folder, model, optimizer, async_mode="disabled")
    before = full(saver)
    with torch.no_grad():
        model(torch.ones(1, 6))
    assert not isinstance(model.scale, DTensor)
    assert saver.tensors["optimizer"].state_dict().keys() == {
        name.removeprefix("optimizer.") for name in before if name.startswith("optimizer")
    }
    assert saver.save(1)
    fresh, fresh_optimizer = build((2,))
    loader = manager(folder, fresh, fresh_optimizer)
    assert loader.load() == 1
    values = full(loader)
    return all(torch.equal(values[name], before[name]) for name in before)


def test_save_after_validation(tmp_path):
    assert run_ranks(save_after_forward, 2, tmp_path) == [True, True]


def errors_of_all_ranks(folder):
    model, optimizer = build((2,))
    rank, errors = dist.get_rank(), []
    saver = manager(folder, model, optimizer, Counter(samples=rank))
    try:
        saver.save(1)
        saver.wait()
    except RuntimeError as error:
        errors.append(str(error))
    saver.states["train"].state = {}
    assert saver.save(1)
    saver.wait()
    writer = files.TensorWriter.write_data
    if rank == 1:
        files.TensorWriter.write_data = lambda *args: (_ for _ in ()).throw(OSError("quota exceeded"))
    try:
        saver.save(2)
        saver.wait()
    except StorageError as error:
        errors.append(str(error))
    files.TensorWriter.write_data = writer
    assert saver.save(2)
    saver.close()
    dist.barrier()
    if rank == 0:
        path = folder / "step-2/__1_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    assert manager(folder, model, optimizer).load() == 1
    try:
        manager(folder, model, optimizer, load_step=2).load()
    except ValueError as error:
        errors.append(str(error))
    return errors


def test_all_ranks_agree(tmp_path):
    """A failure or a damaged file on one rank is an error on all ranks, and no rank waits for ever."""
    first, second = run_ranks(errors_of_all_ranks, 2, tmp_path)
    assert first == second and len(first) == 3
    assert "`train` is not the same on all ranks" in first[0]
    assert "failed on rank 1: OSError: quota exceeded" in first[1]
    assert "step-2/__1_0.distcp: its content was altered" in first[2]


def save_until_killed(folder, mode):
    weights, counter = Weights(), Counter()
    saver = CheckpointManager(
        Checkpoint(interval=1, keep_latest_k=2, async_mode=mode), folder, {"ema": weights}, {"train": counter}
    )
    step = saver.load()
    assert all(bool((w == step).all()) for w in weights.values.values()) and counter.state.get("step", 0) == step
    if dist.get_rank() == 0:
        (folder / "started").touch()
    while True:
        step += 1
        weights.fill(step)
        counter.state = {"step": step}
        saver.save(step)


def kill_saves(folder, kills, mode, world):
    """Kill -9 at random moments, again and again in one folder.

    Returns how many kills left an unfinished folder behind.
    """
    rng, cut_short, newest = random.Random(f"{mode}{world}"), 0, 0
    folder.mkdir()
    for _ in range(kills):
        (folder / "started").unlink(missing_ok=True)
        processes, _ = start_ranks(save_until_killed, world, folder, mode)
        deadline = time.monotonic() + 60
        while not ((folder / "started").exists() and (newest or files.list_steps(folder))):
            assert time.monotonic() < deadline and all(p.exitcode is None for p in processes), (
                "a process that saves has failed"
            )
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        for p in processes:
            p.kill()
        for p in processes:
            p.join()
        steps = files.list_steps(folder)
        assert steps and steps[-1] >= newest, "never fewer than before"
        for step in steps:
            files.verify(folder / f"step-{step}")
        cut_short += bool(files.list_partial(folder))
        newest = steps[-1]
        weights, counter = Weights(), Counter()
        loader = CheckpointManager(Checkpoint(), folder, {"ema": weights}, {"train": counter})
        assert loader.load() == newest and counter.state == {"step": newest}
        assert all(bool((w == newest).all()) for w in weights.values.values())
    return cut_short


@pytest.mark.parametrize(("mode", "world", "kills"), [("disabled", 1, 5), ("async", 1, 5), ("async", 2, 2)])
def test_kill_while_saving(tmp_path, mode, world, kills):
    assert kill_saves(tmp_path / "run", kills, mode, world) >= 1, "no kill met a save: the test shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "world"), [("disabled", 1), ("async", 1), ("async", 2)])
def test_fifty_kills_while_saving(tmp_path, mode, world):
    assert kill_saves(tmp_path / "run", 50, mode, world) >= 20


def one_rank_cannot_write(folder, mode):
    model, optimizer = build((2,))
    saver = manager(folder, model, optimizer, async_mode=mode, on_error="continue")
    write, found = files.TensorWriter.write_data, []
    if dist.get_rank() == 1:
        files.TensorWriter.write_data = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    for step in (1, 2):
        saver.save(step)
        train(model, optimizer, [step])
    try:
        saver.wait()
    except StorageError as error:
        found.append(str(error))
    files.TensorWriter.write_data = write
    dist.barrier()
    found.append([path.name for path in folder.iterdir()])
    dist.barrier()
    assert saver.save(3)
    saver.close()
    return [*found, files.list_steps(folder)]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_all_ranks_go_on_when_one_cannot_write(tmp_path, mode):
    first, second = run_ranks(one_rank_cannot_write, 2, tmp_path, mode)
    assert first == second and first[1:] == [[], [3]]
    assert "the checkpoint of step 2 could not be saved" in first[0] and "failed on rank 1" in first[0]


def load_forged(folder):
    model, optimizer = build((2,))
    saver = manager(folder, model, optimizer, Counter(samples=1), async_mode="disabled")
    train(model, optimizer, range(1))
    saver.save(1)
    values = full(saver)
    train(model, optimizer, range(1, 2))
    saver.save(2)
    dist.barrier()
    if dist.get_rank() == 0:  # what rank 1 wrote is no tensor
        path = folder / "step-2/__1_0.distcp"
        metadata = pickle.loads((folder / "step-2/.metadata").read_bytes())
        torch.save({"a": "b"}, path)
        for info in metadata.storage_data.values():
            if info.relative_path == path.name:
                info.offset, info.length = 0, path.stat().st_size
        (folder / "step-2/.metadata").write_bytes(pickle.dumps(metadata))
        reseal(folder / "step-2", 2)
    dist.barrier()
    fresh = manager(folder, *build((2,)), counter := Counter())
    step, found = fresh.load(), full(fresh)
    return step, counter.state, all(torch.equal(found[name], value) for name, value in values.items())


def test_all_ranks_fall_back_from_a_forged_checkpoint(tmp_path):
    assert run_ranks(load_forged, 2, tmp_path) == [(1, {"samples": 1}, True)] * 2
