"""The model and encoder families, found by their files: a new family needs no entry in a list."""

import pkgutil
import re
from importlib.machinery import ModuleSpec
from pathlib import Path

from titan_video.tools.parts import find_module

FLAVOR = re.compile(r'^    "([^"]+)":', re.MULTILINE)  # a key of a table of flavors
# A module of titan_video/encoders is a family if it defines a class of this form: WanEncoders, DebugEncoders, ...
ENCODERS_CLASS = re.compile(r"^class [A-Za-z0-9]+Encoders\b", re.MULTILINE)


def model_families() -> tuple[str, ...]:
    """Names of the packages in titan_video/models."""
    return tuple(sorted(name for name, spec in _modules("titan_video.models") if spec.submodule_search_locations))


def model_flavors() -> str:
    """The families, each with the keys of the table FLAVORS in its file, which is not imported."""
    found = []
    for name in model_families():
        text = Path(find_module(f"titan_video.models.{name}").origin).read_text(encoding="utf-8")
        names = FLAVOR.findall(text.partition("\nFLAVORS = {")[2].partition("\n}")[0])
        found.append(f"{name}: {', '.join(names)}")
    return "; ".join(found)


def encoder_families() -> tuple[str, ...]:
    """Names of the modules in titan_video/encoders that define a class `...Encoders`."""
    found = [
        name
        for name, spec in _modules("titan_video.encoders")
        if spec.origin and ENCODERS_CLASS.search(Path(spec.origin).read_text(encoding="utf-8"))
    ]
    return tuple(sorted(found))


def _modules(package: str) -> list[tuple[str, ModuleSpec]]:
    """(name, spec) of each module that can be imported from a package. Nothing is imported."""
    spec = find_module(package)
    names = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)] if spec else []
    specs = [(name, find_module(f"{package}.{name}")) for name in names]
    return [(name, spec) for name, spec in specs if spec]
