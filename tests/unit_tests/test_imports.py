"""The floors of the program: who may import whom, read from the syntax trees of all its files. Nothing is executed.

A file imports its own floor, without cycles, and lower floors; see FLOORS, STRANGERS and `is_roof`. Imports inside
functions count like all others, but for optional packages, which must be imported there.
"""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = "titan_video"
FLOORS = {
    "config": 0,
    "tools": 0,
    "flow": 1,
    "kernels": 1,
    "models": 2,
    "encoders": 2,
    "distributed": 3,
    "data": 3,
    "components": 4,
}
STRANGERS = {frozenset(pair) for pair in (("models", "encoders"), ("distributed", "data"))}
OPTIONAL = {"diffusers", "transformers", "sentencepiece", "av", "ftfy", "PIL", "torchao"}
OPTIONAL_ON_TOP = {"data": {"av", "PIL"}}


def sources(root):
    """{dotted module name: path} of train.py and the package; a package goes by its own name."""
    found = {"train": root / "train.py"} if (root / "train.py").exists() else {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_roof(module):
    """train.py and the command modules, which may import anything and which nothing imports:

    titan_video/NAME.py and every __main__.py.
    """
    parts = module.split(".")
    return parts == ["train"] or parts[-1] == "__main__" or (len(parts) == 2 and parts[1] not in FLOORS)


def folder(module):
    return module.split(".")[1] if "." in module else ""


def nodes(tree):
    """Every node of a tree with whether it is inside a function."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            yield child, inside
            yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from walk(tree, False)


def imports(module, path, modules):
    """(what is imported, whether inside a function) of a file.

    Our own modules by full name; of others, the top-level package.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, inside in nodes(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules else source for alias in node.names
            ]
        else:
            continue
        for name in names:
            ours = name == "train" or name.split(".")[0] == PACKAGE
            yield name if ours else name.split(".")[0], inside


def broken_rules(module, imported, modules):
    """What is wrong with one of our files importing another."""
    here, there = folder(module), folder(imported)
    if imported not in modules:
        yield "which does not exist"
    elif is_roof(imported):
        yield "a command module, which nothing may import"
    elif is_roof(module) or there == "":
        return
    elif FLOORS.get(here, -1) < FLOORS[there]:
        yield f"which is on a higher floor ({here} is on {FLOORS.get(here, 'no floor')}, {there} on {FLOORS[there]})"
    elif frozenset((here, there)) in STRANGERS:
        yield f"but {here} and {there} do not know each other"
    elif (
        here == "distributed"
        and there == "models"
        and modules[".".join(imported.split(".")[:3])].name == "__init__.py"
        and imported.count(".") > 1
    ):
        yield "a concrete model"


def find_cycle(graph):
    """A list of modules that import each other in a ring, or None."""
    state, trail = {}, []

    def visit(module):
        state[module] = "open"
        trail.append(module)
        for following in sorted(graph.get(module, ())):
            if state.get(following) == "open":
                return trail[trail.index(following) :] + [following]
            if following not in state and (cycle := visit(following)):
                return cycle
        state[module] = "done"
        trail.pop()
        return None

    return next((cycle for module in sorted(graph) if module not in state and (cycle := visit(module))), None)


def violations(root):
    modules, found, graph = sources(root), [], {}
    for module, path in modules.items():
        if not is_roof(module) and module != PACKAGE and folder(module) not in FLOORS:
            found.append(f"{module} is in no folder of FLOORS")
            continue
        for imported, inside in imports(module, path, modules):
            if imported in OPTIONAL - OPTIONAL_ON_TOP.get(folder(module), set()) and not inside:
                found.append(f"{module} imports the optional package {imported} outside a function")
            if imported == "train" or imported.split(".")[0] == PACKAGE:
                broken = [
                    f"{module} imports {imported}, {reason}" for reason in broken_rules(module, imported, modules)
                ]
                found += broken
                if not broken:
                    graph.setdefault(module, set()).add(imported)
    cycle = find_cycle(graph)
    return found + ([f"cycle: {' -> '.join(cycle)}"] if cycle else [])


def test_the_floors_hold():
    assert len(sources(ROOT)) > 20
    assert violations(ROOT) == []


GOOD = {
    "train.py": "from titan_video.components.saver import save\nimport titan_video.models.wan\nfrom titan_video.config "
    "import load\n",
    "titan_video/__init__.py": "",
    "titan_video/sample.py": "from titan_video.components import saver\n",
    "titan_video/config/__init__.py": "from titan_video.config.manager import load\n",
    "titan_video/config/manager.py": "def load(): ...\n",
    "titan_video/models/__init__.py": "def spec():\n    from .wan import SPEC\n    return SPEC\n",
    "titan_video/models/spec.py": "",
    "titan_video/models/wan/__init__.py": "from titan_video.models.spec import *\nfrom .model import Wan\n",
    "titan_video/models/wan/model.py": "from .. import spec\nfrom titan_video.config import load\n",
    "titan_video/encoders/wan.py": "def load():\n    import diffusers.models\n    from transformers import T5\n",
    "titan_video/distributed/fsdp.py": "from titan_video.models.spec import Plan\nfrom titan_video.models import "
    "spec\n",
    "titan_video/data/__init__.py": "",
    "titan_video/ingest/plan.py": "import av\nfrom PIL import Image\nimport titan_video.encoders.wan\n",
    "titan_video/ingest/__main__.py": "from titan_video.components.saver import save\n",
    "titan_video/components/__init__.py": "",
    "titan_video/components/saver.py": "from titan_video.distributed.fsdp import x\nfrom titan_video.ingest.plan import "
    "y\n",
}
BAD = [  # (file, what is added to it, what is said of it)
    (
        "titan_video/models/spec.py",
        "from titan_video.distributed.fsdp import x",
        "models.spec imports titan_video.distributed.fsdp, which is on",
    ),
    (
        "titan_video/models/wan/model.py",
        "def f():\n    from ...distributed import fsdp",
        "titan_video.distributed.fsdp, which is on a higher",
    ),
    ("titan_video/config/manager.py", "import titan_video.models.spec", "higher floor"),
    ("titan_video/__init__.py", "import titan_video.config.manager", "higher floor"),
    (
        "titan_video/models/spec.py",
        "from titan_video.encoders import wan",
        "models and encoders do not know each other",
    ),
    (
        "titan_video/encoders/wan.py",
        "if True:\n    from titan_video.models.spec import x",
        "encoders and models do not know each other",
    ),
    (
        "titan_video/ingest/plan.py",
        "from titan_video.distributed.fsdp import x",
        "data and distributed do not know each other",
    ),
    (
        "titan_video/distributed/fsdp.py",
        "from titan_video.data import dataset",
        "distributed and data do not know each other",
    ),
    ("titan_video/distributed/fsdp.py", "import titan_video.models.wan.model", "a concrete model"),
    ("titan_video/distributed/fsdp.py", "from titan_video.models.wan import SPEC", "a concrete model"),
    ("titan_video/components/saver.py", "import train", "a command module"),
    ("titan_video/components/saver.py", "from titan_video.sample import x", "a command module"),
    ("titan_video/components/saver.py", "from titan_video.ingest.__main__ import x", "a command module"),
    ("titan_video/sample.py", "import train", "a command module"),
    ("titan_video/components/saver.py", "from titan_video.planner import x", "does not exist"),
    ("titan_video/planner/cost.py", "", "titan_video.planner.cost is in no folder"),
    (
        "titan_video/config/manager.py",
        "from titan_video.config import load",
        "cycle: titan_video.config -> titan_video.config.manager",
    ),
    ("titan_video/models/spec.py", "def f():\n    from titan_video.models.wan.model import x", "cycle: "),
    ("titan_video/encoders/wan.py", "import diffusers", "optional package diffusers"),
    (
        "titan_video/components/saver.py",
        "try:\n    from PIL.Image import open\nexcept ImportError:\n    pass",
        "optional package PIL",
    ),
    ("titan_video/components/saver.py", "class A:\n    import av", "optional package av"),
    ("titan_video/ingest/plan.py", "import ftfy", "optional package ftfy"),
    ("train.py", "from transformers import T5", "optional package transformers"),
]


def fabricate(root: Path, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_lawful_program_passes(tmp_path):
    fabricate(tmp_path, GOOD)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("name, text, reason", BAD)
def test_a_fabricated_violation_is_found(tmp_path, name, text, reason):
    fabricate(tmp_path, GOOD | {name: GOOD.get(name, "") + text + "\n"})
    found = violations(tmp_path)
    assert len(found) == 1 and reason in found[0], found
