"""By which rules a run reads its media: the newest, or those it was started with."""

import json
from dataclasses import replace
from pathlib import Path

from titan_video.config.job_config import Data
from titan_video.tools.logging import logger

PLAN = "data_plan.jsonl"


def with_started_rules(data: Data, folder: Path) -> Data:
    """[data] with the media_rules that the run of `folder` was started with, where it leaves them open (0).

    They are in the rows of its data_plan.jsonl; a plan without them was made before there were others than 1. A folder
    without a checkpoint has nothing to go on with, so its run takes the newest rules.
    """
    if data.media_rules or not any(folder.glob("*/step-*")):
        return data
    try:
        with open(folder / PLAN, encoding="utf-8", errors="replace") as f:
            rules = json.loads(f.readline()).get("media_rules", 1)
    except (OSError, ValueError, AttributeError):
        return data
    if rules == 1:
        logger.warning(
            f"{folder} goes on with data.media_rules = 1, with which it was started: HDR, untagged HD, transparency "
            "and 16-bit images are read as before, without data.hdr, bt709_lines and video_as_image; a new run takes 2"
        )
    return replace(data, media_rules=rules if rules in (1, 2) else 0)
