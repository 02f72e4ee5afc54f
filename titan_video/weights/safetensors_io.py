"""Files of public weights: their headers, and tensors by slices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from titan_video.tools.bounded import open_regular, short
from titan_video.tools.parts import resolve

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PICKLED = (".pt", ".pth")
PICKLED_FILE = "titan_video.weights.original:PickledFile"
SUFFIXES = (".safetensors", *PICKLED)
MAX_HEADER = 32 << 20  # bytes: that of 200,000 tensors

Shape = tuple[int, ...]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of tensors with the interface of `safe_open`: `keys()`, `get_tensor(name)`, `get_slice(name)[box]`.

    Nothing but the header is read until a tensor is asked for. ValueError: the file is damaged.
    """
    if path.suffix in PICKLED:
        yield resolve(PICKLED_FILE, asked_by=f"{path}, a pickled state dict")(path)
        return
    try:
        with open_regular(path) as f:
            if int.from_bytes(f.read(8), "little") > MAX_HEADER:
                raise SafetensorError("its header is larger than that of any model")
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} is missing, incomplete or damaged: {short(str(e), 300)}") from e


def read_header(path: Path) -> dict[str, tuple[Shape, str]]:
    """Name -> (shape, type) of every tensor in a file; no tensor is read."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
