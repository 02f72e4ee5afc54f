"""Whole runs of the trainer, small enough for a test."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import ROOT, Program, context, free_port

SMALL = {
    "job.config_file": ROOT / "train_configs" / "debug.toml",
    "data.path": "embedded:shapes-12",
    "training.local_batch_size": 2,
    "training.steps": 12,
    "lr_scheduler.warmup_steps": 1,
    "lr_scheduler.decay_ratio": 0,
    "validation.enable": "false",
    "metrics.enable_tensorboard": "false",
}


@dataclass
class Run:
    """The result of a run: its exit code, the output of rank 0, its folder."""

    code: int
    output: str
    folder: Path

    def ok(self):
        assert self.code == 0, self.output
        return self

    def stopped(self):
        """A signal has ended it, and the same command continues it. Under torchrun the code is 0."""
        status = json.loads((self.folder / "status.json").read_text())
        assert (status["status"], status["exit_code"]) == ("stopped", 85), (status, self.output)
        assert self.code == (0 if status["run_id"] else 85), self.output
        return self

    def fails_with(self, *words):
        """The run ended with an error for its user: a message that holds `words`, and no traceback."""
        assert self.code not in (0, None) and self.code > 0, (self.code, self.output)
        assert "Traceback" not in self.output, self.output
        for word in words:
            assert word in self.output, self.output
        return self

    def _rows(self, kind):
        path = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [
            {k: v for k, v in row.items() if not any(word in k for word in ("seconds", "time", "resident"))}
            for row in rows
            if kind in row
        ]

    @property
    def records(self):
        """The training steps in metrics.jsonl, each exactly once, without what depends on the clock."""
        rows = self._rows("loss")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return rows

    @property
    def validations(self):
        """What validation measured, by step."""
        rows = self._rows("validation")
        assert len({row["step"] for row in rows}) == len(rows)
        return {row["step"]: row["validation"] for row in rows}

    def checkpoint(self, step):
        return self.folder / "checkpoint" / f"step-{step}"


def _module(words, folder, log, env, own_code):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # as in helpers.py
    os.chdir(folder)
    if own_code:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("titan_video", "train")]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run_module(words, folder, log, world=1, own_code=False, timeout=200):
    """([exit code of a rank], output of rank 0) of `python -m WORDS` in `folder`, from the fork server.

    own_code: of this repository it imports what is in `folder`.
    """
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
    ranks = [
        context().Process(target=_module, args=(words, folder, f"{log}{rank}", env, own_code))
        for rank, env in enumerate(envs)
    ]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(timeout)
    for p in ranks:
        p.kill()
        p.join()
    return [p.exitcode for p in ranks], Path(f"{log}0").read_text()


class Front:
    """Starts runs in folders by name; all share one cache of clips."""

    def __init__(self, root, cache):
        self.root, self.cache = root, cache

    def argv(self, name, options):
        merged = {"job.dump_folder": self.root / name, "data.cache_folder": self.cache, **SMALL, **options}
        return [word for key, value in merged.items() for word in (f"--{key}", str(value))]

    def start(self, name, options=None, world=1, hook=None):
        logs = self.root / f"{name}.logs"
        logs.mkdir(exist_ok=True)
        return Program(self.argv(name, options or {}), logs, world, hook)

    def finish(self, name, program):
        code = program.wait()
        return Run(code, Path(program.logs[0]).read_text(), self.root / name)

    def run(self, name, options=None, world=1, hook=None):
        """Start and finish a run on `world` ranks. options: values by `section.field`, beside those of SMALL."""
        return self.finish(name, self.start(name, options, world, hook))

    def command(self, name, options=None, program=(str(ROOT / "run_train.sh"),), **env):
        """The same through a shell, in a process of its own."""
        inherited = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHON", "NGPU", "CONFIG_FILE", "LOG_RANK", "RANK", "WORLD_SIZE")
        }
        env = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **env,
        }
        p = subprocess.run(
            [*program, *self.argv(name, options or {})],
            cwd=self.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        return Run(p.returncode, p.stdout, self.root / name)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def front(tmp_path, cache):
    return Front(tmp_path, cache)


@pytest.fixture(scope="module")
def shared_front(tmp_path_factory, cache):
    """For runs that several tests of a file look at."""
    return Front(tmp_path_factory.mktemp("runs"), cache)
