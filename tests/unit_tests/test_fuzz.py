"""The short form of benchmarks/fuzz.py. Its figures in docs/reliability.md are of the full form."""

import json
import os
import sys
import time

import pytest

from benchmarks import fuzz, fuzz_cases
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HOSTILE = {"media": len(fuzz_cases.SPECIAL_MEDIA), "toml": len(fuzz_cases.SPECIAL_TOMLS)}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_few_dozen(kind):
    """All hostile files that were written by hand, and some that are mutated at random."""
    result = fuzz.run(kind, HOSTILE.get(kind, 0) + 12, seed=0)
    assert fuzz.is_clean(result), result["findings"]
    assert result["refused"] > 0


def test_what_a_case_does_is_counted(monkeypatch, tmp_path):
    """The runner sees each of the ways in which a case may fail; else it would be clean for ever."""
    ways = [
        lambda case: os.kill(os.getpid(), 9),
        lambda case: 1 / 0,
        lambda case: time.sleep(60),
        lambda case: os.system("true") and "refused" or "refused",
        lambda case: (case.outside.write_text("x"), "refused")[1],
        lambda case: (case.outside.parent / "new").mkdir() or "refused",
        lambda case: os.rename(case.outside, case.folder / "mine") or "refused",
        lambda case: (case.folder / "mine").write_text("x") and "accepted",
    ]
    monkeypatch.setitem(fuzz.KINDS, "checkpoint", (8, lambda case: ways[case.number](case), lambda folder: None))
    monkeypatch.setattr(fuzz, "HANG", 0.5)
    result = fuzz.run("checkpoint", len(ways), seed=0)
    counts = {name: result[name] for name in fuzz.COLUMNS}
    assert counts == {
        "cases": 8,
        "accepted": 1,
        "refused": 4,
        "crashes": 1,
        "tracebacks": 1,
        "hangs": 1,
        "executions": 1,
        "writes outside": 4,  # and the comparison of the files outside
    }
    assert not fuzz.is_clean(result) and len(result["findings"]) == 9


def test_a_case_is_a_function_of_seed_and_number():
    one, two = (fuzz.run("toml", 1, seed=3, first=200) for _ in range(2))
    assert {k: one[k] for k in fuzz.COLUMNS} == {k: two[k] for k in fuzz.COLUMNS}


def test_the_page_has_the_figures():
    record = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert fuzz.table(record["results"]) in page
    assert [r["kind"] for r in record["results"]] == list(fuzz.KINDS)
    assert all(fuzz.is_clean(r) for r in record["results"])
