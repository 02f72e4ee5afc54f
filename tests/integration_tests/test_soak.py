"""The soak of benchmarks/soak.py, in a short form: faults of the quick kinds on two ranks."""

import json
import os
import subprocess
import sys

from tests.helpers import ROOT


def test_a_few_faults_end_bitwise_equal(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--faults", "4", "--steps", "12", "--seed", "3"]
    command += ["--kinds", "signal,kill,start", "--folder", str(tmp_path), "--json", str(tmp_path / "soak.json")]
    p = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert p.returncode == 0, p.stdout + p.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert sum(report["faults"].values()) == 4 and report["problems"] == 0 and report["finished_runs_compared"] >= 1
