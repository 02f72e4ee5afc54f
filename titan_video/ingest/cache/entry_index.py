"""What the shards of a cache hold, as columns in a file that all ranks map: a rank's own memory does not grow with the
entries.

The file is made from the manifest and the shards, and named by their names and sizes; a shard never changes. Entries
that a process writes, or finds in newer shards, are in a dict beside it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np

from titan_video.data.latent_cache import LatentCache, content_hash, entry_names
from titan_video.ingest.columns import Columns, ColumnWriter, SortedKeys, is_new, sort_keys, used
from titan_video.ingest.files.refused import reading
from titan_video.tools.files import StorageError, optional_write, writing

KEY_BYTES = 32
VERSION = 1  # raise it when an index of the same name would hold something else
NO_COLUMNS = np.dtype([])


class EntryIndex(MutableMapping[str, str]):
    """{entry: shard}. shards: {name: bytes} of those in the file. Raises ValueError, as `Columns`."""

    def __init__(self, path: str | os.PathLike):
        self.columns = Columns(path)
        names, sizes = self.columns.note["shards"], self.columns["sizes"].tolist()
        self.names: list[str] = names
        self.shards = dict(zip(names, sizes, strict=True))
        kinds = self.columns.note["kinds"]
        self.found = {k: SortedKeys(self.columns[f"{k}/keys"], self.columns[f"{k}/prefixes"]) for k in kinds}
        self.fresh: dict[str, str] = {}

    def __reduce__(self) -> tuple:
        return EntryIndex, (self.columns.path,)

    def __getitem__(self, name: str) -> str:
        if name in self.fresh:
            return self.fresh[name]
        kind, _, key = name.partition("/")
        raw = _raw(key)
        at = self.found[kind].find(raw) if raw and kind in self.found else -1
        if at < 0:
            raise KeyError(name)
        return self.names[self.columns[f"{kind}/shards"][at]]

    def __setitem__(self, name: str, shard: str) -> None:
        self.fresh[name] = shard

    def __delitem__(self, name: str) -> None:
        del self.fresh[name]

    def __len__(self) -> int:
        return sum(len(found.keys) for found in self.found.values()) + len(self.fresh)

    def __iter__(self) -> Iterator[str]:
        for kind, found in self.found.items():
            for row in range(len(found.keys)):
                yield f"{kind}/{found.keys[row].tobytes().hex()}"
        yield from self.fresh

    def counts(self) -> Counter[str]:
        """The number of entries by kind."""
        counts = Counter({kind: len(found.keys) for kind, found in self.found.items()})
        return counts + Counter(name.partition("/")[0] for name in self.fresh)


class NotListed(dict[str, str]):
    """Of a cache whose folder is not to be listed yet."""

    shards: Mapping[str, int] = MappingProxyType({})


def holds(cache: LatentCache, kind: str, keys: np.ndarray) -> np.ndarray:
    """bool [n]: whether the cache has the entries of a kind with these keys, uint8 [n, 32]."""
    index = cache.where
    found = np.zeros(len(keys), bool)
    if isinstance(index, EntryIndex) and kind in index.found:
        found = index.found[kind].find_all(keys) >= 0
    if not isinstance(index, EntryIndex) or index.fresh or cache.waiting:
        for i in np.flatnonzero(~found):
            found[i] = cache.has(kind, keys[i].tobytes().hex())
    return found


def make_index(cache: LatentCache, spare: Path | None = None) -> Path | None:
    """The file for all that the cache's folder holds now, which this process lists. None: it cannot be written, or
    there is no shard.

    spare: the folder for it where that of the cache cannot be written.
    One process calls it; `use_index` then takes it on all.
    """
    sizes = {shard: cache.shard_bytes(shard) for shard in cache.list_shards()}
    name = f"index-{content_hash(VERSION, sorted(sizes.items()))[:32]}.columns"
    if not sizes:
        return None
    paths = [folder / name for folder in (cache.folder, spare) if folder]
    for path in paths:
        with suppress(ValueError):
            EntryIndex(path)
            return used(path)
    what = "index of the cache"
    for path in paths:
        with optional_write(what, path) if path == paths[-1] else suppress(StorageError), writing(what, path):
            _write(path, sizes, listed_entries(cache, sizes))
            return used(path)
    return None


def use_index(cache: LatentCache, path: Path | None) -> None:
    """Take the index at `path` in place of what the cache knows; without one the folder is listed."""
    if path is None:
        return cache.refresh()
    cache.use(EntryIndex(path))


def listed_entries(cache: LatentCache, sizes: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """(shard, names of its entries) of all shards: by the manifest, else by their headers. UnreadableFile: of one."""
    listed = set()
    with suppress(OSError):
        for line in cache.manifest_lines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)
                shard, names = row["shard"], list(map(str.strip, row["entries"]))
                if sizes.get(shard) == row["bytes"] and shard not in listed:
                    listed.add(shard)
                    yield shard, names
    for shard in sorted(sizes):
        if shard not in listed:
            with reading("header of a shard", cache.folder / "shards" / shard):
                header, _ = cache.header(shard)
            yield shard, entry_names(header)


def _write(path: Path, sizes: Mapping[str, int], entries: Iterator[tuple[str, list[str]]]) -> None:
    names = sorted(sizes)
    numbers = {name: number for number, name in enumerate(names)}
    keys: dict[str, bytearray] = {}
    shards: dict[str, list[np.ndarray]] = {}
    for shard, held in entries:
        counts: Counter[str] = Counter()
        for name in held:
            kind, _, key = name.partition("/")
            if raw := _raw(key):
                keys.setdefault(kind, bytearray()).extend(raw)
                counts[kind] += 1
        for kind, count in counts.items():
            shards.setdefault(kind, []).append(np.full(count, numbers[shard], np.int32))
    with ColumnWriter(path.parent, NO_COLUMNS) as writer:
        for kind in sorted(keys):
            _put_kind(writer, kind, np.frombuffer(keys[kind], np.uint8).reshape(-1, KEY_BYTES), shards[kind])
        writer.put("sizes", np.array([sizes[name] for name in names], np.int64))
        writer.write(path, {"shards": names, "kinds": sorted(keys)}, "index of the cache", num_rows=len(names))


def _put_kind(writer: ColumnWriter, kind: str, keys: np.ndarray, shards: list[np.ndarray]) -> None:
    """The keys of a kind in order, each once: in the shard that comes first by its name."""
    number = np.concatenate(shards)
    order = np.argsort(number, kind="stable")
    order = order[sort_keys(keys[order])]
    order = order[is_new(keys[order])]
    keys = np.ascontiguousarray(keys[order])
    writer.put(f"{kind}/keys", keys)
    writer.put(f"{kind}/prefixes", SortedKeys.prefixes_of(keys))
    writer.put(f"{kind}/shards", number[order])


def _raw(key: str) -> bytes:
    """The bytes of a key; b"" where it is no hash."""
    with suppress(ValueError):
        return bytes.fromhex(key) if len(key) == 2 * KEY_BYTES else b""
    return b""
