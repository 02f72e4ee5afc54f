"""How a field of a section is declared."""

from collections.abc import Callable
from dataclasses import field
from typing import Any


def opt(default: Any, help: str, names: Callable[[], tuple[str, ...]] | None = None, **limits: float) -> Any:
    """A documented field of a section.

    default: {} for a table of plain values, whose names the user chooses.
    names: for a string, a function that returns the legal values, e.g. from a folder. A closed set is a `Literal`.
    limits: some of ge, gt, le and lt. They apply to the value, or to every number of a list.
    """
    metadata = {"help": help, **limits} | ({"names": names} if names else {})
    return (
        field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)
    )
