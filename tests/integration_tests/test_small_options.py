"""Options beside a run's numbers: when Python's garbage is collected, what signals do, which weights are validated."""

import gc
import os
import signal
from functools import partial

from tests.integration_tests.test_stopping import VALIDATED

NO_EMA = {**VALIDATED, "training.steps": 2}


def note_collections(path):
    """A hook: each collection of Python's garbage writes its generation to `path`."""
    collect = gc.collect

    def noted(generation=2):
        with path.open("a") as file:
            file.write(f"{generation}\n")
        return collect(generation)

    gc.collect = noted


def test_garbage_is_collected_every_so_many_steps(front, tmp_path):
    path = tmp_path / "collections"
    options = {"training.steps": 5, "training.gc_freq": 2}
    front.run("run", options, hook=partial(note_collections, path)).ok()
    assert path.read_text().split().count("1") == 2


def signal_itself_at(step):
    """A hook: SIGTERM to the process in the middle of a step."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        run_step(self, *args)

    train.Trainer.train_step = train_step


def test_without_save_on_signal_a_signal_ends_the_run_as_usual(front):
    options = {"training.steps": 4, "fault_tolerance.save_on_signal": "false"}
    run = front.run("run", options, hook=partial(signal_itself_at, 2))
    assert run.code == -signal.SIGTERM and len(run.records) == 1 and not list(run.folder.glob("checkpoint/step-*"))
    front.run("saved", {"training.steps": 4}, hook=partial(signal_itself_at, 2)).stopped()


def test_validation_takes_the_ema_weights_unless_told_not_to(front):
    ema = {**NO_EMA, "ema.enable": "true", "ema.decay": 0.5}
    plain = front.run("plain", {**NO_EMA, "ema.enable": "false"}).ok()
    without = front.run("without", {**ema, "validation.use_ema": "false"}).ok()
    averaged = front.run("averaged", ema).ok()
    assert without.validations == plain.validations != averaged.validations
    assert averaged.validations[0] == plain.validations[0]
