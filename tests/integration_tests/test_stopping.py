"""A rank that hangs ends the run and is named; one that only takes long does not. Signals before, during and after
training.
"""

import os
import signal
import time
from functools import partial

import pytest

TIMEOUTS = {"comm.init_timeout_seconds": 30, "comm.train_timeout_seconds": 3, "data.num_workers": 0}


def stuck_reader(rank, step):
    """A hook: from `step` on, opening a file of the cache takes for ever on this rank, as on a dead network disk."""
    import train
    from titan_video.data import latent_cache

    open_regular = latent_cache.open_regular

    def stuck_open(path, *args, **kwargs):
        if stuck_open.steps >= step and str(path).endswith(".safetensors") and os.environ.get("RANK", "0") == str(rank):
            time.sleep(1000)
        return open_regular(path, *args, **kwargs)

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        stuck_open.steps = self.step
        run_step(self, *args)

    stuck_open.steps = 0
    latent_cache.open_regular = stuck_open
    train.Trainer.train_step = train_step


@pytest.mark.parametrize("world, num_workers", [(1, 0), pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_a_stuck_reader_is_named_with_its_file(front, world, num_workers):
    options = {**TIMEOUTS, "data.num_workers": num_workers, "training.steps": 200}
    program = front.start("run", options, world, partial(stuck_reader, world - 1, 3))
    begun = time.monotonic()
    code = program.wait()
    output = "".join(open(log).read() for log in program.logs)
    assert code == 1 and "Traceback" not in open(program.logs[-1]).read(), output
    said = next(line for line in output.splitlines() if " hangs: " in line)
    assert said.startswith(f"error: rank {world - 1} (host {os.uname().nodename}, pid ")
    assert "waiting for the data of the next step for" in said and "/shards/" in said and ".safetensors for" in said
    assert time.monotonic() - begun < 100  # not the 1000 s of the reader


def slow_encoding(seconds, begun=None):
    """A hook: each clip takes so long to encode on the first rank. begun: a file that is made at the first."""
    from titan_video.ingest.cache import encode

    make = encode.encode_job

    def encode_job(*args):
        if begun:
            begun.touch()
        if os.environ.get("RANK", "0") == "0" and args[2].entry:  # not the empty caption
            time.sleep(seconds)
        return make(*args)

    encode.encode_job = encode_job


def test_a_long_encoding_on_one_rank_is_no_hang(front, tmp_path):
    """Twelve clips on two ranks: the first takes longer than the timeout in all, and for no single clip."""
    options = {
        "data.cache_folder": tmp_path / "empty",
        "comm.init_timeout_seconds": 4,
        "comm.train_timeout_seconds": 4,
        "training.steps": 2,
    }
    front.run("run", options, 2, partial(slow_encoding, 1.0)).ok()


def test_encoding_that_hangs_is_named_with_its_clip(front, tmp_path):
    options = {"data.cache_folder": tmp_path / "empty", "comm.init_timeout_seconds": 3}
    front.run("run", options, hook=partial(slow_encoding, 1000.0)).fails_with(
        "rank 0", "hangs: encoding captions: ", ".mp4 for "
    )


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_while_encoding_ends_it_cleanly(front, tmp_path, signum):
    options = {"data.cache_folder": tmp_path / "empty", "training.steps": 2}
    program = front.start("run", options, 1, partial(slow_encoding, 0.2, tmp_path / "begun"))
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    os.kill(program.ranks[0].pid, signum)
    stopped = front.finish("run", program).stopped()
    assert "stopped while encoding" in stopped.output and "Traceback" not in stopped.output
    front.run("run", options).ok()


def signal_in_validation(number):
    """A hook: the process has a signal before the `number`-th call of the model in validations."""
    from titan_video.tools import signals
    from titan_video.training.fault_tolerance import StopAgreement

    guard, calls = StopAgreement.guard, []

    def guarded(self, model):
        def counted(**kwargs):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
                while not signals.stop_requested():
                    time.sleep(0.01)
            return guard(self, model)(**kwargs)

        return counted

    StopAgreement.guard = guarded


VALIDATED = {
    "validation.enable": "true",
    "validation.freq": 2,
    "validation.holdout": 0.2,
    "validation.sample_steps": 3,
    "training.steps": 4,
}


@pytest.fixture(scope="module")
def validated(shared_front):
    return shared_front.run("validated", VALIDATED).ok()


@pytest.mark.parametrize("number, step", [(2, 0), (20, 2)])
def test_a_signal_during_validation_ends_it_early(front, validated, number, step):
    """At step 0 there is nothing to save. Later the step is saved, and the run goes on as if nothing had been."""
    stopped = front.run("run", VALIDATED, hook=partial(signal_in_validation, number)).stopped()
    assert [row["step"] for row in stopped.records] == list(range(1, step + 1)) and step not in stopped.validations
    again = front.run("run", VALIDATED).ok()
    assert again.records == validated.records
    assert again.validations == {s: v for s, v in validated.validations.items() if s != step or step == 0}


def signal_in_export(rank):
    import train
    from titan_video.tools import signals

    export = train.Trainer.export

    def signalled(self, last=False):
        if last and self.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.stop_requested():
                time.sleep(0.01)
        export(self, last)

    train.Trainer.export = signalled


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_during_export_lets_it_finish(front, world):
    options = {"training.steps": 2, "checkpoint.last_save_in_hf": "true"}
    run = front.run("run", options, world, partial(signal_in_export, world - 1)).ok()
    assert list(run.folder.glob("hf/**/config.json")) and "finished" in run.output


def ask_for_a_save(step):
    """A hook: `touch DUMP/save` in the middle of a step, on the last rank."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        if self.step == step and self.rank == self.world_size - 1:
            (self.folder / "save").touch()
        run_step(self, *args)

    train.Trainer.train_step = train_step


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_save_is_asked_for_by_a_file(front, world):
    options = {"training.steps": 6, "checkpoint.interval": 100, "checkpoint.keep_latest_k": 0}
    run = front.run("run", {**options, "checkpoint.async_mode": "disabled"}, world, partial(ask_for_a_save, 3)).ok()
    assert sorted(path.name for path in run.checkpoint(1).parent.iterdir()) == ["step-3", "step-6"]
    assert len(run.records) == 6 and not (run.folder / "save").exists()


def test_saves_by_the_clock(front):
    """Each step takes longer than the interval, so each is saved."""
    options = {"training.steps": 3, "checkpoint.interval": 100, "checkpoint.interval_minutes": 0.0001}
    run = front.run("run", {**options, "checkpoint.async_mode": "disabled"}).ok()
    assert sorted(path.name for path in run.checkpoint(1).parent.iterdir()) == ["step-1", "step-2", "step-3"]
