"""Optional parts of the program: a core file names them in a table `{name: "module:attribute"}` and loads one at use.

A folder or file of an optional part can be deleted. What asks for it then ends with an error that names both.
"""

from importlib import import_module
from typing import Any


def resolve(target: str, asked_by: str) -> Any:
    """The attribute that `target`, "module:attribute", names.

    asked_by: the option that needs it, for the message, such as `lora.enable = true`.
    ValueError: the module is not part of this installation. A package that the module needs and does not find is not
    hidden: its own ImportError is raised.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as e:
        if e.name is None or not (module == e.name or module.startswith(f"{e.name}.")):
            raise
        path = e.name.replace(".", "/")
        raise ValueError(
            f"{asked_by}: needs the optional part {path}, which is not installed here; restore it, or leave the option "
            f"at its default"
        ) from None
