"""Runs whose clips are encoded during training: by the ranks that train, or by ranks of their own."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import signal_at
from titan_video.data.latent_cache import LatentCache

VALIDATED = {"validation.enable": "true", "validation.freq": 6, "validation.num_videos": 1, "validation.sample_steps": 1, "validation.holdout": 0.2,
             "training.steps": 6}  # fmt: skip
SEPARATE = {"encoder.placement": "separate", "encoder.num_ranks": 1, "encoder.queue_depth": 2}


@pytest.fixture(scope="module")
def cached(shared_front):
    return shared_front.run("cached", VALIDATED).ok()


def losses(run):
    """The steps, without what only this placement says."""
    return [{name: value for name, value in row.items() if name != "queue_depth"} for row in run.records]


def entries(folder):
    return {kind: sum(name.startswith(f"{kind}/") for name in LatentCache(folder, "", "").where) for kind in ("video", "text")}


@pytest.mark.parametrize("world, options", [(1, {"encoder.placement": "colocated"}), (2, SEPARATE)])
def test_runs_are_the_same(front, cached, tmp_path, world, options):
    fresh = {**VALIDATED, **options, "data.cache_folder": tmp_path / "fresh"}
    run = front.run("run", fresh, world=world).ok()
    assert losses(run) == cached.records and run.validations == cached.validations
    assert entries(tmp_path / "fresh") == {"video": 2, "text": 3}  # what validation looks at, and the empty caption
    again = front.run("again", {**fresh, "encoder.write_cache": "true"}, world=world).ok()
    assert losses(again) == cached.records
    told = [row for row in map(json.loads, (again.folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert told[0]["encode_seconds"] > 0 if world == 1 else all(0 <= row["queue_depth"] <= 2 for row in told)
    drawn = entries(tmp_path / "fresh")
    assert 9 <= drawn["video"] <= 12 and drawn["text"] > 3


def test_a_signal_and_a_resumption(front, cached, tmp_path):
    options = {**VALIDATED, **SEPARATE, "data.cache_folder": tmp_path / "fresh"}
    stopped = front.run("run", options, world=2, hook=partial(signal_at, 3, signal.SIGTERM)).ok()
    assert "stopped by a signal after step 3" in stopped.output and len(stopped.records) == 3
    assert losses(front.run("run", options, world=2).ok()) == cached.records
    moved = front.run("moved", {**VALIDATED, "training.steps": 3}).ok()
    assert losses(front.run("moved", {**VALIDATED, **SEPARATE}, world=2).ok()) == cached.records and moved
    assert "already at step 6" in front.run("moved", {**VALIDATED, **SEPARATE}, world=2).ok().output


def die_at(sample):
    """A hook: whoever is to make the `sample`-th clip is killed."""
    from titan_video.data.encode import Maker

    make, count = Maker.entries, [0]

    def entries(self, *args):
        count[0] += 1
        if count[0] == sample:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, *args)

    Maker.entries = entries


def ends(program, timeout):
    """Exit codes of all ranks, none of which is stopped by another's end."""
    deadline = time.monotonic() + timeout
    while any(p.exitcode is None for p in program.ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    codes = [p.exitcode for p in program.ranks]
    program.kill()
    return codes


def test_a_lost_rank_ends_the_run(front, tmp_path):
    options = {**SEPARATE, "encoder.num_ranks": 1, "data.cache_folder": tmp_path / "fresh", "training.steps": 40, "data.num_workers": 1}
    program = front.start("encoder", options, world=3, hook=partial(die_at, 9))
    codes = ends(program, 90)
    assert codes[2] == -signal.SIGKILL and codes[0] not in (0, None) and codes[1] not in (0, None), codes
    logs = [Path(log).read_text() for log in program.logs]
    assert any("lost encoder rank 2 while waiting for sample" in log and "was last encoding sample" in log for log in logs[:2]), logs
    program = front.start("training", options, world=3, hook=partial(signal_at, 4, signal.SIGKILL, rank=1))
    codes = ends(program, 90)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None) and codes[2] not in (0, None), codes
    assert "encoder rank 2 lost training rank" in Path(program.logs[2]).read_text()
