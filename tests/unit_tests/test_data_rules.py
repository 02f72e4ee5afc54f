"""data.media_rules: how media were read before colour and images were converted, and now."""

import numpy as np
import pytest
from PIL import Image

from tests.unit_tests.data_clips import captioned, write_patches
from titan_video.config.job_config import Data, JobConfig
from titan_video.ingest import bucketing
from titan_video.ingest.plan.build import build_plan

SIGNALS = np.array([(200, 50, 25), (30, 140, 70)]) / 255


@pytest.mark.parametrize("rules", [1, 2])
def test_a_plan_by_each_of_the_rules(tmp_path, rules):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_patches(clips / "hd.mkv", SIGNALS, (0.2126, 0.0722), width=1280, height=720)
    captioned(clips / "plain.mp4", count=10)
    Image.new("RGBA", (64, 48), (9, 9, 9, 9)).save(clips / "image.png")
    (clips / "image.txt").write_text("an image")
    section = Data(path=str(clips), buckets=((1, 32, 32), (5, 32, 32)), num_workers=0, media_rules=rules)
    plan = build_plan(section, tmp_path / "cache", 4)
    assert [bool(e.conversion) for e in plan.entries] == [rules == 2, rules == 2, False]


def test_options_that_the_old_rules_do_not_know_are_refused():
    for name, value in (("hdr", "drop"), ("bt709_lines", 0), ("video_as_image", True)):
        config = JobConfig(data=Data(path="x", media_rules=1, **{name: value}))
        lines = [line for line in bucketing.rules(config, 1) if line.startswith(f"data.{name}: ")]
        assert len(lines) == 1 and "data.media_rules = 1" in lines[0]
        assert not any(f"data.{name}" in line for line in bucketing.rules(JobConfig(data=Data(path="x")), 1))
