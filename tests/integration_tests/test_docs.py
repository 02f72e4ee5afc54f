"""The pages that a newcomer follows: their commands run as they stand, in a copy of the repository.

Where a command would take long, options that make it small are added behind it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import ROOT, free_port, start_program
from tests.integration_tests.conftest import run_module
from tests.unit_tests.data_clips import captioned
from tests.unit_tests.test_docs import fences, read, shell_commands

COPIED = ("titan_video", "train_configs", "train.py", "run_train.sh", "ensure_env.sh", "requirements.txt")
SMALL = (
    " --data.path embedded:shapes-12 --training.local_batch_size 2 --training.steps 2 --lr_scheduler.warmup_steps 1"
    " --validation.num_videos 1 --validation.sample_steps 1"
)


@pytest.fixture
def clone(tmp_path):
    """The program in a fresh folder."""
    folder = tmp_path / "titan-video"
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def start(command, folder):
    """A shell command of a page, on CPU, with this Python on PATH."""
    hidden = ("PYTHON", "NGPU", "CONFIG_FILE", "LOG_RANK", "RANK", "WORLD_SIZE", "NNODES")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return start_program(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command, folder):
    process = start(command, folder)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, f"{command}\n{output}"
    return output


def run_forked(command, folder, own_code=False):
    """A command `python -m MODULE ...` or `CONFIG_FILE=... ./run_train.sh ...`, without the start of a shell, of Python
    and of torchrun. own_code: the page has added code in `folder`."""
    words = shlex.split(command)
    env = dict(word.split("=", 1) for word in words[: next(k for k, word in enumerate(words) if word[0] in "p.")])
    program, *words = words[len(env) :]
    assert env.keys() <= {"NGPU", "CONFIG_FILE"}
    if program == "./run_train.sh":
        words = ["train", "--job.config_file", env["CONFIG_FILE"], *words]
    else:
        assert (program, words.pop(0), env) == ("python", "-m", {})
    world = int(env.get("NGPU", 1))
    codes, output = run_module(words, folder, folder / "log", world, own_code)
    assert codes == [0] * world, f"{command}\n{output}"
    return output


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def baseline(folder):
    """The validation loss before the first step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row["validation"]["loss"] for row in rows if "validation" in row and row["step"] == 0)


def one_command(page, start_of_it):
    (command,) = [command for command in shell_commands(page) if command.startswith(start_of_it)]
    return command


def write_files(page, folder):
    """Write the files that a page shows; the first line of each block says where it goes."""
    written = []
    for language, body, _ in fences(page):
        first, _, rest = body.partition("\n")
        if language in ("python", "toml") and (match := re.fullmatch(r"# (\S+\.(?:py|toml))", first)):
            path = folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest)
            written.append(path)
    return written


@pytest.mark.timeout(600)
def test_a_third_family_is_made_as_the_page_says(clone):
    page = "docs/adding_a_model.md"
    files = write_files(page, clone)
    assert [path.suffix for path in files] == [".py", ".py", ".toml"]
    for command in shell_commands(page):
        run_forked(command, clone, own_code=True)
    one = losses(clone / "outputs" / "tiny_dit")
    assert len(one) == 3 and 2 < one[0] < 3
    assert losses(clone / "outputs" / "tiny_dit_tp") == pytest.approx(one, rel=1e-5)
    restarted = losses(clone / "outputs" / "tiny_dit_2")
    assert len(restarted) == 3 and restarted[0] < one[0]


def test_the_page_keeps_the_style_of_the_house(clone):
    """Its files could be committed as they are."""
    files = write_files("docs/adding_a_model.md", clone)
    shutil.copy2(ROOT / "pyproject.toml", clone)
    names = " ".join(str(path) for path in files if path.suffix == ".py")
    run(f"ruff format --check {names} && ruff check {names}", clone)


def check_that_metrics_are_explained(folder):
    """Every number that a run writes is in a table of the documents."""
    explained = read("docs/debugging.md") + read("docs/data.md")
    for row in (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()):
        assert [key for key in row if key not in ("step", "time") and f"`{key}`" not in explained] == []
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert len(tags) > 20
    stems = {tag: re.sub(r"[\d(].*", "", tag) for tag in tags}  # without units, sizes and noise levels
    unexplained = [tag for tag, stem in stems.items() if f"`{stem}" not in explained]
    assert [tag for tag in unexplained if f"`{tag.partition('/')[0]}/...`" not in explained] == []


@pytest.mark.timeout(600)
def test_the_first_commands_of_the_readme(clone):
    page = "README.md"
    run(one_command(page, "./run_train.sh") + SMALL, clone)
    shown = re.search(r"^ls outputs/shapes +# (.*)$", read(page), re.MULTILINE)[1].replace("/", "").split()
    assert set(shown) <= set(run(one_command(page, "ls outputs/shapes"), clone).split())
    check_that_metrics_are_explained(clone / "outputs" / "shapes")
    run_forked(one_command(page, "python -m titan_video.sample") + " --steps 1", clone)
    assert (clone / "red.mp4").stat().st_size > 0

    board = start(f"{one_command(page, 'tensorboard --logdir')} --port {free_port()}", clone)
    assert any("http://" in line for line in iter(board.stdout.readline, "")), "TensorBoard ended without serving"


def test_the_rehearsal_of_the_recipe(clone):
    run(
        one_command("docs/recipe.md", "CONFIG_FILE=train_configs/debug.toml ./run_train.sh --data.path embedded")
        + SMALL,
        clone,
    )
    assert 2 < baseline(clone / "outputs/rehearsal") < 3  # what the page says of a model that knows nothing


@pytest.mark.slow
def test_a_trace_of_a_step(clone):
    command = one_command("docs/debugging.md", "./run_train.sh --profiling")
    run(command + SMALL + " --profiling.profile_freq 2", clone)
    assert (clone / "outputs/shapes/profile_traces/step-2/rank0_trace.json").is_file()


def test_the_plan_of_own_clips(clone):
    (clone / "my_clips").mkdir()
    for k in range(2):
        captioned(clone / "my_clips" / f"{k}.mp4", f"clip {k}", width=96, height=64, fps=16, count=81)
    for page in ("README.md", "docs/recipe.md"):
        output = run_forked(one_command(page, "python -m titan_video.data plan train_configs/wan"), clone)
        assert "2 found, 2 kept, 0 dropped" in output


@pytest.mark.slow
def test_encoding_ahead_of_training(clone):
    """`CONFIG.toml`, `my_clips` and 8 ranks of the page: the debug run's, its clips, 2 ranks."""
    command = one_command("docs/data.md", "torchrun")
    command = command.replace("CONFIG.toml", "train_configs/debug.toml").replace("my_clips", "embedded:shapes-12")
    assert "12 clips in outputs/debug/cache" in run(command.replace("--nproc_per_node 8", "--nproc_per_node 2"), clone)


@pytest.mark.slow
def test_two_nodes_on_one_machine(clone):
    command = re.sub(
        r"localhost:\d+", f"localhost:{free_port()}", one_command("docs/multinode.md", "NNODES=2 RDZV_ID=try")
    )
    nodes = [start(command + SMALL, clone) for _ in range(2)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert len(losses(clone / "outputs" / "two_nodes")) == 2


def test_a_checkpoint_is_verified_by_hand(front):
    checkpoint = front.run("run", {"training.steps": 1}).ok().checkpoint(1)
    command = one_command("docs/checkpoint.md", "python -c")
    output = run(command, checkpoint)
    assert output.count(": OK") == len(json.loads((checkpoint / "manifest.json").read_text())["files"])
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    process = start(command, checkpoint)
    assert "FAILED" in process.communicate(timeout=60)[0] and process.returncode != 0
