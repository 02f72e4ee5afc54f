"""From TOML and command line to a `JobConfig`, and back to TOML.

    file.toml --load--+
                      +--> {section: {field: raw value}} --> JobConfig --dump--> resolved TOML
    sys.argv ---------+

Types, limits and help texts come from the dataclasses of `job_config.py`: a new field needs no change here.
All mistakes are collected and raised as one `ConfigError`, so that a user sees them in one run.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tomli_w

from titan_video.config.job_config import JobConfig
from titan_video.config.parts import missing_sections
from titan_video.config.renames import current_name, with_current_names
from titan_video.config.values import (
    MAX_TOML_BYTES,
    convert,
    convert_text,
    default_text,
    describe,
    get_limits,
    loads_toml,
    nearest,
    nearest_word,
    options,
    sections,
    show,
)
from titan_video.tools.bounded import short
from titan_video.tools.parts import resolve

MAX_MISTAKES, MAX_LINE = 50, 1000  # shown, and characters of one
CONFIG_FILE, DATA_FILE = "job.config_file", "data.file"  # only on the command line
FILES = {  # and their help
    CONFIG_FILE: "a TOML file; none: the defaults",
    DATA_FILE: "a TOML file of [data] and [training], as `python -m titan_video.data import` writes; it is read second",
}
USAGE = (
    "usage: train.py [--job.config_file FILE.toml] [--section.field VALUE | --section.field=VALUE | --section.flag] ..."
)


class ConfigError(ValueError):
    """One or more mistakes in a configuration, one line each: the field, its value, and what is legal."""


def listed(errors: list[str]) -> str:
    """The first mistakes, one a line."""
    more = ["and others"] if len(errors) > MAX_MISTAKES else []
    return "\n".join([short(line, MAX_LINE) for line in errors[:MAX_MISTAKES]] + more)


@contextmanager
def main_guard() -> Iterator[None]:
    """Ends the program with the message, and no traceback, when its body raises what a user can mend."""
    try:
        yield
    except ConfigError as e:
        sys.exit(f"config error: {e}")
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


def read_tables(
    raw: dict, errors: list[str], convert: Callable[[Any, Any, dict, str], Any] = convert
) -> dict[str, dict[str, Any]]:
    """{section: {field: typed value}} of the legal values in `raw`. A message for each other one goes to `errors`."""
    typed: dict[str, dict[str, Any]] = {}
    for section, table in raw.items():
        if len(errors) > MAX_MISTAKES:
            break
        if section not in sections():
            errors.append(_unknown_section(section, table))
            continue
        if not isinstance(table, dict):
            names = ", ".join(f.name for f in fields(sections()[section]))
            errors.append(f"{section}: given {show(table)}; legal: a table, [{section}], of {names}")
            continue
        table, conflicts = with_current_names(table, sections()[section], section)
        errors += conflicts
        for name, value in table.items():
            full = f"{section}.{name}"
            if full not in options():
                if len(errors) <= MAX_MISTAKES:  # to find the nearest name takes milliseconds
                    errors.append(f"{short(full)}: unknown field; nearest known name: {nearest(full, options())}")
                continue
            kind, f = options()[full]
            try:
                typed.setdefault(section, {})[name] = convert(value, kind, get_limits(f), full)
            except ValueError as e:
                errors.append(f"{full}: {e}")
    return typed


def _unknown_section(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return f"{short(name)}: outside every section; nearest known name: {nearest(name, options())}"
    if not value:
        return f"{short(name)}: unknown section; nearest known name: {nearest_word(name, sections())}"
    full = f"{name}.{next(iter(value))}"
    return f"{short(full)}: unknown section {short(name)}; nearest known name: {nearest(full, options())}"


def _build(typed: dict[str, dict[str, Any]], errors: list[str]) -> JobConfig:
    config = None
    if not errors:
        config = JobConfig(**{section: sections()[section](**values) for section, values in typed.items()})
        errors = list(missing_sections(config))
    if errors:
        raise ConfigError(listed(errors))
    return config


# ---- TOML ----


def from_dict(d: dict[str, Any]) -> JobConfig:
    """The configuration of {section: {field: value}} as TOML gives it. Missing fields have their defaults.

    Raises ConfigError.
    """
    errors: list[str] = []
    return _build(read_tables(d, errors), errors)


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return loads_toml(text)
    except ValueError as e:
        raise ConfigError(f"{source}: not valid TOML: {e}") from None


def parse(text: str, source: str = "TOML text") -> JobConfig:
    """The configuration of a TOML text; `source` names it in messages. `parse(dump(c)) == c`. Raises ConfigError."""
    return from_dict(_toml(text, source))


def read_file(path: str | Path, option: str = CONFIG_FILE) -> dict[str, Any]:
    """The tables of a TOML file, which `option` names. Raises ConfigError."""
    try:
        with open(path, "rb") as f:
            text = f.read(MAX_TOML_BYTES + 1).decode("utf-8-sig")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ConfigError(f"{option}: cannot read {path}: {reason}; give an existing TOML file in UTF-8") from None
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

    `--job.config_file X.toml` is read first, then `--data.file Y.toml`. `--section.field value` or
    `--section.field=value` overrides both; the last of several applies. A bare `--section.flag` is true. `--help`
    prints every option and exits 0. Raises ConfigError.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        sys.exit(0)
    errors: list[str] = []
    files, raw = _split(argv, errors)
    layers: list[dict[str, dict[str, Any]]] = []
    try:
        layers += [read_tables(read_file(files[CONFIG_FILE]), errors)] if CONFIG_FILE in files else []
        if DATA_FILE in files:
            layers.append(resolve("titan_video.ingest.data_file:read_data_file", DATA_FILE)(files[DATA_FILE], errors))
    except ConfigError as e:
        errors.append(str(e))
    typed: dict[str, dict[str, Any]] = {}
    for layer in (*layers, read_tables(raw, errors, convert_text)):
        for section, values in layer.items():
            table = typed.setdefault(section, {})
            table |= {k: table.get(k, {}) | v if isinstance(v, dict) else v for k, v in values.items()}
    return _build(typed, errors)


def _split(argv: list[str], errors: list[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """({option of FILES: file}, {section: {field: text}}) of a command line."""
    files: dict[str, str] = {}
    raw: dict[str, dict[str, str]] = {}
    rest = deque(argv)
    while rest and len(errors) <= MAX_MISTAKES:
        word = rest.popleft()
        if not word.startswith("--") or word == "--":
            errors.append(f"{short(word)}: stray argument; legal: --section.field VALUE")
            continue
        name, equals, value = word[2:].partition("=")
        has_value = bool(equals) or bool(rest and not rest[0].startswith("--"))
        if not equals:
            value = rest.popleft() if has_value else "true"
        section, _, last = name.partition(".")
        last, _, key = last.partition(".")  # of a table whose names the user chooses
        option = options().get(f"{section}.{current_name(last, sections().get(section))}")
        if key and option and option[0] is not dict:
            option = None
        if name not in FILES and not option:
            closest = nearest(name, [*FILES, *options()])
            errors.append(f"{short(name)}: unknown option; nearest known name: {closest}")
        elif not has_value and not (option and option[0] is bool):
            legal = "a TOML file" if name in FILES else describe(option[0], get_limits(option[1]))
            errors.append(
                f"{name}: given no value; legal: {legal} (a value that starts with -- is written --{name}=VALUE)"
            )
        elif name in FILES:
            files[name] = value
        else:
            table = raw.setdefault(section, {})
            earlier = table.get(last) if isinstance(table.get(last), dict) else {}
            table[last] = {**earlier, key: value} if key else value
    return files, raw


def help_text() -> str:
    """Every option with its type, default and help."""
    lines = [USAGE, "", *(f"  --{name}  ({text})" for name, text in FILES.items())]
    for full, (kind, f) in options().items():
        section, _, name = full.partition(".")
        if name == fields(sections()[section])[0].name:
            lines += ["", f"[{section}]"]
        lines += [
            f"  --{full}  ({describe(kind, get_limits(f))}; default {default_text(f)})",
            f"      {f.metadata['help']}",
        ]
    return "\n".join(lines)
