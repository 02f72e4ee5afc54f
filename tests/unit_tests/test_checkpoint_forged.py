"""Checkpoints whose manifest and hashes were written anew around wrong content: an older one is loaded, or the run ends
with a plain message. Nothing is accepted in silence.
"""

import json
import os
import pickle
import random
import shutil

import pytest
import torch

from tests.unit_tests.test_checkpoint import Counter, build, reseal, states, train
from titan_video.checkpoint import files
from titan_video.checkpoint.files import InvalidCheckpoint
from titan_video.checkpoint.manager import CheckpointManager
from titan_video.config.job_config import Checkpoint
from titan_video.data.sampler import CostClass, GlobalSampler

ADVICE = ("weights_only", "weights-only", "safe_globals", "trust", "Traceback")


def new_sampler():
    return GlobalSampler([5, 7], [CostClass((0,), 1), CostClass((1,), 1)], 2, 1, seed=0, shuffle=True)


class Sampler:
    """The counters of a real run."""

    def __init__(self):
        self.sampler = new_sampler()

    def state_dict(self):
        return self.sampler.get_state()

    def load_state_dict(self, state):
        self.sampler.reset(state)


def make(folder, seed=0, **section):
    model, optimizer = build(seed)
    section = Checkpoint(**{"async_mode": "disabled", "interval": 1, "keep_latest_k": 0, **section})
    counters = {"data": Sampler(), "train": Counter()}
    return CheckpointManager(section, folder, states(model, optimizer), counters), model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder with step-1 and step-2, the tensors of each)."""
    folder, values = tmp_path_factory.mktemp("run") / "checkpoint", {}
    saver, model, optimizer = make(folder)
    for step in (1, 2):
        train(model, optimizer, [step])
        next(saver.states["data"].sampler)
        saver.states["train"].state = {"samples": step}
        saver.save(step)
        values[step] = {name: tensor.clone() for name, tensor in saver._live_tensors().items()}
    return folder, values


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def index(change):
    """A forgery of DCP's index."""

    def forge(folder):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        found = change(metadata)
        (folder / ".metadata").write_bytes(found if isinstance(found, bytes) else pickle.dumps(metadata))

    return forge


def state(change):
    """A forgery of state.json: the changed object, or a text."""

    def forge(folder):
        found = json.loads((folder / "state.json").read_text())
        text = change(found)
        (folder / "state.json").write_bytes(text if isinstance(text, bytes) else json.dumps(found).encode())

    return forge


def manifest(change, text=None):
    """A forgery of the manifest itself, with its own checksum right."""

    def forge(folder):
        found = json.loads((folder / "manifest.json").read_text())
        change(found)
        (folder / "manifest.json").write_text(files._render(found) if text is None else text)

    return forge


def tensors(content):
    """A forgery of the file of tensors: every entry of the index refers to all of it."""

    def forge(folder):
        path = folder / "__0_0.distcp"
        torch.save(content, path)
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, path.stat().st_size
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return forge


NAME = "model.0.weight"
MOMENT = "optimizer.0.weight.exp_avg"


def entry(metadata, name=NAME):
    return metadata.state_dict_metadata[name]


def chunk(metadata, name=NAME):
    return entry(metadata, name).chunks[0]


def drop(metadata, prefix):
    for name in [name for name in metadata.state_dict_metadata if name.startswith(prefix)]:
        del metadata.state_dict_metadata[name]


def set_size(metadata, name, size):
    entry(metadata, name).size = torch.Size(size)
    chunk(metadata, name).sizes = torch.Size(size)


def set_dtype(metadata, name, dtype):
    object.__setattr__(entry(metadata, name).properties, "dtype", dtype)


def set_info(metadata, **values):
    for info in metadata.storage_data.values():
        for name, value in values.items():
            setattr(info, name, value)


def deep(n=100_000):
    return b'{"step": 2, "counters": ' + b"[" * n + b"]" * n + b"}"


def many_files(count):
    return dict.fromkeys(map(str, range(count)), {"size": 1, "sha256": "0" * 64})


FORGERIES = {
    # the index
    "missing tensor": index(lambda m: drop(m, NAME)),
    "missing moment": index(lambda m: drop(m, MOMENT)),
    "missing moments": index(lambda m: drop(m, "optimizer.0.weight.e")),
    "no optimizer": index(lambda m: drop(m, "optimizer")),
    "no state": index(lambda m: drop(m, "optimizer.0.weight")),
    "another tensor": index(lambda m: m.state_dict_metadata.update({"model.new": entry(m)})),
    "name with a line break": index(lambda m: m.state_dict_metadata.update({"model.x\n\ud800": entry(m)})),
    "number for a name": index(lambda m: m.state_dict_metadata.update({7: entry(m)})),
    "wrong shape": index(lambda m: set_size(m, NAME, (2, 2))),
    "no shape": index(lambda m: set_size(m, NAME, ())),
    "no shape of a moment": index(lambda m: set_size(m, MOMENT, ())),
    "absurd shape": index(lambda m: set_size(m, NAME, (1 << 40, 1 << 20))),
    "absurd shape of a moment": index(lambda m: set_size(m, MOMENT, (8, 1 << 50))),
    "negative shape": index(lambda m: set_size(m, NAME, (-8, -4))),
    "wrong type": index(lambda m: set_dtype(m, NAME, torch.bfloat16)),
    "wrong type of a moment": index(lambda m: set_dtype(m, MOMENT, torch.float16)),
    "quantized type of a moment": index(lambda m: set_dtype(m, MOMENT, torch.qint8)),
    "text for a type": index(lambda m: set_dtype(m, NAME, "float32")),
    "no chunk": index(lambda m: entry(m).chunks.clear()),
    "part of a chunk": index(lambda m: setattr(chunk(m), "sizes", torch.Size((1, 1)))),
    "chunk elsewhere": index(lambda m: setattr(chunk(m), "offsets", torch.Size((1, 0)))),
    "text for chunks": index(lambda m: setattr(entry(m), "chunks", "abc")),
    "size of nothing": index(lambda m: setattr(entry(m), "size", None)),
    "no place": index(lambda m: m.storage_data.clear()),
    "place behind the end": index(lambda m: set_info(m, offset=1 << 60)),
    "negative place": index(lambda m: set_info(m, offset=-5)),
    "text for a place": index(lambda m: set_info(m, offset="0")),
    "length of nothing": index(lambda m: set_info(m, length=0)),
    "absurd length": index(lambda m: set_info(m, length=1 << 62)),
    "another file": index(lambda m: set_info(m, relative_path="../step-1/__0_0.distcp")),
    "no text for a file": index(lambda m: set_info(m, relative_path=["x"])),
    "index of nothing": index(lambda m: pickle.dumps(None)),
    "index of a list": index(lambda m: pickle.dumps([1, 2])),
    "empty index": index(lambda m: b""),
    "half an index": index(lambda m: pickle.dumps(m)[:-40]),
    "noise for an index": index(lambda m: bytes(range(256)) * 4),
    "deep index": index(lambda m: b"\x80\x04" + b"]" * 10 + b"(" * 100_000 + b"l" * 100_000 + b"."),
    "length beyond the file": index(lambda m: b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x."),
    # state.json
    "state of a list": state(lambda s: b"[]"),
    "state of nothing": state(lambda s: b"null"),
    "empty state": state(lambda s: b""),
    "state of noise": state(lambda s: bytes(range(128, 256))),
    "deep state": state(lambda s: deep()),
    "long number": state(lambda s: b'{"step": ' + b"9" * 100_000 + b', "counters": {}}'),
    "long state": state(lambda s: b'{"step": 2, "counters": {}}' + b" " * (17 << 20)),
    "another step": state(lambda s: s.update(step=3)),
    "no counters": state(lambda s: s.pop("counters") and None),
    "list of counters": state(lambda s: s.update(counters=[1])),
    "text for a counter": state(lambda s: s["counters"].update(data="x")),
    "no data": state(lambda s: s["counters"].pop("data") and None),
    "no draws": state(lambda s: s["counters"]["data"].pop("draws") and None),
    "negative draws": state(lambda s: s["counters"]["data"].update(draws=[-1, 1])),
    "text for draws": state(lambda s: s["counters"]["data"].update(draws="ab")),
    "numbers as texts": state(lambda s: s["counters"]["data"].update(draws=["1", "1"])),
    "fractions for draws": state(lambda s: s["counters"]["data"].update(draws=[1.5, 1])),
    "absurd draws": state(lambda s: s["counters"]["data"].update(draws=[10**30, 1])),
    "nothing for draws": state(lambda s: s["counters"]["data"].update(draws=None)),
    "lists for draws": state(lambda s: s["counters"]["data"].update(draws=[[1], [1]])),
    # the manifest
    "text for the step": manifest(lambda m: m.update(step="2")),
    "negative step": manifest(lambda m: m.update(step=-2)),
    "absurd step": manifest(lambda m: m.update(step=10**40)),
    "truth for the step": manifest(lambda m: m.update(step=True)),
    "another format": manifest(lambda m: m.update(format=[])),
    "no files": manifest(lambda m: m.update(files={})),
    "list of files": manifest(lambda m: m.update(files=[".metadata", "state.json"])),
    "file elsewhere": manifest(lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}})),
    "folder above": manifest(lambda m: m["files"].update({"..": {"size": 4096, "sha256": ""}})),
    "nul in a name": manifest(lambda m: m["files"].update({"a\0b": {"size": 1, "sha256": ""}})),
    "surrogate in a name": manifest(lambda m: m["files"].update({"a\ud800": {"size": 1, "sha256": ""}})),
    "long name": manifest(lambda m: m["files"].update({"a" * 5000: {"size": 1, "sha256": ""}})),
    "text for a size": manifest(lambda m: m["files"][".metadata"].update(size="9")),
    "negative size": manifest(lambda m: m["files"][".metadata"].update(size=-9)),
    "number for a hash": manifest(lambda m: m["files"][".metadata"].update(sha256=9)),
    "number for a file": manifest(lambda m: m["files"].update({".metadata": 7})),
    "deep manifest": manifest(lambda m: None, "[" * 200_000),
    "long manifest": manifest(lambda m: m["files"].update(many_files(150_000))),
    "manifest of a list": manifest(lambda m: None, "[1]"),
    # the tensors
    "text for tensors": tensors("text"),
    "dict for tensors": tensors({"a": torch.zeros(3)}),
    "class for tensors": tensors(pytest.ExitCode.OK),
    "small tensors": tensors(torch.zeros(1)),
    "tensors of another rank": tensors(torch.zeros(3, 3, 3, 3)),
    "meta tensors": tensors(torch.zeros(8, 8, device="meta")),
}

# A run whose updates were all skipped has no state either.
SAID = {"no optimizer": "has no optimizer state of 4 tensors", "no state": "has no optimizer state of 1 tensors"}
RESEALED = [name for name in FORGERIES if "manifest" not in FORGERIES[name].__qualname__]


@pytest.mark.parametrize("name", FORGERIES)
def test_nothing_is_accepted_in_silence(saved, folder, caplog, name):
    FORGERIES[name](folder / "step-2")
    if name in RESEALED:
        reseal(folder / "step-2", 2)
    loader, _, _ = make(folder, seed=3)
    try:
        step = loader.load()
    except ValueError as error:  # train.py's message for its user
        text = str(error)
        assert any(word in text for word in ("step-2", "the position in the data", "optimizer.name of this run")), text
        text.encode()
    else:
        text = "\n".join(record.getMessage() for record in caplog.records if record.name == "root")
        if name in SAID:
            assert step == 2 and SAID[name] in text
            return
        assert step == 1 and "step-2 is not valid and is skipped" in text
        found = loader._live_tensors()
        assert found.keys() == saved[1][1].keys()
        assert all(torch.equal(found[k], value) for k, value in saved[1][1].items())
        assert loader.states["train"].state == {"samples": 1}
        assert loader.states["data"].state_dict() == files.read_counters(saved[0] / "step-1", 1)["data"]
    assert not any(word in text for word in ADVICE), text
    assert len(text) < 2500, len(text)


def test_a_pipe_for_a_manifest_is_not_waited_for(folder):
    (folder / "step-2/manifest.json").unlink()
    os.mkfifo(folder / "step-2/manifest.json")
    assert make(folder)[0].load() == 1


def test_the_messages_say_what_is_wrong(folder):
    for name, message in {
        "deep state": "state.json: refused: RecursionError",
        "another step": "state.json: not the state of step 2",
        "part of a chunk": r"\.metadata: the chunks of 'model.0.weight' do not make up a tensor",
        "class for tensors": "reading .*step-2 failed on rank 0: .* holds a pickled object that is no tensor",
        "long state": "state.json: refused: it has more than 16,777,216 bytes",
        "long manifest": "manifest.json: refused: it has more than 16,777,216 bytes",
    }.items():
        shutil.copytree(folder / "step-2", folder.parent / name.replace(" ", "-") / "checkpoint/step-2")
        other = folder.parent / name.replace(" ", "-") / "checkpoint"
        FORGERIES[name](other / "step-2")
        if name in RESEALED:
            reseal(other / "step-2", 2)
        with pytest.raises(ValueError, match=message):
            make(other, load_step=2)[0].load()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_random_bytes_under_a_valid_manifest(saved, folder, seed):
    """Flips and cuts of the index and the state, resealed: refused, or what is loaded is complete."""
    rng = random.Random(seed)
    originals = {name: (folder / "step-2" / name).read_bytes() for name in (".metadata", "state.json")}
    accepted = 0
    for _ in range(25):
        name = rng.choice(list(originals))
        data = bytearray(originals[name])
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / "step-2" / name).write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        reseal(folder / "step-2", 2)
        loader, _, _ = make(folder, seed=3)
        try:
            step = loader.load()
        except ValueError:
            pass
        else:
            accepted += step == 2
            found = loader._live_tensors()
            same = [k for k, value in saved[1][step].items() if torch.equal(found[k], value)]
            assert step == 1 and len(same) == len(found) or step == 2 and found.keys() == saved[1][2].keys()
        (folder / "step-2" / name).write_bytes(originals[name])
    assert accepted < 25


def test_what_is_saved_passes(saved):
    folder, _ = saved
    for step in (1, 2):
        assert files.verify(folder / f"step-{step}")[0] == step
        assert files.read_counters(folder / f"step-{step}", step)["train"] == {"samples": step}
    with pytest.raises(InvalidCheckpoint):
        files.read_counters(folder / "step-1", 2)
