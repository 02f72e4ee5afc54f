"""Pipeline parallel: which blocks a rank has (stages.py), and how micro-batches pass them (schedule.py)."""

from titan_video.distributed.pipeline_parallel.schedule import Pipeline
from titan_video.distributed.pipeline_parallel.stages import (
    Stages,
    check_microbatches,
    keep_stages,
    layout_errors,
    rules,
    split_blocks,
)

__all__ = ["Pipeline", "Stages", "check_microbatches", "keep_stages", "layout_errors", "rules", "split_blocks"]
