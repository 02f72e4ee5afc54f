"""From TOML and command line to a `JobConfig`, and back to TOML.

    file.toml --load--+
                      +--> {section: {field: raw value}} --convert--> JobConfig --dump--> resolved TOML
    sys.argv ---------+

Types, limits and help texts all come from the dataclasses of `job_config.py`: a new field needs nothing here.
Mistakes are collected, so that a user sees all of them in one run, and raised as one `ConfigError`.
"""

import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from titan_video.config.job_config import JobConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "job.config_file"  # only on the command line
USAGE = (
    "usage: train.py [--job.config_file FILE.toml] [--section.field VALUE | --section.field=VALUE | --section.flag] ..."
)
BOUNDS = MappingProxyType(
    {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}
)
INT64 = range(-(2**63), 2**63)  # what a TOML integer is


class ConfigError(ValueError):
    """One or more mistakes in a configuration, one line each; every line names the field, what was given and what is
    legal.
    """


@contextmanager
def main_guard() -> Iterator[None]:
    """Ends the program with the message, and no traceback, when its body raises `ConfigError`."""
    try:
        yield
    except ConfigError as e:
        sys.exit(f"config error: {e}")


# ---- the dataclasses, seen as sections and fields ----


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


def get_limits(f: Field) -> dict[str, float]:
    return {name: f.metadata[name] for name in BOUNDS if name in f.metadata}


def describe(kind: Any, limits: dict[str, float], plural: bool = False) -> str:
    """What is legal, in words: `an integer >= 1`, `one of uniform, mode`, `a list of numbers > 0 and <= 1`."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
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
    }
    bounds = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in limits.items())
    return f"{words[kind][plural]} {bounds}".rstrip()


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known full name closest to `name`: the same field of another section if there is one (`training.lr` is
    `optimizer.lr`), else by letters, the field's counting twice."""
    section, _, last = name.rpartition(".")

    def closeness(candidate: str) -> float:
        its_section, _, its_field = candidate.partition(".")
        same_field = 1 if last == its_field else 0
        return (
            same_field
            + 2 * SequenceMatcher(None, last, its_field).ratio()
            + SequenceMatcher(None, section, its_section).ratio()
        )

    return max(known, key=closeness)


# ---- raw values to typed ones ----


def _show(value: Any) -> str:
    """A value about as the user wrote it: strings are quoted, floats have a point."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except ValueError:  # Python does not print integers of thousands of digits
        text = "a value too long to print"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _convert(value: Any, kind: Any, limits: dict[str, float]) -> Any:
    """`value` as `kind`; raises ValueError with what is wrong. Strict:

    a boolean is no integer, a float is no integer, an integer is a float.
    """
    legal = describe(kind, limits)
    wrong = ValueError(f"given {_show(value)}; legal: {legal}")
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise wrong
        return tuple(_element(v, get_args(kind)[0], limits, i) for i, v in enumerate(value))
    if is_dataclass(kind):
        return _table(value, kind)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise wrong
        return value
    if kind is float and type(value) is int and value in INT64:
        value = float(value)
    if type(value) is not kind or (kind is int and value not in INT64) or (kind is float and not math.isfinite(value)):
        raise wrong
    if kind is str and not _storable(value):
        raise ValueError(f"given {_show(value)}; legal: text in UTF-8 without NUL characters")
    if not all(BOUNDS[name][1](value, bound) for name, bound in limits.items()):
        raise wrong
    return value


def _element(value: Any, kind: Any, limits: dict[str, float], index: int) -> Any:
    try:
        return _convert(value, kind, limits)
    except ValueError as e:
        raise ValueError(f"item {index}: {e}") from None


def _table(value: Any, kind: Any) -> Any:
    """A table inside a section, such as one [[data.source]]."""
    kinds = get_type_hints(kind)
    if not isinstance(value, dict):
        raise ValueError(f"given {_show(value)}; legal: {describe(kind, {})}")
    typed = {}
    for name, item in value.items():
        if name not in kinds:
            raise ValueError(
                f"{name}: unknown field; nearest known name: "
                f"{max(kinds, key=lambda known: SequenceMatcher(None, name, known).ratio())}"
            )
        try:
            typed[name] = _convert(item, kinds[name], get_limits(kind.__dataclass_fields__[name]))
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    return kind(**typed)


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        return False
    return "\0" not in text


def _read(
    raw: dict, errors: list[str], convert: Callable[[Any, Any, dict], Any] = _convert
) -> dict[str, dict[str, Any]]:
    """{section: {field: typed value}} of what is right in `raw`; the rest goes to `errors`."""
    typed: dict[str, dict[str, Any]] = {}
    for section, table in raw.items():
        if section not in sections():
            errors.append(_unknown_section(section, table))
            continue
        if not isinstance(table, dict):
            names = ", ".join(f.name for f in fields(sections()[section]))
            errors.append(f"{section}: given {_show(table)}; legal: a table, [{section}], of {names}")
            continue
        for name, value in table.items():
            full = f"{section}.{name}"
            if full not in options():
                errors.append(f"{full}: unknown field; nearest known name: {_nearest(full, options())}")
                continue
            kind, f = options()[full]
            try:
                typed.setdefault(section, {})[name] = convert(value, kind, get_limits(f))
            except ValueError as e:
                errors.append(f"{full}: {e}")
    return typed


def _unknown_section(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return f"{name}: outside every section; nearest known name: {_nearest(name, options())}"
    if not value:
        return (
            f"{name}: unknown section; nearest known name: "
            f"{max(sections(), key=lambda section: SequenceMatcher(None, name, section).ratio())}"
        )
    full = f"{name}.{next(iter(value))}"
    return f"{full}: unknown section {name}; nearest known name: {_nearest(full, options())}"


def _build(typed: dict[str, dict[str, Any]], errors: list[str]) -> JobConfig:
    if errors:
        raise ConfigError("\n".join(errors))
    return JobConfig(**{section: sections()[section](**values) for section, values in typed.items()})


# ---- TOML ----


def from_dict(d: dict[str, Any]) -> JobConfig:
    """The configuration of {section: {field: value}} as TOML gives it; what is missing has its default.

    Raises ConfigError.
    """
    errors: list[str] = []
    return _build(_read(d, errors), errors)


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{source}: TOML nested too deeply") from None
    except ValueError as e:
        reason = str(e).replace("end of document", f"line {text.count(chr(10)) + 1}, end of document")
        raise ConfigError(f"{source}: not valid TOML: {reason}") from None


def parse(text: str, source: str = "TOML text") -> JobConfig:
    """The configuration of a TOML text; `source` names it in messages. `parse(dump(c)) == c`. Raises ConfigError."""
    return from_dict(_toml(text, source))


def read_file(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ConfigError(f"{CONFIG_FILE}: cannot read {path}: {reason}; give an existing TOML file in UTF-8") from None
    return _toml(text, str(path))


def load(path: str | Path) -> JobConfig:
    """The configuration of a TOML file. Raises ConfigError, also when the file is missing."""
    return from_dict(read_file(path))


def dump(config: JobConfig) -> str:
    """The configuration as TOML, every field explicit."""
    return tomli_w.dumps(
        {section: {k: _plain(v) for k, v in values.items()} for section, values in asdict(config).items()}
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


# ---- the command line ----


def parse_args(argv: list[str]) -> JobConfig:
    """The configuration of a command line (without the program's name).

    `--job.config_file X.toml`, if given, is read first; `--section.field value` or `--section.field=value` wins over
    it, the last one of several. A bare `--section.flag` is true. `--help` prints every option and exits 0. Raises
    ConfigError.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        sys.exit(0)
    errors: list[str] = []
    files, raw = _split(argv, errors)
    typed: dict[str, dict[str, Any]] = {}
    try:
        typed = _read(read_file(files[-1]), errors) if files else {}
    except ConfigError as e:
        errors.append(str(e))
    for section, values in _read(raw, errors, _convert_text).items():
        typed[section] = typed.get(section, {}) | values
    return _build(typed, errors)


def _split(argv: list[str], errors: list[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(values of --job.config_file, {section: {field: text}}) of a command line."""
    files: list[str] = []
    raw: dict[str, dict[str, str]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            errors.append(f"{word}: stray argument; legal: --section.field VALUE")
            continue
        name, equals, value = word[2:].partition("=")
        has_value = bool(equals) or bool(rest and not rest[0].startswith("--"))
        if not equals:
            value = rest.pop(0) if has_value else "true"
        section, _, last = name.partition(".")
        known = name in options()
        if name != CONFIG_FILE and not known:
            errors.append(f"{name}: unknown option; nearest known name: {_nearest(name, [CONFIG_FILE, *options()])}")
        elif not has_value and not (known and options()[name][0] is bool):
            legal = (
                "a TOML file" if name == CONFIG_FILE else describe(options()[name][0], get_limits(options()[name][1]))
            )
            errors.append(
                f"{name}: given no value; legal: {legal} (a value that starts with -- is written --{name}=VALUE)"
            )
        elif name == CONFIG_FILE:
            files.append(value)
        else:
            raw.setdefault(section, {})[last] = value
    return files, raw


def _convert_text(text: str, kind: Any, limits: dict[str, float]) -> Any:
    """As `_convert`, of a text from the command line."""
    value: Any = text
    if kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif kind is int and re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        value = int(text)
    elif kind is float and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        value = float(text)
    elif get_origin(kind) is tuple and text.lstrip().startswith("["):
        value = _toml_list(text)
    elif (
        get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is not tuple and not is_dataclass(get_args(kind)[0])
    ):
        return tuple(_convert_text(item.strip(), get_args(kind)[0], limits) for item in text.split(",")) if text else ()
    return _convert(value, kind, limits)


def _toml_list(text: str) -> Any:
    try:
        (value,) = tomllib.loads(f"x = {text}").values()
    except (ValueError, RecursionError):
        return text
    return value


def help_text() -> str:
    """Every option with its type, default and help."""
    lines = [USAGE, "", f"  --{CONFIG_FILE}  (a TOML file; none: the defaults)"]
    for full, (kind, f) in options().items():
        section, _, name = full.partition(".")
        if name == fields(sections()[section])[0].name:
            lines += ["", f"[{section}]"]
        lines += [
            f"  --{full}  ({describe(kind, get_limits(f))}; default {default_text(f)})",
            f"      {f.metadata['help']}",
        ]
    return "\n".join(lines)


def default_text(f: Field) -> str:
    """A field's default, as TOML writes it."""
    return json.dumps(f.default)
