"""Filling the cache with what a table of clips needs, on all ranks: the first one finds what is missing, in columns;
each makes the jobs of its share, some at a time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch.distributed as dist

from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.utils import broadcast_from_rank0, gather_objects
from titan_video.encoders.spec import Encoders
from titan_video.ingest.cache.cache_keys import explain_stale, remove_partial_shards, write_manifest
from titan_video.ingest.cache.clip_table import ClipTable, Missing, WantedNames, failed_paths
from titan_video.ingest.cache.encode import Job, encode_share, frames_job, missing_part, text_job, text_jobs
from titan_video.ingest.cache.entry_index import KEY_BYTES, make_index, use_index
from titan_video.ingest.columns import SortedKeys
from titan_video.ingest.plan.planned import ALL, Part
from titan_video.tools.logging import logger
from titan_video.tools.signals import Stopped, stop_requested

TEXTS_TOGETHER, CLIPS_TOGETHER = 1 << 16, 1 << 14  # jobs in memory; the text encoder is loaded for each lot
EXPLAINED = 100_000  # missing entries that are compared with older ones


def encode_table(
    clips: ClipTable,
    encoders: Encoders,
    cache: LatentCache,
    group: dist.ProcessGroup | None,
    num_workers: int,
    prompts: Sequence[str] = (),
    part: Part = ALL,
) -> tuple[dict[str, str], dict[str, float]]:
    """Encode what the cache lacks of these clips, prompts and the empty prompt, on all ranks.

    part: of what is missing; the others are encoded by other jobs at the same time, and none lists what it has done.
    Returns, as `prepare.encode_clips`, failures and numbers for the log; both are {} when nothing was missing.
    Stopped: on all ranks, when a stop is requested.
    """

    def find() -> tuple[Missing, list[str], bool]:
        remove_partial_shards(cache)
        num_shards = len(cache.shards)
        cache.refresh()
        found = clips.missing(cache)
        if found.frames.size or found.texts.size:
            _log_stale(clips, cache, found, logger.info)
        texts = [text for text in dict.fromkeys(["", *prompts]) if _is_missing(text, clips, cache, found)]
        return found, texts, len(cache.shards) > num_shards

    start = time.perf_counter()
    missing, texts, has_grown = broadcast_from_rank0(find, group)
    if not (missing.frames.size or missing.texts.size or texts):
        if has_grown and part.count == 1:  # another run has written what was missing when the index was made
            share_index(cache, group)
        return {}, {}
    rank, world = dist.get_rank(), dist.get_world_size()
    missing, texts = _of_part(clips, missing, part), texts if part.index == 0 else []
    frames = _by_cost(clips, missing.frames, cache)[rank::world]
    of_texts = ((int(r), int(n)) for r, n in zip(missing.texts[rank::world], missing.number[rank::world], strict=True))
    captions = (missing_part(cache, _text_job(clips, cache, row, number)) for row, number in of_texts)
    of_prompts = (text_job(cache, cache.text_key(text), text) for text in texts[rank::world])
    of_frames = (missing_part(cache, frames_job(cache, clips.clip(int(row)).entry)) for row in frames)
    made = _Made()
    for is_text, jobs in ((True, chain(of_prompts, captions)), (False, of_frames)):
        made.encode(is_text, jobs, encoders, cache, num_workers)
    gathered = gather_objects((made, stop_requested()), group)
    if any(stopping for _, stopping in gathered):
        raise Stopped("stopped while encoding; the same command goes on from there")
    if part.count == 1:
        share_index(cache, group)
    failed = {keys: reason for one, _ in gathered for keys, reason in one.failed.items()}
    return broadcast_from_rank0(lambda: dict(failed_paths(clips, failed)) if failed else {}, group), {
        "encode_seconds": time.perf_counter() - start,
        "decode_wait_seconds": max(one.decode_wait for one, _ in gathered),
        "encoded_clips": sum(one.num_clips for one, _ in gathered),
        "encoded_frames": (frames := sum(one.num_frames for one, _ in gathered)),
        "encoded_frames_per_second": frames / max(1e-9, *(one.clip_seconds for one, _ in gathered)),
    }


def share_index(cache: LatentCache, group: dist.ProcessGroup | None) -> None:
    """All ranks know what the folder holds: the first one lists it, and writes the manifest and the index."""

    def find():
        cache.refresh()
        counts = write_manifest(cache)
        logger.info(f"{cache.folder} holds " + ", ".join(f"{counts[kind]} of {kind}" for kind in sorted(counts)))
        return make_index(cache)

    use_index(cache, broadcast_from_rank0(find, group))


class _Made:
    """What one rank has encoded. failed: {keys of a job: reason}. The times are in seconds."""

    def __init__(self):
        self.failed: dict[tuple[tuple[str, str], ...], str] = {}
        self.num_clips = self.num_frames = 0
        self.decode_wait = self.clip_seconds = 0.0

    def encode(
        self, is_text: bool, jobs: Iterator[Job], encoders: Encoders, cache: LatentCache, num_workers: int
    ) -> None:
        jobs, together = (job for job in jobs if job.keys), TEXTS_TOGETHER if is_text else CLIPS_TOGETHER
        while not stop_requested() and (some := list(islice(jobs, together))):
            spent: dict[str, float] = {}
            both = (some, []) if is_text else ([], some)
            failed = encode_share(both, encoders, cache, 0, 1, num_workers, logger.info, spent)
            self.failed |= failed
            self.decode_wait += spent["decode_wait"]
            if not is_text:
                done = [job for job in some if job.keys not in failed]
                self.num_clips += len(done)
                self.num_frames += sum(job.entry.bucket[0] for job in done)
                self.clip_seconds += spent.get("clips", 0.0)


def _of_part(clips: ClipTable, missing: Missing, part: Part) -> Missing:
    """By the keys: the same whatever else is missing, as other jobs encode their parts at the same time."""
    places = clips.columns["texts/ends"][missing.texts] // KEY_BYTES + missing.number
    texts = clips.columns["texts"].reshape(-1, KEY_BYTES)[places]
    own = [
        SortedKeys.prefixes_of(keys) % np.uint64(part.count) == part.index
        for keys in (clips.columns["video"][missing.frames], texts)
    ]
    return Missing(missing.frames[own[0]], missing.texts[own[1]], missing.number[own[1]])


def _by_cost(clips: ClipTable, rows: np.ndarray, cache: LatentCache) -> np.ndarray:
    """The rows whose frames are missing, the most expensive first."""
    pixels = np.array([np.prod(size, dtype=np.int64) for size in clips.sizes])
    return rows[np.argsort(-pixels[clips.columns["bucket"][rows]], kind="stable")]


def _text_job(clips: ClipTable, cache: LatentCache, row: int, number: int) -> Job:
    return next(islice(text_jobs(cache, clips.clip(row)), number, None))


def _is_missing(text: str, clips: ClipTable, cache: LatentCache, missing: Missing) -> bool:
    """Whether a text without a clip is to be encoded, and no caption of the clips is the same."""
    key = cache.text_key(text)
    if all(cache.has(kind, key) for kind in cache.text_kinds):
        return False
    keys = clips.columns["texts"].reshape(-1, KEY_BYTES)
    places = clips.columns["texts/ends"][missing.texts] // KEY_BYTES + missing.number
    return not (keys[places] == np.frombuffer(bytes.fromhex(key), np.uint8)).all(1).any()


def _log_stale(clips: ClipTable, cache: LatentCache, missing: Missing, log: Callable[[str], None]) -> None:
    if not cache.shards:
        return
    frames = (frames_job(cache, clips.clip(int(row)).entry) for row in missing.frames)
    of_texts = zip(missing.texts.tolist(), missing.number.tolist(), strict=True)
    texts = (_text_job(clips, cache, row, number) for row, number in of_texts)
    jobs = (missing_part(cache, job) for some in (texts, frames) for job in islice(some, EXPLAINED))
    lacking = ((kind, job.made_from(kind)) for job in jobs for kind, _ in job.keys)
    for reason, count in explain_stale(cache, lacking, WantedNames(clips)).most_common():
        log(f"{cache.folder}: {count} stale entries are refused, and encoded anew: {reason}")
