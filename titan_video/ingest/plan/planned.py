"""The plan of a run as a table that all ranks read: all of them look at the clips, the first one decides.

    scan (first rank) -> what has no probe -> probe (all ranks, each its share) -> decide (first rank) -> table

A table is named by all that it depends on: options, names, captions, sizes and times of files. The same again is taken
from the cache folder, and nothing is decided anew.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from titan_video.data.latent_cache import content_hash
from titan_video.distributed.utils import broadcast_from_rank0, gather_objects
from titan_video.ingest.columns import used
from titan_video.ingest.decode.video import require
from titan_video.ingest.plan.build import FILES_TOGETHER, Planner, Scan
from titan_video.ingest.plan.entries import Plan
from titan_video.ingest.plan.plan_table import PlanTable, write_plan_table
from titan_video.ingest.plan.probes import ProbeStore, chunks, passing, share
from titan_video.tools.files import StorageError, atomic_write, optional_write, writing
from titan_video.tools.signals import Stopped

T = TypeVar("T")
REMARKED_ANEW = 100_000  # clips: what lies beside so few is looked at again at each start


class Part(NamedTuple):
    """Part `index`, from 0 on, of `count` of the work."""

    index: int
    count: int


ALL = Part(0, 1)


@dataclass(frozen=True)
class Tables:
    """Folders for tables: in that of the cache, where later runs find them, or in that of the run, if it is full or
    read-only.
    """

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, cache_folder: Path, dump_folder: Path) -> "Tables":
        return cls((cache_folder / "tables", dump_folder / "tables"))

    def make(self, write: Callable[[Path], T]) -> T:
        """What `write` returns, given the first of the folders that can be written. `write` says itself what cannot be
        written, by a StorageError, or read.
        """
        for folder in self.folders:
            with suppress(StorageError) if folder != self.folders[-1] else nullcontext():
                with writing("tables", folder):
                    folder.mkdir(parents=True, exist_ok=True)
                return write(folder)
        raise AssertionError("the last folder is written, or raises")

    def remembered(self, what: str, make: Callable[[], str]) -> str:
        """What `make` returns; another run that asks for the same takes it from a file. what: all it depends on."""
        name = f"text-{content_hash(what)[:32]}.json"
        for path in self.find(name):
            with suppress(OSError, ValueError):
                return str(json.loads(path.read_text()))
        text = make()
        self.make(lambda folder: atomic_write(folder / name, json.dumps(text)))
        return text

    def find(self, name: str) -> Iterator[Path]:
        return (path for folder in self.folders if (path := folder / name).exists())


def plan_on_ranks(planner: Planner, num_workers: int, tables: Tables, group: dist.ProcessGroup | None = None) -> Plan:
    """The plan, whose entries are a table.

    ValueError on all ranks: as `make_plan`, but for a plan without clips.
    """
    broadcast_from_rank0(lambda: require(planner.policy.decoder), group)
    found = _Looking(planner, tables)
    is_known = broadcast_from_rank0(found.scan, group)
    while not is_known and (files := broadcast_from_rank0(found.next_files, group)):
        _probe_share(planner, files, num_workers, group, found)
    return broadcast_from_rank0(found.plan, group)


class _Looking:
    """What the first rank knows while the plan is made."""

    def __init__(self, planner: Planner, tables: Tables):
        self.planner, self.tables = planner, tables
        self.table: PlanTable | None = None
        self.store: ProbeStore | None = None

    def scan(self) -> bool:
        """Whether the plan is there already."""
        self.scanned = Scan(self.planner, self.tables.folders)
        self.key = self.planner.key(self.scanned)
        for path in self.tables.find(_table_name(self.key)):
            with suppress(ValueError, KeyError, TypeError):
                table = PlanTable(path)
                if table.key == self.key:
                    self.table = table
                    used(path)
                    break
        if self.table is None:
            self.store = ProbeStore(self.planner.probes, self.planner.limits)
            missing = self.planner.missing(self.scanned, self.store)
            self.chunks = chunks(missing, FILES_TOGETHER * dist.get_world_size())
        return self.table is not None

    def next_files(self) -> dict[bytes, str]:
        return next(self.chunks, {})

    def plan(self) -> Plan:
        if self.table is not None:
            plan = self.table.plan()
            if self.scanned.num_records <= REMARKED_ANEW:
                plan = replace(plan, remarks=tuple(self.planner.remarks(self.scanned)))
        else:
            self.store.merge()
            plan = self.tables.make(lambda folder: self._write(folder).plan())
        self.scanned.close()
        return plan

    def _write(self, folder: Path) -> PlanTable:
        planner, limits = self.planner, self.planner.limits
        entries = planner.entries(self.scanned, self.store)
        plan = planner.plan(entries, planner.remarks(self.scanned))
        key = self.key
        if others := passing(self.store.unsaved):  # what is made of this plan must not be taken for the next one
            key = content_hash(key, others)
        if not planner.without_stills:
            return PlanTable(used(write_plan_table(folder / _table_name(key), plan, limits, key).path))
        whole = folder / f"plan-{key[:32]}-{os.uname().nodename}-{os.getpid()}.columns"
        try:
            plan = write_plan_table(whole, plan, limits).plan().without_single_frames()
            return PlanTable(used(write_plan_table(folder / _table_name(key), plan, limits, key).path))
        finally:
            whole.unlink(missing_ok=True)


def _table_name(key: str) -> str:
    return f"plan-{key[:32]}.columns"


def probe_part(planner: Planner, num_workers: int, part: Part) -> int:
    """Probe one part of the files that have no probe, with all ranks, and make no plan; returns how many this rank
    probed. Other jobs do the other parts; a plan then finds the probes of all.
    """
    scanned, store = Scan(planner), ProbeStore(planner.probes, planner.limits)
    rank, world, count = dist.get_rank(), dist.get_world_size(), 0
    for files in chunks(planner.missing(scanned, store), FILES_TOGETHER):
        mine = share(files, part.index * world + rank, part.count * world)
        store.probe(mine, num_workers)
        count += len(mine)
    scanned.close()
    return count


def _probe_share(
    planner: Planner,
    files: dict[bytes, str],
    num_workers: int,
    group: dist.ProcessGroup | None,
    found: _Looking,
) -> None:
    """This rank's share of the files; the first rank then knows the probes of all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    store = found.store if rank == 0 else ProbeStore(planner.probes, planner.limits)
    stopped, before = None, set(store.unsaved)
    try:
        store.probe(share(files, rank, world), num_workers)
    except Stopped as e:
        stopped = e
    unsaved = {key: probe for key, probe in store.unsaved.items() if key not in before}
    gathered = gather_objects((unsaved, stopped), group)
    for _, stop in gathered:
        if stop:
            raise stop
    if rank == 0 and world > 1:
        for others, _ in gathered:
            store.unsaved |= others
        store.open()


def write_report(plan: Plan, path: Path, key: str, others: bool = False) -> None:
    """`Plan.write_jsonl`, unless the file is there as it was written for the plan of this key.

    others: some of the plan's clips are dropped for reasons that the key does not know; it is written in any case.
    """
    stamp = _stamp_path(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        if key and not others and json.loads(stamp.read_text()) == _stamp(path, key):
            return
    plan.write_jsonl(path)
    with optional_write("note of the plan that was written", stamp):
        atomic_write(stamp, json.dumps(_stamp(path, "" if others else key) | ({"table": key} if others else {})))


def reported_plan(path: Path, tables: Tables) -> PlanTable | None:
    """The table of the plan of which the report at `path` was written; None: it is not there any more."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        noted = json.loads(_stamp_path(path).read_text())
        key = noted["plan"] or noted["table"]
        return next((table for file in tables.find(_table_name(key)) if (table := PlanTable(file)).key == key), None)
    return None


def _stamp_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.key")


def _stamp(path: Path, key: str) -> dict[str, object]:
    stat = path.stat()
    return {"plan": key, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
