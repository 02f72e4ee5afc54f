"""Weights & Biases: the same scalars as TensorBoard, and a run that keeps its id. Nothing is sent: the package is a
stand-in, or offline.
"""

import json
import sys

import pytest

from tests.helpers import ROOT
from tests.unit_tests.config_cases import BASE, WORLD
from tests.unit_tests.test_metrics import events, make, step
from titan_video.config import ConfigError, from_dict
from titan_video.config.check import check
from titan_video.training.wandb_sink import RUN_ID, WandbSink

FAKE = '''
"""Writes its calls to the file calls.jsonl beside it."""

import json
from pathlib import Path


class Error(Exception):
    pass


def note(name, values):
    with (Path(__file__).parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps([name, values]) + "\\n")


class Run:
    def __init__(self, id):
        self.id = id

    def log(self, scalars, step):
        note("log", {"step": step, **scalars})

    def finish(self):
        note("finish", {})


def init(**options):
    if options["project"] == "refused":
        raise Error("no login")
    note("init", options)
    return Run(options["id"] or f"new-{len(options['dir'])}")
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The calls of a stand-in for the package, read from its file."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(folder)
    yield lambda: [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def values(calls, name):
    return [found for kind, found in calls if kind == name]


def test_the_scalars_of_tensorboard_under_the_same_names(fake, tmp_path):
    logger = make(tmp_path / "run", enable_wandb=True)
    for i in range(1, 5):
        step(logger, i)
    logger.log_scalars(4, {"loss": 0.25})
    logger.close()
    sent = {}
    for scalars in values(fake(), "log"):
        number = scalars.pop("step")
        for name, value in scalars.items():
            sent.setdefault(name, []).append((number, pytest.approx(value, rel=1e-6)))
    accumulator = events(tmp_path / "run")
    names = accumulator.Tags()["scalars"]
    given = {name: [(e.step, e.value) for e in accumulator.Scalars(name)] for name in names}
    repeated = {"Loss/training", "Loss/held_out"}
    assert {name: points for name, points in given.items() if name not in repeated} == sent
    assert [number for number, _ in sent["lr"]] == [1, 2, 4] and "validation/loss" in sent
    assert fake()[-1] == ["finish", {}]


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(fake, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("[training]\nsteps = 3\n")
    for resume_step in (0, 4, 0):
        if resume_step:
            (folder / RUN_ID).write_text("the-first")
        make(folder, resume_step=resume_step, enable_wandb=True).close()
        assert (folder / RUN_ID).read_text() == ("the-first" if resume_step else f"new-{len(str(folder))}")
    expected = {"project": "titan_video", "dir": str(folder), "config": {"training": {"steps": 3}}, "resume": "allow"}
    ids = [None, "the-first", None]
    assert values(fake(), "init") == [{**expected, "id": run_id} for run_id in ids]


def test_only_rank_0_and_only_where_asked(fake, tmp_path):
    make(tmp_path / "other", rank=1, enable_wandb=True).close()
    make(tmp_path / "off").close()
    assert "wandb" not in sys.modules and not list(tmp_path.rglob(RUN_ID))


def test_the_project_of_the_environment_and_a_refusal(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    WandbSink(tmp_path, is_resumed=False)
    assert values(fake(), "init")[0]["project"] == "mine"
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    with pytest.raises(ValueError, match=r"^metrics.enable_wandb: no login; run `wandb login`"):
        WandbSink(tmp_path, is_resumed=False)


@pytest.mark.parametrize("has_folder", [False, True])
def test_a_missing_package_is_a_config_error(fake, tmp_path, monkeypatch, has_folder):
    config = from_dict({**BASE, "metrics": {"enable_wandb": True}})
    check(config, WORLD)
    (tmp_path / "site" / "wandb.py").unlink()
    if has_folder:  # the package leaves such a folder where it runs
        (tmp_path / "site" / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path / "site"), str(ROOT)])
    sys.path_importer_cache.clear()
    with pytest.raises(ConfigError, match=r"^metrics.enable_wandb: needs the package wandb; pip install wandb$"):
        check(config, WORLD)


def test_the_real_package_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for resume_step in (0, 2):
        logger = make(tmp_path, resume_step=resume_step, enable_wandb=True, enable_tensorboard=False)
        ids.append(logger.sinks[0].run.id)
        for i in range(resume_step + 1, resume_step + 3):
            step(logger, i)
        logger.close()
    assert ids == 2 * [(tmp_path / RUN_ID).read_text()]
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert len(files) == 2 and all(b"loss_metrics/global_avg_loss" in path.read_bytes() for path in files)
