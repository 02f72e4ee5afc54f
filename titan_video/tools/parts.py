"""Optional parts of the program: a core file names them in a table `{name: "module:attribute"}` and loads one at use.

A folder or file of an optional part can be deleted. What asks for it then ends with an error that names both.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any


def resolve(target: str, asked_by: str) -> Any:
    """The attribute that `target`, "module:attribute", names; the module itself for "module".

    asked_by: the option that needs it, for the message, such as `lora.enable = true`.
    ValueError: the module is not part of this installation. A package that the module needs and does not find is not
    hidden: its own ImportError is raised.
    """
    module, _, attribute = target.partition(":")
    try:
        found = import_module(module)
        return getattr(found, attribute) if attribute else found
    except ModuleNotFoundError as e:
        if e.name is None or not (module == e.name or module.startswith(f"{e.name}.")):
            raise
        path = e.name.replace(".", "/")
        raise ValueError(
            f"{asked_by}: needs the optional part {path}, which is not installed here; restore it, or leave the option "
            f"at its default"
        ) from None


def find_module(name: str) -> ModuleSpec | None:
    """The spec of a module, or None if it cannot be imported.

    Nothing is imported, while `importlib.util.find_spec` imports the packages above the module, and with them torch.
    """
    top, *rest = name.split(".")
    spec = _find(top, None)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = _find(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _find(full_name: str, search_path: Any) -> ModuleSpec | None:
    if sys.modules.get(full_name, True) is None:  # importing it raises ModuleNotFoundError
        return None
    try:
        specs = (finder.find_spec(full_name, search_path) for finder in sys.meta_path)
        return next((spec for spec in specs if spec), None)
    except ModuleNotFoundError:
        return None
