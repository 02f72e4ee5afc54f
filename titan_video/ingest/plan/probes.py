"""Probes of many files, in worker processes of many ranks, kept between runs.

A probe is named by a hash of its file's path, size and time of change. Each process writes its probes as tables
(columns.py): once a minute into a small one, which takes the place of the one before, until that is full. Many tables
are merged into one. Caches of earlier versions have a small JSON file for each probe.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from titan_video.data.latent_cache import DAMAGE_ERRORS
from titan_video.ingest.columns import Columns, ColumnWriter, SortedKeys, TimesWriter, decode_times, is_new, sort_keys
from titan_video.ingest.decode.video import Probe, probe
from titan_video.ingest.decode.worker import map_in_workers
from titan_video.ingest.files import media
from titan_video.ingest.files.media import DecodeLimits
from titan_video.tools import heartbeat
from titan_video.tools.files import optional_write
from titan_video.tools.signals import Stopped, stop_requested

PROBE_VERSION = 3
PROBES_A_TABLE, SECONDS_A_TABLE = 20_000, 60.0
TABLES_KEPT = 16  # more are merged
PASSING = ("unreadable: ", "too slow", "crashed", "too large: decoding")  # reasons that the next try may not meet
KEPT_SECONDS = 86_400  # after a merge the merged ones are deleted: others may have them mapped
NUMBERS = ("width", "height", "end")
TEXTS = ("sha256", "time_base", "reason", "colour", "formerly")
ROW = np.dtype(
    [("key", "u1", (32,)), ("prefix", "u8"), *((name, "i8") for name in (*NUMBERS, "first", "step", "place", "count"))]
)


def identity(path: str) -> dict[str, Any]:
    """What a probe of `path` is valid for. Raises OSError."""
    return {"probe": PROBE_VERSION, **media.version(path)}


def probe_key(path: str) -> bytes:
    """32 bytes, another one when the file changes. Raises OSError."""
    return hashlib.sha256(repr(identity(path)).encode()).digest()


class Prober:
    """A data set for `map_in_workers`: probes by path. What has no probe within the limits is tried again."""

    def __init__(self, limits: DecodeLimits):
        self.decode_limits = limits

    def limits(self, path: str) -> DecodeLimits:
        return self.decode_limits

    def name(self, path: str) -> str:
        return path

    def failed(self, path: str, reason: str) -> Probe:
        return Probe(reason=reason)

    def __getitem__(self, path: str) -> Probe:
        return probe(path, self.decode_limits)


class ProbeStore:
    """The probes in `folder`, and those made since.

    unsaved: {key: probe} of those that are in no table: beyond a limit, failed in passing, or the folder cannot be
        written.
    """

    def __init__(self, folder: str | os.PathLike, limits: DecodeLimits):
        self.folder, self.limits = Path(folder), limits
        self.unsaved: dict[bytes, Probe] = {}
        self.waiting: dict[bytes, Probe] = {}
        self.oldest = 0.0
        self.small: Columns | None = None  # the table of this process that is not full
        self.open()

    def open(self) -> None:
        """Take what other processes have written."""
        found = []
        for path in sorted(self.folder.glob("*.columns")):
            with suppress(ValueError):  # not whole, or just replaced: the files are probed again
                found.append(_open(path))
        merged = {name: columns.path for columns in found for name in columns.note["merged"]}
        self.tables = [_keyed(columns) for columns in found if columns.path.name not in merged]
        for path in (columns.path for columns in found if columns.path.name in merged):
            with suppress(OSError):
                if time.time() - merged[path.name].stat().st_mtime > KEPT_SECONDS:
                    path.unlink(missing_ok=True)
        self.has_files = next(self.folder.glob("??"), None) is not None

    def get(self, key: bytes, path: str) -> Probe | None:
        if found := self.unsaved.get(key) or self.waiting.get(key):
            return found
        for columns, keys in self.tables:
            if (row := keys.find(key)) >= 0:
                return _read(columns, row)
        return self._from_file(path) if self.has_files else None

    def has(self, key: bytes, path: str) -> bool:
        is_known = key in self.unsaved or key in self.waiting or any(keys.find(key) >= 0 for _, keys in self.tables)
        return is_known or (self.has_files and self._from_file(path) is not None)

    def _from_file(self, path: str) -> Probe | None:
        name = hashlib.sha256(
            (path if media.is_url(path) else os.path.abspath(path)).encode("utf-8", "surrogateescape")
        ).hexdigest()
        try:
            saved = json.loads((self.folder / name[:2] / f"{name}.json").read_text(encoding="utf-8"))
            found = _whole(Probe(**saved["found"]))
            return found and replace(found, pts=tuple(found.pts)) if saved["of"] == identity(path) else None
        except (OSError, *DAMAGE_ERRORS):  # not there, or not whole: probe again
            return None

    def probe(self, files: Mapping[bytes, str], num_workers: int) -> None:
        """Probe files, {key: path}. Each is kept, so a stop request ends this early: Stopped."""
        fresh = map_in_workers(Prober(self.limits), files.values(), min(num_workers, len(files)))
        with heartbeat.own_work("looking at clips"):
            for (key, path), found in zip(files.items(), fresh, strict=True):
                self.add(key, found)
                heartbeat.progress(path)
                if stop_requested():
                    self.flush()
                    raise Stopped("stopped while looking at clips; the same command goes on from there")
        self.flush()

    def add(self, key: bytes, found: Probe) -> None:
        if found.reason.startswith(("too large", "too long", *PASSING)):
            self.unsaved[key] = found  # another limit may be set next time, or it may pass
            return
        self.oldest = self.oldest if self.waiting else time.monotonic()
        self.waiting[key] = found
        if len(self.waiting) >= PROBES_A_TABLE or time.monotonic() - self.oldest > SECONDS_A_TABLE:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a table. Without it the next start probes again."""
        waiting, self.waiting = self.waiting, {}
        if not waiting:
            return
        old = self.small
        rows = {} if old is None else {old["key"][row].tobytes(): row for row in range(old.num_rows)}
        # Not all at a time: a long file has many times.
        probes = ((key, waiting[key] if key in waiting else _read(old, rows[key])) for key in sorted(rows | waiting))
        if not self._write(probes, ()):
            self.unsaved |= waiting
            return
        if old is not None:
            self.tables = [(columns, keys) for columns, keys in self.tables if columns.path != old.path]
            with suppress(OSError):
                old.path.unlink(missing_ok=True)
        new = self.tables[-1][0]
        self.small = new if new.num_rows < PROBES_A_TABLE else None

    def merge(self) -> None:
        """One table in place of many. One process calls it, when all have written."""
        if len(self.tables) <= TABLES_KEPT:
            return
        old = [columns for columns, _ in self.tables]
        table = np.repeat(np.arange(len(old)), [columns.num_rows for columns in old])
        row = np.concatenate([np.arange(columns.num_rows) for columns in old])
        keys = np.concatenate([columns["key"] for columns in old])
        order = sort_keys(keys)
        chosen = order[is_new(keys[order])].tolist()
        probes = ((keys[n].tobytes(), _read(old[table[n]], int(row[n]))) for n in chosen)
        if self._write(probes, [columns.path.name for columns in old]):
            self.tables, self.small = self.tables[-1:], None

    def _write(self, probes: Iterable[tuple[bytes, Probe]], merged: Sequence[str]) -> bool:
        """Whether a table of these could be written. merged: names of the tables whose place it takes."""
        path = self.folder / f"{time.time_ns():x}-{os.uname().nodename}-{os.getpid()}.columns"
        with optional_write("probes", self.folder):
            with ColumnWriter(self.folder, ROW, ("texts",)) as writer:
                times = TimesWriter(writer)
                for key, found in probes:
                    texts = json.dumps([getattr(found, name) for name in TEXTS])
                    numbers = [getattr(found, name) for name in NUMBERS]
                    raw, prefix = np.frombuffer(key, np.uint8), int.from_bytes(key[:8], "big")
                    writer.append((raw, prefix, *numbers, *times.code(found.pts)), texts.encode())
                writer.write(path, {"merged": list(merged)}, "probes")
            with suppress(ValueError):  # it cannot be read back
                self.tables.append(_keyed(_open(path)))
                return True
        return False


def _open(path: Path) -> Columns:
    """A small table is read, as its process may delete it."""
    columns = Columns(path)
    return columns if columns.num_rows >= PROBES_A_TABLE else Columns(path, is_copied=True)


def _keyed(columns: Columns) -> tuple[Columns, SortedKeys]:
    return columns, SortedKeys(columns["key"], columns["prefix"])


def _read(columns: Columns, row: int) -> Probe:
    numbers = {name: int(columns[name][row]) for name in NUMBERS}
    pts = decode_times(columns, *(int(columns[name][row]) for name in ("first", "step", "place", "count")))
    return Probe(**dict(zip(TEXTS, json.loads(columns.blob("texts", row)), strict=True)), **numbers, pts=pts)


def _whole(found: Probe) -> Probe | None:
    """The probe, unless something in it is of another type than it must be."""
    is_whole = all(isinstance(n, int) for n in (found.width, found.height, found.end, *found.pts))
    is_whole = is_whole and Fraction(found.time_base) > 0 and isinstance(found.sha256 + found.colour, str)
    return found if is_whole else None


def chunks(files: Iterator[tuple[bytes, str]], size: int) -> Iterator[dict[bytes, str]]:
    """The files, {key: path}, at most `size` at a time."""
    some: dict[bytes, str] = {}
    for key, path in files:
        some[key] = path
        if len(some) == size:
            yield some
            some = {}
    if some:
        yield some


def share(files: Mapping[bytes, str], rank: int, world_size: int) -> dict[bytes, str]:
    """Those of one rank, by their keys: the same whichever other files there are."""
    return {key: path for key, path in files.items() if int.from_bytes(key[:8], "big") % world_size == rank}


def passing(found: Mapping[bytes, Probe]) -> list[tuple[str, str]]:
    """(key, reason) of the files that have no probe within the limits, but may have one the next time."""
    return sorted((key.hex(), p.reason) for key, p in found.items() if p.reason.startswith(PASSING))
