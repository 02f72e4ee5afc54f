"""The data plan: what becomes of every clip, decided and printed before anything is encoded.

    scan (sources.py) -- probe (video.py, worker processes) -- frame_indices -- bucket.choose -- PlanEntry per clip
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
from torch.utils.data import DataLoader

from titan_video.data import bucket as bucketing
from titan_video.data.bucket import Bucket
from titan_video.data.sources import ClipRecord, scan
from titan_video.data.video import Probe, decode, frame_indices, probe

NAMES_SHOWN = 20
PROBE_VERSION = 1


@dataclass(frozen=True)
class PlanEntry:
    """One training clip. Dropped with a `reason` (`category: detail`), or kept with its bucket and the source times of its frames.

    num_frames counts the whole source after resampling to `fps`, of which the clip takes the bucket's frames from number `start`; the source
    gives `num_clips` such clips. pts: in ticks, or with by_index numbers of frames. repeats: how often an epoch holds it.
    captions: all that it has, `caption` is the first. image: a first frame to be given instead of the clip's own.
    """

    path: str
    caption: str = ""
    reason: str = ""
    captions: tuple[str, ...] = ()
    fps: float = 0.0
    repeats: int = 1
    start: int = 0
    num_clips: int = 1
    by_index: bool = False
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

    @property
    def kept(self) -> bool:
        return not self.reason

    @property
    def content(self) -> str:
        """Identity of the pixels that `read_frames` gives: the file's content, the frames taken and their size."""
        made_of = [self.sha256, self.by_index, list(self.pts), list(self.bucket or ())]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Every clip of `source`, kept and dropped, in scan order."""

    source: str
    fps: float
    buckets: tuple[Bucket, ...]
    entries: tuple[PlanEntry, ...]

    @property
    def kept(self) -> list[PlanEntry]:
        return [e for e in self.entries if e.kept]

    def drop(self, failures: Mapping[str, str]) -> "Plan":
        """The plan without the clips that turned out to be unusable: {path: reason}."""
        failed = (replace(e, reason=failures[e.path], bucket=None) if e.kept and e.path in failures else e for e in self.entries)
        return replace(self, entries=tuple(failed))

    def without_stills(self) -> "Plan":
        """The plan for image-to-video, which has nothing to learn from a clip that is no longer than the frame it is given."""
        stills = {e.path: "a still: image-to-video needs more than the given frame; use a longer clip, or buckets of 5 frames or more"
                  for e in self.kept if e.bucket[0] == 1}  # fmt: skip
        return self.drop(stills)

    def require_clips(self) -> None:
        """Raises ValueError, with the summary and what to do, when no clip is left."""
        if not self.kept:
            raise ValueError(f"no usable clip\n{self.summary()}\n  {self._fix()}")

    def _fix(self) -> str:
        too_short = [e for e in self.entries if e.reason.startswith("too short")]
        if too_short:
            longest = max(e.num_frames for e in too_short)
            fits = (longest - 1) // 4 * 4 + 1
            return f"The longest clip has {longest} frames at data.fps = {self.fps:g}: add a bucket of {fits} frames or fewer, or change data.fps"
        return "Give clips (.mp4 and the like) with same-name .txt captions, or a metadata file that names both, as data.path"

    def write_jsonl(self, path: str | os.PathLike) -> None:
        """One line per clip, with all that was decided; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as f:
            for entry in self.entries:
                row: dict[str, Any] = {"kept": entry.kept, **asdict(entry)}
                del row["pts"]
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)

    def summary(self) -> str:
        """Counts by bucket, and by reason with names, for people."""
        kept = self.kept
        found, dropped = len(self.entries), len(self.entries) - len(kept)
        lines = [f"data plan of {self.source} at {self.fps:g} fps: {found} found, {len(kept)} kept, {dropped} dropped"]
        counts = Counter(e.bucket for e in kept)
        upscaled = Counter(e.bucket for e in kept if bucketing.is_upscaled(e.width, e.height, e.bucket))
        for b in self.buckets:
            note = f", {upscaled[b]} of them smaller than that and upscaled" if upscaled[b] else ""
            lines.append(f"  bucket {b[0]} x {b[1]} x {b[2]} (frames, height, width): {counts[b]} clips{note}")
        dropped: dict[str, list[PlanEntry]] = {}
        for e in self.entries:
            if not e.kept:
                dropped.setdefault(e.reason.partition(":")[0], []).append(e)
        for category, entries in dropped.items():
            lines.append(f"  dropped, {category}: {len(entries)}")
            lines += [f"    {e.path}:{e.reason.removeprefix(category).removeprefix(':')}" for e in entries[:NAMES_SHOWN]]
            if len(entries) > NAMES_SHOWN:
                lines.append(f"    and {len(entries) - NAMES_SHOWN} more")
        return "\n".join(lines)


def read_frames(entry: PlanEntry, first_only: bool = False) -> Tensor:
    """The training clip of a kept entry, or its first frame alone: uint8 RGB [3, F, H, W]. Raises UnusableClip."""
    return decode(entry.path, entry.pts[:1] if first_only else entry.pts, entry.width, entry.height, entry.bucket)


def make_plan(path: str | os.PathLike, buckets: Sequence[Sequence[int]], fps: float, num_workers: int, cache_folder: str | os.PathLike) -> Plan:
    """Scan `path`, probe each file in worker processes (0: in this one) and decide about each clip.

    Probes are kept in cache_folder, so a second plan does not read the files again unless their size or time of change differ.
    Raises ValueError for a path or metadata of no known layout, and when no clip is usable.
    """
    records = scan(path)
    sizes = tuple(tuple(b) for b in buckets)
    paths = list(dict.fromkeys(r.path for r in records if not r.reason))
    probes = dict(zip(paths, probe_all(paths, num_workers, Path(cache_folder) / "probes"), strict=True))
    plan = Plan(str(path), fps, sizes, tuple(_decide(r, probes.get(r.path), sizes, fps) for r in records))
    plan.require_clips()
    return plan


def _decide(record: ClipRecord, found: Probe | None, buckets: Sequence[Bucket], fps: float) -> PlanEntry:
    entry = PlanEntry(record.path, record.caption, record.reason, (record.caption,), fps, image=record.image)
    if record.reason or found is None:
        return entry
    if found.reason:
        return replace(entry, reason=found.reason)
    indices = frame_indices(*found.seconds(), fps)
    entry = replace(entry, width=found.width, height=found.height, source_fps=round(found.fps, 3), source_frames=len(found.pts),
                    num_frames=len(indices), sha256=found.sha256)  # fmt: skip
    chosen = bucketing.choose(len(indices), found.width, found.height, buckets)
    if chosen is None:
        return replace(entry, reason=f"too short: {len(indices)} frames at {fps:g} fps, the shortest bucket takes {min(b[0] for b in buckets)}")
    entry = replace(entry, bucket=chosen, pts=tuple(found.pts[i] for i in indices[: chosen[0]]))
    return replace(entry, image_sha256=hashlib.sha256(Path(entry.image).read_bytes()).hexdigest()) if entry.image else entry


# ---- probes, in worker processes, kept between runs ----


def probe_all(paths: Sequence[str], num_workers: int, folder: Path) -> list[Probe]:
    """The probe of each path, in order."""
    files = _Probes(list(paths), folder)
    missing = [i for i in range(len(paths)) if files.read(i) is None]
    fresh = DataLoader(files, batch_size=None, sampler=missing, num_workers=min(num_workers, len(missing)))
    found = dict(zip(missing, fresh, strict=True))
    return [found[i] if i in found else files.read(i) or probe(p) for i, p in enumerate(paths)]


class _Probes:
    """Probes by index of path; each is written to one small file named by the path and holding the size and time of change it is for."""

    def __init__(self, paths: list[str], folder: Path):
        self.paths, self.folder = paths, folder

    def __len__(self) -> int:
        return len(self.paths)

    def _identity(self, path: str) -> dict[str, Any]:
        stat = os.stat(path)
        return {"version": PROBE_VERSION, "path": os.path.abspath(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}

    def _file(self, path: str) -> Path:
        name = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def read(self, index: int) -> Probe | None:
        path = self.paths[index]
        try:
            saved = json.loads(self._file(path).read_text(encoding="utf-8"))
            found = Probe(**saved.pop("probe"))
            return replace(found, pts=tuple(found.pts)) if saved == self._identity(path) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or not whole: probe again
            return None

    def __getitem__(self, index: int) -> Probe:
        path = self.paths[index]
        try:
            identity = self._identity(path)
        except OSError as e:
            return Probe(reason=f"unreadable: {e.strerror or e}")
        found = probe(path)
        file = self._file(path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**identity, "probe": asdict(found)}), encoding="utf-8")
        os.replace(temporary, file)
        return found
