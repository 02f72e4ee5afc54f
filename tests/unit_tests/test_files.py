"""Atomic writes and the hash of a file."""

import hashlib
import os

import pytest

from titan_video.tools import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "new" / "x.json"
    for data in ("a\nb", b"\x00\xff"):
        files.atomic_write(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
        assert names(path.parent) == ["x.json"]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_the_content_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls = []
    replace, sync = os.replace, files.sync
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    monkeypatch.setattr(files, "sync", lambda path: (calls.append("folder" if path.is_dir() else "file"), sync(path)))
    files.atomic_write(tmp_path / "x", "new")
    assert calls == ["file", "rename", "folder"]


def test_sha256(tmp_path):
    data = os.urandom((1 << 24) + 5)
    (tmp_path / "x").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert files.sha256(tmp_path / "x") == expected
