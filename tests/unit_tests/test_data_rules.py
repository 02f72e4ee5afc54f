"""data.media_rules: a resumed run reads its media as it was started to."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.unit_tests.data_clips import captioned, write_patches
from titan_video.config.job_config import Data, JobConfig
from titan_video.ingest import bucketing
from titan_video.ingest.plan import build_plan
from titan_video.ingest.resumed import with_started_rules

SIGNALS = np.array([(200, 50, 25), (30, 140, 70)]) / 255


def old_plan(folder):
    """A data_plan.jsonl as written before there were rules."""
    (folder / "data_plan.jsonl").write_text(json.dumps({"kept": True, "path": "a.mp4"}) + "\n")


def test_a_run_that_was_started_before_there_were_rules_keeps_the_old_ones(tmp_path, caplog):
    data = Data(path="x")
    old_plan(tmp_path)
    assert with_started_rules(data, tmp_path).media_rules == 0  # no checkpoint: there is nothing to resume
    (tmp_path / "checkpoint" / "step-2").mkdir(parents=True)
    with caplog.at_level("WARNING"):
        assert with_started_rules(data, tmp_path).media_rules == 1
    assert "goes on with data.media_rules = 1" in caplog.text
    assert with_started_rules(Data(path="x", media_rules=2), tmp_path).media_rules == 2
    (tmp_path / "data_plan.jsonl").unlink()
    assert with_started_rules(data, tmp_path).media_rules == 0


@pytest.mark.parametrize("rules", [1, 2])
def test_the_rules_are_in_the_plan_and_stay(tmp_path, rules):
    clips, run = tmp_path / "clips", tmp_path / "run"
    clips.mkdir()
    (run / "checkpoint" / "step-2").mkdir(parents=True)
    write_patches(clips / "hd.mkv", SIGNALS, (0.2126, 0.0722), width=1280, height=720)
    captioned(clips / "plain.mp4", count=10)
    Image.new("RGBA", (64, 48), (9, 9, 9, 9)).save(clips / "image.png")
    (clips / "image.txt").write_text("an image")
    section = Data(path=str(clips), buckets=((1, 32, 32), (5, 32, 32)), num_workers=0, media_rules=rules)
    plan = build_plan(section, tmp_path / "cache", 4)
    plan.write_jsonl(run / "data_plan.jsonl")
    again = with_started_rules(Data(path=str(clips), buckets=section.buckets, num_workers=0), run)
    assert build_plan(again, tmp_path / "cache", 4) == plan
    assert [bool(e.conversion) for e in plan.entries] == [rules == 2, rules == 2, False]


def test_options_that_the_old_rules_do_not_know_are_refused():
    for name, value in (("hdr", "drop"), ("bt709_lines", 0), ("video_as_image", True)):
        config = JobConfig(data=Data(path="x", media_rules=1, **{name: value}))
        lines = [line for line in bucketing.rules(config, 1) if line.startswith(f"data.{name}: ")]
        assert len(lines) == 1 and "data.media_rules = 1" in lines[0]
        assert not any(f"data.{name}" in line for line in bucketing.rules(JobConfig(data=Data(path="x")), 1))
