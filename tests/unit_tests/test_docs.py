"""The documents: every command is run by a test or says what it needs, and what they name exists."""

import ast
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from functools import cache

import pytest

from benchmarks import diagram, fits, house
from tests.helpers import ROOT
from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import FILES, parse_args
from titan_video.config.values import tomllib

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"\(needs\s[^)]+\)")  # in the paragraph before the commands: they cannot be run in a test

# A command that matches is run by this test, by itself or with sizes that a test can afford.
FRONT, DOCS = "tests/integration_tests/test_front_door.py", "tests/integration_tests/test_docs.py"
PHONE = "tests/integration_tests/test_phone_clips.py"
MUP = "tests/unit_tests/test_mup.py"
SCRIPTS, BENCHMARKS = "tests/integration_tests/test_launch_scripts.py", "tests/unit_tests/test_benchmarks.py"
RUN_BY = {
    r".*train_configs/tiny_dit\.toml": (f"{DOCS}::test_a_third_family_is_made_as_the_page_says"),
    r"\./run_train\.sh --profiling\.": f"{DOCS}::test_a_trace_of_a_step",
    r"\./run_train\.sh$": f"{DOCS}::test_the_first_commands_of_the_readme",
    r"CONFIG_FILE=train_configs/debug\.toml \./run_train\.sh --data\.path embedded": (
        f"{DOCS}::test_the_rehearsal_of_the_recipe"
    ),
    r".*train_configs/debug\.toml .*--data\.path phone_clips": f"{PHONE}::test_from_a_phone_to_diffusers",
    r"python -c \"from diffusers": f"{PHONE}::test_from_a_phone_to_diffusers",
    r"NNODES=2 .*RDZV_ENDPOINT=localhost:\d+ NGPU=1 \./run_train\.sh": f"{DOCS}::test_two_nodes_on_one_machine",
    r"ls outputs/shapes": f"{DOCS}::test_the_first_commands_of_the_readme",
    r"tensorboard --logdir": f"{DOCS}::test_the_first_commands_of_the_readme",
    r"python -m titan_video\.sample outputs/shapes ": f"{DOCS}::test_the_first_commands_of_the_readme",
    r"\./run_tests\.sh": f"{SCRIPTS}::test_run_tests_passes_arguments_and_exit_code",
    r"python -m titan_video\.data plan train_configs/wan2\.1_t2v_1\.3b\.toml": f"{DOCS}::test_the_plan_of_own_clips",
    r"python -m titan_video\.data plan +CONFIG": "tests/unit_tests/test_data_report.py",
    r"torchrun --nproc_per_node \d+ -m titan_video\.data encode CONFIG": f"{DOCS}::test_encoding_ahead_of_training",
    r"python -m titan_video\.data import": "tests/unit_tests/test_data_importers.py::test_the_command",
    r"python -m titan_video\.planner\.dry_run": "tests/integration_tests/test_dry_run.py::test_toml_at_its_world_size",
    r"python -m titan_video\.planner (CONFIG|train_configs)": (
        "tests/integration_tests/test_planner.py::test_the_command_prints_and_writes"
    ),
    r"python benchmarks/planner_(search|shipped|strategies)\.py": (
        f"{BENCHMARKS}::test_the_planners_scripts_print_their_tables"
    ),
    r"python -m titan_video\.convert": "tests/unit_tests/test_convert.py::test_the_command_round_trips",
    r"python -m titan_video\.upcycle": "tests/unit_tests/test_upcycle.py::test_the_command",
    r"python -m titan_video\.mup check": f"{MUP}::test_the_check_as_a_command",
    r"python -m titan_video\.mup transfer": f"{MUP}::test_a_rate_that_holds_and_one_that_does_not",
    r"python -m titan_video\.config": "tests/unit_tests/test_config_page.py",
    r"python benchmarks/learn_shapes\.py": BENCHMARKS,
    r"python benchmarks/soak\.py": "tests/integration_tests/test_soak.py",
    r"python benchmarks/traffic\.py": f"{BENCHMARKS}::test_page_of_layouts_has_the_tables_that_the_script_prints",
    r"python benchmarks/(diagram|fits|house)\.py": "tests/unit_tests/test_docs.py",
    r"python -c \"import json": f"{DOCS}::test_a_checkpoint_is_verified_by_hand",
    r"ip -brief|export NCCL_SOCKET_IFNAME": "",  # of the system; nothing of ours is run
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page):
    """(language, body, the paragraph before) of each fenced block."""
    text = read(page)
    for match in FENCE.finditer(text):
        before = [part for part in text[: match.start()].split("\n\n") if part.strip()]
        yield match[2], match[3], before[-1] if before else ""


def shell_commands(page, is_runnable=True):
    """The commands of a page's bash blocks, without comments: those that can be run here, or those that need more."""
    found = []
    for language, body, before in fences(page):
        if language == "bash" and bool(NEEDS.search(before)) != is_runnable:
            lines = [re.sub(r"\s+#.*", "", line).strip() for line in body.splitlines()]
            found += [line for line in lines if line]
    return found


@cache
def test_names(path):
    tree = ast.parse(read(path), path)
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


test_names.__test__ = False


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_by_a_test(page):
    for command in shell_commands(page):
        tests = [test for pattern, test in RUN_BY.items() if re.match(pattern, command)]
        assert tests, f"{page}: no test runs `{command}`; add one, or say before the block what it needs: (needs ...)"


def runs_of(page):
    """(TOML, options, ranks) of every command that starts training or encoding, also where it needs GPUs."""
    for command in shell_commands(page) + shell_commands(page, is_runnable=False):
        words = shlex.split(command)
        is_run = any(word.endswith(("run_train.sh", ".slurm", "train.py")) for word in words) or "encode" in words
        path = next((word.rpartition("=")[2] for word in words if word.endswith(".toml")), "train_configs/shapes.toml")
        if not is_run or "tiny_dit" in command:
            continue
        path = "train_configs/debug.toml" if path == "CONFIG.toml" else path
        names = [k for k, word in enumerate(words) if re.match(r"--\w+\.\w+$", word)]
        options = [word for k in names for word in words[k : k + 2]]
        yield path, options, int(re.search(r"world size: (\d+)", read(path))[1])


@pytest.mark.parametrize("page", PAGES)
def test_the_configuration_of_every_run_is_legal(page):
    """As the page writes it: tests that run it may add options that make it small."""
    for path, options, num_ranks in runs_of(page):
        toml = [] if "--job.config_file" in options else ["--job.config_file", str(ROOT / path)]
        check(parse_args([*toml, *options]), num_ranks, files=False)


def test_the_tests_that_run_commands_exist():
    for target in filter(None, RUN_BY.values()):
        path, _, name = target.partition("::")
        assert (ROOT / path).is_file(), target
        assert not name or name in test_names(path), target


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_look_like_commands_are_marked_so(page):
    """An unmarked block would escape the tests above."""
    for language, body, _ in fences(page):
        if language == "":
            lines = [line for line in body.splitlines() if re.match(r"\s*([A-Z_]+=\S+ )*(\./|python |torchrun )", line)]
            assert not lines, f"{page}: write ```bash before {lines}"


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:titan_video|tests|benchmarks|docs|train_configs)/[\w./-]+)`", read(page))
    made = re.findall(r"^# (\S+\.(?:py|toml))$", read("docs/adding_a_model.md"), re.MULTILINE)
    for path in named:
        is_placeholder = "NAME" in path or path in made
        assert is_placeholder or (ROOT / path).exists(), f"{page}: {path}"


def options():
    """Every legal `section.field` of the configuration."""
    sections = {f.name: getattr(JobConfig(), f.name) for f in fields(JobConfig)}
    found = {f"{name}.{f.name}" for name, section in sections.items() if is_dataclass(section) for f in fields(section)}
    return found, set(sections)


def is_module(package, name):
    return (ROOT / "titan_video" / package / f"{name}.py").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page):
    legal, sections = options()
    legal |= set(FILES)
    text = read(page)
    names = set(re.findall(r"--(\w+\.\w+)", text)) - {"section.field"}
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        match = re.match(r"(\w+)\.(\w+)(?: =.*| \d.*)?$", code)
        is_file = match and (match[2] in ("md", "py", "toml", "json", "jsonl") or is_module(match[1], match[2]))
        if match and match[1] in sections and match[2].islower() and not is_file:
            names.add(f"{match[1]}.{match[2]}")
    assert names <= legal, f"{page}: {sorted(names - legal)}"


@pytest.mark.parametrize("page", PAGES)
def test_toml_that_is_shown_has_legal_names(page):
    legal, sections = options()
    for language, body, _ in fences(page):
        if language == "toml":
            parsed = tomllib.loads(body)
            if parsed.keys() <= sections:
                names = {f"{section}.{field}" for section, table in parsed.items() for field in table}
            else:  # fields of [data], shown without the section
                names = {f"data.{field}" for field in parsed}
            assert names <= legal, f"{page}: {sorted(names - legal)}"


def test_the_block_diagram_is_what_its_script_draws():
    assert diagram.PAGE.read_text() == diagram.svg()
    assert diagram.PAGE.relative_to(ROOT).as_posix() in read("README.md")
    for box in diagram.BOXES:
        for folder in box.folders.split():
            assert (ROOT / "titan_video" / folder).is_dir(), folder


def test_the_table_of_what_fits_is_what_its_script_prints():
    figures = json.loads(fits.RESULTS.read_text())
    assert read("README.md").split(fits.MARKER)[1].strip() == fits.table(figures)
    small = next(row for row in fits.ROWS if row.config == "wan2.1_t2v_14b_lora_24gb")
    assert figures[small.command]["total"] <= 21.5 * fits.GIB and figures[small.command]["tokens"] == 32760
    for row in fits.ROWS:
        first_line = (ROOT / "train_configs" / f"{row.config}.toml").read_text().splitlines()[0]
        assert first_line == f"# world size: {row.num_ranks}"


def test_the_size_that_the_readme_states():
    """Rounded numbers, off by 5 % at most. `python benchmarks/house.py --write README.md` writes them."""
    size_text = re.search(r"\*\*Size\.\*\*.*?\n\n", read("README.md"), re.DOTALL)[0]
    core, train, ingest, optional = (int(n.replace(",", "")) for n in re.findall(r"about\s([\d,]+)", size_text))
    lines = house.count_lines(ROOT)
    counted = {
        core: house.core_lines(ROOT),
        train: lines["core: train"],
        ingest: lines["ingest"],
        optional: sum(count for name, count in lines.items() if name.startswith("optional")),
    }
    assert all(abs(said - found) <= 0.05 * found for said, found in counted.items()), counted


def test_the_tour_names_files_and_floors_that_exist():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", read("docs/tour.md"), re.MULTILINE)
    assert len(rows) > len(house.LEVELS)
    for floor, folders, text in rows:
        packages = [name.strip("/") for name in re.findall(r"`(\w+/)`", folders)]
        assert packages and all(package in house.LEVELS[int(floor)] for package in packages), (floor, folders)
        parents = [ROOT / "titan_video" / package for package in packages]
        for name in re.findall(r"`(\w+/?)`", text):
            assert any((p / name).is_dir() or (p / f"{name}.py").is_file() for p in parents), f"{folders}: {name}"
    named = {name.strip("/") for _, folders, _ in rows for name in re.findall(r"`(\w+/)`", folders)}
    assert named == {name for level in house.LEVELS for name in level}


def test_the_tour_lists_the_rings():
    text = read("docs/tour.md").split("## Floors")[0]
    named = {path.removesuffix(".py") for path in re.findall(r"`([\w/.]+)`", text)}
    assert {part.replace(".", "/") for part in house.OPTIONAL_PARTS} <= named


def test_the_list_of_slow_tests():
    """CONTRIBUTING lists each test that has a slow form, and no other."""
    marked = {
        f"{path.relative_to(ROOT / 'tests').as_posix()}::{node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("mark.slow" in ast.unparse(d) for d in node.decorator_list)
    }
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^\| `([^`]+::\w+)` \|", page, re.MULTILINE)) == marked and len(marked) > 10
