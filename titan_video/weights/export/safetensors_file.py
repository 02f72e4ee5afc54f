"""Writing safetensors in constant memory.

safetensors' own `save_file` needs all tensors of a file in memory at once. Names, types, shapes and offsets are known
before the data, so `SafetensorsFile` writes the header first and then the tensors one by one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_video.weights.safetensors_io import DTYPE_NAMES, Shape, read_header

CHECK_EVERY = 1 << 30  # bytes; other ranks wait while rank 0 reads them back


class SafetensorsFile:
    """A safetensors file that is being written, tensor by tensor, in the order of `entries`. Consecutive writes may
    fill one entry row by row.

    Each gigabyte is synced to disk, read back, and its SHA-256 compared with that of what was written. `close` does
    this for the rest, and compares names, shapes and types. RuntimeError: something differs.
    """

    def __init__(self, path: Path, entries: dict[str, tuple[Shape, torch.dtype]], metadata: dict | None = None):
        self.path, self.entries = path, entries
        header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
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
        """The next bytes: a full tensor or its next rows, in the entry's type."""
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
