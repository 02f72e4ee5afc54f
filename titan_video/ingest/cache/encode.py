"""From clips and captions to cache entries: find what is missing, partition it over ranks by cost, decode in worker
processes, encode one clip at a time.

    missing_jobs -> partition_jobs -> Decoder (worker processes) -> encode_job -> LatentCache.write

An entry depends on its own clip or caption alone. It is the same bytes whichever rank makes it, before training or
during it (titan_video/online).
"""

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from titan_video.data.latent_cache import GIVEN, CachedClip, LatentCache
from titan_video.encoders.spec import Encoders
from titan_video.ingest.cache.cache_keys import explain_stale, video_keys
from titan_video.ingest.cache.cached_clips import cached_clips
from titan_video.ingest.cache.conditioning_frames import encode_cond_frames, encode_images
from titan_video.ingest.decode.video import UnusableClip, read_image
from titan_video.ingest.decode.worker import map_in_workers, release
from titan_video.ingest.files.media import DEFAULT_LIMITS, DecodeLimits
from titan_video.ingest.plan.entries import Plan, PlanEntry, read_frames
from titan_video.models.conditioning import ConditioningSpec
from titan_video.tools import heartbeat
from titan_video.tools.bounded import short
from titan_video.tools.signals import stop_requested

LOG_EVERY = 15.0  # seconds
BLACK = (336, 336)  # the image of a text without one
TEXT_COST = 1 << 20  # of encoding a caption, in pixels of a clip that take as long

# A clip's frames and its conditioning frames, uint8 [3, F or N, H, W]; None where they are not needed.
Decoded = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Job:
    """Entries to make of one clip or caption. keys: (kind, key) of each. entry: None for a text without a clip.

    is_imageless: where a text sees an image, this one sees a black one.
    """

    keys: tuple[tuple[str, str], ...]
    caption: str
    entry: PlanEntry | None = None
    is_imageless: bool = False

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.keys}

    @property
    def cost(self) -> int:
        """The work of encoding, in pixels of a clip that take as long."""
        frames, height, width = self.entry.bucket if self.entry else (0, 0, 0)
        return frames * height * width * bool(self.kinds - {"text", "pooled"}) + TEXT_COST * ("text" in self.kinds)

    def made_from(self, kind: str) -> dict[str, str]:
        """The origin of an entry, for the header of its shard. The names are those of caches on disk."""
        if kind in ("text", "pooled"):
            return {"of": self.caption}
        e = self.entry
        frames = {
            "bucket": "x".join(map(str, e.bucket)),
            "data.fps": f"{e.fps:g}",
            "frames": f"{e.pts[0]} to {e.pts[-1]}",
        }
        return {
            "of": e.sha256,
            **frames,
            "data.decoder": e.decoder,
            "source": e.path,
            "given": e.image,
            "captions": " | ".join(e.captions),
        }


def frames_job(cache: LatentCache, entry: PlanEntry) -> Job:
    """All entries that are made from a clip's frames."""
    return Job(tuple(video_keys(cache, entry).items()), entry.caption, entry)


def text_job(cache: LatentCache, key: str, caption: str, entry: PlanEntry | None = None) -> Job:
    """All entries of one caption."""
    return Job(tuple((kind, key) for kind in cache.text_kinds), caption, entry)


def draw_job(cache: LatentCache, clip: CachedClip, text_key: str) -> Job:
    """All entries of a clip with one of its texts. The empty caption is always in the cache."""
    frames = frames_job(cache, clip.entry)
    text = next((job for job in text_jobs(cache, clip) if ("text", text_key) in job.keys), None)
    return replace(text, keys=frames.keys + text.keys, entry=clip.entry) if text else frames


def text_jobs(cache: LatentCache, clip: CachedClip) -> Iterator[Job]:
    """The texts of a clip: its captions, and those of which a part is dropped."""
    for key, caption in zip(clip.text_keys, clip.captions, strict=True):
        yield text_job(cache, key, caption, clip.entry)
    if clip.imageless_keys:
        yield text_job(cache, clip.imageless_keys[0], "", clip.entry)
        for key, caption in zip(clip.imageless_keys[1:], clip.captions, strict=True):
            yield replace(text_job(cache, key, caption), is_imageless=True)


def missing_part(cache: LatentCache, job: Job) -> Job:
    """The part of a job that the cache lacks."""
    return replace(job, keys=tuple((kind, key) for kind, key in job.keys if not cache.has(kind, key)))


def missing_jobs(
    clips: Iterable[CachedClip], cache: LatentCache, prompts: Sequence[str] = (), log: Callable[[str], None] = print
) -> tuple[list[Job], list[Job]]:
    """The jobs that the cache lacks: (those of captions, prompts and the empty prompt; those of frames), the most
    expensive first. Stale entries are logged with the reason.
    """
    cache.refresh()
    texts = {cache.text_key(text): text_job(cache, cache.text_key(text), text) for text in ["", *prompts]}
    frames = {}  # copies of a file share their keys
    for clip in clips:
        texts.update({job.keys[0][1]: job for job in text_jobs(cache, clip)})
        frames[clip.video_key, clip.cond_key, clip.image_key] = frames_job(cache, clip.entry)
    jobs = [[rest for job in some.values() if (rest := missing_part(cache, job)).keys] for some in (texts, frames)]
    if cache.shards and any(jobs):
        wanted = {f"{kind}/{key}" for job in [*texts.values(), *frames.values()] for kind, key in job.keys}
        lacking = ((kind, job.made_from(kind)) for job in jobs[0] + jobs[1] for kind, _ in job.keys)
        for reason, count in explain_stale(cache, lacking, wanted).most_common():
            log(f"{cache.folder}: {count} stale entries are refused, and encoded anew: {reason}")
    return tuple(sorted(some, key=lambda job: (-job.cost, job.keys)) for some in jobs)


def partition_jobs(jobs: Sequence[Job], rank: int, world_size: int) -> list[Job]:
    """The jobs of one rank. Each job is assigned to the rank with the least work so far."""
    loads, mine = [(0, r) for r in range(world_size)], []
    for job in jobs:
        load, r = heapq.heappop(loads)
        heapq.heappush(loads, (load + job.cost, r))
        mine += [job] if r == rank else []
    return mine


# ---- one job ----


def read_cond_frames(e: PlanEntry, num_cond_frames: int, frames_CFHW: Tensor | None = None) -> Tensor:
    """A clip's conditioning frames, uint8 [3, N, H, W]: its first frame or its image, and with N = 2 its last frame.

    frames_CFHW: the clip, if it is decoded already.
    """
    if frames_CFHW is None:
        frames_CFHW = read_frames(e, first_only=num_cond_frames == 1)
    first = read_image(e.image, e.bucket, e.limits, e.image_conversion) if e.image else frames_CFHW[:, :1]
    return torch.cat([first, frames_CFHW[:, -1:]], dim=1) if num_cond_frames == 2 else first


class Decoder:
    """A data set for `map_in_workers`, indexed by lists of jobs: what each job needs of its clip, or the reason why it
    cannot be decoded.
    """

    def __init__(self, conditioning: ConditioningSpec):
        self.conditioning = conditioning

    def __getitem__(self, jobs: Sequence[Job]) -> list[Decoded | str]:
        return [self._decode(job) for job in jobs]

    def limits(self, jobs: Sequence[Job]) -> DecodeLimits:
        limits = next((job.entry.limits for job in jobs if job.entry), DEFAULT_LIMITS)
        return replace(limits, seconds=limits.seconds * max(1, len(jobs)))

    def name(self, jobs: Sequence[Job]) -> str:
        return short(", ".join(job.entry.path if job.entry else job.caption for job in jobs), 300)

    def failed(self, jobs: Sequence[Job], reason: str) -> list[Decoded | str]:
        return [reason] * len(jobs)

    def _decode(self, job: Job) -> Decoded | str:
        c, e, kinds = self.conditioning, job.entry, job.kinds
        try:
            frames_CFHW = read_frames(e) if "video" in kinds else None
            in_frames = kinds & {GIVEN, "image"}
            if in_frames or ("text" in kinds and c.text_image_tokens and e is not None):
                return frames_CFHW, read_cond_frames(e, c.num_cond_frames if in_frames else 1, frames_CFHW)
            return frames_CFHW, None
        except UnusableClip as error:
            return str(error)


@torch.no_grad()
def encode_job(
    encoders: Encoders, conditioning: ConditioningSpec, job: Job, decoded: Decoded | str
) -> dict[tuple[str, str], Tensor]:
    """{(kind, key): tensor}, on the host. Raises UnusableClip with what the decoder said, and for latents that are not
    finite.

    The decoded tensors' memory goes back to the worker: do not use them afterwards.
    """
    if isinstance(decoded, str):
        raise UnusableClip(decoded)
    frames_CFHW, cond_frames_CNHW = decoded
    options = {}
    if tokens := conditioning.text_image_tokens:
        is_black = job.is_imageless or cond_frames_CNHW is None
        image = torch.zeros(3, *BLACK, dtype=torch.uint8) if is_black else cond_frames_CNHW[:, 0]
        options = {"images": [image], "image_tokens": tokens}
    make = {
        "video": lambda: encoders.encode_video(frames_CFHW[None])[0].float(),
        "given": lambda: encode_cond_frames(encoders, conditioning, cond_frames_CNHW, job.entry.bucket[0]),
        "image": lambda: encode_images(encoders, cond_frames_CNHW),
        "text": lambda: encoders.encode_text([job.caption], **options)[0],
        "pooled": lambda: encoders.encode_pooled([job.caption])[0],
    }
    tensors = {(kind, key): make[kind]().cpu().clone(memory_format=torch.contiguous_format) for kind, key in job.keys}
    release(*decoded)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UnusableClip("not finite: the encoder gave NaN or infinity for this clip")
    return tensors


def store(cache: LatentCache, job: Job, tensors: dict[tuple[str, str], Tensor]) -> None:
    for (kind, key), tensor in tensors.items():
        cache.write(kind, key, tensor, job.made_from(kind))


@dataclass
class EncodeStats:
    """Seconds of encoding, seconds of waiting for decoded frames, and how many frames were encoded."""

    encode_seconds: float = 0.0
    decode_wait_seconds: float = 0.0
    encoded_frames: int = 0

    def numbers(self) -> dict[str, float]:
        """For the log."""
        seconds = self.encode_seconds + self.decode_wait_seconds
        return {**asdict(self), "encoded_frames_per_second": self.encoded_frames / max(seconds, 1e-9)}


class ClipEncoder:
    """Entries during training: read where the cache has them, else made, and with `write` put into the cache."""

    def __init__(self, encoders: Encoders, cache: LatentCache, write: bool, num_workers: int, prefetch_factor: int):
        self.encoders = encoders
        self.cache = cache
        self.write = write
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.spent = EncodeStats()

    def decoded(self, jobs: Iterable[list[Job]]) -> Iterator[list[Decoded | str]]:
        """What each list of jobs needs, decoded ahead of time by the workers."""
        decoder = map_in_workers(Decoder(self.cache.conditioning), jobs, self.num_workers, self.prefetch_factor)
        while True:
            start = time.perf_counter()
            decoded = next(decoder, None)
            self.spent.decode_wait_seconds += time.perf_counter() - start
            if decoded is None:
                return
            yield decoded

    def entries(self, job: Job, part: Job, decoded: Decoded | str) -> dict[tuple[str, str], Tensor]:
        """All entries of a job. part: the entries that the cache lacked, for which `decoded` is.

        ValueError: the clip cannot be encoded; the message names it and the fix.
        """
        start = time.perf_counter()
        heartbeat.progress()
        try:
            made = encode_job(self.encoders, self.cache.conditioning, part, decoded)
        except UnusableClip as e:
            raise ValueError(
                f"{job.entry.path}: {e}. The plan could not see it: remove this clip, or set encoder.placement "
                f"to cached, "
                "which leaves such clips out before training"
            ) from e
        if self.write:
            store(self.cache, part, made)
        self.spent.encode_seconds += time.perf_counter() - start
        self.spent.encoded_frames += job.entry.bucket[0] if "video" in part.kinds else 0
        return {name: made[name] if name in made else self.cache.read(*name) for name in job.keys}


# ---- many jobs, before training ----


def encode_share(
    jobs: tuple[Sequence[Job], Sequence[Job]],
    encoders: Encoders,
    cache: LatentCache,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    log: Callable[[str], None] = print,
    spent: dict[str, float] | None = None,
) -> dict[tuple, str]:
    """Encode this rank's part of what `missing_jobs` found; return its failures, {keys of a job: reason}.

    All ranks pass the same jobs. After a kill the next start finds what is missing anew. A stop request ends it early.
    spent: receives the seconds for captions, for clips, and of decode_wait, when the encoder waited for decoding.
    """
    spent = {} if spent is None else spent
    spent["decode_wait"] = 0.0
    failed: dict[tuple, str] = {}
    cache.is_shared = False  # no other rank makes these entries
    for what, some in zip(("captions", "clips"), jobs, strict=True):
        mine = partition_jobs(some, rank, world_size)
        needs_frames = what == "clips" or cache.conditioning.text_image_tokens
        workers = min(num_workers, len(mine)) if needs_frames else 0
        decoder = map_in_workers(Decoder(cache.conditioning), [[job] for job in mine], workers)
        progress = _Progress(mine, what, log)
        start = asked = time.perf_counter()
        with heartbeat.own_work(f"encoding {what}"):
            for job, (decoded,) in zip(mine, decoder, strict=True):
                spent["decode_wait"] += time.perf_counter() - asked
                heartbeat.progress(job.entry.path if job.entry else job.caption or "the empty caption")
                try:
                    store(cache, job, encode_job(encoders, cache.conditioning, job, decoded))
                except UnusableClip as error:
                    failed[job.keys] = str(error)
                progress.done(job)
                if stop_requested():
                    break
                asked = time.perf_counter()
        cache.flush()
        spent[what] = time.perf_counter() - start
        if mine:
            encoders.free()  # the text encoder is the larger half
        if stop_requested():
            break
    cache.is_shared = True
    return failed


def failed_clips(clips: Iterable[CachedClip], cache: LatentCache, failed: dict[tuple, str]) -> dict[str, str]:
    """{path: reason} of the clips whose job failed."""
    by_entry = {name: reason for keys, reason in failed.items() for name in keys}

    def names(clip: CachedClip) -> list[tuple[str, str]]:
        texts = (*clip.text_keys, *clip.imageless_keys)
        return [*video_keys(cache, clip.entry).items(), *(("text", key) for key in texts)]

    return {clip.path: by_entry[name] for clip in clips for name in names(clip) if name in by_entry}


def encode_missing(
    plan: Plan,
    encoders: Encoders,
    cache: LatentCache,
    num_workers: int = 0,
    log: Callable[[str], None] = print,
    prompts: Sequence[str] = (),
) -> dict[str, str]:
    """Encode what the cache lacks, in this process; return the failures {path: reason}."""
    clips = cached_clips(plan, cache)
    return failed_clips(
        clips,
        cache,
        encode_share(missing_jobs(clips, cache, prompts, log), encoders, cache, num_workers=num_workers, log=log),
    )


class _Progress:
    def __init__(self, jobs: Sequence[Job], what: str, log: Callable[[str], None]):
        self.num_jobs, self.what, self.log, self.left = len(jobs), what, log, sum(job.cost for job in jobs)
        self.frames = sum(job.entry.bucket[0] for job in jobs if job.entry)
        self.num_done = self.cost = 0
        self.started = self.last = time.monotonic()

    def done(self, job: Job) -> None:
        self.num_done, self.cost, self.left = self.num_done + 1, self.cost + job.cost, self.left - job.cost
        now = time.monotonic()
        seconds = now - self.started
        if self.num_done == self.num_jobs:
            rate = f", {self.frames / max(seconds, 1e-9):,.0f} frames a second" if self.what == "clips" else ""
            self.log(f"encoded {self.num_jobs} {self.what} in {seconds:.1f} s{rate}")
        elif now - self.last > LOG_EVERY:
            self.last = now
            percent = 100 * self.cost / (self.cost + self.left)
            self.log(
                f"encoded {self.num_done} of {self.num_jobs} {self.what}, {percent:.0f} % of the work, "
                f"{self.num_done / seconds:.2f} a second, "
                f"{seconds * self.left / self.cost:.0f} s to go"
            )
