"""The planner's command line, and runs of what it writes."""

import json
import re

import pytest

from tests.helpers import ROOT
from tests.integration_tests.conftest import run_module
from titan_video.config.manager import load, read_file
from titan_video.planner import __main__ as program
from titan_video.planner.dry_run import run as dry_run
from titan_video.planner.plan_file import write_toml

DEBUG = str(ROOT / "train_configs" / "debug.toml")
FAMILIES = {
    "wan": [],
    "moe": ["--model.flavor=moe-debug"],
    "hunyuan_video": ["--model.name=hunyuan_video", "--model.flavor=debug", "--model.kernels=torch"],
}
RUN = {
    "validation.enable": "false",
    "training.steps": 3,
    "data.buckets": "[[9,64,64]]",
    "checkpoint.enable": "false",
    "training.global_batch_size": 8,
}


def make_cluster(folder, gpus, memory_gib=20.0):
    """A machine of `gpus` GPUs with little memory and slow links, so that what a plan may use is used."""
    text = (ROOT / "train_configs" / "clusters" / "h100x8.toml").read_text()
    lines = []
    for line in text.splitlines():
        name = line.partition("=")[0].strip()
        values = {"gpus": gpus, "gpus_per_node": gpus, "memory_gib": memory_gib}
        lines.append(f"{name} = {values[name]}" if name in values else line)
    path = folder / f"cluster{gpus}.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def options_of(family):
    return [*FAMILIES[family], *(f"--{name}={value}" for name, value in RUN.items())]


def plan(folder, gpus, *words, family="wan"):
    out = str(folder / "plan")
    program.main([DEBUG, "--cluster", make_cluster(folder, gpus), "--out", out, *options_of(family), *words])
    return folder / "plan" / "plan.toml"


def losses(front, name, path, world):
    """(losses, gradient norms) of a few steps of a TOML, as the trainer runs it."""
    t = load(path).training
    sizes = {"training.local_batch_size": t.local_batch_size, "training.global_batch_size": t.global_batch_size}
    options = {name: value for name, value in RUN.items() if "batch" not in name}
    records = front.run(name, {"job.config_file": path, **options, **sizes}, world).ok().records
    return [row["loss"] for row in records], [row["grad_norm"] for row in records]


@pytest.mark.parametrize(
    "gpus, family, fixed",
    [
        (2, "moe", "cp=2,ep=2"),
        pytest.param(2, "wan", "cp=2", marks=pytest.mark.slow),
        pytest.param(8, "moe", "dp_shard=2,cp=2,tp=2,ep=4", marks=pytest.mark.slow),
        pytest.param(8, "moe", "pp=2,ring=2,dp_shard=2,ep=2", marks=pytest.mark.slow),
        pytest.param(8, "wan", "cp=8", marks=pytest.mark.slow),
        pytest.param(8, "wan", "pp=2,cp=2,tp=2", marks=pytest.mark.slow),
        pytest.param(8, "wan", "pp=2,ring=2,dp_replicate=2", marks=pytest.mark.slow),
        pytest.param(8, "hunyuan_video", "ulysses=2,ring=2", marks=pytest.mark.slow),
        pytest.param(8, "hunyuan_video", "pp=4,tp=2", marks=pytest.mark.slow),
    ],
)
def test_a_plan_trains_with_the_loss_of_one_process(gpus, family, fixed, front, tmp_path):
    path = plan(tmp_path, gpus, "--fix", fixed, "--no-page", family=family)
    one = write_one_rank(path, tmp_path / "one.toml")
    (loss, norm), (expected, expected_norm) = losses(front, "many", path, gpus), losses(front, "one", one, 1)
    assert len(loss) == 3 and loss == pytest.approx(expected, rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-4)


def write_one_rank(path, one):
    """The same job without parallelism and checkpointing, on one rank."""
    tables = read_file(path)
    clips = tables["training"]["global_batch_size"]
    tables = {name: table for name, table in tables.items() if name not in ("parallelism", "activation_checkpoint")}
    tables["training"] = {**tables["training"], "global_batch_size": clips, "local_batch_size": 2}
    one.write_text(write_toml(tables, []))
    return one


# ---- the command line ----


def test_the_command_prints_and_writes(tmp_path, capsys):
    plan(tmp_path, 2, "--explain", "tp=2", "--what-if", "cp=2")
    printed = capsys.readouterr().out
    assert "predicted" in printed and "\n| *" in printed and "As the TOML is:" in printed
    assert "tp=2" in printed and "with cp=2:" in printed
    names = {"plan.toml", "plan.html", "plan.json", "plans.md", "plans.csv", "timeline.json"}
    assert {path.name for path in (tmp_path / "plan").iterdir()} == names


def test_experts_are_in_all_that_is_written(tmp_path, capsys):
    path = plan(tmp_path, 2, "--fix", "ep=2", "--explain", "ep=3", "--what-if", "ep=2,tp=2", family="moe")
    printed = capsys.readouterr().out
    assert "ep = 3 does not divide the model's 8 experts" in printed and "with ep=2,tp=2:" in printed
    assert load(path).parallelism.expert_parallel_degree == 2
    words = " ".join(path.read_text().replace("\n#", "").split())
    assert re.search(r"expert parallel: [\d.]+ s", words) and "a rank's get 1.5 times as many" in words
    page = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert page["parts"]["expert parallel"] > 0
    assert "expert parallel" in {event["lane"] for event in page["layer"]}
    assert ",ep," in (tmp_path / "plan" / "plans.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--cluster", "nowhere"], "--cluster: nowhere cannot be read"),
        (["--explain", "tq=3"], "nearest: tp"),
        (["--allow", "magic"], "legal: offload, 8bit, host-state"),
        (["--shares", "9x64x64"], "FRAMESxHEIGHTxWIDTH=SHARE"),
        (["--training.stepz", "3"], "unknown option; nearest known name: training.steps"),
        (["--cluster", "h100x8", "--fix", "tp=3"], "no layout is legal on h100x8"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as e:
        program.main([DEBUG, "--cluster", "h100x1", *words])
    assert message in str(e.value.code)


def test_the_dry_run_predicts_a_step(tmp_path, capsys):
    path = make_cluster(tmp_path, 2)
    dry_run.main([DEBUG, "--world-size", "2", "--cluster", path, "--training.local_batch_size=2"])
    assert re.search(r"predicted on h100x8: [\d.]+ s a step, MFU [\d.]+%\n  products", capsys.readouterr().out)


def test_modules_are_programs(tmp_path):
    """By their names, as the documents say, and under the former name."""
    for module in ("titan_video.planner", "titan_video.planner.dry_run", "titan_video.dry_run"):
        codes, output = run_module([module, "--help"], ROOT, tmp_path / "log")
        assert codes == [0] and "--cluster" in output, (module, output)
