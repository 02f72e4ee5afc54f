"""muP: the class of every parameter, initial values and groups by class, the coordinate check, the sweep of rates."""

import json
import math
import subprocess
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks import mup as benchmark
from tests.helpers import ROOT
from titan_video.config.check import check
from titan_video.config.job_config import LrScheduler
from titan_video.config.manager import ConfigError, parse_args
from titan_video.distributed.utils import initialise
from titan_video.models import FAMILIES, get_spec
from titan_video.models.wan import SPEC, WanArgs
from titan_video.optim.lr_scheduler import Scheduler
from titan_video.optim.mup import cli, coordinate_check, parametrization, transfer
from titan_video.optim.mup.coordinate_check import BAR, Probe, at_width
from titan_video.optim.mup.parametrization import POWERS, Parametrization, base_problem, fitting_flavors, width_class
from titan_video.optim.mup.widths import FAMILY_RULES, WidthRules, width_rules
from titan_video.optim.optimizer import build_optimizer
from titan_video.training.parts import parametrize

FLAVORS = [(family, flavor) for family in FAMILIES for flavor in get_spec(family).flavors]
WIDE = WanArgs(dim=128, num_heads=4, num_layers=1, ffn_dim=256, text_dim=8, text_len=5, freq_dim=16)
NARROW = replace(WIDE, dim=32, num_heads=1, ffn_dim=64)
MUP = [
    "--optimizer.parametrization",
    "mup",
    "--optimizer.base_flavor",
    "proxy-debug",
    "--encoder.max_text_length",
    "16",
]


def configured(*argv):
    return parse_args([*MUP, *argv])


# ---- classes ----


@pytest.mark.parametrize("family, flavor", FLAVORS)
def test_every_parameter_has_the_class_of_its_shape(family, flavor):
    """Of the dims of a matrix, those that grow with the width are known from two widths."""
    spec = get_spec(family)
    args = at_width(spec, spec.flavors[flavor], spec.flavors[flavor].dim, layers=4)
    with torch.device("meta"):
        models = [spec.build(at_width(spec, args, width, layers=4)) for width in (args.dim, 2 * args.dim)]
    shapes, wide = ({name: p.shape for name, p in model.named_parameters()} for model in models)
    for name, shape in shapes.items():
        found = width_class(name, width_rules(spec))
        grows = [2 * n == m for n, m in zip(shape, wide[name], strict=True)]
        if "bias" in name or "norm" in name or len(shape) < 2:
            assert found == "vector", name
        elif name.startswith("modulation") or name in ("head_modulation", "image_embedder.positions"):  # tables
            assert found == "vector", name
        else:
            expected = {(True, True): "hidden", (False, True): "output", (True, False): "input"}
            assert found == expected.get(tuple(grows[-2:]), "input"), name


def test_a_parameter_without_a_class_is_named():
    with pytest.raises(ValueError, match="experts.up matches no pattern of the model family's WidthRules"):
        width_class("experts.up", WidthRules(sizes=("dim",), classes={"*.weight": "hidden"}))


@pytest.mark.parametrize("family, flavor", [x for x in FLAVORS if x[1].startswith("proxy-")])
def test_a_proxy_fits_its_model(family, flavor):
    spec = get_spec(family)
    wide = spec.flavors[flavor.removeprefix("proxy-")]
    assert base_problem(spec, wide, spec.flavors[flavor]) == ""
    assert fitting_flavors(spec, wide)[0] == flavor and spec.flavors[flavor].dim * 4 <= wide.dim


@dataclass(frozen=True)
class Inner:
    width: int
    top: int


@dataclass(frozen=True)
class Outer:
    dim: int
    num_heads: int
    inner: Inner | None = None
    num_layers: int = 3

    @property
    def head_dim(self):
        return self.dim // self.num_heads


def test_arguments_in_arguments_grow_too(monkeypatch):
    spec = replace(SPEC, name="nested")
    monkeypatch.setitem(FAMILY_RULES, "nested", WidthRules(sizes=("dim", "num_heads", "inner.width"), classes={}))
    wide = Outer(64, 2, Inner(width=32, top=2))
    assert at_width(spec, wide, 32, layers=2) == Outer(32, 1, Inner(width=16, top=2), num_layers=2)
    assert base_problem(spec, wide, Outer(32, 1, Inner(width=16, top=2))) == ""
    assert "inner.top is 2 in model.flavor and 1 in it" in base_problem(spec, wide, Outer(32, 1, Inner(16, 1)))
    assert "inner.width is 32 in model.flavor and 8 in it" in base_problem(spec, wide, Outer(32, 1, Inner(8, 2)))
    assert "inner.width is 32 in model.flavor and None in it" in base_problem(spec, wide, Outer(32, 1))


# ---- initial values ----


def drawn(args, base=None):
    """{name: tensor} of a model as it is initialised, with muP where a base is given."""
    with torch.device("meta"):
        model = SPEC.build(args)
    model.to_empty(device="cpu")
    initialise(model, Parametrization(SPEC, args, base).init_parameter if base else SPEC.init_parameter, seed=3)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_at_the_width_of_the_base_the_values_are_those_without():
    plain, mup = drawn(WIDE), drawn(WIDE, base=WIDE)
    assert all(torch.equal(mup[name], plain[name]) for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_scales_follow_the_classes(family):
    """Root mean squares at four times the width of the base, as multiples of those at the base."""
    spec = get_spec(family)
    base, args = spec.flavors["proxy-debug"], spec.flavors["debug"]
    mup = Parametrization(spec, args, base)
    expected = {"input": 1.0, "vector": 1.0, "hidden": 0.5, "output": 0.25}
    seen = set()
    for name, shape in mup.shapes.items():
        narrow, wide = torch.empty(mup.base_shapes[name]), torch.empty(shape)
        spec.init_parameter(name, narrow, torch.Generator().manual_seed(1))
        mup.init_parameter(name, wide, torch.Generator().manual_seed(2))
        found, before = (t.square().mean().sqrt().item() for t in (wide, narrow))
        assert found == pytest.approx(before * expected[mup.classes[name]], rel=0.2), name
        seen.add((mup.classes[name], before > 0))
    assert {("input", True), ("vector", True), ("hidden", True), ("output", False)} <= seen


# ---- groups ----


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Muon"])
def test_rates_decay_and_eps_by_class(name):
    config = configured("--optimizer.name", name, "--optimizer.lr", "0.01", "--optimizer.weight_decay", "0.1")
    section, mup = config.optimizer, Parametrization(SPEC, WIDE, NARROW)
    model = SPEC.build(WIDE)
    optimizer = build_optimizer(model, section, SPEC.plan.blocks, adjust_group=mup.adjust_group)
    names = {p: n for n, p in model.named_parameters()}
    lr = Scheduler(optimizer, LrScheduler(warmup_steps=4), section.lr, total_steps=10).set_step(2)
    assert lr == 0.005
    found = {}
    for group in optimizer.param_groups:
        scale = 0.25 if group["width_class"] in ("hidden", "output") else 1.0
        scale = 0.5 if group["kind"] == "Muon" else scale
        assert group["lr"] == lr * scale and group["lr_scale"] == scale
        assert group["eps"] == section.eps * (1 if group["width_class"] == "output" else 0.25)
        assert group["weight_decay"] * group["lr"] == pytest.approx(0.1 * lr if group["weight_decay"] else 0)
        for p in group["params"]:
            assert group["weight_decay"] == 0 if p.ndim < 2 or "modulation" in names[p] else group["weight_decay"] > 0
            found[names[p]] = group["width_class"], group["kind"]
    assert found.keys() == dict(model.named_parameters()).keys()
    matrices = {"AdamW": "AdamW", "AdamW8bit": "AdamW8bit", "Muon": "AdamW"}[name]
    assert found["blocks.0.ffn.up.weight"] == ("hidden", name if name == "Muon" else matrices)
    assert found["time_proj.weight"] == ("hidden", matrices) and found["proj_out.weight"] == ("output", matrices)
    assert found["patch_embedding.weight"] == ("input", matrices) and found["modulation.0"] == ("vector", "AdamW")


def test_groups_without_it_are_as_they_were():
    optimizer = build_optimizer(SPEC.build(NARROW), parse_args([]).optimizer, SPEC.plan.blocks)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}
    assert not any("width_class" in group for group in optimizer.param_groups)


def test_the_log_has_the_rate_of_each_class(caplog, monkeypatch):
    monkeypatch.setattr(parametrization.logger, "propagate", True)
    with caplog.at_level("INFO", logger=parametrization.logger.name):
        spec = parametrize(SPEC, configured("--optimizer.name", "Muon", "--optimizer.lr", "0.01"))
    assert spec.adjust_group and spec.init_parameter is not SPEC.init_parameter
    for words in (
        "muP: width 128 is 4 x the 32 of proxy-debug",
        "input, AdamW: lr 0.01 (1 x), weight decay 0.01, eps 2.5e-09, 3 tensors",
        "vector, AdamW: lr 0.01 (1 x), weight decay none, eps 2.5e-09, ",
        "hidden, AdamW: lr 0.0025 (0.25 x), weight decay 0.04, eps 2.5e-09, 3 tensors",
        "hidden, Muon: lr 0.005 (0.5 x), weight decay 0.02, 40 tensors",
        "output, AdamW: lr 0.0025 (0.25 x), weight decay 0.04, eps 1e-08, 1 tensors",
    ):
        assert words in caplog.text, caplog.text
    assert parametrize(SPEC, parse_args([])) is SPEC


# ---- rules of the configuration ----


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--optimizer.base_flavor", "proxy-t2v-1.3B"], ["head is 32 in model.flavor and 128", "legal", "proxy-debug"]),
        (["--optimizer.base_flavor", "debug-ti2v"], ["clean_first_frame is False in model.flavor and True in it"]),
        (
            ["--model.flavor", "t2v-14B", "--optimizer.base_flavor", "proxy-t2v-1.3B"],
            ["num_layers is 40", "proxy-t2v-14B"],
        ),
        (
            ["--optimizer.base_flavor", ""],
            ["optimizer.base_flavor: given ''", "legal for this model: proxy-debug, debug"],
        ),
        (["--optimizer.base_flavor", "nothing"], ["given 'nothing', which is no flavor of wan"]),
        (["--optimizer.name", "torch.optim.RAdam"], ["no rule is known for torch.optim.RAdam", "choose AdamW"]),
        (["--lora.enable"], ["lora.enable trains adapters"]),
        (["--checkpoint.initial_load_path", "x"], ["checkpoint.initial_load_path", "optimizer.mup_finetune = true"]),
        (
            ["--checkpoint.initial_load_in_hf", "--model.hf_assets_path", "x"],
            ["checkpoint.initial_load_in_hf gives the initial weights"],
        ),
        (["--optimizer.mup_finetune"], ["optimizer.mup_finetune: true, but the weights are drawn"]),
        (["--optimizer.parametrization", "standard"], ["optimizer.base_flavor: given proxy-debug, without effect"]),
        (
            ["--optimizer.parametrization", "standard", "--optimizer.base_flavor", "", "--optimizer.mup_finetune"],
            ["optimizer.mup_finetune: given true, without effect"],
        ),
    ],
)
def test_what_cannot_be_is_refused(argv, words):
    with pytest.raises(ConfigError) as caught:
        check(configured("--encoder.name", "debug", *argv), 1, files=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_can_be_is_accepted():
    for argv in (
        [],
        ["--optimizer.base_flavor", "debug"],
        ["--optimizer.name", "AdamW8bit"],
        ["--model.flavor", "t2v-1.3B", "--optimizer.base_flavor", "proxy-t2v-1.3B"],
        ["--checkpoint.initial_load_path", "x", "--optimizer.mup_finetune"],
    ):
        check(configured("--encoder.name", "debug", *argv), 1, files=False)


def test_a_base_that_is_not_narrower_in_proportion_is_refused():
    assert "ffn_dim is 256 in model.flavor and 65" in base_problem(SPEC, WIDE, replace(NARROW, ffn_dim=65))
    assert "has no WidthRules" in base_problem(replace(SPEC, name="other"), WIDE, NARROW)


# ---- the coordinate check ----

WIDTHS = (64, 128, 256)


def found_by(*argv, widths=WIDTHS, **probe):
    return coordinate_check.coordinate_check(configured(*argv), Probe(widths, **probe))


def quickly(*argv):
    """Where the slopes are far from the bar."""
    return found_by(*argv, widths=(64, 256), seeds=1, layers=1)


@pytest.mark.parametrize(
    "family, name",
    [
        ("wan", "AdamW"),
        pytest.param("wan", "AdamW8bit", marks=pytest.mark.slow),
        ("wan", "Muon"),
        ("hunyuan_video", "AdamW"),
        pytest.param("hunyuan_video", "AdamW8bit", marks=pytest.mark.slow),
        pytest.param("hunyuan_video", "Muon", marks=pytest.mark.slow),
    ],
)
def test_activations_keep_their_size(family, name):
    found = found_by("--model.name", family, "--optimizer.name", name, seeds=2)
    assert found.measure == ("changes" if name == "Muon" else "activations")
    assert abs(found.worst()[2]) <= BAR, found.worst()
    assert len(found.slopes) >= 32 and list(found.sizes) == list(WIDTHS)
    plain = quickly("--model.name", family, "--optimizer.name", name, "--optimizer.parametrization", "standard")
    assert plain.worst()[2] > 0.5, plain.worst()


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["debug", "debug-i2v", "debug-flf2v", "debug-i2v-A14B", "debug-ti2v"])
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_activations_keep_their_size_up_to_512(flavor, name):
    found = found_by("--model.flavor", flavor, "--optimizer.name", name, widths=(64, 128, 256, 512))
    assert abs(found.worst()[2]) <= BAR, found.worst()


BROKEN = [  # (class, what is broken, options, the layer that shows it, the slope there)
    ("hidden", {"rate": 0}, [], "blocks.0.ffn.down", 0.5),
    ("hidden", {"init": 0}, [], "blocks.0.ffn.down", 0.8),
    ("hidden", {"muon_rate": 0}, ["--optimizer.name", "Muon"], "blocks.0.ffn.down", 0.4),
    ("hidden", {"muon_rate": -1}, ["--optimizer.name", "Muon"], "blocks.0.ffn.down", -0.35),
    ("hidden", {"eps": 0}, ["--optimizer.eps", "1e-4"], "time_embedder.down", -0.25),
    ("input", {"rate": -1}, [], "time_embedder.up", -0.5),
    ("input", {"init": -0.5}, [], "patch_embedding", -0.4),
    ("input", {"eps": 0}, ["--optimizer.eps", "1e-4"], "time_embedder.up", -0.25),
    ("vector", {"rate": -1}, [], "time_proj", -0.3),
    ("vector", {"init": -0.5}, [], "head_modulation", -0.4),
    ("vector", {"eps": 0}, ["--optimizer.eps", "1e-4"], "blocks.0.cross_attn.o", -0.25),
    ("output", {"rate": 0}, [], "proj_out", 0.6),
]


@pytest.mark.parametrize("broken, powers, argv, layer, slope", BROKEN)
def test_each_rule_broken_alone_is_seen(broken, powers, argv, layer, slope, monkeypatch):
    monkeypatch.setitem(POWERS, broken, replace(POWERS[broken], **powers))
    found = quickly(*argv)
    assert abs(found.worst()[2]) > BAR
    shown = [x for x in found.slopes[layer][1:] if not math.isnan(x)]
    assert (max(shown) > slope) if slope > 0 else (min(shown) < slope), found.slopes[layer]


WRONG_SCALES = {  # what the family's own initialisation does at every width; muP takes the base's
    "patch_embedding.weight": ("patch_embedding", -0.3),
    "time_embedder.down.weight": ("time_proj", 0.4),
    "modulation.0": ("modulation.0", -0.4),
}


@pytest.mark.parametrize("name", WRONG_SCALES)
def test_the_familys_own_scale_is_seen(name, monkeypatch):
    right = Parametrization.init_parameter

    def init_parameter(self, parameter, tensor, generator):
        if parameter == name:
            return self.spec.init_parameter(parameter, tensor, generator)
        right(self, parameter, tensor, generator)

    monkeypatch.setattr(Parametrization, "init_parameter", init_parameter)
    layer, slope = WRONG_SCALES[name]
    shown = quickly().slopes[layer][1:]
    assert (max(shown) > slope) if slope > 0 else (min(shown) < slope), shown


def test_eps_beside_the_gradients_is_width_free():
    """An eps as large as the gradients, which the rules scale with them."""
    assert abs(quickly("--optimizer.eps", "1e-4").worst()[2]) <= BAR


def test_a_layer_that_diverged_fails():
    sizes = {64: {"a": [1.0, 1.0], "b": [0.0, 2.0]}, 128: {"a": [1.0, math.inf], "b": [0.0, math.nan]}}
    slopes = {layer: list(coordinate_check._slopes(sizes, layer)) for layer in ("a", "b")}
    assert slopes["a"] == [0.0, math.inf] and math.isnan(slopes["b"][0]) and slopes["b"][1] == math.inf
    assert coordinate_check.Finding("activations", sizes, slopes).worst() == ("a", 1, math.inf)


def test_widths_of_a_check():
    assert coordinate_check.default_widths(32) == (64, 128, 256, 512)
    assert coordinate_check.default_widths(128) == (128, 256, 512, 1024)
    with pytest.raises(ValueError, match="--widths: given 40, .* multiples of the width of a head, 32"):
        at_width(SPEC, SPEC.flavors["debug"], 40, layers=2)
    with pytest.raises(ValueError, match="has no WidthRules"):
        at_width(replace(SPEC, name="other"), WIDE, 64, layers=2)
    narrow = at_width(SPEC, SPEC.flavors["debug"], 64, layers=2)
    assert (narrow.dim, narrow.num_heads, narrow.ffn_dim, narrow.num_layers) == (64, 2, 256, 2)


# ---- the commands ----


def run_cli(tmp_path, *argv):
    toml = tmp_path / "run.toml"
    toml.write_text('[encoder]\nname = "debug"\nmax_text_length = 16\n')
    with pytest.raises(SystemExit) as caught:
        cli.main([argv[0], str(toml), *map(str, argv[1:])])
    return caught.value.code


def test_the_check_as_a_command(tmp_path, capsys):
    small = ["--widths", 64, 128, 256, "--steps", 2, "--seeds", 1, "--layers", 1, "--plot", tmp_path / "a.svg"]
    assert run_cli(tmp_path, "check", *small, *MUP[:4]) == 0
    out = capsys.readouterr().out
    assert "passed: the worst slope is" in out and "per doubling of the width (64, 128, 256)" in out
    picture = (tmp_path / "a.svg").read_text()
    assert (
        picture.count("<polyline") == 3 * 20 - 1
        and "<title>patch_embedding: +0.0" in picture
        and "#c0392b" not in picture
    )
    assert run_cli(tmp_path, "check", *small) == 1
    out = capsys.readouterr().out
    assert "FAILED: the worst slope is +" in out and "of proj_out after step" in out
    assert "#c0392b" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["check", "--widths", 64], "a slope needs two widths"),
        (["check", "--widths", 40, 64], "--widths: given 40"),
        (["check", *MUP[:4], "--lora.enable"], "config error: optimizer.parametrization: mup, but lora.enable"),
        (["check", "--optimizer.rate", 3], "optimizer.rate: unknown option"),
        (["transfer", "--rates", "1e-3"], "optimizer.base_flavor: empty"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, argv, words):
    assert words in run_cli(tmp_path, *argv)


@pytest.mark.parametrize("word", ["0", "-1e-3", "2^x", "inf", "nan"])
def test_rates_and_widths_are_positive(tmp_path, word, capsys):
    assert run_cli(tmp_path, "transfer", f"--rates={word}") == 2
    assert "such as 1e-3 or 2^-9" in capsys.readouterr().err
    assert run_cli(tmp_path, "check", "--widths", "0") == 2
    assert (cli.parse_rate("2^-9"), cli.parse_rate("1e-3")) == (2.0**-9, 1e-3)


# ---- the page ----


def test_the_page_has_the_tables_that_its_script_prints():
    results = json.loads((ROOT / "benchmarks" / "results" / "mup.json").read_text())["results"]
    assert (ROOT / "docs" / "mup.md").read_text().split(benchmark.MARKER)[1].strip() == benchmark.page(results)
    for row in results["check"]:
        assert abs(row["mup"]["slope"]) <= BAR and row["standard"]["slope"] > 0.5
    costs = benchmark.costs_by_seed(results["transfer"])
    assert len(costs["mup"]) == len(benchmark.SEEDS) == 3 and set(costs["base"]) == {0.0}
    assert max(costs["mup"]) <= 0.02
    assert sorted(costs["standard"])[1] > 0.05  # the median


# ---- the sweep ----

FAKE = """
import json, math, pathlib, sys
sys.path.insert(0, ROOT)
from titan_video.config.manager import dump, parse_args
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, lr, flavor = (options[f"--{k}"] for k in ("job.dump_folder", "optimizer.lr", "model.flavor"))
pathlib.Path(folder, "config.toml").write_text(dump(parse_args(sys.argv[1:])))
if float(lr) > 0.1:
    sys.exit("FloatingPointError: the loss is nan")
if float(lr) < 1e-5:
    sys.exit("error: no such clip")
best = {"proxy-debug": -7, "debug": %d}[flavor]
with open(pathlib.Path(folder) / "metrics.jsonl", "a") as file:
    for step in range(1, 21):
        loss = 1 + 0.03 * abs(math.log2(float(lr)) - best) + (step < 19)
        file.write(json.dumps({"step": step, "loss": loss, "grad_norm": 2.0 if step > 15 else 0.5}) + "\\n")
    file.write(json.dumps({"step": 20, "validation": 5.0}) + "\\n")
"""


@pytest.fixture
def fake_runs(tmp_path, monkeypatch):
    """`train.py` is replaced by a script whose loss is smallest at a rate that it is given."""

    def install(best):
        (tmp_path / "train.py").write_text(f"ROOT = {str(ROOT)!r}{FAKE % best}")
        monkeypatch.setattr(transfer, "TRAIN", tmp_path / "train.py")
        return tmp_path

    return install


SWEEP = ["--training.steps", 20, "--rates", "2^-9", "2^-8", "2^-7", "2^-6", "0.5"]


def test_a_rate_that_holds_and_one_that_does_not(fake_runs, capsys):
    folder = fake_runs(best=-7)
    argv = ["transfer", *SWEEP, "--runs", folder / "same", *MUP[:4]]
    assert run_cli(folder, *argv) == 0
    out = capsys.readouterr().out
    assert "| proxy-debug | 1.0600 | 1.0300 | **1.0000** | 1.0300 | inf |" in out
    assert "costs debug 0.0% of loss over its own best, 7.81e-03. Gradients were clipped in up to 25% of" in out
    (folder / "train.py").write_text("raise SystemExit('a finished run is not made again')")
    again = ["--training.steps", 20, "--rates", "2^-8", "2^-7", "--runs", folder / "same", *MUP[:4]]
    assert run_cli(folder, "transfer", *again) == 0
    folder = fake_runs(best=-9)
    assert run_cli(folder, "transfer", *SWEEP, "--runs", folder / "other", "--base-flavor", "proxy-debug") == 1
    assert "costs debug 6.0% of loss over its own best, 1.95e-03" in capsys.readouterr().out


def test_a_finished_run_of_other_options_is_refused(fake_runs, capsys):
    folder = fake_runs(best=-7)
    rates = ["--rates", "2^-8", "2^-7"]
    argv = ["transfer", "--training.steps", 20, *rates, "--runs", folder / "runs", *MUP[:4]]
    assert run_cli(folder, *argv) == 0
    (folder / "train.py").write_text("raise SystemExit('no run is made')")
    neutral = ["--metrics.log_freq", 7, "--data.num_workers", 1, "--checkpoint.interval", 3, "--job.dump_folder", "x"]
    assert run_cli(folder, *argv, *neutral) == 0
    said = run_cli(folder, *argv, "--optimizer.weight_decay", "0.3", "--debug.seed", 9)
    assert said.count("\n") == 3 and said.startswith(f"error: {folder}/runs/proxy-debug/lr-3.906e-03: optimizer.weight")
    assert (
        "optimizer.weight_decay of the run there is 0.01, and not 0.3; debug.seed of the run there is 0, and not 9"
        in said
    )
    assert f"{folder}/runs/debug/lr-7.812e-03: " in said and said.endswith(": remove it, or give another --runs")
    assert "training.steps of the run there is 20, and not 19" in run_cli(folder, *argv, "--training.steps", 19)
    one = folder / "runs" / "debug" / "lr-7.812e-03"
    (one / "metrics.jsonl").unlink()  # started and stopped: it would go on with the new options
    assert "weight_decay" in run_cli(folder, *argv, "--optimizer.weight_decay", "0.3", "--rates", "2^-7")
    (one / "metrics.jsonl").write_text("")
    (one / "config.toml").unlink()
    assert f"{one}: holds a run without its config.toml" in run_cli(folder, *argv)
    said = run_cli(folder, "transfer", *rates, "--runs", folder / "new", *MUP[:4], "--training.epochs", 2)
    assert "training.epochs: given 2, but runs are compared by training.steps" in said


def test_a_run_has_not_diverged_because_an_earlier_attempt_did(fake_runs, capsys):
    folder = fake_runs(best=-7)
    argv = ["transfer", "--training.steps", 20, "--rates", "0.5", "--runs", folder / "r", *MUP[:4]]
    assert run_cli(folder, *argv) == 1
    assert "Every run of proxy-debug diverged: give lower --rates." in capsys.readouterr().out
    (folder / "train.py").write_text("raise SystemExit('error: no such clip')")
    assert "ended with exit code 1: see" in run_cli(folder, *argv)


def test_a_best_rate_at_the_end_of_the_sweep_is_said(fake_runs, capsys):
    folder = fake_runs(best=-7)
    run_cli(folder, "transfer", "--training.steps", 20, "--rates", "2^-6", "2^-5", "--runs", folder / "r", *MUP[:4])
    assert "The best rate of proxy-debug is the lowest of the sweep: extend --rates." in capsys.readouterr().out


def test_a_run_that_fails_is_named(fake_runs):
    folder = fake_runs(best=-7)
    argv = ["--training.steps", 20, "--rates", "1e-6", "--runs", folder / "r", *MUP[:4]]
    code = run_cli(folder, "transfer", *argv)
    assert "the run of proxy-debug at 1.000e-06 ended with exit code 1: see" in code and code.endswith("log.txt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_ranks_are_started_by_torchrun(tmp_path, ranks, monkeypatch):
    started = []

    def run(words, **options):
        started.append(words)
        return subprocess.CompletedProcess(words, returncode=7)

    monkeypatch.setattr(transfer.subprocess, "run", run)
    argv = ["transfer", "--rates", "1e-3", "--ranks", ranks, "--runs", tmp_path / "runs", *MUP[:4]]
    assert "ended with exit code 7" in run_cli(tmp_path, *argv)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert started[0][1:7] == [*torchrun, str(transfer.TRAIN)] if ranks == 2 else started[0][1] == str(transfer.TRAIN)


def test_the_commands_of_the_runs(tmp_path, capsys):
    argv = ["transfer", *SWEEP, "--print", "--runs", tmp_path / "runs", *MUP[:4]]
    assert run_cli(tmp_path, *argv) == 0 and not (tmp_path / "runs").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all("train.py --job.config_file" in line for line in lines)
    assert "--model.flavor proxy-debug --optimizer.lr 0.001953125 --job.dump_folder" in lines[0]
    assert f"--data.cache_folder {tmp_path}/runs/cache" in lines[0] and "--model.flavor debug" in lines[5]
    assert run_cli(tmp_path, *argv, "--ranks", 2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10 and all(
        " -m torch.distributed.run --standalone --nproc_per_node 2 " in x for x in printed
    )


def test_a_resumed_run_is_read_once(tmp_path):
    """A resumed run repeats steps after its last checkpoint: the later line counts."""
    config = parse_args(["--training.steps", "20"])
    assert transfer.read_outcome(tmp_path, config) is None
    rows = [{"step": s, "loss": 9.0, "grad_norm": 0.1} for s in range(1, 20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert transfer.read_outcome(tmp_path, config) is None
    rows += [{"step": s, "loss": float(s), "grad_norm": 0.1} for s in (19, 20)]
    torn = json.dumps(rows[18])[:-9]  # of a run that was killed
    (tmp_path / "metrics.jsonl").write_text("\n".join([torn, *map(json.dumps, rows)]))
    assert transfer.read_outcome(tmp_path, config) == transfer.Outcome(loss=19.5, clipped=0.0)
