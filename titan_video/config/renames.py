"""Former names of renamed fields. They are accepted with a notice until version 1.0."""

from types import MappingProxyType
from typing import Any

from titan_video.config.job_config import Data, Encoder, Source
from titan_video.tools.logging import logger

RENAMED = MappingProxyType(  # {section or table: {former name of a field: its name}}
    {
        Encoder: {"idle": "offload_policy"},
        Data: {"clip_choice": "frame_extraction", "buckets_per_step": "groups_per_step"},
        Source: {"clip_choice": "frame_extraction"},
    }
)


def current_name(name: str, kind: type) -> str:
    """The current name of a field of the dataclass `kind`; `name` may be a former one."""
    return RENAMED.get(kind, {}).get(name, name)


def with_current_names(table: dict[str, Any], kind: type, where: str) -> tuple[dict[str, Any], list[str]]:
    """A table with current field names, and one message per field that is there under both names.

    kind: the table's dataclass. where: its full name, such as `data.source: item 0`. Each former name is logged.
    """
    renamed: dict[str, Any] = {}
    errors = []
    for name, value in table.items():
        current = current_name(name, kind)
        if current == name:
            renamed[name] = value
        elif current in table:
            errors.append(f"{_full(where, name)}: the former name of {current}, which is there too; remove one of them")
        else:
            logger.warning(f"{_full(where, name)} is now called {current}; the former name works until version 1.0")
            renamed[current] = value
    return renamed, errors


def _full(where: str, name: str) -> str:
    return f"{where}: {name}" if ": item " in where else f"{where}.{name}"
