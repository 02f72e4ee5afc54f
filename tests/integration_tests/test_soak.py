"""The soak of benchmarks/soak.py: faults at random moments, and the end is that of a run without faults."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.soak import KINDS, READER
from tests.helpers import ROOT


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "faults, kinds, steps",
    [
        (1, ("signal",), 6),
        pytest.param(60, KINDS, 60, marks=pytest.mark.slow),
        pytest.param(50, (READER,), 30, marks=pytest.mark.slow),
    ],
)
def test_faults_end_bitwise_equal(tmp_path, faults, kinds, steps):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--faults", str(faults), "--steps", str(steps)]
    command += ["--kinds", ",".join(kinds), "--folder", str(tmp_path), "--json", str(tmp_path / "soak.json")]
    p = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert p.returncode == 0, p.stdout + p.stderr
    if not (tmp_path / "soak.json").exists():  # written in a mount namespace of its own
        return
    report = json.loads((tmp_path / "soak.json").read_text())
    assert sum(report["faults"].values()) >= faults and report["problems"] == 0
    assert report["finished_runs_compared"] >= 1
