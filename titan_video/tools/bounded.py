"""Files that others made, read within bounds. What is no regular file is not opened: to open a fifo waits for ever."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES, MAX_JSON_DEPTH = 64 << 20, 32
# `json.loads` makes one for each text, which takes as long as to read a short one.
_decoder = lru_cache(lambda make_object: json.JSONDecoder(object_pairs_hook=make_object))
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}


def short(value: object, limit: int = 80) -> str:
    """The beginning of a text or value that may be long, for a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def is_plain_name(name: object) -> bool:
    """Whether this is the name of something in a folder, and no path that leads out of it."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & {"/", "\\"}


def refusal(error: Exception) -> str:
    """Why torch's restricted unpickler refuses a file, without its advice to switch the restriction off."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it asks for {asked[1]}, which was not run" if asked else "it is no pickle of tensors alone"


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, for reading; links are followed. OSError: it is something else, or cannot be read."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is a {KINDS.get(stat.S_IFMT(mode), 'device')} and no file", str(path))
    return open(path, "rb")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file. ValueError: it cannot be read, or is too large or too deep."""
    try:
        with open_regular(path) as f:
            data = f.read(max_bytes + 1)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from e
    if len(data) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes >> 20} MiB, which no file of its kind is")
    return parse_json(data, str(path))


def parse_json(data: bytes | str, where: str, make_object: Callable[[list], Any] | None = None) -> Any:
    """The value of a JSON text. ValueError: `where` is no JSON, or is too deep. make_object: of its pairs."""
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
        level = [value := _decoder(make_object).decode(text)]
        for _ in range(MAX_JSON_DEPTH + 1):
            parents = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
            level = [child for parent in parents for child in parent]
            if not level:
                return value
        raise RecursionError
    except RecursionError:
        raise ValueError(f"{where} is nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as e:
        raise ValueError(f"{where} is no JSON in UTF-8 ({e})") from None


def read_index(path: Path) -> dict[str, str]:
    """An index of safetensors files: tensor name -> name of a file in the same folder. ValueError: it is none."""
    try:
        files = read_json(path)["weight_map"]
        outside = [file for file in files.values() if not is_plain_name(file)]
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no index of safetensors files ({e})") from e
    if outside:
        raise ValueError(f"{path} names files outside its folder: {short(outside[0])}")
    return files
