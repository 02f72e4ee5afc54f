"""The files of a checkpoint folder, their verification, and torch.distributed.checkpoint ("DCP") restricted to tensors,
so that loading executes no code from a file.

    step-500/
      __0_0.distcp ... __R_0.distcp   tensors, one file per rank that writes (DCP's format)
      .metadata                       DCP's index: tensor name -> chunks -> file and offset (a pickle: `read_metadata`)
      state.json                      everything that is not a tensor
      manifest.json                   size and SHA-256 of every file above, and of itself; written last

The folder is called `step-500.partial` while it is written and `step-500.old` while it is removed. Folders with these
names are never loaded.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_video.distributed.utils import to_local
from titan_video.tools.files import StorageError, atomic_write, sha256, writing

FORMAT = 1
MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
MAX_BYTES = {MANIFEST: 16 << 20, STATE: 16 << 20, METADATA: 1 << 30}  # a manifest of 100,000 ranks has 15 MiB


class InvalidCheckpoint(ValueError):
    """A checkpoint folder that must not be loaded. The message names the file and what is wrong with it."""


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """InvalidCheckpoint, which names `path`, if it is no file, or too large, or makes the body raise anything."""
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise InvalidCheckpoint(f"{path}: missing")
        if path.stat().st_size > MAX_BYTES.get(path.name, 1 << 62):
            raise InvalidCheckpoint(f"{path}: refused: it has more than {MAX_BYTES[path.name]:,} bytes")
        yield
    except InvalidCheckpoint:
        raise
    except Exception as error:  # damaged or forged content
        raise InvalidCheckpoint(f"{path}: refused: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """One short line. torch's advice to load what was refused by other means is left out."""
    if "weights_only" in str(error):
        return "it holds a pickled object that is no tensor, which was not loaded"
    kind = "" if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:500]


# --- folders ---


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the `step-N` folders, valid or not, in ascending order."""
    return sorted(int(match[1]) for match in _matches(folder, r"step-(0|[1-9]\d*)"))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a step-N folder or contains some, rather than public weights."""
    return (path / MANIFEST).is_file() or bool(list_steps(path))


def list_partial(folder: Path) -> list[Path]:
    """Folders of saves and removals that did not finish."""
    return sorted(folder / match[0] for match in _matches(folder, r"step-\d+\.(partial|old)"))


def _matches(folder: Path, pattern: str) -> list[re.Match]:
    if not folder.is_dir():
        return []
    return [match for path in folder.iterdir() if path.is_dir() and (match := re.fullmatch(pattern, path.name))]


def remove(path: Path) -> None:
    """Remove a step folder. It is renamed first, so that a kill midway leaves no half checkpoint under a valid name."""
    old = path.with_name(f"{path.name}.old")
    if old.exists():
        shutil.rmtree(old)
    os.rename(path, old)
    shutil.rmtree(old)


# --- manifest ---


def manifest_entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _render(manifest: dict[str, Any]) -> str:
    """The text of a manifest. Its `sha256` is that of the compact, key-sorted JSON of the other fields."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "sha256": hashlib.sha256(compact.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """files: name -> `manifest_entry` of every other file of the checkpoint."""
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "torch": torch.__version__, "files": files}
    atomic_write(folder / MANIFEST, _render(manifest), "checkpoint")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against its own checksum.

    InvalidCheckpoint: it is missing or was altered.
    """
    path = folder / MANIFEST
    with _refusing(path):
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        # Comparing whole texts, not only checksums, also detects changed white space.
        if text != _render(manifest):
            raise InvalidCheckpoint(f"{path}: the manifest was altered, it does not match its own checksum")
        if manifest["format"] != FORMAT:
            raise InvalidCheckpoint(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
        if type(manifest["step"]) is not int or not {METADATA, STATE} <= set(manifest["files"]):
            raise InvalidCheckpoint(f"{path}: not a manifest of this program")
        for name, entry in manifest["files"].items():
            if not re.fullmatch(r"[A-Za-z0-9_.]{1,255}", name) or not {"size", "sha256"} <= set(entry):
                raise InvalidCheckpoint(f"{path}: bad entry {name[:99]!r}")
    return manifest


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """InvalidCheckpoint unless every listed file has its size and every tensor file of the folder is listed."""
    for name, entry in manifest["files"].items():
        with _refusing(path := folder / name):
            if path.stat().st_size != entry["size"]:
                raise InvalidCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {entry['size']}")
    for path in sorted(folder.glob("*.distcp")):
        if path.name not in manifest["files"]:
            raise InvalidCheckpoint(f"{path}: not in the manifest")


def is_valid_fast(folder: Path) -> bool:
    """Whether manifest and file sizes are right. Retention uses it: hashing all old checkpoints would cost too much."""
    try:
        check_sizes(folder, read_manifest(folder))
    except InvalidCheckpoint:
        return False
    return True


def verify(folder: Path, rank: int = 0, world: int = 1) -> tuple[int, Metadata]:
    """Check a checkpoint folder and return (step, DCP's index).

    The ranks share the hashing: this one hashes every `world`-th file. The folder is valid if no rank raises.
    InvalidCheckpoint: names the file and what is wrong with it.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for name in sorted(manifest["files"])[rank::world]:
        with _refusing(path := folder / name):
            if sha256(path) != manifest["files"][name]["sha256"]:
                raise InvalidCheckpoint(f"{path}: its content was altered, its SHA-256 is not the manifest's")
    metadata = read_metadata(folder, set(manifest["files"]))
    read_counters(folder, manifest["step"])
    return manifest["step"], metadata


def read_counters(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """What state.json holds of a run that has done `step` steps: the states by name. InvalidCheckpoint: it does not."""
    path = folder / STATE
    with _refusing(path):
        state = json.loads(path.read_bytes())
        if state["step"] != step or not all(isinstance(counter, dict) for counter in state["counters"].values()):
            raise InvalidCheckpoint(f"{path}: not the state of step {step}")
    return state["counters"]


# --- DCP's index ---

# The classes that DCP's writer pickles into `.metadata` for tensors. None of them runs code or opens a file.
_CLASSES = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
    TensorProperties,
    ChunkStorageMetadata,
    BytesStorageMetadata,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {(cls.__module__, cls.__qualname__): cls for cls in _CLASSES}
_ALLOWED[("torch", "Size")] = torch.Size
_ALLOWED[("torch.serialization", "_get_layout")] = torch.serialization._get_layout


def _enum_member(cls: Any, name: str) -> Any:
    """Replaces getattr, by which Python 3.11.0 to 3.11.3 pickle the members of an Enum."""
    if cls is not _MEM_FORMAT_ENCODING or name not in cls.__members__:
        raise pickle.UnpicklingError(
            f"it asks for builtins.getattr of {cls!r}, which has no place in a checkpoint and was not run"
        )
    return cls[name]


_ALLOWED[("builtins", "getattr")] = _enum_member


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[(module, name)]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint and was not run")


def read_metadata(folder: Path, files: set[str]) -> Metadata:
    """DCP's index of a checkpoint folder, read without executing anything.

    files: names that the manifest lists. InvalidCheckpoint: the index names another file, a value that is no tensor, or
    a part of one.
    """
    path = folder / METADATA
    with _refusing(path):
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise InvalidCheckpoint(f"{path}: not an index of tensors")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
                raise InvalidCheckpoint(f"{path}: entry {name!r} is not a tensor; pickled objects are never loaded")
            # DCP would leave what no chunk covers as it is.
            if not name.isprintable() or sum(c.sizes.numel() for c in entry.chunks) != entry.size.numel():
                raise InvalidCheckpoint(f"{path}: the chunks of {name!r} do not make up a tensor {list(entry.size)}")
        for info in metadata.storage_data.values():
            if info.relative_path not in files or info.transform_descriptors:
                raise InvalidCheckpoint(
                    f"{path}: refers to {info.relative_path!r}, which the manifest does not list, or to a "
                    f"transformed file"
                )
    return metadata


# --- DCP, restricted to tensors ---


class TensorWriter(FileSystemWriter):
    size: int | None = None  # bytes of the checkpoint, for the message of StorageError

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # DCP would record the temporary path, as a pathlib object

    def write_data(self, *args: Any, **options: Any) -> Any:
        with writing("checkpoint", self.path, self.size):
            return super().write_data(*args, **options)

    def finish(self, *args: Any, **options: Any) -> None:
        with writing("checkpoint", self.path, self.size):
            super().finish(*args, **options)


class TensorSavePlanner(DefaultSavePlanner):
    """Plans by the layout of the live tensors. staged: copies of their local shards, to be written in their place.
    key: of the plans that DCP keeps for the next save; equal on all ranks, "" keeps none.
    """

    def __init__(self, staged: dict[str, Tensor] | None, key: str = ""):
        super().__init__(flatten_state_dict=False, enable_plan_caching=bool(key))
        self.staged = staged
        self._cached_plans_key = key

    def lookup_object(self, index: Any) -> Any:
        return super().lookup_object(index) if self.staged is None else self.staged[index.fqn]


def layout_key(tensors: dict[str, Tensor]) -> str:
    """Of what a plan holds of them. DCP compares names and shapes alone, and would keep the types of another run."""
    layout = [(name, str(t.dtype), list(t.shape), list(to_local(t).shape)) for name, t in tensors.items()]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


class TensorReader(FileSystemReader):
    """Reads by an index that was already checked. DCP's own reader would unpickle any content of `.metadata`."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class TensorLoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(
            f"entry {read_item.dest_index.fqn!r} of the checkpoint is not a tensor; pickled objects are never loaded"
        )


# DCP says so in one process. A save is in a thread, where a filter could not be set for a while.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@contextmanager
def plain_errors(action: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Turn DCP's CheckpointException (a BaseException with pages of text) into one rank's cause: `failure`, or `kind`
    with its text.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        found = failure(action, rank, cause)
        raise (kind(str(found)) if kind else found) from error


def failure(action: str, rank: int, cause: BaseException) -> StorageError | RuntimeError:
    """The error, on all ranks, of what failed on one. It can be pickled."""
    if isinstance(cause, StorageError):
        return StorageError(f"{cause} (rank {rank})")
    kind = StorageError if isinstance(cause, OSError) else RuntimeError
    return kind(f"{action} failed on rank {rank}: {_reason(cause)}")
