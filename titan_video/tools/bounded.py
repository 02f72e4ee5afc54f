"""Files that others made, read within bounds. What is no regular file is never opened: to open a fifo waits for ever.
A size, a depth or a number beyond its limit is a `ValueError` that names the file.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES, MAX_JSON_DEPTH = 64 << 20, 32
MAX_NUMBER, MAX_LAYERS = 1 << 24, 1024  # in a config.json
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}


def short(value: object, limit: int = 80) -> str:
    """The beginning of a text or value that may be long, for a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def refusal(error: Exception) -> str:
    """Why torch's restricted unpickler refuses a file, without its advice to switch the restriction off."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it asks for {asked[1]}, which was not run" if asked else "it is no pickle of tensors alone"


def is_plain_name(name: object) -> bool:
    """Whether this is the name of something in a folder, and never a path that leads out of it."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & {"/", "\\"}


def special_kind(path: str | os.PathLike) -> str:
    """What `path` is when it is no regular file: folder, fifo, socket or device; else "". Links are followed.

    OSError: it does not exist, or is an endless link.
    """
    mode = os.stat(path).st_mode
    return "" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "device")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, for reading. OSError: it is something else, which is not opened, or cannot be read."""
    if kind := special_kind(path):
        raise OSError(errno.EINVAL, f"it is a {kind} and no file", str(path))
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


def parse_json(data: bytes | str, where: str) -> Any:
    """The value of a JSON text. ValueError: `where` is no JSON, or is too deep."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"{where} is nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as e:
        raise ValueError(f"{where} is no JSON in UTF-8 ({e})") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        parents = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        level = [child for parent in parents for child in parent]
    if level:
        raise ValueError(f"{where} is nested more than {MAX_JSON_DEPTH} deep")
    return value


def read_index(path: Path) -> dict[str, str]:
    """An index of safetensors files: tensor name -> name of a file in the same folder. ValueError: it is none."""
    try:
        files = read_json(path)["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise ValueError("its weight_map holds no names of files")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no index of safetensors files ({e})") from e
    if outside := [file for file in files.values() if not is_plain_name(file)]:
        raise ValueError(f"{path} names files outside its folder: {short(outside[0])}")
    return files


def read_config(path: Path, max_number: int = MAX_NUMBER) -> dict[str, Any]:
    """A config.json. ValueError: it is no table, or holds a number that no model has."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no table of settings")
    _check_numbers(config, str(path), "", max_number)
    return config


def _check_numbers(value: Any, path: str, key: str, limit: int) -> None:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else ((key, item) for item in value)
        for name, item in items:
            _check_numbers(item, path, name, limit)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = MAX_LAYERS if key.endswith("layers") else limit
        if not -limit <= value <= limit:
            raise ValueError(f"{path}: {short(key)} = {short(value)}; legal: numbers from {-limit:,} to {limit:,}")
