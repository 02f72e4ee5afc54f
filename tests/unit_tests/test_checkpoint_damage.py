"""Damaged and malicious checkpoints: every altered file is refused by name, and nothing in it is executed."""

import json
import os
import pickle
import random
import shutil
from enum import Enum

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit_tests.test_checkpoint import Weights, manager, reseal, save_steps
from titan_video.checkpoint import files
from titan_video.checkpoint.files import InvalidCheckpoint


def damage(path, rng):
    """Flip a bit, cut the tail off, or delete the file; says which."""
    data, kind = bytearray(path.read_bytes()), rng.choice(["flip", "cut", "delete"])
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.unlink()
    return kind


def test_damaged_files_are_refused_by_name(tmp_path):
    save_steps(tmp_path, [1])
    rng, kinds, folder = random.Random(0), set(), tmp_path / "step-1"
    for i in range(200):
        path = sorted(folder.iterdir())[i % 4]
        original = path.read_bytes()
        kinds.add((path.name, damage(path, rng)))
        with pytest.raises(InvalidCheckpoint) as error:
            files.verify(folder)
        assert str(error.value).startswith(f"{path}: ")
        path.write_bytes(original)
        files.verify(folder)
    assert len(kinds) == 12, "every file in every way"


def test_every_part_of_the_manifest_counts(tmp_path):
    save_steps(tmp_path, [1])
    path = tmp_path / "step-1/manifest.json"
    original = path.read_bytes()
    compact = json.dumps(json.loads(original)).encode()
    for text in (
        original + b"\n",
        original[:-1],
        original.replace(b"\n", b"\r\n"),
        original.replace(b": 1,", b":  1,"),
        compact,
        b"[" * 100_000,
    ):
        path.write_bytes(text)
        with pytest.raises(InvalidCheckpoint, match="manifest.json"):
            files.read_manifest(path.parent)
    for bit in range(0, len(original) * 8, 13):  # 13 and 8 have no common divisor: every kind of flip
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(InvalidCheckpoint, match="manifest.json"):
            files.read_manifest(path.parent)


def test_files_the_manifest_does_not_know(tmp_path):
    save_steps(tmp_path, [1])
    folder = tmp_path / "step-1"
    (folder / "notes.txt").write_text("mine")
    files.verify(folder)
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    with pytest.raises(InvalidCheckpoint, match="__1_0.distcp: not in the manifest"):
        files.verify(folder)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickle_payload_in_the_index_is_not_executed(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    marker, path = tmp_path / "executed", tmp_path / "step-2/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Payload(marker)
    for payload in (
        pickle.dumps(Payload(marker)),
        pickle.dumps(metadata),
        pickle.dumps(Payload(marker), protocol=0),
        b"ctorch\nload\n.",
    ):
        path.write_bytes(payload)
        reseal(path.parent, 2)
        with pytest.raises(
            InvalidCheckpoint, match=r"step-2/\.metadata: refused: it asks for (posix.mkdir|torch.load)"
        ):
            files.verify(path.parent)
    path.write_bytes(pickle.dumps(metadata))
    reseal(path.parent, 2)
    weights = Weights()
    assert manager(tmp_path, weights).load() == 1 and weights.are(1)
    assert "step-2/.metadata" in caplog.text and not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload works"


class OlderPython(pickle.Pickler):
    """Pickles the members of an Enum as Python 3.11.0 to 3.11.3 do: by a call of getattr."""

    def __init__(self, file, arguments):
        super().__init__(file)
        self.arguments = arguments

    def reducer_override(self, value):
        return (getattr, self.arguments(value)) if isinstance(value, Enum) else NotImplemented


def test_an_index_of_an_older_python(tmp_path):
    save_steps(tmp_path, [1])
    path, refused = tmp_path / "step-1/.metadata", "refused: it asks for builtins.getattr of"
    metadata = pickle.loads(path.read_bytes())
    for arguments, message in (
        (lambda m: (type(m), m.name), ""),
        (lambda m: (type(m), "mro"), refused),
        (lambda m: (torch.Size, "count"), refused),
    ):
        with open(path, "wb") as file:
            OlderPython(file, arguments).dump(metadata)
        assert b"getattr" in path.read_bytes()
        reseal(path.parent, 1)
        if message:
            with pytest.raises(InvalidCheckpoint, match=message):
                files.verify(path.parent)
        else:
            weights = Weights()
            assert manager(tmp_path, weights).load() == 1 and weights.are(1)


def test_pickle_payload_among_the_tensors_is_not_executed(tmp_path):
    save_steps(tmp_path, [1])
    folder, marker = tmp_path / "step-1", tmp_path / "executed"
    torch.save(Payload(marker), folder / "__0_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder, 1)
    with pytest.raises(
        RuntimeError, match="reading .*step-1 failed on rank 0: it asks for posix.mkdir, which was not run$"
    ):
        manager(tmp_path).load()
    assert not marker.exists()


def test_index_may_name_only_tensors_in_listed_files(tmp_path):
    save_steps(tmp_path, [1])
    folder = tmp_path / "step-1"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder, 1)
    with pytest.raises(InvalidCheckpoint, match=r"\.metadata: refers to '../elsewhere'"):
        files.verify(folder)
    shutil.rmtree(folder)
    with files.plain_errors("writing"):
        dcp.save(
            {**{f"ema.{k}": v for k, v in Weights().values.items()}, "extra": {"pickled": 1}},
            no_dist=True,
            storage_writer=files.TensorWriter(folder),
            planner=files.TensorSavePlanner(None),
        )
    (folder / "state.json").write_text("{}")
    reseal(folder, 1)
    with pytest.raises(InvalidCheckpoint, match=r"\.metadata: entry 'extra' is not a tensor"):
        files.verify(folder)
    with (
        pytest.raises(RuntimeError, match="entry 'extra' of the checkpoint is not a tensor"),
        files.plain_errors("reading"),
    ):
        reader = files.TensorReader(folder, pickle.loads((folder / ".metadata").read_bytes()))
        dcp.load(
            {"extra": "x"},
            storage_reader=reader,
            no_dist=True,
            planner=files.TensorLoadPlanner(flatten_state_dict=False),
        )
