"""A plan as columns in a file (columns.py): built once for the same clips and options, and read by all ranks.

A row has what `PlanEntry` has: numbers in columns, times of frames as (first, step, place, count), and texts as JSON.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from titan_video.ingest.columns import Columns, ColumnWriter, TimesWriter, decode_times
from titan_video.ingest.files.media import DecodeLimits
from titan_video.ingest.plan.entries import Plan, PlanEntry, PlanSummary, SummaryMaker

CHUNK = 4096  # rows that are read together
NUMBERS = (
    ("fps", "f8"),
    ("declared_fps", "f8"),
    ("source_fps", "f8"),
    *((name, "i8") for name in ("repeats", "start", "num_clips", "width", "height", "source_frames", "num_frames")),
    ("media_rules", "i4"),
    ("by_index", "?"),
)
TEXTS = ("path", "captions", "reason", "sha256", "image", "image_sha256", "decoder", "conversion", "image_conversion")
TIMES = ("first", "step", "place", "count")
ROW = np.dtype(
    [*NUMBERS, *((name, "i8") for name in TIMES), ("kept", "?"), ("bucket", "i4", (3,)), ("content", "u1", (32,))]
)
NO_BUCKET, NO_CONTENT = (0, 0, 0), bytes(32)


class PlanTable(Sequence[PlanEntry]):
    """The entries of a plan, made when they are asked for.

    columns: also `kept`, `bucket` ((0, 0, 0): none), `repeats` and `content`, the identity of each row's pixels.
    facts: of all entries. ValueError: no such file, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike):
        self.columns = Columns(path)
        note = self.columns.note
        self.path, self.key = Path(path), note["key"]
        self.limits = DecodeLimits(**note["limits"])
        self.facts = PlanSummary(**note["facts"])

    def __reduce__(self) -> tuple:
        return PlanTable, (self.path,)

    def __len__(self) -> int:
        return self.columns.num_rows

    def __getitem__(self, row: int) -> PlanEntry:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return next(self._entries(row % len(self), row % len(self) + 1))

    def __iter__(self) -> Iterator[PlanEntry]:
        for start in range(0, len(self), CHUNK):
            yield from self._entries(start, min(start + CHUNK, len(self)))

    def _entries(self, start: int, end: int) -> Iterator[PlanEntry]:
        names = [name for name, _ in NUMBERS]
        columns = [self.columns[name][start:end].tolist() for name in (*names, *TIMES, "bucket")]
        for row, (*numbers, first, step, place, count, bucket) in enumerate(zip(*columns, strict=True), start):
            texts = dict(zip(TEXTS, self.texts(row), strict=True))
            texts["captions"] = tuple(texts["captions"])
            pts = decode_times(self.columns, first, step, place, count)
            numbers = dict(zip(names, numbers, strict=True))
            yield PlanEntry(
                **texts, **numbers, pts=pts, bucket=tuple(bucket) if bucket[0] else None, limits=self.limits
            )

    def texts(self, row: int) -> list:
        """In the order of TEXTS."""
        return json.loads(self.columns.blob("texts", row))

    def plan(self) -> Plan:
        """The plan with these entries."""
        note = self.columns.note["plan"]
        buckets = tuple(tuple(b) for b in note["buckets"])
        return Plan(note["source"], note["fps"], buckets, self, note["temporal_stride"], tuple(note["remarks"]))


def write_plan_table(path: Path, plan: Plan, limits: DecodeLimits, key: str = "") -> PlanTable:
    """The table of a plan, whose entries may come one at a time.

    limits: of all entries. key: of all that was decided, another one for another table; "": what is made of this table
    is not for later runs.
    """
    maker = SummaryMaker()
    with ColumnWriter(path.parent, ROW, ("texts",)) as writer:
        _append(writer, plan.entries, maker)
        about = {
            "source": plan.source,
            "fps": plan.fps,
            "buckets": plan.buckets,
            "temporal_stride": plan.temporal_stride,
            "remarks": plan.remarks,
        }
        facts = asdict(maker.made(plan.buckets))
        note = {"key": key, "limits": asdict(limits), "facts": facts, "plan": about}
        writer.write(path, note, "table of the plan")
    return PlanTable(path)


def _append(writer: ColumnWriter, entries: Iterable[PlanEntry], maker: SummaryMaker) -> None:
    times, names = TimesWriter(writer), [name for name, _ in NUMBERS]
    for e in entries:
        maker.add(e)
        numbers = [getattr(e, name) for name in names]
        content = np.frombuffer(bytes.fromhex(e.content) if e.kept else NO_CONTENT, np.uint8)
        texts = json.dumps([getattr(e, name) for name in TEXTS], ensure_ascii=False)
        row = (*numbers, *times.code(e.pts), e.kept, e.bucket or NO_BUCKET, content)
        writer.append(row, texts.encode("utf-8", "surrogatepass"))
