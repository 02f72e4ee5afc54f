"""The data plan: what becomes of every clip, decided and printed before anything is encoded.

scan (sources.py) -> probe (video.py, in worker processes) -> frame_indices -> bucketing.choose -> bucketing.starts
-> one PlanEntry for each training clip
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_video.config.job_config import Data, Source
from titan_video.data.batching import Bucket
from titan_video.ingest import bucketing, media
from titan_video.ingest.bucketing import DEFAULT_GEOMETRY, HEAD, ClipChoice, whole_latents
from titan_video.ingest.colour import NEWEST_RULES, DecoderName, MediaPolicy, summarise
from titan_video.ingest.media import DEFAULT_LIMITS, DecodeLimits
from titan_video.ingest.probes import probe_all
from titan_video.ingest.shapes import resolve_path
from titan_video.ingest.sources import ClipRecord, remarks, scan
from titan_video.ingest.video import (
    DEFAULT_POLICY,
    Probe,
    Reading,
    by_policy,
    decode,
    frame_indices,
    require,
    too_many_frames,
)
from titan_video.tools.files import atomic_path

NAMES_SHOWN = 20


@dataclass(frozen=True)
class PlanEntry:
    """One training clip. Dropped with a `reason` (`category: detail`), or kept with its bucket and the source times of
    its frames.

    num_frames: of the whole source after resampling to `fps`. The clip takes the bucket's frames from number `start`
        on, and is one of `num_clips` clips of the source.
    pts: presentation times of its frames in ticks; with by_index numbers of frames.
    repeats: how often an epoch holds it. captions: all of them.
    declared_fps: the rate by metadata of a file that was not opened; the decoder compares it.
    image: replaces the clip's first frame as conditioning frame. decoder: what decodes it, if it is a video.
    limits: what its decoding may take. conversion, image_conversion: of its colour and the image's, "" for plain SDR.
    media_rules: those by which this was decided.
    """

    path: str
    captions: tuple[str, ...] = ()
    reason: str = ""
    fps: float = 0.0
    repeats: int = 1
    start: int = 0
    num_clips: int = 1
    by_index: bool = False
    declared_fps: float = 0.0
    width: int = 0
    height: int = 0
    source_fps: float = 0.0
    source_frames: int = 0
    num_frames: int = 0
    bucket: Bucket | None = None
    sha256: str = ""
    pts: tuple[int, ...] = ()
    image: str = ""
    image_sha256: str = ""
    decoder: DecoderName = "pyav"
    limits: DecodeLimits = DEFAULT_LIMITS
    conversion: str = ""
    image_conversion: str = ""
    media_rules: int = NEWEST_RULES

    @property
    def caption(self) -> str:
        return self.captions[0] if self.captions else ""

    @property
    def kept(self) -> bool:
        return not self.reason

    @property
    def status(self) -> str:
        """What became of the source: kept whole, trimmed to one clip, split into several, or dropped."""
        if self.reason:
            return "dropped"
        return "split" if self.num_clips > 1 else "trimmed" if self.num_frames > self.bucket[0] else "kept"

    @property
    def content(self) -> str:
        """Identity of the pixels that `read_frames` returns: the file's content, the frames taken, their size and,
        where they are not the usual ones, the decoder and the conversion of colour.
        """
        source_key = [self.sha256, self.by_index, list(self.pts), list(self.bucket or ())]
        source_key += [self.decoder] * (self.decoder != "pyav") + [{"colour": self.conversion}] * bool(self.conversion)
        return hashlib.sha256(json.dumps(source_key).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Every clip of `source`, kept and dropped, in scan order. temporal_stride: frames per latent, for advice.

    remarks: lines about what is in no entry, such as files that metadata does not list.
    """

    source: str
    fps: float
    buckets: tuple[Bucket, ...]
    entries: tuple[PlanEntry, ...]
    temporal_stride: int = DEFAULT_GEOMETRY.temporal_stride
    remarks: tuple[str, ...] = ()

    @property
    def kept(self) -> list[PlanEntry]:
        return [e for e in self.entries if e.kept]

    def counts(self) -> dict[str, int]:
        """Clips that are kept, and those dropped by reason, for the log."""
        dropped = Counter(e.reason.partition(":")[0] for e in self.entries if not e.kept)
        return {
            "clips": len(self.kept),
            "dropped": dropped.total(),
            **{f"dropped/{reason}": count for reason, count in dropped.items()},
        }

    def drop(self, failures: Mapping[str, str]) -> "Plan":
        """The plan without the clips that turned out to be unusable: {path: reason}."""
        failed = (
            replace(e, reason=failures[e.path], bucket=None) if e.kept and e.path in failures else e
            for e in self.entries
        )
        return replace(self, entries=tuple(failed))

    def without_single_frames(self) -> "Plan":
        """The plan for image-to-video, which has nothing to learn from a clip of one frame: it is the conditioning
        frame.
        """
        reason = (
            f"single frame: image-to-video needs more than the conditioning frame; use a longer clip, or buckets of "
            f"{self.temporal_stride + 1} frames or more"
        )
        return self.drop({e.path: reason for e in self.kept if e.bucket[0] == 1})

    def require_clips(self) -> None:
        """ValueError, with the summary and the fix, when no clip is left."""
        if not self.kept:
            raise ValueError(f"no usable clip\n{self.summary()}\n  {self._fix()}")

    def _fix(self) -> str:
        too_short = [e for e in self.entries if e.reason.startswith(("too short", "would be a still"))]
        if too_short:
            longest = max(e.num_frames for e in too_short)
            fits = whole_latents(longest, self.temporal_stride)
            if fits == 1 and any(b[0] == 1 for b in self.buckets):
                return f"The longest clip has {longest} frames: raise data.fps, or set data.video_as_image = true"
            return (
                f"The longest clip has {longest} frames at data.fps = {self.fps:g}: add a bucket of {fits} frames or "
                f"fewer, or change data.fps"
            )
        return (
            "Give clips (.mp4 and the like) with same-name .txt captions, or a metadata file that names both, as "
            "data.path or in [[data.source]]"
        )

    def write_jsonl(self, path: str | os.PathLike) -> None:
        """One line per clip, with everything that was decided, written atomically."""
        with (
            atomic_path(path, "plan") as temporary,
            open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f,
        ):
            for entry in self.entries:
                row = {"kept": entry.kept, "status": entry.status, **asdict(entry), **self._geometry(entry)}
                del row["limits"]  # the same for all, and in the configuration
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
            f.flush()  # before atomic_path syncs the file

    @staticmethod
    def _geometry(e: PlanEntry) -> dict[str, Any]:
        """The first and last of the frames taken, and how they are resized and cropped: [left, top, width, height]."""
        if not e.kept:
            return {"pts": []}
        width, height, left, top = bucketing.cover(e.width, e.height, e.bucket)
        return {"pts": [e.pts[0], e.pts[-1]], "resize": [width, height], "crop": [left, top, e.bucket[2], e.bucket[1]]}

    def summary(self) -> str:
        """Counts by bucket, and by reason with names, for people."""
        kept = self.kept
        found, num_dropped = len(self.entries), len(self.entries) - len(kept)
        statuses = Counter({e.path: e.status for e in kept}.values())
        cut = ", ".join(f"{count} {status}" for status in ("trimmed", "split") if (count := statuses[status]))
        lines = [
            f"data plan of {self.source} at {self.fps:g} fps: {found} found, {len(kept)} kept, {num_dropped} dropped"
        ]
        if cut:
            lines.append(f"  of {len({e.path for e in kept})} files that are kept: {cut}")
        counts = Counter(e.bucket for e in kept)
        upscaled = Counter(e.bucket for e in kept if bucketing.is_upscaled(e.width, e.height, e.bucket))
        cropped = Counter(e.bucket for e in kept if bucketing.share_kept(e.width, e.height, e.bucket) < 0.5)
        for b in sorted(counts):
            note = f", {upscaled[b]} of them smaller than that and upscaled" if upscaled[b] else ""
            note += f", {cropped[b]} of them cropped to less than half" if cropped[b] else ""
            lines.append(f"  bucket {b[0]} x {b[1]} x {b[2]} (frames, height, width): {counts[b]} clips{note}")
        if unused := [b for b in self.buckets if b not in counts]:
            more = f" and {len(unused) - NAMES_SHOWN} more" if len(unused) > NAMES_SHOWN else ""
            lines.append(f"  without a clip: {', '.join('x'.join(map(str, b)) for b in unused[:NAMES_SHOWN])}{more}")
        converted = [(e.path, e.conversion) for e in kept] + [(e.image, e.image_conversion) for e in kept]
        lines += summarise(converted)
        dropped: dict[str, list[PlanEntry]] = {}
        for e in self.entries:
            if not e.kept:
                dropped.setdefault(e.reason.partition(":")[0], []).append(e)
        for category, entries in dropped.items():
            lines.append(f"  dropped, {category}: {len(entries)}")
            lines += [
                f"    {e.path}:{e.reason.removeprefix(category).removeprefix(':')}" for e in entries[:NAMES_SHOWN]
            ]
            if len(entries) > NAMES_SHOWN:
                lines.append(f"    and {len(entries) - NAMES_SHOWN} more")
        return "\n".join(lines + [f"  note: {remark}" for remark in self.remarks])


def read_frames(entry: PlanEntry, first_only: bool = False) -> Tensor:
    """The training clip of a kept entry, or its first frame alone: uint8 RGB [3, F, H, W]. Raises UnusableClip."""
    pts = entry.pts[:1] if first_only else entry.pts
    reading = Reading(entry.by_index, entry.declared_fps, entry.decoder, entry.conversion, entry.media_rules)
    return decode(entry.path, pts, entry.width, entry.height, entry.bucket, reading)


def build_plan(section: Data, cache_folder: str | os.PathLike, temporal_stride: int, path: str = "") -> Plan:
    """The plan of [data], or by the same rules that of another path alone (validation.path).

    temporal_stride: the VAE's, frames per latent.
    """
    sources = [Source(path=path)] if path else section.sources
    choice = ClipChoice(section.frame_extraction, section.uniform_clips, section.slide_stride, temporal_stride)
    limits, n = DecodeLimits.of(section), section.num_workers
    return make_plan(sources, section.sizes, section.fps, n, cache_folder, choice, MediaPolicy.of(section), limits)


def make_plan(
    sources: str | os.PathLike | Sequence[Source],
    buckets: Sequence[Sequence[int]],
    fps: float,
    num_workers: int,
    cache_folder: str | os.PathLike,
    choice: ClipChoice = HEAD,
    policy: MediaPolicy = DEFAULT_POLICY,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> Plan:
    """Scan the sources (or one path), probe each file in worker processes (0: in this one) and decide about each clip.

    Probes are kept in cache_folder. A later plan reads a file again only if its size or time of change differs.
    ValueError: a path or metadata of no known layout, a decoder that is not installed, or no usable clip.
    """
    require(policy.decoder)
    sources = [Source(path=str(sources))] if isinstance(sources, (str, os.PathLike)) else list(sources)
    sizes = tuple(tuple(b) for b in buckets)
    paths = [_resolved(source, Path(cache_folder)) for source in sources]
    scanned = [
        (source, r) for source, path in zip(sources, paths, strict=True) for r in scan(path, source.caption_column)
    ]
    trusted = [s.trust_metadata and bool(r.declared) for s, r in scanned]  # not opened
    opened = [r.path for (_, r), is_trusted in zip(scanned, trusted, strict=True) if not r.reason and not is_trusted]
    files = list(dict.fromkeys([*opened, *(r.image for _, r in scanned if r.image and not r.reason)]))
    probes = dict(zip(files, probe_all(files, num_workers, Path(cache_folder) / "probes", limits), strict=True))
    entries = []
    for (source, record), is_trusted in zip(scanned, trusted, strict=True):
        mode = choice.mode if source.frame_extraction == "default" else source.frame_extraction
        entries += _decide(
            source,
            record,
            None if is_trusted else probes.get(record.path),
            sizes,
            source.fps or fps,
            replace(choice, mode=mode),
            policy,
            limits,
        )
    entries = [_with_image(e, probes[e.image], policy) if e.kept and e.image else e for e in entries]
    lines = remarks((p for p, s in zip(paths, sources, strict=True) if p == s.path), [r for _, r in scanned])
    name = ", ".join(str(s.path) for s in sources)
    plan = Plan(name, fps, sizes, tuple(entries), choice.temporal_stride, tuple(lines))
    plan.require_clips()
    return plan


def _resolved(source: Source, cache_folder: Path) -> str:
    return source.path if media.is_url(source.path) else str(resolve_path(source.path, cache_folder))


def _decide(
    source: Source,
    record: ClipRecord,
    found: Probe | None,
    buckets: Sequence[Bucket],
    fps: float,
    choice: ClipChoice,
    policy: MediaPolicy,
    limits: DecodeLimits,
) -> list[PlanEntry]:
    """The training clips of a file, or one entry with the reason why there are none."""
    captions = tuple(source.caption_prefix + caption for caption in record.captions)
    entry = PlanEntry(record.path, captions, record.reason, fps, source.num_repeats, image=record.image, limits=limits)
    entry = replace(entry, media_rules=policy.rules)
    if record.reason:
        return [entry]
    if found is None:
        found, entry = _declared(record), replace(entry, by_index=True, declared_fps=record.declared[3])
    found, conversion = by_policy(found, record.path, policy, limits)
    kind, rate = media.kind(record.path), entry.declared_fps
    if kind == "frames" and not rate:
        rate = source.source_fps
    reason = "no rate: a folder of frames has no rate of its own; set source_fps in its [[data.source]]"
    if found.reason or (kind == "frames" and not rate):
        return [replace(entry, reason=found.reason or reason)]
    is_still = kind == "image" and len(found.pts) == 1
    times, end = found.seconds()
    if rate:
        times, end = [i / rate for i in range(len(found.pts))], len(found.pts) / rate
    if not is_still and (reason := too_many_frames(times, end, fps, limits.max_frames)):
        return [replace(entry, reason=reason)]
    indices = [0] if is_still else frame_indices(times, end, fps)
    entry = replace(
        entry,
        width=found.width,
        height=found.height,
        source_fps=round(rate or found.fps, 3) if not is_still else 0.0,
        source_frames=len(found.pts),
        num_frames=len(indices),
        sha256=found.sha256,
        conversion=conversion,
        # Another decoder gives no frames to convert.
        decoder=policy.decoder if kind == "video" and not conversion else "pyav",
    )
    chosen = bucketing.choose(len(indices), found.width, found.height, buckets, choice)
    may_be_still = policy.video_as_image or policy.rules < 2 or len(found.pts) == 1
    if reason := bucketing.too_short(len(indices), fps, buckets, chosen, choice, may_be_still):
        return [replace(entry, reason=reason)]
    starts = bucketing.starts(len(indices), chosen[0], choice)
    return [
        replace(
            entry,
            bucket=chosen,
            start=start,
            num_clips=len(starts),
            pts=tuple(found.pts[i] for i in indices[start : start + chosen[0]]),
        )
        for start in starts
    ]


def _with_image(entry: PlanEntry, found: Probe, policy: MediaPolicy) -> PlanEntry:
    """The entry with the identity of its conditioning image, or dropped because that cannot be used."""
    found, conversion = by_policy(found, entry.image, policy, entry.limits)
    if found.reason:
        category, _, detail = found.reason.partition(": ")
        return replace(entry, reason=f"{category}: {entry.image}: {detail}", bucket=None)
    identity = f"{found.sha256} {conversion}" if conversion else found.sha256
    return replace(entry, image_sha256=identity, image_conversion=conversion)


def _declared(record: ClipRecord) -> Probe:
    """The metadata of a file in place of a probe. Its identity is its name, size and time, not its content."""
    width, height, count, rate = record.declared
    try:
        identity = media.version(record.path)
    except OSError as e:
        return Probe(reason=f"unreadable: {e.strerror or e}")
    name = hashlib.sha256(json.dumps([identity, rate]).encode()).hexdigest()
    is_video = media.kind(record.path) == "video"
    untagged = "untagged" if is_video else ""  # as far as is known; only frames without a tag are concerned
    return Probe(name, int(width), int(height), "1", tuple(range(int(count))), int(count), colour=untagged)
