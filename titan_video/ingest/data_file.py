"""--data.file: a TOML of [data] and [training] alone, between the run's TOML and the command line."""

from typing import Any

from titan_video.config.job_config import Data
from titan_video.config.manager import DATA_FILE, read_file, read_tables

SECTIONS = ("data", "training")


def read_data_file(path: str, errors: list[str]) -> dict[str, dict[str, Any]]:
    """{section: {field: typed value}} of the file. Its clips and sizes take the place of other ones, in whichever way
    these are given: a `path` empties `source`, `resolutions` empty `buckets`. Mistakes go to `errors`.

    Raises ConfigError.
    """
    wrong: list[str] = []
    typed = read_tables(read_file(path, DATA_FILE), wrong)
    wrong += [f"{name}: legal here: [data] and [training]" for name in typed if name not in SECTIONS]
    errors += [f"{path}: {line}" for line in wrong]
    data = typed.get("data", {})
    for names in (("path", "source"), ("buckets", "resolutions")):
        if any(data.get(name) for name in names):
            empty = {name: type(getattr(Data(), name))() for name in names}
            typed["data"] = data = empty | data
    return typed
