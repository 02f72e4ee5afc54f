"""Runs that encode clips during training, on the training ranks or on encoder ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import ROOT, children, signal_at, start_program
from titan_video.data.latent_cache import LatentCache

VALIDATED = {
    "validation.enable": "true",
    "validation.freq": 6,
    "validation.num_videos": 1,
    "validation.sample_steps": 1,
    "validation.holdout": 0.2,
    "training.steps": 6,
}
SEPARATE = {"encoder.placement": "separate", "encoder.num_ranks": 1, "encoder.queue_depth": 2}


@pytest.fixture(scope="module")
def cached(shared_front):
    return shared_front.run("cached", VALIDATED).ok()


def losses(run):
    """The steps, without what only this placement says."""
    return [
        {name: value for name, value in row.items() if name != "queue_depth" and not name.startswith("encoded_")}
        for row in run.records
    ]


def entries(folder):
    return {
        kind: sum(name.startswith(f"{kind}/") for name in LatentCache(folder, "", "").where)
        for kind in ("video", "text")
    }


@pytest.mark.parametrize("world, options", [(1, {"encoder.placement": "colocated"}), (2, SEPARATE)])
def test_runs_are_the_same(front, cached, tmp_path, world, options):
    fresh = {**VALIDATED, **options, "data.cache_folder": tmp_path / "fresh"}
    run = front.run("run", fresh, world=world).ok()
    assert losses(run) == cached.records and run.validations == cached.validations
    assert entries(tmp_path / "fresh") == {"video": 2, "text": 3}  # what validation looks at, and the empty caption
    again = front.run("again", {**fresh, "encoder.write_cache": "true", "data.num_workers": 1}, world=world).ok()
    assert losses(again) == cached.records
    rows = [row for row in map(json.loads, (again.folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert (
        rows[0]["encode_seconds"] > 0
        and rows[0]["encoded_frames_per_second"] > 0
        and all(row["decode_wait_seconds"] >= 0 for row in rows)
    )
    assert world == 1 or all(0 <= row["queue_depth"] <= 2 for row in rows)
    assert world == 2 or rows[0]["workers_resident_gib"] > 0  # processes that decode
    drawn = entries(tmp_path / "fresh")
    assert 9 <= drawn["video"] <= 12 and drawn["text"] > 3
    assert sum(row["encoded_frames"] for row in rows) == 9 * (drawn["video"] - 2)


def test_a_signal_and_a_resumption(front, cached, tmp_path):
    """A stopped run resumes with any of the three placements."""
    options = {**VALIDATED, **SEPARATE, "data.cache_folder": tmp_path / "fresh"}
    stopped = front.run("run", options, world=2, hook=partial(signal_at, 3, signal.SIGTERM)).stopped()
    assert "stopped by a signal after step 3" in stopped.output and len(stopped.records) == 3
    for place, world in (({"encoder.placement": "cached"}, 1), ({"encoder.placement": "colocated"}, 1), (SEPARATE, 2)):
        shutil.copytree(stopped.folder, front.root / "moved", dirs_exist_ok=True)
        assert losses(front.run("moved", {**VALIDATED, **place}, world=world).ok()) == cached.records
        if world == 1:
            shutil.rmtree(front.root / "moved")
    assert "already at step 6" in front.run("moved", {**VALIDATED, **SEPARATE}, world=2).ok().output


def die_at(sample):
    """A hook: whoever is to make the `sample`-th clip is killed."""
    from titan_video.ingest.cache.encode import ClipEncoder

    make, count = ClipEncoder.entries, [0]

    def entries(self, *args):
        count[0] += 1
        if count[0] == sample:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, *args)

    ClipEncoder.entries = entries


def end_soon(pids):
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, [
            Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if is_running(pid)
        ]
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(program, timeout=90):
    """Exit codes and output of all ranks. No rank is stopped by the end of another, and no process stays behind."""
    deadline, workers = time.monotonic() + timeout, set()
    while any(p.exitcode is None for p in program.ranks) and time.monotonic() < deadline:
        workers |= set(children(*(p.pid for p in program.ranks)))
        time.sleep(0.05)
    codes = [p.exitcode for p in program.ranks]
    program.kill()
    end_soon(workers)
    return codes, [Path(log).read_text() for log in program.logs], len(workers)


LONG = {**SEPARATE, "training.steps": 400, "data.num_workers": 1, "checkpoint.enable": "false"}


def test_a_lost_rank_ends_the_run(front, tmp_path):
    options = {**LONG, "data.cache_folder": tmp_path / "fresh"}
    codes, logs, num_workers = ends(front.start("encoder", options, world=3, hook=partial(die_at, 9)))
    assert codes[2] == -signal.SIGKILL and codes[0] not in (0, None) and codes[1] not in (0, None), codes
    assert any("lost encoder rank 2 while" in log and "was last encoding sample" in log for log in logs[:2]), logs
    assert num_workers  # that were there to outlive it
    codes, logs, _ = ends(front.start("training", options, world=3, hook=partial(signal_at, 4, signal.SIGKILL, rank=1)))
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None) and codes[2] not in (0, None), codes
    assert "encoder rank 2 lost training rank" in logs[2]


def test_a_stop_without_a_save_ends_encoder_ranks(front, tmp_path):
    """A loss that is not finite, and a last step: the encoder ranks are sent a shutdown, and end in order."""
    options = {**LONG, "data.cache_folder": tmp_path / "fresh", "optimizer.lr": 1e30}
    codes, logs, _ = ends(front.start("nan", options, world=2))
    assert codes == [1, 0] and "not finite" in logs[0] and "Traceback" not in logs[0] + logs[1], (codes, logs)


@pytest.mark.slow
@pytest.mark.parametrize("rank, signum", [(2, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_lost_rank_ends_the_run_of_the_script(front, tmp_path, rank, signum):
    """As users start it. An encoder that hangs ends the run when the timeout of training is over."""
    options = {**LONG, "data.cache_folder": tmp_path / "fresh", "comm.train_timeout_seconds": 20}
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "NGPU": "3",
        "LOG_RANK": "0,1,2",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    metrics = front.root / "run" / "metrics.jsonl"
    with open(tmp_path / "log", "w+") as log:
        p = start_program(
            [ROOT / "run_train.sh", *front.argv("run", options)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
            assert p.poll() is None, Path(log.name).read_text()
            time.sleep(0.05)
        all_of_them = children(p.pid)
        os.kill(
            next(
                pid
                for pid in all_of_them
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ),
            signum,
        )
        code = p.wait(timeout=100)
    end_soon(all_of_them)
    said = Path(log.name).read_text()
    assert code and len(all_of_them) >= 5, code
    if signum == signal.SIGKILL:  # torchrun may stop the others before they can say what they have lost
        assert re.search(rf"Root Cause.*rank +: {rank} .*Signal 9 \(SIGKILL\)", said, re.DOTALL), said
    else:
        assert re.search(
            r"training rank [01] lost encoder rank 2 while waiting for sample .*encoder rank 2 was last encoding",
            said,
            re.DOTALL,
        ), said
