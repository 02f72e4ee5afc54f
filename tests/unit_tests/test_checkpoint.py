"""Checkpoints in one process: what is saved comes back bit for bit, and an incomplete folder is not loaded."""

import json
import logging
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tests.helpers import run_ranks
from titan_video.checkpoint import files
from titan_video.checkpoint.files import InvalidCheckpoint
from titan_video.checkpoint.manager import CheckpointManager, load_weights
from titan_video.checkpoint.state import ModelState, OptimizerState, read_tensors
from titan_video.config.job_config import Checkpoint
from titan_video.tools.files import StorageError


class Weights:
    """A flat dict of tensors, like the EMA weights."""

    def __init__(self, value=0.0):
        self.values = {
            "a.weight": torch.full((3, 5), float(value)),
            "a.bias": torch.full((4,), float(value)),
            "count": torch.tensor(float(value)),
        }

    def state_dict(self):
        return dict(self.values)

    def fill(self, value):
        for tensor in self.values.values():
            tensor.fill_(value)

    def are(self, value):
        return all(bool((tensor == value).all()) for tensor in self.values.values())


class Counter:
    def __init__(self, state=None):
        self.state = state or {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def manager(folder, weights=None, counter=None, **section):
    section = {"async_mode": "disabled", "interval": 1, "keep_latest_k": 0, **section}
    return CheckpointManager(
        Checkpoint(**section), folder, {"ema": weights or Weights()}, {"train": counter or Counter()}
    )


def save_steps(folder, steps, **section):
    weights, counter = Weights(), Counter()
    saver = manager(folder, weights, counter, **section)
    for step in steps:
        weights.fill(step)
        counter.state = {"samples": step * 10}
        assert saver.save(step)
    saver.close()
    return [path.name for path in sorted(Path(folder).iterdir())]


def reseal(folder, step):
    """Write a manifest that fits altered files, as an attacker can."""
    names = [path.name for path in folder.iterdir() if path.name != files.MANIFEST]
    files.write_manifest(folder, step, 1, {name: files.manifest_entry(folder / name) for name in names})


def build(seed=0, wrapped=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    if wrapped:
        model[0] = checkpoint_wrapper(model[0])
    vectors, matrices = [p for p in model.parameters() if p.ndim == 1], [p for p in model.parameters() if p.ndim == 2]
    return model, torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], lr=1e-2, fused=True
    )


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def states(model, optimizer):
    return {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}


def save_in_background(folder):
    """(threads of the caller, of the thread that writes, whether DCP talks to a group), on one rank with a group."""
    torch.set_num_threads(2)
    seen, real = [], dcp.save

    def save(*args, no_dist=False, **options):
        seen.append((torch.get_num_threads(), no_dist))
        return real(*args, no_dist=no_dist, **options)

    dcp.save = save  # in a process of this test's own
    saver = manager(folder, Weights(), async_mode="async")
    assert saver.save(1)
    saver.wait()
    return torch.get_num_threads(), *seen[0]


def test_a_save_in_the_background_opens_no_threads(tmp_path):
    """A second OpenMP team, of the thread that writes or of gloo's, halves the speed of a small model for good."""
    assert run_ranks(save_in_background, 1, tmp_path) == [(2, 1, True)]


# --- plans that are kept ---


def alternate(folder, caching):
    """Saves of tensors whose types, shapes and number change between saves; {step: what each rank reads back}."""
    rank = int(os.environ.get("RANK", 0))
    weights, read = Weights(), {}
    saver = manager(folder, weights, plan_caching=caching)
    changes = {  # the fourth is the first rank's alone, the fifth the second's
        1: {},
        2: {},
        3: {"a.weight": torch.ones(3, 5, dtype=torch.bfloat16)},
        4: {"first": torch.full((2,), 4.0)} if rank == 0 else {},
        5: {"second": torch.full((2,), 5.0)} if rank == 1 else {},
        6: {"a.weight": torch.ones(6, 2)},
        7: {},
    }
    for step, change in changes.items():
        weights.values |= change
        weights.fill(step)
        assert saver.save(step)
    for step in changes:
        _, metadata = files.verify(files.step_folder(saver.folder, step))
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
        }
        read_tensors(files.step_folder(saver.folder, step), metadata, tensors, saver.ranks.group)
        read[step] = {name: (str(t.dtype), t.tolist()) for name, t in tensors.items()}
    return read


@pytest.mark.parametrize("world", [1, 2])
def test_kept_plans_change_nothing(tmp_path, world, monkeypatch):
    """DCP alone would keep the float32 of step 2 in the index of step 3."""
    if world == 1:
        monkeypatch.delenv("RANK", raising=False)
        planned, kept = ([alternate(tmp_path / str(caching), caching)] for caching in (False, True))
    else:
        planned, kept = (run_ranks(alternate, 2, tmp_path / str(caching), caching) for caching in (False, True))
    assert planned == kept
    assert planned[0][3]["ema.a.weight"] == ("torch.bfloat16", [[3.0] * 5] * 3)


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    made = []
    plan = DefaultSavePlanner._create_global_plan
    monkeypatch.setattr(DefaultSavePlanner, "_create_global_plan", lambda *args: made.append(1) or plan(*args))
    save_steps(tmp_path / "planned", [1, 2, 3])
    assert len(made) == 3
    made.clear()
    torch.distributed.checkpoint.SavePlanner._cached_save_plan.clear()
    torch.distributed.checkpoint.SavePlanner._cached_all_plans.clear()
    save_steps(tmp_path / "kept", [1, 2, 3], plan_caching=True)
    assert len(made) == 1


# --- what is saved comes back ---


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("first", [0, 3])
def test_resume_is_bitwise(tmp_path, mode, first):
    """Also when the optimizer has not made its first step yet: its step counts must not start at 1."""
    section = Checkpoint(async_mode=mode)
    model, optimizer = build()
    train(model, optimizer, range(first))
    saver = CheckpointManager(section, tmp_path, states(model, optimizer), {})
    assert saver.save(first, force=True)
    expected = train(model, optimizer, range(first, first + 4))
    saver.close()
    resumed, resumed_optimizer = build(seed=1, wrapped=True)
    assert CheckpointManager(section, tmp_path, states(resumed, resumed_optimizer), {}).load() == first
    if first:
        assert [set(s) for s in resumed_optimizer.state.values()] == [{"step", "exp_avg", "exp_avg_sq"}] * 4
        assert all(s["step"] == first for s in resumed_optimizer.state.values())
    assert train(resumed, resumed_optimizer, range(first, first + 4)) == expected
    ours, theirs = (
        OptimizerState(model, optimizer).state_dict(),
        OptimizerState(resumed, resumed_optimizer).state_dict(),
    )
    assert (
        ours.keys() == theirs.keys() and len(ours) == 12 and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def test_layout_of_the_folder(tmp_path):
    assert save_steps(tmp_path, [7]) == ["step-7"]
    folder = tmp_path / "step-7"
    assert {path.name for path in folder.iterdir()} == {"__0_0.distcp", ".metadata", "state.json", "manifest.json"}
    assert json.loads((folder / "state.json").read_text()) == {"step": 7, "counters": {"train": {"samples": 70}}}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["torch"]) == (7, 1, torch.__version__)
    # The recipe of docs/checkpoint.md.
    listing = "".join(f"{entry['sha256']}  {name}\n" for name, entry in manifest["files"].items())
    assert subprocess.run(["sha256sum", "--check", "--quiet"], cwd=folder, input=listing, text=True).returncode == 0
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()


def test_load_restores_tensors_and_states(tmp_path):
    save_steps(tmp_path, [1, 2, 10])
    weights, counter = Weights(), Counter()
    loader = manager(tmp_path, weights, counter)
    assert loader.load() == 10 and weights.are(10) and counter.state == {"samples": 100}
    assert not loader.save(10, force=True), "the state on the disk is that of this step already"
    assert manager(tmp_path, weights, load_step=2).load() == 2 and weights.are(2)
    assert manager(tmp_path, enable=False).load() == 0 and not manager(tmp_path, enable=False).save(11, last=True)


def test_interval_last_and_force(tmp_path):
    saver = manager(tmp_path, interval=4)
    assert [step for step in range(1, 11) if saver.save(step, last=step == 10, force=step == 7)] == [4, 7, 8, 10]


def test_async_writes_the_state_of_the_call(tmp_path, monkeypatch):
    gate, write = threading.Event(), files.TensorWriter.write_data
    monkeypatch.setattr(files.TensorWriter, "write_data", lambda self, *args: (gate.wait(20), write(self, *args))[1])
    weights, counter = Weights(5), Counter({"samples": 50})
    saver = manager(tmp_path / "async", weights, counter, async_mode="async")
    assert saver.save(5)
    weights.fill(6)
    counter.state["samples"] = 60
    assert files.list_steps(tmp_path / "async") == []
    gate.set()
    saver.wait()
    save_steps(tmp_path / "sync", [5])
    for name in ("__0_0.distcp", "state.json"):
        assert (tmp_path / "async/step-5" / name).read_bytes() == (tmp_path / "sync/step-5" / name).read_bytes()
    assert saver.save(6)  # the staging memory is used again
    weights.fill(7)
    saver.close()
    assert manager(tmp_path / "async", weights).load() == 6 and weights.are(6)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_failing_save_surfaces(tmp_path, monkeypatch, mode):
    weights = Weights(1)
    saver = manager(tmp_path, weights, async_mode=mode)
    saver.save(1)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(StorageError, match="step-2.partial.*disk full"):
            saver.save(2)
            saver.save(3)
    assert files.list_steps(tmp_path) == [1] and files.is_valid_fast(tmp_path / "step-1")
    assert saver.save(2)
    saver.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-1", "step-2"]
    with monkeypatch.context() as patch:  # a failure inside DCP: it raises a BaseException
        patch.setattr(files.TensorWriter, "write_data", lambda *args: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(StorageError, match="no space"):
            saver.save(4)
            saver.wait()


def test_states_that_cannot_be_saved_exactly(tmp_path):
    for state in ({"loss": float("nan")}, {"shape": (1, 2)}, {"by_id": {1: 2}}, {"t": torch.zeros(1)}):
        with pytest.raises(ValueError, match="`train`"):
            manager(tmp_path, counter=Counter(state)).save(1)
    weights = Weights()
    weights.values["name"] = "not a tensor"
    with pytest.raises(ValueError, match="ema.name is a str"):
        manager(tmp_path, weights).save(1)
    assert files.list_steps(tmp_path) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_steps(tmp_path, [1])
    changes = [
        ({"a.weight": torch.zeros(3, 4)}, r"a.weight has shape \[3, 5\]"),
        ({"a.bias": torch.zeros(4, dtype=torch.bfloat16)}, "a.bias has type torch.float32"),
        ({"new": torch.zeros(1)}, "the checkpoint lacks new"),
        ({"count": None}, "the run lacks count"),
    ]
    for change, message in changes:
        weights = Weights()
        weights.values = {name: value for name, value in {**weights.values, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=f"step-1.*{message}"):
            manager(tmp_path, weights).load()
    with pytest.raises(ValueError, match="state.json.*`extra`"):
        CheckpointManager(Checkpoint(), tmp_path, {"ema": Weights()}, {"train": Counter(), "extra": Counter()}).load()
    with pytest.raises(ValueError, match="checkpoint lacks 0.weight"):
        CheckpointManager(Checkpoint(), tmp_path, states(*build()), {}).load()


def test_weights_alone(tmp_path):
    model, optimizer = build()
    train(model, optimizer, range(2))
    CheckpointManager(Checkpoint(async_mode="disabled"), tmp_path / "run", states(model, optimizer), {}).save(
        2, last=True
    )
    shutil.copytree(tmp_path / "run/step-2", tmp_path / "base")  # a folder of any name
    other = build(seed=3)[0].to(torch.bfloat16)
    assert load_weights(tmp_path / "base", other) == 2
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    fresh = build(seed=3)
    starter = CheckpointManager(Checkpoint(), tmp_path / "new", states(*fresh), {})
    assert starter.load() == 0 and load_weights(tmp_path / "base", fresh[0]) == 2
    assert torch.equal(fresh[0][0].weight, model[0].weight) and not fresh[1].state
    with pytest.raises(ValueError, match="give a step-N folder.*it holds step-2"):
        load_weights(tmp_path / "run", other)
    with pytest.raises(ValueError, match="no such folder"):
        load_weights(tmp_path / "nowhere", other)
    with pytest.raises(ValueError, match="holds no `ema` weights"):
        load_weights(tmp_path / "base", other, source="ema")
    (tmp_path / "base/__0_0.distcp").write_bytes(b"x")
    with pytest.raises(InvalidCheckpoint, match="base/__0_0.distcp"):
        load_weights(tmp_path / "base", other)


# --- which checkpoint is loaded ---


def test_nothing_yet_and_unfinished_only(tmp_path, caplog):
    assert manager(tmp_path / "none").load() == 0
    (tmp_path / "step-5.partial").mkdir()
    (tmp_path / "step-5.partial/__0_0.distcp").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        assert manager(tmp_path).load() == 0
    assert "step-5.partial" in caplog.text
    assert save_steps(tmp_path, [6]) == ["step-6"], "the next save removes what was left over"


def test_falls_back_to_the_newest_valid(tmp_path, caplog):
    save_steps(tmp_path, [1, 2, 3])
    (tmp_path / "step-3/state.json").write_text("{}")
    (tmp_path / "step-4").mkdir()
    weights = Weights()
    assert manager(tmp_path, weights).load() == 2 and weights.are(2)
    assert f"{tmp_path}/step-3/state.json" in caplog.text and f"{tmp_path}/step-4/manifest.json: missing" in caplog.text
    with pytest.raises(ValueError, match=r"load_step = 3 is not valid: .*step-3/state.json.*: step-1, step-2\."):
        manager(tmp_path, load_step=3).load()
    with pytest.raises(ValueError, match=r"no step-9; it has step-1, step-2, step-3, step-4\."):
        manager(tmp_path, load_step=9).load()
    # Saving step 3 again replaces the broken folder.
    saver = manager(tmp_path, weights)
    saver.load()
    saver.save(3)
    assert manager(tmp_path, weights).load() == 3


def test_roll_back(tmp_path, monkeypatch):
    """Tensors come back, states stay; a save in the background is waited for; what is newer is another branch's."""
    save_steps(tmp_path, [9])
    weights, counter = Weights(), Counter({"samples": 1})
    saver = manager(tmp_path, weights, counter, async_mode="async")
    gate, write = threading.Event(), files.TensorWriter.write_data
    monkeypatch.setattr(files.TensorWriter, "write_data", lambda self, *args: (gate.wait(20), write(self, *args))[1])
    weights.fill(3)
    assert saver.save(3)
    weights.fill(5)
    counter.state = {"samples": 50}
    threading.Timer(0.2, gate.set).start()
    assert saver.roll_back() == 3 and weights.are(3) and counter.state == {"samples": 50}
    assert saver.last_step == 3 and not saver.save(3, force=True)
    weights.fill(4)
    saver.save(4)
    saver.wait()
    (tmp_path / "step-4/__0_0.distcp").write_bytes(b"damaged")
    weights.fill(6)
    assert saver.roll_back() == 3 and weights.are(3) and files.list_steps(tmp_path) == [3, 4, 9]
    weights.fill(40)
    assert saver.save(4)  # replaces the damaged one
    saver.close()
    assert manager(tmp_path, weights, load_step=4).load() == 4 and weights.are(40)
    (tmp_path / "step-3/manifest.json").unlink()
    (tmp_path / "step-4/manifest.json").unlink()
    with pytest.raises(ValueError, match="none is valid"):
        saver.roll_back()


def test_a_state_that_older_checkpoints_lack(tmp_path):
    class Guard(Counter):
        is_optional = True

    save_steps(tmp_path, [1])
    counter, guard = Counter(), Guard({"skipped": 7})
    again = CheckpointManager(
        Checkpoint(async_mode="disabled"), tmp_path, {"ema": Weights()}, {"train": counter, "guard": guard}
    )
    assert again.load() == 1 and counter.state == {"samples": 10} and guard.state == {"skipped": 7}
    again.save(2, force=True)
    guard.state = {}
    assert again.load() == 2 and guard.state == {"skipped": 7}


def test_none_valid_stops(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "step-1/__0_0.distcp").unlink()
    os.rename(tmp_path / "step-2", tmp_path / "step-20")
    with pytest.raises(ValueError, match="none is valid") as error:
        manager(tmp_path).load()
    assert "step-1/__0_0.distcp: missing" in str(error.value) and "step-20/manifest.json: written at step 2" in str(
        error.value
    )


def test_retention(tmp_path):
    for name in ("step-x", "notes", "step-03"):
        (tmp_path / name).mkdir()
    others = ["notes", "step-03", "step-x"]
    assert save_steps(tmp_path, [1, 2, 3, 4], keep_latest_k=2) == sorted([*others, "step-3", "step-4"])
    (tmp_path / "step-4/__0_0.distcp").write_bytes(b"short")
    assert save_steps(tmp_path, [5], keep_latest_k=2) == sorted([*others, "step-3", "step-4", "step-5"]), (
        "an invalid one does not count"
    )
    # After load_step, newer folders are another branch's: neither counted nor removed.
    weights = Weights()
    branch = manager(tmp_path, weights, load_step=3, keep_latest_k=1)
    assert branch.load() == 3
    (tmp_path / "step-9").mkdir()
    branch.save(4)
    assert files.list_steps(tmp_path) == [4, 5, 9] and files.is_valid_fast(tmp_path / "step-4")


def test_retention_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("busy")))
        save_steps(tmp_path, [2], keep_latest_k=1)
    assert "could not remove" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"step-1.old", "step-2"}
    assert save_steps(tmp_path, [3], keep_latest_k=1) == ["step-3"]
