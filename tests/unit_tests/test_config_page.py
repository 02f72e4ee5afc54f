"""docs/config.md is what `python -m titan_video.config` prints."""

import runpy
import sys

from tests.helpers import ROOT
from titan_video.config.values import options


def test_reference_page_is_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["config"])
    runpy.run_module("titan_video.config", run_name="__main__")
    page = capsys.readouterr().out
    assert (ROOT / "docs" / "config.md").read_text() == page, "run: python -m titan_video.config > docs/config.md"
    assert all(f"| {full.split('.')[1]} |" in page for full in options())
    assert "### [[data.source]]" in page
