"""Planning the clips of a run and filling the latent cache with all ranks: for train.py and `python -m titan_video.data encode`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from titan_video.data.dataset import Plan
from titan_video.data.encode import encode_share, failed_clips, missing_jobs
from titan_video.data.latent_cache import CachedClip, LatentCache, cached_clips
from titan_video.distributed.utils import broadcast_from_zero, gather_objects
from titan_video.encoders.spec import Encoders
from titan_video.tools.logging import logger


def shared_plan(make: Callable[[], Plan], report: Path, group: dist.ProcessGroup | None) -> Plan:
    """The plan that rank 0 makes, on all ranks, logged and written to `report`. ValueError on all ranks when no clip is left."""
    def on_zero() -> Plan:
        plan = make()
        _report(plan, report)
        plan.require_clips()
        return plan

    return broadcast_from_zero(on_zero, group)


def _report(plan: Plan, report: Path) -> None:
    plan.write_jsonl(report)
    logger.info(plan.summary())


def encode_clips(
    clips: Sequence[CachedClip], encoders: Encoders, cache: LatentCache, group: dist.ProcessGroup | None, num_workers: int,
    prompts: Sequence[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Encode what the cache lacks of these clips, prompts and the empty prompt, each rank its share; return all ranks' failures, {path: reason}."""
    def find():
        cache.remove_leftovers()
        return missing_jobs(clips, cache, prompts, logger.info)

    jobs = broadcast_from_zero(find, group)
    mine = encode_share(jobs, encoders, cache, dist.get_rank(), dist.get_world_size(), num_workers, logger.info)
    failed = {keys: reason for part in gather_objects(mine, group) for keys, reason in part.items()}
    cache.refresh()
    if any(jobs):
        counts = broadcast_from_zero(cache.write_manifest, group)
        logger.info(f"{cache.folder} holds " + ", ".join(f"{counts[kind]} of {kind}" for kind in sorted(counts)))
    return failed_clips(clips, cache, failed)


def encode_plan(plan: Plan, report: Path, encoders: Encoders, cache: LatentCache, group: dist.ProcessGroup | None, num_workers: int,
                prompts: Sequence[str] = ()) -> list[CachedClip]:  # fmt: skip
    """The clips of a plan, in the cache. Those that turn out to be unusable are dropped, and the report is written anew; ValueError if all are."""
    clips = cached_clips(plan, cache)
    failures = encode_clips(clips, encoders, cache, group, num_workers, prompts)
    if not failures:
        return clips
    plan = plan.drop(failures)
    broadcast_from_zero(lambda: _report(plan, report), group)
    plan.require_clips()
    return cached_clips(plan, cache)
