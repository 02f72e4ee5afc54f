"""A cache of which a copy lies in an object store (data.cache_url): what the folder lacks is read there, by fsspec.

    <url>/shards/*.safetensors, <url>/manifest.jsonl    as data/latent_cache.py says; nothing is written there
    <folder>/fetched/                                   parts of shards that were read, up to data.cache_url_gib

A part is the header of a shard, or one entry: shards are not fetched whole, as training draws entries in random order.
The parts that were not used for longest are deleted first. All ranks of a machine share them.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from titan_video.config.job_config import JobConfig
from titan_video.data.latent_cache import MANIFEST, LatentCache, content_hash
from titan_video.tools import heartbeat
from titan_video.tools.files import atomic_path, optional_write
from titan_video.tools.parts import find_module

HEADER_GUESS = 1 << 17
LOOKED_AFTER, KEPT = 64, 7 / 8  # the folder is measured after each 1/64 of its bound, and cut to 7/8 of it


class RemoteCache(LatentCache):
    """url: of the copy. max_gib: of what is kept of it; 0: nothing. remote: shards of the store and their bytes
    (`list_store`), which one rank finds for all. Other arguments: see `LatentCache`.
    """

    header_guess = HEADER_GUESS

    def __init__(self, *args: Any, url: str, max_gib: float, remote: dict[str, int], **kwargs: Any):
        self.url, self.max_bytes, self.remote = url.rstrip("/"), int(max_gib * 2**30), remote
        self.since_measured = self.max_bytes  # bytes kept
        self.measuring = threading.Lock()
        self.store, self.root = _open_store(url)
        super().__init__(*args, **kwargs)

    def list_shards(self) -> set[str]:
        return super().list_shards() | self.remote.keys()

    def shard_bytes(self, shard: str) -> int:
        with suppress(FileNotFoundError):
            return super().shard_bytes(shard)
        if shard not in self.remote:
            raise FileNotFoundError(2, "no such shard, here or in the store", shard)
        return self.remote[shard]

    def manifest_lines(self) -> Iterator[str]:
        with suppress(OSError):
            yield from super().manifest_lines()
        with heartbeat.reading(self.url), self.store.open(f"{self.root}/{MANIFEST}", "rt", encoding="utf-8") as f:
            yield from f

    def read_bytes(self, shard: str, first: int, last: int) -> bytearray:
        if shard not in self.remote or (self.folder / "shards" / shard).exists():
            return super().read_bytes(shard, first, last)
        last = min(last, self.remote[shard])
        path = self._path(shard, first, last)
        with suppress(OSError):
            data = bytearray(path.read_bytes())
            if len(data) == last - first:
                os.utime(path)
                return data
        data = self._fetch(shard, first, last)
        if len(data) == last - first <= self.max_bytes:
            self._keep(path, data)
        return data

    def _path(self, shard: str, first: int, last: int) -> Path:
        name = content_hash(self.url, shard, self.remote[shard], first, last)
        return self.folder / "fetched" / name[:2] / name

    def _fetch(self, shard: str, first: int, last: int) -> bytearray:
        address = f"{self.url}/shards/{shard}"
        try:
            with heartbeat.reading(address):
                return bytearray(self.store.cat_file(f"{self.root}/shards/{shard}", start=first, end=last))
        except Exception as e:
            raise OSError(5, f"{address}: {type(e).__name__}: {e}") from e

    def _keep(self, path: Path, data: bytearray) -> None:
        """Without it the part is fetched again."""
        with optional_write("parts of shards", path), atomic_path(path, "part of a shard", len(data)) as temporary:
            temporary.write_bytes(data)
        with self.measuring:
            self.since_measured += len(data)
            if self.since_measured * LOOKED_AFTER >= self.max_bytes:
                self.since_measured = 0
                self._cut()

    def _cut(self) -> None:
        """Delete the parts that were used longest ago. Another rank may do so at the same time."""
        parts = []
        for path in (self.folder / "fetched").glob("??/*"):
            with suppress(OSError):
                stat = path.stat()
                parts.append((stat.st_mtime_ns, stat.st_size, path))
        size = sum(size for _, size, _ in parts)
        for _, part, path in sorted(parts) if size > KEPT * self.max_bytes else ():
            if size <= KEPT * self.max_bytes:
                return
            with suppress(OSError):
                path.unlink(missing_ok=True)
            size -= part


def list_store(url: str) -> dict[str, int]:
    """The shards of the copy at `url`, and their bytes. ValueError: it cannot be listed; the message names it."""
    store, root = _open_store(url)
    try:
        files = [(info["name"].rpartition("/")[2], info["size"]) for info in store.ls(f"{root}/shards", detail=True)]
    except Exception as e:  # drivers raise errors of their own
        raise ValueError(
            f"data.cache_url: {url} cannot be listed ({type(e).__name__}: {e}); give a copy of a cache folder, whose "
            f"shards are in {url.rstrip('/')}/shards"
        ) from e
    return {name: int(size) for name, size in files if name.endswith(".safetensors")}


def _open_store(url: str) -> tuple[Any, str]:
    """(file system, path in it) of fsspec. ValueError: it knows none, or none is installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url.rstrip("/"))
    except Exception as e:
        raise ValueError(f"data.cache_url: {url} cannot be opened ({type(e).__name__}: {e})") from e


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of data.cache_url, one line per mistake."""
    url = config.data.cache_url
    if "://" not in url:
        yield f"data.cache_url: given {url}; legal: a URL that fsspec opens, such as s3://bucket/cache"
    elif not find_module("fsspec"):
        yield f"data.cache_url: given {url}, which needs fsspec and its driver for this protocol: pip install fsspec"
    else:
        import fsspec

        try:
            fsspec.get_filesystem_class(url.partition("://")[0])
        except (ValueError, ImportError) as e:
            yield f"data.cache_url: given {url}; {e}"
    if config.encoder.placement != "cached":
        yield (
            f"data.cache_url: given {url}, but encoder.placement is {config.encoder.placement}; set that to cached, or "
            f"leave this empty"
        )
