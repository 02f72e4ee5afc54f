"""Configurations for the tests of the configuration: right ones, drawn ones, and wrong values of every kind."""

from dataclasses import fields, is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from titan_video.config import ConfigError, from_dict, parse
from titan_video.config.check import check
from titan_video.config.values import get_limits, options, sections

WORLD = 4


BASE = {"data": {"path": "embedded:shapes-8", "buckets": [[17, 64, 64]]}, "encoder": {"name": "debug"}}


LETTERS = "az09 _-./\\\"'#=[]{}\n\r\t\x01\x7fé漢🎬\u2028"


def draw(kind, limits, rng):
    """A legal value of a field, as TOML gives it."""
    if get_origin(kind) is tuple:
        return [draw(get_args(kind)[0], limits, rng) for _ in range(rng.randrange(4))]
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return {f.name: draw(kinds[f.name], get_limits(f), rng) for f in fields(kind) if rng.random() < 0.7}
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind is bool:
        return rng.random() < 0.5
    if kind is dict:
        return {"".join(rng.choices(LETTERS, k=5)): rng.choice([1, 0.5, True, "a b", [1, 2]]) for _ in range(3)}
    if "names" in limits:
        return rng.choice(limits["names"])
    if kind is str:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))
    low, high = limits.get("ge", limits.get("gt", -(2**63))), limits.get("le", limits.get("lt", 2**63 - 1))
    if kind is int:
        return rng.choice([low, min(low + rng.randrange(100), high), rng.randint(low, high - ("lt" in limits))])
    inside = [
        x
        for x in (rng.uniform(low, min(high, low + 10)), low + 5e-324, low + 1e-7 * rng.random(), low + 0.1, 1e300, 3)
        if x <= high and (x < high or "lt" not in limits) and (x > low or "gt" not in limits)
    ]
    return rng.choice(inside)


def draw_config(rng):
    d = {section: {} for section in sections()}
    for full, (kind, f) in options().items():
        section, name = full.split(".")
        d[section][name] = draw(kind, get_limits(f), rng)
    return from_dict(d)


def get_message(text, world=WORLD):
    """The ConfigError of a TOML text. Anything else raised, or nothing, fails."""
    with pytest.raises(ConfigError) as caught:
        check(parse(text), world)
    return str(caught.value)


def with_values(values):
    """BASE with further {"section.field": value}, as the nested tables of a file."""
    tables = {section: dict(table) for section, table in BASE.items()}
    for full, value in values.items():
        section, name = full.split(".")
        tables.setdefault(section, {})[name] = value
    return tables


def typo(name, rng):
    """`name` with two letters exchanged, one doubled or one lost; never itself."""
    i = rng.randrange(len(name) - 1)
    ways = [name[:i] + name[i + 1] + name[i] + name[i + 2 :], name[:i] + name[i] + name[i:], name[:i] + name[i + 1 :]]
    return rng.choice([w for w in ways if w != name and not w.startswith("_")])


def wrong_types(kind):
    if get_origin(kind) is tuple:
        inner = [[v] for v in wrong_types(get_args(kind)[0])]
        return [1, "1", True, {"a": 1}, *inner]
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return [
            1,
            "a",
            True,
            [1],
            *(
                {f.name: v}
                for f in fields(kind)
                for v in wrong_types(kinds[f.name]) + out_of_range(kinds[f.name], get_limits(f))
            ),
        ]
    if get_origin(kind) is Literal:
        return ["none of these", 1, True, [get_args(kind)[0]], get_args(kind)[0].swapcase()]
    return {
        bool: ["true", 1, 0.0, [True]],
        int: ["3", 3.0, True, [3], 2**63, -(2**63) - 1, float("inf")],
        str: [3, 1.5, False, ["a"], "a\0b"],
        dict: [3, "a", [{"a": 1}], {"a": {"b": 1}}],
        float: ["1e-4", True, [1.0], {"x": 1.0}, float("nan"), float("inf"), -float("inf"), 10**400],
    }[kind]


def out_of_range(kind, limits):
    """Values on the wrong side of each limit: the limit itself, where it is excluded, and beyond."""
    if get_origin(kind) is tuple:
        return [[v] for v in out_of_range(get_args(kind)[0], limits)]
    if is_dataclass(kind):
        return []
    if "names" in limits:
        return ["none of these", limits["names"][0].swapcase()]
    step = {int: 1, float: 1e-6}.get(kind)
    beyond = {
        "ge": lambda x: [x - step, x - 999],
        "le": lambda x: [x + step, x + 999],
        "gt": lambda x: [x, x - step],
        "lt": lambda x: [x, x + step],
    }
    return [kind(v) for name, limit in limits.items() for v in beyond[name](limit)]
