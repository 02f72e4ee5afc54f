"""The clips that training takes from the cache, as columns in a file (columns.py): by the keys of their entries, in the
order of `cached_clips`. The file is built once for a plan and a cache's encoders; all ranks map it.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import CODE_VERSION, GIVEN, CachedClip, LatentCache, content_hash
from titan_video.data.loader import ClipsByBucket
from titan_video.ingest.cache.cache_keys import imageless_keys, text_keys, video_keys
from titan_video.ingest.cache.entry_index import KEY_BYTES, NO_COLUMNS, holds
from titan_video.ingest.columns import Columns, ColumnWriter, SortedKeys, is_new, sort_keys, used, words
from titan_video.ingest.plan.plan_table import TEXTS, PlanTable

VERSION = 1  # raise it when a table of the same name would hold something else
CHUNK, LOOKED_UP = 4096, 1 << 20  # clips whose keys are hashed together, keys that are looked up together
CLIPS_KEPT = 512  # of a bucket, in memory: about 4 KB each
PATH, CAPTIONS, IMAGE_SHA256 = (TEXTS.index(name) for name in ("path", "captions", "image_sha256"))


class ClipTable(Sequence[CachedClip]):
    """The kept clips of a plan, made when they are asked for. It is sent to another process as the paths of its files.

    rows: of the table, ascending; None: all.
    ValueError: no such file, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike, plan: PlanTable, rows: np.ndarray | None = None):
        self.columns, self.plan = Columns(path), plan
        self.sizes: list[Bucket] = [tuple(size) for size in self.columns.note["sizes"]]
        self.rows = rows

    def __reduce__(self) -> tuple:
        return ClipTable, (self.columns.path, self.plan, self.rows)

    def __len__(self) -> int:
        return self.columns.num_rows if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> CachedClip:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.clip(index if self.rows is None else int(self.rows[index]))

    def clip(self, row: int) -> CachedClip:
        entry = self.plan[int(self.columns["entry"][row])]
        keys = {kind: self._key(kind, row) for kind in ("video", GIVEN, "image")}
        texts = self.columns.blob("texts", row)
        texts = tuple(texts[i : i + KEY_BYTES].hex() for i in range(0, len(texts), KEY_BYTES))
        return CachedClip(
            video_key=keys["video"],
            text_keys=texts[: len(entry.captions)],
            bucket=entry.bucket,
            captions=entry.captions,
            path=entry.path,
            cond_key=keys[GIVEN],
            image_key=keys["image"],
            repeats=entry.repeats,
            entry=entry,
            imageless_keys=texts[len(entry.captions) :],
        )

    def path(self, row: int) -> str:
        return self.plan.texts(int(self.columns["entry"][row]))[PATH]

    def _key(self, kind: str, row: int) -> str:
        return self.columns[kind][row].tobytes().hex() if len(self.columns[kind]) else ""

    def selected(self) -> np.ndarray:
        """The rows of the table."""
        return np.arange(self.columns.num_rows) if self.rows is None else self.rows

    def where(self, is_taken: np.ndarray) -> "ClipTable":
        """Those of the clips for which this is true, bool [len(self)]."""
        return self if is_taken.all() else ClipTable(self.columns.path, self.plan, self.selected()[is_taken])

    def without_paths(self, paths: Mapping[str, Any] | set[str]) -> "ClipTable":
        if not paths:
            return self
        return self.where(np.array([self.path(row) not in paths for row in self.selected()], bool))

    # ---- training and validation ----

    def split(self, share: float, at_least: int = 1) -> "tuple[ClipTable, ClipTable]":
        """(train, held out), as `split_holdout`."""
        count = math.floor(share * len(self) + 1e-9)
        if share > 0:
            count = max(count, min(at_least, len(self) - 1))
        is_held = np.zeros(len(self), bool)
        if count:
            is_held[np.argpartition(self.columns["holdout"][self.selected()], count - 1)[:count]] = True
        return self.where(~is_held), self.where(is_held)

    def by_bucket(self, identity: str) -> ClipsByBucket:
        """For `DrawPlan`. identity: `self.identity()`, which one rank finds for all."""
        groups = self._groups()
        return ClipsByBucket([size for size, _ in groups], [_Bucket(self, rows) for _, rows in groups], identity)

    def identity(self) -> str:
        """What the state of a loader says about these clips."""
        digest = hashlib.sha256()
        for _, rows in self._groups():
            for start in range(0, len(rows), CHUNK):
                digest.update(self._lines(rows[start : start + CHUNK].astype(np.int64)))
            digest.update(b"\n")
        return digest.hexdigest()

    def _groups(self) -> list[tuple[Bucket, np.ndarray]]:
        """(size, uint32 rows) of each bucket, as often as an epoch holds them."""
        selected = self.selected()
        bucket = self.columns["bucket"][selected]
        groups = []
        for number, size in enumerate(self.sizes):
            rows = selected[bucket == number].astype(np.uint32)
            repeats = self.columns["repeats"][rows]
            if len(rows):
                groups.append((size, rows if (repeats == 1).all() else np.repeat(rows, repeats)))
        return groups

    def _lines(self, rows: np.ndarray) -> bytes:
        """A line for each row: its keys in hexadecimal, as in `data.loader.by_bucket`."""
        captions = self.columns["captions"][rows]
        has_given = len(self.columns[GIVEN]) > 0
        first, *_ = captions.tolist()
        if (captions == first).all():
            start = self.columns["texts/ends"][rows]
            texts = self.columns["texts"][start[:, None] + np.arange(first * KEY_BYTES)]
            given = [self.columns[GIVEN][rows]] if has_given else []
            keys = np.concatenate([self.columns["video"][rows], texts, *given], axis=1)
            return (keys.tobytes().hex("\n", keys.shape[1]) + "\n").encode()
        lines = []
        for row, count in zip(rows.tolist(), captions.tolist(), strict=True):
            texts = self.columns.blob("texts", row)[: count * KEY_BYTES]
            lines.append(f"{self._key('video', row)}{texts.hex()}{self._key(GIVEN, row)}\n")
        return "".join(lines).encode()

    # ---- what the cache holds of them ----

    def cached(self, cache: LatentCache) -> np.ndarray:
        """bool [len(self)]: whether the cache has all that training reads of a clip with its captions."""
        rows = self.selected()
        lacking = np.zeros(self.columns.num_rows, bool)
        lacking[rows] = self._lack_frames(cache, rows)
        owner, number, lack = self._lack_texts(cache, rows)
        lacking[owner[lack & (number < self.columns["captions"][owner])]] = True
        return ~lacking[rows]

    def missing(self, cache: LatentCache) -> "Missing":
        """What the cache lacks of these clips, each entry once."""
        rows = self.selected()
        frames = rows[self._lack_frames(cache, rows)]
        if len(frames):  # copies of a file share their keys
            keys = [self.columns[kind][frames] for kind in self._kinds()]
            order = np.lexsort(np.concatenate([words(of_kind) for of_kind in keys])[::-1])
            frames = frames[np.sort(order[is_new(np.concatenate(keys, axis=1)[order])])]
        owner, number, lack = self._lack_texts(cache, rows)
        owner, number = owner[lack], number[lack]
        keys = self.columns["texts"].reshape(-1, KEY_BYTES)[self._text_places(owner, number)]
        order = sort_keys(keys)
        chosen = np.sort(order[is_new(keys[order])])
        return Missing(frames, owner[chosen], number[chosen])

    def _kinds(self) -> list[str]:
        return [kind for kind in ("video", GIVEN, "image") if len(self.columns[kind])]

    def _lack_frames(self, cache: LatentCache, rows: np.ndarray) -> np.ndarray:
        lack = np.zeros(len(rows), bool)
        for start in range(0, len(rows), LOOKED_UP):
            some = rows[start : start + LOOKED_UP]
            for kind in self._kinds():
                lack[start : start + len(some)] |= ~holds(cache, kind, self.columns[kind][some])
        return lack

    def _lack_texts(self, cache: LatentCache, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, number of the text in it, whether it is missing) of each text."""
        ends = self.columns["texts/ends"]
        counts = (ends[rows + 1] - ends[rows]) // KEY_BYTES
        owner = np.repeat(rows, counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        keys, places = self.columns["texts"].reshape(-1, KEY_BYTES), self._text_places(owner, number)
        lack = np.zeros(len(owner), bool)
        for start in range(0, len(places), LOOKED_UP):
            some = keys[places[start : start + LOOKED_UP]]
            for kind in cache.text_kinds:
                lack[start : start + len(some)] |= ~holds(cache, kind, some)
        return owner, number, lack

    def _text_places(self, owner: np.ndarray, number: np.ndarray) -> np.ndarray:
        return self.columns["texts/ends"][owner] // KEY_BYTES + number


class Missing(NamedTuple):
    """frames: rows of clips whose frames are to be encoded. texts, number: rows, and which of `text_jobs` of each."""

    frames: np.ndarray
    texts: np.ndarray
    number: np.ndarray


class _Bucket(Sequence[CachedClip]):
    """It keeps the clips that it gave last: those of a small data set are drawn again and again."""

    def __init__(self, table: ClipTable, rows: np.ndarray):
        self.table, self.rows = table, rows
        self.clip = lru_cache(maxsize=CLIPS_KEPT)(table.clip)

    def __reduce__(self) -> tuple:
        return _Bucket, (self.table, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CachedClip:
        return self.clip(int(self.rows[index]))


# ---- building ----


class _Keyed(NamedTuple):
    """What the keys of a clip depend on, of its plan's entry."""

    content: str
    captions: Sequence[str]
    image_sha256: str


def clip_table(plan: PlanTable, cache: LatentCache, drop_apart: bool, folder: Path) -> ClipTable:
    """The table of a plan's kept clips in `folder`; one that is there is taken.

    drop_apart: see `cached_clips`. One process calls it; others open the file.
    """
    drop_apart = drop_apart and cache.conditioning.text_image_tokens > 0
    ids = (cache.video_id, cache.text_id, cache.image_id, repr(cache.conditioning), drop_apart, CODE_VERSION)
    path = folder / f"clips-{content_hash(VERSION, plan.key, *ids)[:32]}.columns"
    if plan.key:
        with suppress(ValueError):
            found = ClipTable(path, plan)
            used(path)
            return found
    _write(path, plan, cache, drop_apart)
    return ClipTable(used(path), plan)


def _write(path: Path, plan: PlanTable, cache: LatentCache, drop_apart: bool) -> None:
    entry = np.flatnonzero(plan.columns["kept"])
    keys: dict[str, bytearray] = {kind: bytearray() for kind in ("video", GIVEN, "image")}
    texts: list[bytes] = []
    captions = np.zeros(len(entry), np.int32)
    for n, row in enumerate(entry.tolist()):
        written = plan.texts(row)
        e = _Keyed(plan.columns["content"][row].tobytes().hex(), written[CAPTIONS], written[IMAGE_SHA256])
        for kind, key in video_keys(cache, e).items():
            keys[kind] += bytes.fromhex(key)
        own = text_keys(cache, e) + (imageless_keys(cache, e) if drop_apart else ())
        texts.append(bytes.fromhex("".join(own)))
        captions[n] = len(e.captions)
    columns = {kind: np.frombuffer(raw, np.uint8).reshape(-1, KEY_BYTES) for kind, raw in keys.items()}
    order = _order(columns["video"], texts, lambda n: plan.texts(int(entry[n]))[PATH])
    entry, columns = entry[order], {kind: some[order] if len(some) else some for kind, some in columns.items()}
    sizes, bucket = np.unique(plan.columns["bucket"][entry], axis=0, return_inverse=True)
    with ColumnWriter(path.parent, NO_COLUMNS) as writer:
        for kind, some in columns.items():
            writer.put(kind, some)
        writer.put("entry", entry)
        writer.put("captions", captions[order])
        writer.put("bucket", bucket.reshape(-1).astype(np.int32))
        writer.put("repeats", plan.columns["repeats"][entry])
        writer.put("holdout", _holdout(columns["video"]))
        lengths = np.array([len(text) for text in texts], np.int64)[order]
        writer.put("texts/ends", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        for start in range(0, len(order), CHUNK):
            writer.put("texts", np.frombuffer(b"".join(texts[n] for n in order[start : start + CHUNK]), np.uint8))
        writer.write(path, {"sizes": sizes.tolist()}, "table of clips", num_rows=len(entry))


def _order(video: np.ndarray, texts: Sequence[bytes], path: Any) -> np.ndarray:
    """Positions that sort by video key, then text keys, then path: as `cached_clips`."""
    order = sort_keys(video)
    starts = np.append(np.flatnonzero(is_new(video[order])), len(order)).tolist()
    for start, end in pairwise(starts):
        if end - start > 1:
            order[start:end] = sorted(order[start:end].tolist(), key=lambda n: (texts[n], path(n)))
    return order


def _holdout(video: np.ndarray) -> np.ndarray:
    """int64 [n]: the place of each clip in the order in which `split_holdout` takes them."""
    hashed = bytearray()
    for key in video:
        hashed += bytes.fromhex(content_hash("holdout", key.tobytes().hex()))
    places = np.empty(len(video), np.int64)
    places[sort_keys(np.frombuffer(hashed, np.uint8).reshape(-1, KEY_BYTES))] = np.arange(len(video))
    return places


class WantedNames:
    """Whether an entry, `kind/key`, is one of this table's clips: a container."""

    def __init__(self, table: ClipTable):
        self.found = {}
        for kind in ("video", GIVEN, "image"):
            self._add(kind, table.columns[kind])
        self._add("text", table.columns["texts"].reshape(-1, KEY_BYTES))
        if "text" in self.found:
            self.found["pooled"] = self.found["text"]

    def _add(self, kind: str, keys: np.ndarray) -> None:
        if len(keys):
            keys = keys[sort_keys(keys)]
            self.found[kind] = SortedKeys(keys, SortedKeys.prefixes_of(keys))

    def __contains__(self, name: str) -> bool:
        kind, _, key = name.partition("/")
        return kind in self.found and self.found[kind].find(bytes.fromhex(key)) >= 0


def failed_paths(table: ClipTable, failed: Mapping[tuple[tuple[str, str], ...], str]) -> Iterator[tuple[str, str]]:
    """(path, reason) of the clips one of whose entries could not be made. failed: {keys of a job: reason}."""
    by_entry = {name: reason for keys, reason in failed.items() for name in keys}
    rows = table.selected()
    for kind in {kind for kind, _ in by_entry}:
        wanted = {bytes.fromhex(key): reason for (k, key), reason in by_entry.items() if k == kind}
        if kind in ("text", "pooled"):
            keys = table.columns["texts"].reshape(-1, KEY_BYTES)
            owner = np.repeat(np.arange(table.columns.num_rows), np.diff(table.columns["texts/ends"]) // KEY_BYTES)
        else:
            keys, owner = table.columns[kind], np.arange(table.columns.num_rows)
        sought = np.frombuffer(b"".join(sorted(wanted)), np.uint8).reshape(-1, KEY_BYTES)
        at = SortedKeys(sought, SortedKeys.prefixes_of(sought)).find_all(keys)
        for i in np.flatnonzero((at >= 0) & np.isin(owner, rows)):
            yield table.path(int(owner[i])), wanted[keys[i].tobytes()]
