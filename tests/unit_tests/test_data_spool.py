"""Where what does not stay in memory goes while clips are planned; what is said when that, or a read, is refused."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.small_disk import fill, free, small_disk
from tests.unit_tests.data_clips import captioned
from titan_video.data.latent_cache import LatentCache
from titan_video.ingest.__main__ import main
from titan_video.ingest.cache.cache_keys import write_manifest
from titan_video.ingest.cache.entry_index import EntryIndex, make_index
from titan_video.ingest.columns import ColumnWriter
from titan_video.ingest.decode.video import Probe
from titan_video.ingest.files import sources, spool
from titan_video.ingest.files.media import DEFAULT_LIMITS
from titan_video.ingest.files.refused import UnreadableFile
from titan_video.ingest.files.spool import Spool
from titan_video.ingest.plan import probes
from titan_video.ingest.plan.planned import Tables
from titan_video.ingest.plan.probes import ProbeStore
from titan_video.tools.files import StorageError

FULL = r"No space left on device \([\d,]+ bytes needed, [\d,]+ bytes were free\)$"
LINES = [f"{n} {'x' * (n % 97)}\r\x0b\n".encode() for n in range(20_000)]  # a megabyte


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as path:
        yield path


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(spool, "MEMORY", 2000)
    monkeypatch.setattr(spool, "BLOCK", 1000)


def folder_of(file):
    return Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).parent


@pytest.fixture
def toml(tmp_path):
    (tmp_path / "clips").mkdir()
    for k in range(3):
        captioned(tmp_path / "clips" / f"{k}.mp4", "a caption " * 300, count=9, fps=8)
    file = tmp_path / "run.toml"
    data = f'[data]\npath = "{tmp_path}/clips"\nbuckets = [[5, 32, 32]]\nfps = 8.0\nnum_workers = 0\n'
    file.write_text(f'{data}[encoder]\nname = "debug"\n[job]\ndump_folder = "{tmp_path}/run"\n')
    return file


@pytest.mark.parametrize("count", [0, 3, 500, len(LINES)])
def test_lines_are_read_as_they_were_written(tmp_path, little_memory, count):
    lines = Spool("list", [tmp_path / "new" / "folder"])
    for n, line in enumerate(LINES[:count]):
        lines.append(line)
        assert n % 2000 or list(lines) == LINES[: n + 1]
    first, second = iter(lines), iter(lines)
    assert next(first, b"") == next(second, b"") and list(first) == list(second) == LINES[1:count]
    assert (lines.file is None) == (count <= 3) and (count <= 3 or folder_of(lines.file) == tmp_path / "new" / "folder")
    lines.close()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_list_goes_on_in_the_next_folder(disk, tmp_path, little_memory):
    """The first one is full in the middle of it."""
    fill(disk, 400_000)
    lines = Spool("list", [disk / "tables", tmp_path / "tables"])
    for line in LINES:
        lines.append(line)
    assert list(lines) == LINES and folder_of(lines.file) == tmp_path / "tables"


def test_a_full_disk_is_one_line(disk, little_memory):
    fill(disk, 400_000)
    lines = Spool("list of clips", [disk / "tables"])
    with pytest.raises(StorageError, match=f"^{disk}/tables: cannot write the list of clips: {FULL}"):
        for line in LINES:
            lines.append(line)
    lines.close()
    with pytest.raises(StorageError, match=f"^{disk}/tables: cannot write the table: {FULL}"):
        with ColumnWriter(disk / "tables", np.dtype([]), ()) as writer:
            for _ in range(100):
                writer.put("n", np.zeros(10_000, np.int64))


def test_the_list_of_clips_lies_beside_the_cache(toml, tmp_path, little_memory, monkeypatch):
    """And not in the temporary folder of the machine, which may be small or in memory."""
    folders, real = [], tempfile.TemporaryFile

    def temporary(*args, dir=None, **kwargs):
        folders.append(dir)
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda *_, **__: pytest.fail("of the machine"))
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    for part in ("0/2", "1/2"):  # the folder's name decides which part has which of the clips
        main(["plan", str(toml), "--part", part])
    assert set(folders) == {tmp_path / "run/cache/tables", tmp_path / "run/cache/probes"}
    main(["plan", str(toml)])
    assert set(folders) == {tmp_path / "run/cache/tables", tmp_path / "run/cache/probes"}


def test_a_start_on_a_full_disk(toml, tmp_path, disk, little_memory, capsys):
    """A full disk of the cache: the run's folder takes the list. Both full: one line."""
    fill(disk)
    main(["plan", str(toml), "--data.cache_folder", str(disk / "cache")])
    assert "3 found, 3 kept" in capsys.readouterr().out
    assert [p.name[:5] for p in (tmp_path / "run/tables").iterdir()] == ["plan-"]
    on_disk = ["--data.cache_folder", str(disk / "cache"), "--job.dump_folder", str(disk / "run")]
    with pytest.raises(SystemExit, match=f"^error: {disk}/run/tables: cannot write the list of clips: {FULL}"):
        main(["plan", str(toml), *on_disk])
    free(disk)
    main(["plan", str(toml), *on_disk])


# ---- what is refused while it is read ----


def raise_io(name):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    return fail


def test_what_cannot_be_read_is_not_told_as_a_write(toml, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_folders", raise_io("clips/away"))
    with pytest.raises(SystemExit, match="^error: clips/away: cannot read the files beside the clips: Input/output"):
        main(["plan", str(toml)])


def test_tables_say_what_was_done(tmp_path):
    """The second folder is for what the first does not take, not for what cannot be read."""
    tables, seen = Tables((tmp_path / "a", tmp_path / "b")), []

    def write(folder):
        seen.append(folder.name)
        raise UnreadableFile("clips: cannot read the files beside the clips: away")

    with pytest.raises(UnreadableFile, match="^clips: cannot read"):
        tables.make(write)
    assert seen == ["a"]


def test_a_header_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    cache = LatentCache(tmp_path / "cache", "v", "t")
    cache.write("text", f"{1:064x}", torch.ones(1), {})
    cache.flush()
    (shard,) = cache.shards
    index = make_index(cache)
    known = LatentCache(tmp_path / "cache", "v", "t")
    index.unlink()
    monkeypatch.setattr(LatentCache, "header", raise_io(None))
    words = f"^{tmp_path}/cache/shards/{shard}: cannot read the header of a shard: Input/output error$"
    for spare in (None, tmp_path / "tables"):
        with pytest.raises(UnreadableFile, match=words):
            make_index(known, spare)
    monkeypatch.undo()
    known.use(EntryIndex(make_index(known)))
    monkeypatch.setattr(LatentCache, "header", raise_io(None))
    with pytest.raises(UnreadableFile, match=words):
        write_manifest(known)


def test_probes_that_cannot_be_read_back_are_kept(tmp_path, monkeypatch):
    store = ProbeStore(tmp_path / "probes", DEFAULT_LIMITS)
    store.add(b"k" * 32, Probe("content", 8, 8, "1/25", (0, 1), 2))

    def gone(path):
        raise ValueError(f"{path}: is not there") from OSError(errno.ESTALE, "away")

    monkeypatch.setattr(probes, "_open", gone)
    store.flush()
    assert store.get(b"k" * 32, "").sha256 == "content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_probe_that_failed_in_passing_is_not_kept(tmp_path, monkeypatch, number):
    clip = str(captioned(tmp_path / "a.mp4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_video.ingest.files.media.open_regular", raise_number(number))
        store = ProbeStore(tmp_path / "probes", DEFAULT_LIMITS)
        store.probe({b"k" * 32: clip}, 0)
        assert store.get(b"k" * 32, clip).reason == f"unreadable: {os.strerror(number)}"
        assert probes.passing(store.unsaved)
    assert not ProbeStore(tmp_path / "probes", DEFAULT_LIMITS).has(b"k" * 32, clip)


def raise_number(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail
