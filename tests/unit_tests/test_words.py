"""The words of the code: identifiers that the project has replaced by the field's terms do not come back.

The first list holds for identifiers: names, attributes, arguments, functions, classes, modules, TOML keys, words of
shell scripts. Strings are exempt: tables of renamed options and the kinds in old caches keep their words. Names of
other packages would be exempt, but none is on the list. The second list holds for comments, docstrings and messages
too.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from titan_video.config.values import tomllib

BANNED = set(
    """
    told num_given given_BCFHW given_CNHW encode_given GivenTokens put_into clean_BL shift_level expert_levels noisy
    wire Wire HELLO GOODBYE Goodbye _Goodbye Lost Live build_live AtHand Maker Spent dealt dealt_out foreign park
    hold_in rows_in_use MeanSquares mean_squares GroupMeanSquares AttentionCore JointAttentionCore RingCore
    JointRingCore UlyssesCore JointUlyssesCore _refusal _missing unfit _pick in_use local_part gather_whole
    whole_shapes zeros_beside on_zero broadcast_from_zero bring_to_zero clips_of blocks_of mesh_of seed_of owners_of
    box_of unit_of axes_of loss_of group_of plan_of work_of SLAB _slabs picker _Keep _Replay closers read_ahead
    given_out leftovers looks_valid load_start take_apart swapped verdict stated believed taking let_go keep_later
    WAYS alike
    """.split()
)
BANNED_IN_PROSE = {"told", "dealt", "alike"}

FOLDERS = ("titan_video", "tests", "benchmarks", "train_configs")
FILES = sorted(
    path.relative_to(ROOT)
    for top in (ROOT, *(ROOT / folder for folder in FOLDERS))
    for path in (top.iterdir() if top == ROOT else top.rglob("*"))
    if path.suffix in (".py", ".toml", ".sh", ".slurm")
)
NAME_FIELDS = ("id", "attr", "arg", "name", "asname", "module", "rest", "names", "kwd_attrs")  # of nodes in ast


def words_of_python(text: str) -> Iterator[tuple[int, str]]:
    """(line, identifier) of everything with a name, and of each part of a dotted one."""
    for node in ast.walk(ast.parse(text)):
        for field in NAME_FIELDS:
            value = getattr(node, field, None)
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    yield from ((getattr(node, "lineno", 0), word) for word in name.split("."))


def words_of_toml(table: dict) -> Iterator[tuple[int, str]]:
    for key, value in table.items():
        yield 0, key
        if isinstance(value, dict):
            yield from words_of_toml(value)


def words_of_shell(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, word) for word in re.findall(r"\w+", re.sub(r"(^|\s)#.*", "", line)))


def identifiers(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(line, identifier) of a file; line 0 where it is unknown. The file's own name is one of them."""
    yield 0, path.stem
    if path.suffix == ".py":
        yield from words_of_python(text)
    elif path.suffix == ".toml":
        yield from words_of_toml(tomllib.loads(text))
    else:
        yield from words_of_shell(text)


def found_in(path: Path, text: str) -> list[str]:
    """The banned identifiers of a file. It is parsed only where such a word is in it at all, in a comment perhaps."""
    if BANNED.isdisjoint(re.findall(r"\w+", f"{path.stem} {text}")):
        return []
    return [f"{path}:{line}: {word}" for line, word in identifiers(path, text) if word in BANNED]


def test_identifiers():
    assert [line for path in FILES for line in found_in(path, (ROOT / path).read_text(encoding="utf-8"))] == []


def test_prose():
    found = []
    for path in FILES:
        if path.name != Path(__file__).name:  # this file has the list
            for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
                words = BANNED_IN_PROSE.intersection(re.findall(r"\w+", line.lower()))
                found += [f"{path}:{number}: {word}" for word in words]
    assert found == []


PYTHON = [
    "told = 1",
    "x.told",
    "x.told.y",
    "def told(): ...",
    "async def told(): ...",
    "class told: ...",
    "def f(told): ...",
    "def f(*told): ...",
    "def f(**told): ...",
    "lambda told: 1",
    "f(told=1)",
    "import x as told",
    "from x import told",
    "from told import x",
    "import x.told.y",
    "def f():\n    global told",
    "try: ...\nexcept OSError as told: ...",
    "match x:\n    case [*told]: ...",
    "match x:\n    case {1: 2, **told}: ...",
    "match x:\n    case X(told=1): ...",
    "[told for told in x]",
    'f"{told}"',
]


@pytest.mark.parametrize("text", PYTHON)
def test_every_identifier_of_python_is_seen(text):
    assert "told" in [word for _, word in identifiers(Path("x.py"), text)]
    assert found_in(Path("x.py"), text)
    assert "told" not in [word for _, word in identifiers(Path("x.py"), text.replace("told", "retold"))]


def test_identifiers_of_other_files():
    toml = '# verdict\n[told]\nwire = "dealt"\n[a.b]\npark = 1\n'
    assert {word for _, word in identifiers(Path("x.toml"), toml)} & BANNED == {"told", "wire", "park"}
    shell = "# verdict\nfor wire in $told; do  # dealt\n    ${park}\n"
    found = {(line, word) for line, word in identifiers(Path("x.sh"), shell) if word in BANNED}
    assert found == {(2, "wire"), (2, "told"), (3, "park")}
    assert found_in(Path("ingest/foreign.py"), "") == ["ingest/foreign.py:0: foreign"]
    assert list(identifiers(Path("x.py"), "# told\n'told'\nverdict = 1")) == [(0, "x"), (3, "verdict")]


def test_files_are_found():
    names = {str(path) for path in FILES}
    assert {"train.py", "run_train.sh", "titan_video/config/manager.py", "train_configs/debug.toml"} <= names
    assert len(names) > 200


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".py"], ids=str)
def test_the_formatter_has_no_exceptions(path):
    assert not re.search(r"# *fmt" + r": *(skip|off)", (ROOT / path).read_text())
