"""What a plan says about each clip, and about all of them."""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.ingest import bucketing
from titan_video.ingest.bucketing import DEFAULT_GEOMETRY, whole_latents
from titan_video.ingest.decode.colour import NEWEST_RULES, DecoderName, summarise
from titan_video.ingest.decode.video import Reading, decode
from titan_video.ingest.files.media import DEFAULT_LIMITS, DecodeLimits
from titan_video.tools.files import atomic_path

NAMES_SHOWN = 20
STATUSES = ("kept", "trimmed", "split")


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

    entries: a tuple, or a table that makes them one at a time (plan_table.py).
    remarks: lines about what is in no entry, such as files that metadata does not list.
    """

    source: str
    fps: float
    buckets: tuple[Bucket, ...]
    entries: Sequence[PlanEntry]
    temporal_stride: int = DEFAULT_GEOMETRY.temporal_stride
    remarks: tuple[str, ...] = ()

    @property
    def kept(self) -> list[PlanEntry]:
        return [e for e in self.entries if e.kept]

    def facts(self) -> "PlanSummary":
        """A table knows them; else the entries are counted."""
        if known := getattr(self.entries, "facts", None):
            return known
        maker = SummaryMaker()
        for e in self.entries:
            maker.add(e)
        return maker.made(self.buckets)

    def counts(self) -> dict[str, int]:
        """Clips that are kept, and those dropped by reason, for the log."""
        found = self.facts()
        dropped = {f"dropped/{reason}": count for reason, count in found.counts.items() if reason}
        return {"clips": found.num_kept, "dropped": found.num_dropped, **dropped}

    def drop(self, failures: Mapping[str, str]) -> "Plan":
        """The plan without the clips that turned out to be unusable: {path: reason}."""
        entries = _Dropped(self.entries, failures)
        return replace(self, entries=tuple(entries) if isinstance(self.entries, tuple) else entries)

    def without_single_frames(self) -> "Plan":
        """The plan for image-to-video, which has nothing to learn from a clip of one frame: it is the conditioning
        frame.
        """
        reason = (
            f"single frame: image-to-video needs more than the conditioning frame; use a longer clip, or buckets of "
            f"{self.temporal_stride + 1} frames or more"
        )
        return self.drop({e.path: reason for e in self.entries if e.kept and e.bucket[0] == 1})

    def require_clips(self) -> None:
        """ValueError, with the summary and the fix, when no clip is left."""
        if not self.facts().num_kept:
            raise ValueError(f"no usable clip\n{self.summary()}\n  {self._fix()}")

    def _fix(self) -> str:
        too_short = [e.num_frames for e in self.entries if e.reason.startswith(("too short", "would be a still"))]
        if too_short:
            longest = max(too_short)
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
        # The limits are the same for all, and in the configuration.
        names = [f.name for f in fields(PlanEntry) if f.name != "limits"]
        with (
            atomic_path(path, "plan") as temporary,
            open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f,
        ):
            for e in self.entries:
                decided = {name: getattr(e, name) for name in names}
                row = {"kept": e.kept, "status": e.status, **decided, **self._geometry(e)}
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
        found = self.facts()
        lines = [
            f"data plan of {self.source} at {self.fps:g} fps: {len(self.entries)} found, {found.num_kept} kept, "
            f"{found.num_dropped} dropped"
        ]
        return "\n".join([*lines, *found.lines, *(f"  note: {remark}" for remark in self.remarks)])


class _Dropped(Sequence[PlanEntry]):
    """The entries, of which those of some paths are dropped: {path: reason}."""

    def __init__(self, entries: Sequence[PlanEntry], failures: Mapping[str, str]):
        self.entries, self.failures = entries, failures

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> PlanEntry:
        return self._drop(self.entries[index])

    def __iter__(self) -> Iterator[PlanEntry]:
        return map(self._drop, self.entries)

    def _drop(self, e: PlanEntry) -> PlanEntry:
        return replace(e, reason=self.failures[e.path], bucket=None) if e.kept and e.path in self.failures else e


@dataclass(frozen=True)
class PlanSummary:
    """What is known of all entries. counts: by the category of their reason, in their order; "": kept. lines: for
    people, by bucket and by reason.
    """

    counts: dict[str, int]
    lines: list[str]

    @property
    def num_kept(self) -> int:
        return self.counts.get("", 0)

    @property
    def num_dropped(self) -> int:
        return sum(self.counts.values()) - self.num_kept


class SummaryMaker:
    """Counts entries in one pass. Of each clip nine bytes are kept, and no name."""

    def __init__(self):
        self.buckets: Counter[Bucket] = Counter()
        self.upscaled: Counter[Bucket] = Counter()
        self.cropped: Counter[Bucket] = Counter()
        self.counts: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}  # those dropped, by the category of their reason
        self.clips: dict[tuple[str, str], None] = {}  # that are converted
        self.images: dict[tuple[str, str], None] = {}
        self.paths, self.statuses = array("q"), array("b")

    def add(self, e: PlanEntry) -> None:
        category = e.reason.partition(":")[0]
        self.counts[category] += 1
        if not e.kept:
            names = self.named.setdefault(category, [])
            if len(names) < NAMES_SHOWN:
                names.append(f"    {e.path}:{e.reason.removeprefix(category).removeprefix(':')}")
            return
        self.paths.append(hash(e.path))
        self.statuses.append(STATUSES.index(e.status))
        self.buckets[e.bucket] += 1
        self.upscaled[e.bucket] += bucketing.is_upscaled(e.width, e.height, e.bucket)
        self.cropped[e.bucket] += bucketing.share_kept(e.width, e.height, e.bucket) < 0.5
        if e.conversion:
            self.clips[e.path, e.conversion] = None
        if e.image_conversion:
            self.images[e.image, e.image_conversion] = None

    def made(self, buckets: Sequence[Bucket]) -> PlanSummary:
        """buckets: all of the plan."""
        _, last = np.unique(np.array(self.paths, np.int64)[::-1], return_index=True)  # a file has several clips
        counts = np.bincount(np.array(self.statuses, np.int64)[::-1][last], minlength=len(STATUSES)).tolist()
        cut = ", ".join(f"{counts[i]} {STATUSES[i]}" for i in (1, 2) if counts[i])
        lines = [f"  of {len(last)} files that are kept: {cut}"] if cut else []
        for b in sorted(self.buckets):
            note = f", {self.upscaled[b]} of them smaller than that and upscaled" if self.upscaled[b] else ""
            note += f", {self.cropped[b]} of them cropped to less than half" if self.cropped[b] else ""
            lines.append(f"  bucket {b[0]} x {b[1]} x {b[2]} (frames, height, width): {self.buckets[b]} clips{note}")
        if unused := [b for b in buckets if b not in self.buckets]:
            more = f" and {len(unused) - NAMES_SHOWN} more" if len(unused) > NAMES_SHOWN else ""
            lines.append(f"  without a clip: {', '.join('x'.join(map(str, b)) for b in unused[:NAMES_SHOWN])}{more}")
        lines += summarise([*self.clips, *self.images])
        for category, names in self.named.items():
            lines += [f"  dropped, {category}: {self.counts[category]}", *names]
            if self.counts[category] > NAMES_SHOWN:
                lines.append(f"    and {self.counts[category] - NAMES_SHOWN} more")
        return PlanSummary(dict(self.counts), lines)


def read_frames(entry: PlanEntry, first_only: bool = False) -> Tensor:
    """The training clip of a kept entry, or its first frame alone: uint8 RGB [3, F, H, W]. Raises UnusableClip."""
    pts = entry.pts[:1] if first_only else entry.pts
    reading = Reading(entry.by_index, entry.declared_fps, entry.decoder, entry.conversion, entry.media_rules)
    return decode(entry.path, pts, entry.width, entry.height, entry.bucket, reading)
