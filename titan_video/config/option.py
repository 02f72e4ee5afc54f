"""How a field of a section is declared."""

from collections.abc import Callable
from dataclasses import field
from typing import Any


def opt(default: Any, help: str, names: Callable[[], tuple[str, ...]] | None = None, **limits: float) -> Any:
    """A documented field of a section.

    names: for a string, a function that returns the legal values, e.g. from a folder. A closed set is a `Literal`.
    limits: some of ge, gt, le and lt. They apply to the value, or to every number of a list.
    """
    metadata = {"help": help, **limits}
    return field(default=default, metadata=metadata | ({"names": names} if names else {}))
