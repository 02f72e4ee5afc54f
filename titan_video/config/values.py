"""The dataclasses as sections and fields; their values checked, converted and described in words.

raw value (TOML or command line) --convert / convert_text--> typed value of a field, or ValueError
"""

import json
import math
import operator
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from titan_video.config.job_config import JobConfig
from titan_video.config.renames import with_current_names
from titan_video.tools.bounded import short

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOUNDS = MappingProxyType(
    {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}
)
INT64 = range(-(2**63), 2**63)  # what a TOML integer is
MAX_NAME, MAX_DIVISOR = 80, 1 << 16  # characters of a name that are compared and shown; the greatest divisor shown
MAX_TOML_BYTES, MAX_DOTS = 4 << 20, 1000  # the time to read a key grows with the square of its dots


# ---- sections and fields ----


@cache
def sections() -> MappingProxyType:
    """{section: its dataclass}, in order."""
    return MappingProxyType(get_type_hints(JobConfig))


@cache
def options() -> MappingProxyType:
    """{"section.field": (type, dataclass field)}, in order."""
    found: dict[str, tuple[Any, Field]] = {}
    for section, cls in sections().items():
        kinds = get_type_hints(cls)
        found |= {f"{section}.{f.name}": (kinds[f.name], f) for f in fields(cls)}
    return MappingProxyType(found)


def get_limits(f: Field) -> dict[str, Any]:
    """The limits of a field: those of BOUNDS, and under "names" the legal strings."""
    limits = {name: f.metadata[name] for name in BOUNDS if name in f.metadata}
    return limits | ({"names": f.metadata["names"]()} if "names" in f.metadata else {})


def default_text(f: Field) -> str:
    """A field's default, as TOML writes it."""
    return json.dumps({} if f.default is MISSING else f.default)


# ---- words for messages ----


def describe(kind: Any, limits: dict[str, Any], plural: bool = False) -> str:
    """What is legal, in words: `an integer >= 1`, `one of uniform, mode`, `a list of numbers > 0 and <= 1`."""
    if get_origin(kind) is Literal or "names" in limits:
        choices = limits.get("names") or get_args(kind)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else f"only {choices[0]}"
    if is_dataclass(kind):
        return ("tables" if plural else "a table") + " of " + ", ".join(f.name for f in fields(kind))
    if get_origin(kind) is tuple:
        return ("lists" if plural else "a list") + " of " + describe(get_args(kind)[0], limits, plural=True)
    words = {
        bool: ("true or false", "booleans"),
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        str: ("a string", "strings"),
        dict: ("a table of numbers, strings, booleans and lists of these", ""),
    }
    bounds = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in limits.items())
    return f"{words[kind][plural]} {bounds}".rstrip()


def nearest(name: str, known: Iterable[str]) -> str:
    """The known full name that is closest to `name`.

    A field of the same name in another section comes first (`training.lr` is `optimizer.lr`). Then the spelling counts,
    that of the field twice.
    """
    section, _, last = name.rpartition(".")

    def closeness(candidate: str) -> float:
        its_section, _, its_field = candidate.partition(".")
        return (last == its_field) + 2 * _likeness(last, its_field) + _likeness(section, its_section)

    return max(known, key=closeness)


def nearest_word(word: str, known: Iterable[str]) -> str:
    return max(known, key=lambda candidate: _likeness(word, candidate))


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a[:MAX_NAME], b).ratio()


def divisors(*numbers: int) -> str:
    """The common divisors of the numbers, for a message: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, min(*numbers, MAX_DIVISOR) + 1) if all(n % d == 0 for n in numbers))


def nearest_multiples(value: int, step: int, offset: int = 0) -> str:
    """The positive values `k step + offset` below and above `value`, for a message: "13 or 17"."""
    below = (value - offset) // step * step + offset
    return f"{below} or {below + step}" if below > 0 else f"{below + step}"


def show(value: Any) -> str:
    """A value almost as the user wrote it: strings are quoted, floats have a point."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (ValueError, RecursionError):  # integers of thousands of digits, tables in tables in tables
        text = "a value too long to print"
    return short(text, MAX_NAME)


def loads_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. ValueError: it is none, or one that takes too long to read."""
    if len(text) > MAX_TOML_BYTES:
        raise ValueError(f"it has more than {MAX_TOML_BYTES >> 20} MiB")
    if long := [n for n, line in enumerate(text.splitlines(), 1) if line.count(".") > MAX_DOTS]:
        raise ValueError(f"more than {MAX_DOTS} dots (at line {long[0]})")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("TOML nested too deeply") from None
    except ValueError as e:  # the line is at the end of its message
        raise ValueError(
            str(e)[-300:].replace("end of document", f"line {text.count(chr(10)) + 1}, end of document")
        ) from None


# ---- raw values to typed ones ----


def convert(value: Any, kind: Any, limits: dict[str, Any], where: str = "") -> Any:
    """A TOML value as `kind`. Strict: a boolean is no integer, a float is no integer, but an integer is a float.

    where: the full name of the field, for notices about tables in it.
    ValueError: what is wrong and what is legal.
    """

    def wrong(given: Any = value) -> ValueError:  # as the user wrote it
        return ValueError(f"given {show(given)}; legal: {describe(kind, limits)}")

    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise wrong()
        return tuple(_element(v, get_args(kind)[0], limits, f"{where}: item {i}") for i, v in enumerate(value))
    if is_dataclass(kind):
        return _table(value, kind, where)
    if kind is dict:
        if not isinstance(value, dict) or not all(
            type(item) in (bool, int, float, str, list) for item in value.values()
        ):
            raise wrong()
        return value
    choices = get_args(kind) if get_origin(kind) is Literal else limits.get("names")
    if choices:
        if value not in choices:
            raise wrong()
        return value
    if kind is float and type(value) is int and value in INT64:
        value = float(value)
    if type(value) is not kind or (kind is int and value not in INT64) or (kind is float and not math.isfinite(value)):
        raise wrong()
    if kind is str and not _storable(value):
        raise ValueError(f"given {show(value)}; legal: text in UTF-8 without NUL characters")
    if not all(BOUNDS[name][1](value, bound) for name, bound in limits.items()):
        raise wrong()
    return value


def _element(value: Any, kind: Any, limits: dict[str, Any], where: str) -> Any:
    try:
        return convert(value, kind, limits, where)
    except ValueError as e:
        raise ValueError(f"{where.rpartition(': ')[2]}: {e}") from None


def _table(value: Any, kind: Any, where: str) -> Any:
    """A table inside a section, such as one [[data.source]]."""
    kinds = get_type_hints(kind)
    if not isinstance(value, dict):
        raise ValueError(f"given {show(value)}; legal: {describe(kind, {})}")
    table, errors = with_current_names(value, kind, where)
    if errors:
        raise ValueError(errors[0].rpartition(f"{where}: ")[2])
    typed = {}
    for name, item in table.items():
        if name not in kinds:
            raise ValueError(f"{short(name)}: unknown field; nearest known name: {nearest_word(name, kinds)}")
        try:
            typed[name] = convert(item, kinds[name], get_limits(kind.__dataclass_fields__[name]))
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    return kind(**typed)


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return "\0" not in text


def convert_text(text: str, kind: Any, limits: dict[str, Any], where: str = "") -> Any:
    """A text of the command line as `kind`; see `convert`."""
    value: Any = text
    if kind is dict and isinstance(text, dict):  # --section.field.name VALUE
        value = {name: _toml_value(item) for name, item in text.items()}
    elif kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif kind is int and re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        value = int(text)
    elif kind is float and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        value = float(text)
    elif get_origin(kind) is tuple and text.lstrip().startswith("["):
        value = _toml_value(text)
    elif get_origin(kind) is tuple and not _is_nested(get_args(kind)[0]):
        return tuple(convert_text(item.strip(), get_args(kind)[0], limits) for item in text.split(",")) if text else ()
    return convert(value, kind, limits, where)


def _is_nested(kind: Any) -> bool:
    return get_origin(kind) is tuple or is_dataclass(kind)


def _toml_value(text: str) -> Any:
    """A value as TOML writes it; any other text is a string."""
    try:
        (value,) = loads_toml(f"x = {text}").values()
    except ValueError:
        return text
    return value
