"""Files of public weights: safetensors written front to back in constant memory and read back, headers, and the one
kind of pickle that is read.

A safetensors file is a length, a JSON header of names, types, shapes and offsets, and the tensors' bytes. All but the
bytes is known beforehand, so a file of any size is written tensor by tensor.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PICKLED = (".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLED)
CHECK_EVERY = 1 << 30  # bytes; short enough for other ranks to wait for

Shape = tuple[int, ...]


# --- reading ---


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of tensors: `keys()`, `get_tensor(name)`, `get_slice(name)[box]`. No tensor is read before it is asked
    for.

    ValueError if the file is damaged.
    """
    if path.suffix in PICKLED:
        yield _Pickled(path)
        return
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} is missing, incomplete or damaged: {e}") from e


def read_header(path: Path) -> dict[str, tuple[Shape, str]]:
    """Name -> (shape, type) of every tensor in a file; no tensor is read."""
    with opened(path) as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


class _Pickled:
    """A state dict that torch.save wrote, as HunyuanVideo is published:

    mapped into memory, and only tensors are unpickled.
    """

    def __init__(self, path: Path):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            content = content.get("module", content)
            self.tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
        except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as e:
            raise ValueError(f"{path} is missing, damaged, or no state dict of tensors: {e}") from e

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(self.tensors[name])


class _Slice:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, box: Any) -> Tensor:
        return self.tensor[box]


# --- writing ---


class SafetensorsFile:
    """A file under way. Tensors are given as their bytes come, in the order of `entries`; several may make one entry,
    row after row.

    Each gigabyte is synced to the disk, read back and compared by SHA-256 with what was given; `close` does the last
    one, and compares names, shapes and types. RuntimeError if something differs.
    """

    def __init__(self, path: Path, entries: dict[str, tuple[Shape, torch.dtype]]):
        self.path, self.entries = path, entries
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in self.entries.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.size = 8 + len(text) + end
        self.checked, self.digest = 0, hashlib.sha256()
        self.file = open(path, "w+b")
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: Tensor) -> None:
        """The next bytes: a tensor, or the next rows of one, of the entry's type."""
        self._put(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if self.file.tell() - self.checked >= CHECK_EVERY:
            self._read_back()

    def close(self) -> None:
        self._read_back()
        self.file.close()
        expected = {name: (tuple(shape), DTYPE_NAMES[dtype]) for name, (shape, dtype) in self.entries.items()}
        if self.checked != self.size or read_header(self.path) != expected:
            raise RuntimeError(f"{self.path} does not hold what was written to it")

    def _put(self, data: Any) -> None:
        self.file.write(data)
        self.digest.update(data)

    def _read_back(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        end, found = self.file.tell(), hashlib.sha256()
        self.file.seek(self.checked)
        while data := self.file.read(min(1 << 20, end - self.file.tell())):
            found.update(data)
        if found.digest() != self.digest.digest():
            raise RuntimeError(
                f"{self.path} does not hold what was written to it: bytes {self.checked} to {end} differ"
            )
        self.checked, self.digest = end, hashlib.sha256()
