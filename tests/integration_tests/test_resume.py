"""A run that is stopped in any way resumes bit for bit like one without the stop."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.helpers import kill_in_save, signal_at

NUM_STEPS = 12
EVERYTHING = {
    "ema.enable": "true",
    "ema.decay": 0.9,
    "training.global_batch_size": 8,
    "data.num_workers": 1,
    "activation_checkpoint.mode": "full",
    "validation.enable": "true",
    "validation.freq": 4,
    "validation.holdout": 0.2,
    "validation.num_videos": 0,
    "validation.timesteps": "0.5",
}


def iter_tensors(folder):
    """All tensors of a checkpoint, read with DCP alone."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def assert_same_checkpoint(a, b):
    ours, theirs = iter_tensors(a), iter_tensors(b)
    assert ours.keys() == theirs.keys() and {name.partition(".")[0] for name in ours} >= {"model", "optimizer"}
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different
    assert json.loads((a / "state.json").read_text()) == json.loads((b / "state.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(shared_front):
    """(options, world) -> the run that nothing stops; each is made once."""
    made = {}

    def get(options, world, num_steps=NUM_STEPS):
        key = world, num_steps, *sorted(map(str, options.items()))
        if key not in made:
            run = shared_front.run(
                f"whole{len(made)}", {**options, "training.steps": num_steps, "checkpoint.interval": 1000}, world
            ).ok()
            assert len(run.records) == num_steps and all(
                set(row) > {"loss", "grad_norm", "lr", "samples"} for row in run.records
            )
            made[key] = run
        return made[key]

    return get


class Stopper:
    """One run that is stopped again and again; after each stop its records are those of the run that was not."""

    def __init__(self, front, whole, options, world, num_steps=NUM_STEPS):
        self.front, self.whole, self.world, self.num_steps = front, whole, world, num_steps
        self.options = {**options, "training.steps": num_steps}

    def _stopped(self, run, message=None):
        assert run.records == self.whole.records[: len(run.records)]
        assert message is None or message in run.output, run.output
        return run

    def by_signal(self, step, signum, rank=0):
        run = self.front.run("stopped", self.options, self.world, partial(signal_at, step, signum, rank)).stopped()
        self._stopped(run, f"stopped by a signal after step {step};")
        assert len(run.records) == step and run.checkpoint(step).is_dir()

    def by_last_step(self, step):
        run = self._stopped(
            self.front.run("stopped", {**self.options, "training.steps": step}, self.world).ok(), "finished"
        )
        assert len(run.records) == step and run.checkpoint(step).is_dir()

    def by_kill_in_save(self, step):
        """`step` is one at which a checkpoint is due."""
        run = self.front.run("stopped", self.options, self.world, partial(kill_in_save, step))
        assert run.code == -signal.SIGKILL or self.world > 1 and run.code, run.output
        assert (run.folder / "checkpoint" / f"step-{step}.partial").is_dir() and not run.checkpoint(step).exists()

    def by_kill(self, step, delay):
        """All ranks are killed `delay` seconds after `step` was seen in the metrics."""
        path, program = (
            self.front.root / "stopped" / "metrics.jsonl",
            self.front.start("stopped", self.options, self.world),
        )
        while not (path.exists() and f'"step": {step},' in path.read_text()) and all(
            p.is_alive() for p in program.ranks
        ):
            time.sleep(0.01)
        time.sleep(delay)
        program.kill()
        self._stopped(self.front.finish("stopped", program))

    def finish(self):
        run = self._stopped(self.front.run("stopped", self.options, self.world).ok(), "loaded")
        assert len(run.records) == self.num_steps
        # There is one more for each step that was the last one for a while.
        assert {step: run.validations[step] for step in self.whole.validations} == self.whole.validations
        assert not list((run.folder / "checkpoint").glob("*.partial"))
        assert_same_checkpoint(run.checkpoint(self.num_steps), self.whole.checkpoint(self.num_steps))
        return run


def test_one_rank(front, uninterrupted):
    options = {**EVERYTHING, "training.global_batch_size": 4}
    stop = Stopper(
        front, uninterrupted(options, 1), {**options, "checkpoint.async_mode": "async", "checkpoint.interval": 4}, 1
    )
    stop.by_signal(2, signal.SIGUSR2)
    stop.by_last_step(5)
    stop.by_kill_in_save(8)
    stop.by_kill(9, random.uniform(0, 0.2))
    stop.finish()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks(front, uninterrupted, world):
    """One rank has the signal, all save. Then one dies while saving."""
    options = {"ema.enable": "true", "checkpoint.async_mode": "disabled", "checkpoint.interval": 3}
    stop = Stopper(front, uninterrupted({"ema.enable": "true"}, world, 6), options, world, 6)
    stop.by_signal(2, signal.SIGTERM, rank=world // 2)
    stop.by_kill_in_save(6)
    stop.finish()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["async", "disabled"])
@pytest.mark.parametrize("world", [1, 4])
def test_twenty_stops(front, uninterrupted, world, mode):
    """Twenty different steps, three ways to stop. Only each third checkpoint comes from the interval."""
    num_steps, rng = 63, random.Random(f"{world} {mode}")
    options = {**EVERYTHING, "checkpoint.async_mode": mode, "checkpoint.interval": 3}
    stop = Stopper(front, uninterrupted(EVERYTHING, world, num_steps), options, world, num_steps)
    for number, step in enumerate(range(3, 63, 3)):
        step -= rng.randrange(3)
        if number % 4 == 0:
            stop.by_signal(step, rng.choice([signal.SIGTERM, signal.SIGUSR2]), rng.randrange(world))
        elif number % 4 == 1:
            stop.by_last_step(step)
        elif number % 4 == 2:
            stop.by_kill_in_save(-(-step // 3) * 3)
        else:
            stop.by_kill(step, rng.uniform(0, 0.5))
    stop.finish()


# ---- other numbers of ranks and workers ----


def drawn_recorded(stop_at, signum):
    """A hook: each rank writes what it trains on, and in the middle of step `stop_at` has a signal; SIGTERM is for one
    rank, a kill for all.
    """
    import train

    run_step = train.Trainer.train_step

    def train_step(self, batches, *args):
        rows = [
            (i, hashlib.sha256(b.streams["video"][k].numpy().tobytes() + b.text_BLD[k].numpy().tobytes()).hexdigest())
            for b in batches
            for k, i in enumerate(b.sample_ids_B.tolist())
        ]
        with open(self.folder / f"drawn{self.rank}.jsonl", "a") as f:
            f.write(json.dumps([self.step, rows]) + "\n")
        if self.step == stop_at and (signum == signal.SIGKILL or self.rank == 0):
            os.kill(os.getpid(), signum)
        run_step(self, batches, *args)

    train.Trainer.train_step = train_step


def drawn(run):
    """{step: {sample id: digest of its clip and text}}; a step that was begun twice had the same."""
    steps = {}
    for path in run.folder.glob("drawn*.jsonl"):
        for step, rows in map(json.loads, path.read_text().splitlines()):
            for sample_id, mark in rows:
                assert steps.setdefault(step, {}).setdefault(sample_id, mark) == mark, (step, sample_id)
    return steps


ALL_PAIRS = (1, 1, 2, 2, 4, 4, 8, 8, 1, 4, 1, 8, 2, 8, 4, 2, 1)  # each degree follows each


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "degrees, workers, steps",
    [((2, 1, 2), (1, 0, 0), 2), pytest.param(ALL_PAIRS, (0, 1, 4), 3, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_samples_on_other_numbers_of_ranks_and_workers(front, degrees, workers, steps):
    """After SIGTERM and kill -9, in the middle of epochs, each run on another number of ranks and workers: every step
    has the samples of the run that nothing stopped."""
    num_steps = steps * len(degrees)
    options = {
        "training.global_batch_size": 8,
        "training.local_batch_size": 1,
        "training.steps": num_steps,
        "checkpoint.interval": 2,
        "checkpoint.async_mode": "disabled",
        "ema.enable": "false",
        "optimizer.lr": 1e-4,
    }
    hook = partial(drawn_recorded, 0, signal.SIGTERM)
    whole = front.run(
        "whole", {**options, "checkpoint.enable": "false", "training.local_batch_size": 8}, hook=hook
    ).ok()
    for k, degree in enumerate(degrees):
        signum, is_last = (signal.SIGTERM, signal.SIGKILL)[k % 2], k == len(degrees) - 1
        hook = partial(drawn_recorded, 0 if is_last else steps * (k + 1), signum)
        run = front.run("stopped", {**options, "data.num_workers": workers[k % 3]}, degree, hook)
        assert run.code in (0, 85) or signum == signal.SIGKILL and run.code == -signum, run.output
    assert drawn(run) == drawn(whole) and len(run.records) == num_steps
    for step, rows in drawn(run).items():
        assert sorted(rows) == list(range(8 * (step - 1), 8 * step))
    assert [row["loss"] for row in run.records] == pytest.approx([row["loss"] for row in whole.records], rel=1e-3)


def snapshot(folder):
    """All that a run has written, but for the time of its last start."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "status.json"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def short(shared_front):
    """A run of two steps, finished."""
    return shared_front.run("short", {"training.steps": 2, "checkpoint.interval": 1}).ok()


def test_a_finished_run_is_left_alone(shared_front, short):
    before = snapshot(short.folder)
    for steps in (2, 1):
        again = shared_front.run(
            "short", {"training.steps": steps, "checkpoint.interval": 1, "metrics.enable_tensorboard": "true"}
        ).ok()
        assert "is already at step 2" in again.output and "training from" not in again.output
        assert snapshot(short.folder) == before


@pytest.mark.slow
def test_more_steps_go_on(front, short, uninterrupted):
    """Also on another number of ranks: the same clips, noise and weights."""
    shutil.copytree(short.folder, front.root / "more")
    whole = uninterrupted({}, 1)
    run = front.run("more", {"training.steps": 4, "training.local_batch_size": 1}, world=2).ok()
    assert run.records[:2] == whole.records[:2]
    for ours, theirs in zip(run.records, whole.records[:4], strict=True):
        assert (
            ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            and ours["samples"] == theirs["samples"]
            and ours["lr"] == theirs["lr"]
        )


def test_no_valid_checkpoint_stops_the_run(front, short):
    shutil.copytree(short.folder, front.root / "broken")
    manifests = sorted((front.root / "broken" / "checkpoint").glob("step-*/manifest.json"))
    assert len(manifests) == 2
    for manifest in manifests:
        raw = bytearray(manifest.read_bytes())
        raw[len(raw) // 2] ^= 1
        manifest.write_bytes(raw)
    run = front.run("broken", {"training.steps": 4}).fails_with("none is valid", "step-1", "step-2")
    assert run.records == short.records and "training from" not in run.output


def test_an_invalid_checkpoint_is_passed_over(front, short, uninterrupted):
    shutil.copytree(short.folder, front.root / "damaged")
    folder = front.root / "damaged" / "checkpoint"
    (tensors,) = (folder / "step-2").glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (folder / "step-7.partial").mkdir()
    (folder / "step-7.partial" / "manifest.json").write_text("{}")
    run = front.run("damaged", {"training.steps": 3}).ok()
    assert "step-2 is not valid" in run.output and "training from step 2 to 3" in run.output
    assert run.records == uninterrupted({}, 1).records[:3]
    # The partial one goes, the damaged one is kept for its owner to see.
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-3"]
