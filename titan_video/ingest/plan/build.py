"""The data plan: what becomes of every clip, decided and printed before anything is encoded.

scan (sources.py) -> probe (video.py, in worker processes) -> frame_indices -> bucketing.choose -> bucketing.starts
-> one PlanEntry for each training clip

`Planner` does it one clip at a time, so that a plan of any length can be written to a table (planned.py).
"""

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from titan_video.config.job_config import Data, Source
from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import CODE_VERSION
from titan_video.ingest import bucketing
from titan_video.ingest.bucketing import HEAD, ClipChoice
from titan_video.ingest.decode.colour import MediaPolicy
from titan_video.ingest.decode.video import DEFAULT_POLICY, Probe, by_policy, frame_indices, require, too_many_frames
from titan_video.ingest.files import media
from titan_video.ingest.files.media import DEFAULT_LIMITS, DecodeLimits
from titan_video.ingest.files.refused import reading
from titan_video.ingest.files.shapes import resolve_path
from titan_video.ingest.files.sources import ClipRecord, iter_records, remarks
from titan_video.ingest.files.spool import Spool
from titan_video.ingest.plan.entries import Plan, PlanEntry
from titan_video.ingest.plan.probes import PROBE_VERSION, ProbeStore, chunks, probe_key

PLAN_VERSION = 1  # raise it when the same clips and options give another plan
FILES_TOGETHER = 1 << 16  # that are probed together
MAX_REMARKED = 1_000_000  # clips; of more it is not looked at what lies beside them


class Scanned(NamedTuple):
    """A clip that was found. source: which of the plan's. key, image_key: of the probe of its file and of its image
    (probes.py); a reason after "!": the file cannot be looked at; "": none is needed.
    """

    source: int
    record: ClipRecord
    key: str
    image_key: str


class Scan:
    """All clips of the sources, in order; they can be gone through any number of times.

    digest: of all that was found, with the sizes and times of the files. num_records: clips.
    folders: for what does not stay in memory (spool.py); by default that of the cache's tables.
    """

    def __init__(self, planner: "Planner", folders: Sequence[Path] = ()):
        self.lines = Spool("list of clips", folders or [planner.cache_folder / "tables"])
        self.num_records = 0
        with _without_collector():
            self.digest = self._scan(planner)

    def _scan(self, planner: "Planner") -> str:
        digest = hashlib.sha256()
        for number, (source, path) in enumerate(zip(planner.sources, planner.paths, strict=True)):
            for record in iter_records(path, source.caption_column):
                is_read = not record.reason
                version = "" if not is_read else _key(record.path)
                image = _key(record.image) if record.image and is_read else ""
                row = json.dumps([number, *vars(record).values(), version, image]).encode() + b"\n"
                digest.update(row)
                self.lines.append(row)
                self.num_records += 1
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Scanned]:
        for line in self.lines:
            number, path, captions, reason, image, declared, written, key, image_key = json.loads(line.decode())
            record = ClipRecord(path, tuple(captions), reason, image, tuple(declared), written)
            yield Scanned(number, record, key, image_key)

    def close(self) -> None:
        self.lines.close()


@contextmanager
def _without_collector() -> Iterator[None]:
    """A million records are in no cycles, and the collector would look at all of them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _key(path: str) -> str:
    try:
        return probe_key(path).hex()
    except OSError as e:
        return f"!unreadable: {e.strerror or e}"


@dataclass(frozen=True)
class Planner:
    """How a plan is made. fps, buckets, choice, policy, limits: as [data] says. cache_folder: of generated clips.

    without_stills: for image-to-video (`Plan.without_single_frames`).
    """

    sources: Sequence[Source]
    buckets: tuple[Bucket, ...]
    fps: float
    cache_folder: Path
    choice: ClipChoice = HEAD
    policy: MediaPolicy = DEFAULT_POLICY
    limits: DecodeLimits = DEFAULT_LIMITS
    without_stills: bool = False

    @classmethod
    def of(
        cls, section: Data, cache_folder: str | os.PathLike, temporal_stride: int, path: str = "", stills: bool = True
    ) -> "Planner":
        """By [data], or by the same rules for another path alone (validation.path).

        temporal_stride: the VAE's, frames per latent. stills: whether clips of one frame are of use.
        """
        sources = [Source(path=path)] if path else section.sources
        choice = ClipChoice(section.frame_extraction, section.uniform_clips, section.slide_stride, temporal_stride)
        policy, limits = MediaPolicy.of(section), DecodeLimits.of(section)
        sizes = tuple(tuple(b) for b in section.sizes)
        return cls(sources, sizes, section.fps, Path(cache_folder), choice, policy, limits, not stills)

    @property
    def paths(self) -> list[str]:
        return [s.path if media.is_url(s.path) else str(resolve_path(s.path, self.cache_folder)) for s in self.sources]

    @property
    def probes(self) -> Path:
        return self.cache_folder / "probes"

    def key(self, scanned: Scan) -> str:
        """Of all that the plan depends on."""
        rules = [asdict(self.choice), asdict(self.policy), asdict(self.limits), self.without_stills]
        sources = [asdict(source) for source in self.sources]
        versions = PLAN_VERSION, PROBE_VERSION, CODE_VERSION
        parts = json.dumps([versions, sources, self.buckets, self.fps, rules, scanned.digest])
        return hashlib.sha256(parts.encode()).hexdigest()

    def is_trusted(self, found: Scanned) -> bool:
        """Whether the file is not opened."""
        return self.sources[found.source].trust_metadata and bool(found.record.declared)

    def missing(self, scanned: Scan, store: ProbeStore) -> Iterator[tuple[bytes, str]]:
        """(key, path) of the files that have no probe."""
        for found in scanned:
            record = found.record
            for key, path in ((found.key, record.path), (found.image_key, record.image)):
                is_needed = key and key[0] != "!" and not (path == record.path and self.is_trusted(found))
                if is_needed and not store.has(bytes.fromhex(key), path):
                    yield bytes.fromhex(key), path

    def entries(self, scanned: Scan, store: ProbeStore) -> Iterator[PlanEntry]:
        """What becomes of each clip. A file without a probe is looked at here."""
        for found in scanned:
            source, record = self.sources[found.source], found.record
            probed = None
            if found.key and not self.is_trusted(found):
                probed = _probe(store, found.key, record.path)
            for e in _decide(self, source, record, probed):
                if e.kept and e.image:
                    e = _with_image(e, _probe(store, found.image_key, e.image), self.policy)
                yield e

    def plan(self, entries: Sequence[PlanEntry], lines: Sequence[str]) -> Plan:
        name = ", ".join(str(s.path) for s in self.sources)
        return Plan(name, self.fps, self.buckets, entries, self.choice.temporal_stride, tuple(lines))

    def remarks(self, scanned: Scan) -> list[str]:
        """Lines about what is in no entry."""
        if scanned.num_records > MAX_REMARKED:
            return [f"what lies beside the clips is not looked at, as these are more than {MAX_REMARKED:,}"]
        given = [p for p, s in zip(self.paths, self.sources, strict=True) if p == s.path]
        records = [found.record for found in scanned]
        with reading("files beside the clips", ", ".join(given)):
            return remarks(given, records)


def _probe(store: ProbeStore, key: str, path: str) -> Probe:
    if key[:1] == "!":
        return Probe(reason=key[1:])
    found = store.get(bytes.fromhex(key), path)
    if found is None:
        store.probe({bytes.fromhex(key): path}, 0)
        found = store.get(bytes.fromhex(key), path)
    return found


def build_plan(section: Data, cache_folder: str | os.PathLike, temporal_stride: int, path: str = "") -> Plan:
    """The plan of [data] in memory, made in this process. Arguments: see `Planner.of`."""
    return _in_memory(Planner.of(section, cache_folder, temporal_stride, path), section.num_workers)


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
    sources = [Source(path=str(sources))] if isinstance(sources, (str, os.PathLike)) else list(sources)
    sizes = tuple(tuple(b) for b in buckets)
    planner = Planner(sources, sizes, fps, Path(cache_folder), choice, policy, limits)
    return _in_memory(planner, num_workers)


def _in_memory(planner: Planner, num_workers: int) -> Plan:
    require(planner.policy.decoder)
    scanned, store = Scan(planner), ProbeStore(planner.probes, planner.limits)
    for files in chunks(planner.missing(scanned, store), FILES_TOGETHER):
        store.probe(files, num_workers)
    plan = planner.plan(tuple(planner.entries(scanned, store)), planner.remarks(scanned))
    scanned.close()
    plan.require_clips()
    return plan


def _decide(planner: Planner, source: Source, record: ClipRecord, found: Probe | None) -> list[PlanEntry]:
    """The training clips of a file, or one entry with the reason why there are none."""
    policy, limits, buckets, fps = planner.policy, planner.limits, planner.buckets, source.fps or planner.fps
    mode = planner.choice.mode if source.frame_extraction == "default" else source.frame_extraction
    choice = planner.choice if mode == planner.choice.mode else replace(planner.choice, mode=mode)
    captions = tuple(source.caption_prefix + caption for caption in record.captions)
    repeats, rules = source.num_repeats, policy.rules
    entry = PlanEntry(
        record.path, captions, record.reason, fps, repeats, image=record.image, limits=limits, media_rules=rules
    )
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
