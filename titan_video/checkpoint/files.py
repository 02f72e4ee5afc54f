"""The files of a checkpoint folder: the manifest that makes it valid, its verification, and DCP narrowed to tensors, so
that a load executes nothing.

    step-500/
      __0_0.distcp ... __R_0.distcp   tensors, one file per writing rank (torch.distributed.checkpoint, "DCP")
      .metadata                       DCP's index: tensor name -> chunks -> file and offset (a pickle; read here through an allow-list)
      state.json                      everything that is not a tensor
      manifest.json                   size and SHA-256 of every file above, and of itself; written last

While it is written the folder is called `step-500.partial`; on its way out, `step-500.old`. Neither name is ever
loaded.
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
import torch.distributed as dist
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

FORMAT = 1
MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"


class InvalidCheckpoint(ValueError):
    """A checkpoint folder that must not be loaded. The message names the file and what is wrong with it."""


# --- folders ---


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the `step-N` folders, valid or not, in rising order."""
    return sorted(int(match[1]) for match in _matches(folder, r"step-(0|[1-9]\d*)"))


def list_leftovers(folder: Path) -> list[Path]:
    """Folders of saves and removals that were cut short."""
    return sorted(folder / match[0] for match in _matches(folder, r"step-\d+\.(partial|old)"))


def _matches(folder: Path, pattern: str) -> list[re.Match]:
    if not folder.is_dir():
        return []
    return [match for path in folder.iterdir() if path.is_dir() and (match := re.fullmatch(pattern, path.name))]


def discard(path: Path) -> None:
    """Remove a step folder.

    It loses its name first, so a kill midway cannot leave half a checkpoint under a valid name.
    """
    old = path.with_name(f"{path.name}.old")
    if old.exists():
        shutil.rmtree(old)
    os.rename(path, old)
    shutil.rmtree(old)


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name: `path` holds all of `text`, on the disk, or does not exist."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


# --- manifest ---


def sha256_of(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _render(manifest: dict[str, Any]) -> str:
    """The one text of a manifest. `sha256` covers the compact, key-sorted JSON of the other fields."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "sha256": hashlib.sha256(compact.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    write_text(
        folder / MANIFEST,
        _render({"format": FORMAT, "step": step, "world_size": world_size, "torch": torch.__version__, "files": files}),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against its own checksum; `InvalidCheckpoint` if it is missing or was altered."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        # Comparing texts, not checksums, also notices a changed blank.
        if text != _render(manifest):
            raise InvalidCheckpoint(f"{path}: the manifest was altered, it does not match its own checksum")
        if manifest["format"] != FORMAT:
            raise InvalidCheckpoint(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
        if not isinstance(manifest["step"], int) or not {METADATA, STATE} <= set(manifest["files"]):
            raise InvalidCheckpoint(f"{path}: not a manifest of this program")
        for name, entry in manifest["files"].items():
            if name != Path(name).name or not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                raise InvalidCheckpoint(f"{path}: bad entry {name!r}")
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path}: missing") from None
    except InvalidCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    return manifest


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Every listed file is there with its size, and no tensor file is there that is not listed."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InvalidCheckpoint(f"{path}: missing")
        if path.stat().st_size != entry["size"]:
            raise InvalidCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {entry['size']}")
    for path in sorted(folder.glob("*.distcp")):
        if path.name not in manifest["files"]:
            raise InvalidCheckpoint(f"{path}: not in the manifest")


def is_valid_fast(folder: Path) -> bool:
    """Manifest and file sizes are right. Retention uses this:

    reading every old checkpoint in full at each save would cost too much.
    """
    try:
        check_sizes(folder, read_manifest(folder))
    except InvalidCheckpoint:
        return False
    return True


def verify(folder: Path, rank: int = 0, world: int = 1) -> tuple[int, Metadata]:
    """Check a checkpoint folder; return its step and DCP's index, or raise `InvalidCheckpoint`.

    Reading every byte is shared: this rank hashes each `world`-th file, so a folder is valid when no rank objects.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for name in sorted(manifest["files"])[rank::world]:
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise InvalidCheckpoint(f"{folder / name}: cannot be read ({error})") from error
        if found != manifest["files"][name]["sha256"]:
            raise InvalidCheckpoint(f"{folder / name}: its content was altered, its SHA-256 is not the manifest's")
    return manifest["step"], read_metadata(folder, set(manifest["files"]))


# --- DCP's index ---

# What DCP's own writer puts into `.metadata` for tensors, and nothing that could run code or open a file.
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
    """In place of getattr, by which Python 3.11.0 to 3.11.3 write a member of an Enum."""
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
    """DCP's index of a folder whose listed files are `files`, without executing anything.

    It may name only tensors, in those files.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise InvalidCheckpoint(f"{path}: not an index of tensors")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise InvalidCheckpoint(f"{path}: entry {name!r} is not a tensor; pickled objects are never loaded")
        for info in metadata.storage_data.values():
            if info.relative_path not in files or info.transform_descriptors:
                raise InvalidCheckpoint(
                    f"{path}: refers to {info.relative_path!r}, which the manifest does not list, or to a "
                    f"transformed file"
                )
    except InvalidCheckpoint:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise InvalidCheckpoint(f"{path}: refused: {error}") from error
    return metadata


# --- DCP, narrowed to tensors ---


class TensorWriter(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # DCP would record the temporary path, as a pathlib object


class TensorSavePlanner(DefaultSavePlanner):
    """Plans with the live tensors' layout and, if `staged` is given, writes the copies of their local parts instead."""

    def __init__(self, staged: dict[str, Tensor] | None) -> None:
        super().__init__(flatten_state_dict=False)
        self.staged = staged

    def lookup_object(self, index: Any) -> Any:
        return super().lookup_object(index) if self.staged is None else self.staged[index.fqn]


class TensorReader(FileSystemReader):
    """Reads with an index that was already checked: DCP's own would unpickle whatever `.metadata` holds."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class TensorLoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(
            f"entry {read_item.dest_index.fqn!r} of the checkpoint is not a tensor; pickled objects are never loaded"
        )


@contextmanager
def plain_errors(action: str) -> Iterator[None]:
    """DCP's exception derives from BaseException and prints pages: keep the first rank's cause."""
    try:
        if dist.is_initialized():
            yield
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise RuntimeError(f"{action} failed on rank {rank}: {type(cause).__name__}: {cause}") from error
