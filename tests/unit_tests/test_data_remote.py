"""A cache of which a copy lies in an object store, here fsspec's in memory and its local one."""

import threading

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.helpers import run_ranks
from tests.unit_tests.data_clips import captioned
from titan_video.config.check import check
from titan_video.config.job_config import Data, Encoder, Job, JobConfig
from titan_video.config.manager import ConfigError
from titan_video.data.latent_cache import LatentCache
from titan_video.encoders.debug import DebugEncoders
from titan_video.ingest.__main__ import main
from titan_video.ingest.cache import remote_cache
from titan_video.ingest.cache.cache_keys import write_manifest
from titan_video.ingest.cache.entry_index import EntryIndex, make_index
from titan_video.ingest.cache.remote_cache import RemoteCache, list_store
from titan_video.ingest.prepare import open_run_cache
from titan_video.models.conditioning import ConditioningSpec

URL = "memory://bucket/cache"
NAMES = [f"{n:064x}" for n in range(6)]


@pytest.fixture
def store():
    """Empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def fill(folder, store, with_manifest=True):
    """A copy of a cache of three shards; returns its tensors."""
    cache, tensors = LatentCache(folder, "v", "t"), {}
    for n, name in enumerate(NAMES):
        tensors[name] = torch.randn(500 + n)
        cache.write("video", name, tensors[name], {"of": name})
        if n % 2:
            cache.flush()
    if with_manifest:
        write_manifest(cache)
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe(f"/bucket/cache/{path.relative_to(folder)}", path.read_bytes())
    return tensors


def remote(folder, url=URL, max_gib=1, **kwargs):
    return RemoteCache(folder, "v", "t", url=url, max_gib=max_gib, remote=list_store(url), **kwargs)


def fetches(cache, monkeypatch):
    made, fetch = [], cache._fetch
    monkeypatch.setattr(cache, "_fetch", lambda *where: made.append(where) or fetch(*where))
    return made


@pytest.mark.parametrize("with_manifest", [True, False])
def test_what_the_folder_lacks_is_read_from_the_store(tmp_path, store, monkeypatch, with_manifest):
    tensors = fill(tmp_path / "whole", store, with_manifest)
    cache = remote(tmp_path / "here")
    made = fetches(cache, monkeypatch)
    cache._headers.clear()
    assert all(torch.equal(cache.read("video", name), x) for name, x in tensors.items())
    assert (
        len(made) == (3 if with_manifest else 0) + 6
    )  # headers and entries; a start without a manifest has the headers
    made.clear()
    assert all(torch.equal(cache.read("video", name), x) for name, x in tensors.items()) and made == []
    other = remote(tmp_path / "here", f"{URL}/")  # another rank, a later run
    made = fetches(other, monkeypatch)
    threads = [threading.Thread(target=other.read, args=("video", name)) for name in NAMES]
    [t.start() for t in threads], [t.join() for t in threads]
    assert made == []
    cache.write("video", "ab" * 32, torch.ones(3), {"of": "new"})
    cache.flush()
    assert len(list((tmp_path / "here" / "shards").iterdir())) == 1 and len(cache.list_shards()) == 4
    indexed = EntryIndex(make_index(cache))
    known = remote(tmp_path / "here", known=indexed)
    assert len(indexed) == 7 and torch.equal(known.read("video", NAMES[3]), tensors[NAMES[3]])
    assert torch.equal(known.read("video", "ab" * 32), torch.ones(3))


@pytest.mark.parametrize("kept", [0, 6000])
def test_what_is_kept_of_the_store_is_bounded(tmp_path, store, monkeypatch, kept):
    monkeypatch.setattr(RemoteCache, "header_guess", 8)
    tensors = fill(tmp_path / "whole", store)
    cache = remote(tmp_path / "here", max_gib=kept / 2**30)
    made = fetches(cache, monkeypatch)
    for _ in range(3):
        for name, x in tensors.items():
            assert torch.equal(cache.read("video", name), x)
            files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in files) <= kept
    assert len(made) > 2 * len(tensors) and bool(files) == bool(kept)


def test_a_damaged_or_missing_copy_is_named(tmp_path, store):
    fill(tmp_path / "whole", store)
    with pytest.raises(ValueError, match="data.cache_url: memory://nothing cannot be listed .*shards are in"):
        remote(tmp_path / "a", "memory://nothing")
    cache = remote(tmp_path / "a")
    shard = cache.where[f"video/{NAMES[0]}"]
    path = f"/bucket/cache/shards/{shard}"
    data = bytearray(store.cat_file(path))
    data[-1] ^= 1
    store.pipe(path, bytes(data))
    with pytest.raises(ValueError, match="its checksum differs"):
        [cache.read("video", name) for name in NAMES if cache.where[f"video/{name}"] == shard]
    for part in (tmp_path / "a" / "fetched").glob("*/*"):
        part.unlink()
    store.rm(path)
    with pytest.raises(ValueError, match=f"cannot be read .*{URL}/shards/{shard}: FileNotFoundError"):
        cache.read("video", NAMES[0])


def lists_of_the_store(folder):
    """What this rank has asked of the store while it opened the cache; what it knows; an entry that it reads."""
    asked = []

    class Counted(LocalFileSystem):
        def ls(self, path, **kwargs):
            asked.append(path)
            return super().ls(path, **kwargs)

        def open(self, path, *args, **kwargs):
            asked.append(path)
            return super().open(path, *args, **kwargs)

    fsspec.register_implementation("file", Counted, clobber=True)
    data = Data(cache_url=f"file://{folder}/whole", cache_folder=str(folder / "here"))
    config = JobConfig(Job(dump_folder=str(folder / "run")), data=data)
    cache = open_run_cache(config, DebugEncoders(16), ConditioningSpec(), None)
    return (
        list(dict.fromkeys(asked)),
        sorted(cache.shards),
        cache.list_shards(),
        cache.read("video", "ab" * 32).tolist(),
    )


@pytest.mark.parametrize("world", [1, 3])
def test_one_rank_lists_the_store_for_all(tmp_path, world):
    encoders = DebugEncoders(16)
    cache = LatentCache(tmp_path / "whole", encoders.video_id(), encoders.text_id())
    cache.write("video", "ab" * 32, torch.ones(3), {"of": "x"})
    cache.flush()
    write_manifest(cache)
    found = run_ranks(lists_of_the_store, world, tmp_path)
    (first, shards, _, _), *others = found
    assert first == [f"{tmp_path}/whole/shards", f"{tmp_path}/whole/manifest.jsonl"] and len(shards) == 1
    assert all(asked == [] for asked, *_ in others)
    assert all(rest == [shards, set(shards), [1, 1, 1]] for _, *rest in found)


def test_rules():
    def said(url, **encoder):
        config = JobConfig(data=Data(path="embedded:shapes-2", cache_url=url), encoder=Encoder(name="debug", **encoder))
        return "\n".join(remote_cache.rules(config, 1))

    assert said(URL) == ""
    assert said("a/folder").startswith("data.cache_url: given a/folder; legal: a URL that fsspec opens")
    assert "nosuch" in said("nosuch://x") and "Protocol not known" in said("nosuch://x")
    assert "encoder.placement is colocated; set that to cached" in said(URL, placement="colocated")
    with pytest.raises(ConfigError, match="data.cache_url: given a/folder"):
        check(JobConfig(data=Data(path="embedded:shapes-2", cache_url="a/folder"), encoder=Encoder(name="debug")), 1)


def test_a_run_takes_its_latents_from_the_copy(tmp_path, capsys):
    """As `encode` and train.py open it: nothing is encoded again."""
    (tmp_path / "clips").mkdir()
    for name in "ab":
        captioned(tmp_path / "clips" / f"{name}.mp4", f"clip {name}", count=9, fps=8)
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'[data]\npath = "{tmp_path}/clips"\nbuckets = [[5, 32, 32]]\nfps = 8.0\n[encoder]\nname = "debug"\n'
    )
    main(["encode", str(toml), "--job.dump_folder", str(tmp_path / "first")])
    assert len(list((tmp_path / "first/cache/shards").iterdir())) >= 1
    second = ["--job.dump_folder", str(tmp_path / "second"), "--data.cache_url", f"file://{tmp_path}/first/cache"]
    main(["encode", str(toml), *second])
    assert "2 clips in" in capsys.readouterr().out
    assert not (tmp_path / "second/cache/shards").exists()
