"""The TOML, the cache and the checkpoint of an older commit still load (old_run/make.py wrote them)."""

import json
import zipfile

import pytest

from tests.helpers import ROOT


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(ROOT / "tests" / "old_run" / "run.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_an_old_run_is_resumed(old, front):
    names = ("idle", "clip_choice", "buckets_per_step")
    written = (old / "run" / "config.toml").read_text()
    assert all(f"\n{name} = " in written for name in names)
    shards = sorted((old / "cache" / "shards").iterdir())
    options = {
        "job.config_file": old / "run" / "config.toml",
        "job.dump_folder": old / "run",
        "data.cache_folder": old / "cache",
        "model.hf_assets_path": old / "tiny",
        "data.path": "embedded:shapes-6",
        "training.steps": 6,
        "lr_scheduler.warmup_steps": 2,
    }
    run = front.run("run", options).ok()
    assert "loaded" in run.output and "step-3" in run.output
    assert all(f".{name}" in run.output for name in names)  # a notice for each former name
    rows = [json.loads(line) for line in (old / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(json.loads((old / "expected.json").read_text()), rel=1e-5)
    assert sorted((old / "cache" / "shards").iterdir()) == shards  # all latents are those of the old cache
    assert "encoded" not in run.output
