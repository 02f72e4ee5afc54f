"""A mixture made from dense weights computes what they compute; mixtures are exported in a form of their own."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.unit_tests.config_cases import BASE
from tests.unit_tests.test_experts import ARGS, build, inputs
from titan_video import convert, upcycle
from titan_video.config import from_dict
from titan_video.config.check import check
from titan_video.config.manager import ConfigError
from titan_video.models import args_from_config
from titan_video.models.spec import ExpertArgs
from titan_video.models.wan import SPEC
from titan_video.weights.export.save import save_hf
from titan_video.weights.formats import FORMAT_NAMES
from titan_video.weights.hf_storage import load_hf

DENSE = replace(ARGS, experts=None)
MIXTURES = {
    "copies": replace(ARGS, experts=ExpertArgs(4, top_k=2, expert_dim=60, first_dense=1)),
    "copies and shared": replace(ARGS, experts=ExpertArgs(4, top_k=3, expert_dim=60, shared_dim=16)),
    "shared": replace(ARGS, experts=ExpertArgs(4, top_k=2, expert_dim=35, shared_dim=60, last_dense=1)),
}


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """(model, folder) in float64, with the mixtures among the flavors."""
    for name, args in MIXTURES.items():
        monkeypatch.setitem(SPEC.flavors, name, args)
    model = build(DENSE)
    save_hf(model, tmp_path / "dense/transformer", SPEC, DENSE, torch.float64)
    return model, tmp_path / "dense"


def upcycled(folder, flavor, method, *options):
    path = folder.parent / f"{flavor}{'-'.join(options)}"
    upcycle.run(upcycle.parse([str(folder), str(path), "--flavor", flavor, "--method", method, *options]))
    model = build(MIXTURES[flavor])
    load_hf(model, path, SPEC, MIXTURES[flavor])
    return model


@pytest.mark.parametrize("flavor", MIXTURES)
def test_computes_what_the_dense_model_does(flavor, dense):
    model, folder = dense
    method = flavor.partition(" ")[0]
    mixture = upcycled(folder, flavor, method, *(["--noise", "0"] if method == "copies" else []))
    kwargs = inputs(ARGS)
    with torch.no_grad():
        expected = model(**kwargs)
        assert (mixture(**kwargs) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_experts_start_apart(dense):
    model, folder = dense
    for flavor, method in (("copies", "copies"), ("shared", "shared")):
        mixture = upcycled(folder, flavor, method)
        up = mixture.blocks["1"].moe.experts.up
        dense_up = model.blocks["1"].ffn.up.weight.t()
        width = up.shape[2]
        for i in range(4):
            columns = (i * width + torch.arange(width)) % 60
            relative = up[i] / dense_up[:, columns] - 1
            assert 0.005 < relative.std() < 0.02
        assert mixture.routers["1"].weight.any() and not mixture.routers["1"].bias.any()
        assert (mixture.blocks["1"].moe.experts.down == 0).all() == (method == "shared")
    first, other = (upcycled(folder, "copies", "copies", "--seed", seed) for seed in "01")
    assert not torch.equal(first.blocks["1"].moe.experts.up, other.blocks["1"].moe.experts.up)


@pytest.mark.parametrize(
    "flavor, method, message",
    [
        ("shared", "copies", "those of --flavor shared have 35"),
        ("copies", "shared", "that of --flavor copies has 0"),
        ("debug", "copies", "--flavor debug is no mixture of experts; legal: moe-debug"),
        ("moe-debug", "shared", "dense feed-forward of width 512, but that of --flavor moe-debug has 256"),
    ],
)
def test_what_does_not_fit_is_refused(flavor, method, message, dense):
    with pytest.raises(ValueError, match=message):
        upcycle.run(upcycle.parse([str(dense[1]), str(dense[1]) + "-new", "--flavor", flavor, "--method", method]))


def test_another_dense_model_is_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(SPEC.flavors, "wider", replace(MIXTURES["copies"], dim=72))
    with pytest.raises(ValueError, match="SRC is not the dense model of --flavor wider"):
        upcycle.run(upcycle.parse([str(dense[1]), str(tmp_path / "x"), "--flavor", "wider", "--method", "copies"]))
    with pytest.raises(ValueError, match="exists; give a new path"):
        upcycle.run(upcycle.parse([str(dense[1]), str(tmp_path), "--flavor", "copies", "--method", "copies"]))
    for noise in ("-1.0", "nan", "inf"):
        arguments = [str(dense[1]), str(tmp_path / "x"), "--flavor", "copies", "--method", "copies", "--noise", noise]
        with pytest.raises(ValueError, match=f"--noise: given {noise}"):
            upcycle.run(upcycle.parse(arguments))


# ---- exports ----


def test_a_stacked_export_loads_back_bitwise(tmp_path):
    args = replace(ARGS, experts=replace(ARGS.experts, first_dense=1))
    model, path = build(args, torch.float32), tmp_path / "transformer"
    save_hf(model, path, SPEC, args, torch.float32, format_name="stacked")
    again = build(args, torch.float32)
    for p in again.parameters():
        p.data.fill_(7)
    load_hf(again, tmp_path, SPEC, args)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    stored = load_file(path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["blocks.1.moe.experts.up"], model.blocks["1"].moe.experts.up)
    assert stored["blocks.0.ffn.net.2.weight"].shape == (48, 60) and "blocks.1.ffn.net.2.weight" not in stored
    config = json.loads((path / "config.json").read_text())
    assert config["_class_name"] == "TitanVideoWanExperts"  # by which diffusers refuses it
    assert replace(args_from_config(SPEC, config, path), text_len=args.text_len) == args


def test_other_formats_are_refused(tmp_path):
    model = build(ARGS, torch.float32)
    for name in ("diffusers", "original", "single_file", "comfyui"):
        with pytest.raises(ValueError, match=f"format {name} .*: the model is a mixture of experts.*; choose stacked"):
            save_hf(model, tmp_path / "x", SPEC, ARGS, torch.float32, format_name=name)
    with pytest.raises(ValueError, match="format stacked .*: the model is no mixture of experts; choose one of diff"):
        save_hf(build(DENSE, torch.float32), tmp_path / "x", SPEC, DENSE, torch.float32, format_name="stacked")
    save_hf(model, tmp_path / "a/transformer", SPEC, ARGS, torch.float32, format_name="stacked")
    with pytest.raises(ValueError, match="choose stacked"):
        convert.run(convert.parse([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "diffusers"]))
    convert.run(convert.parse([str(tmp_path / "a"), str(tmp_path / "c"), "--format", "stacked"]))
    files = [tmp_path / folder / "transformer/diffusion_pytorch_model.safetensors" for folder in "ac"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("asked", [{"last_save_in_hf": True}, {"export_every": 5}, {}])
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("flavor", ["debug", "moe-debug"])
def test_a_run_whose_export_would_be_refused_does_not_start(tmp_path, flavor, is_folder, asked):
    """Also of a folder, whose config.json says whether the model has experts."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(SPEC.args_to_hf(SPEC.flavors[flavor])))
    model = {"flavor": "hf" if is_folder else flavor, "hf_assets_path": str(tmp_path)}
    for name in FORMAT_NAMES:
        config = from_dict(BASE | {"model": model, "checkpoint": asked | {"export_format": name}})
        if not asked or (name == "stacked") == (flavor == "moe-debug"):
            check(config, 1, files=False)
            continue
        fix = "choose one of diffusers, original" if name == "stacked" else "no other program loads; choose stacked"
        with pytest.raises(ConfigError, match=f"^checkpoint.export_format: given {name}, .*{fix}[^\\n]*$"):
            check(config, 1, files=False)
    model["hf_assets_path"] = str(tmp_path / "elsewhere")  # another rule names it
    if is_folder:
        check(from_dict(BASE | {"model": model, "checkpoint": asked}), 1, files=False)


def test_averages_are_exported_with_the_biases_of_routers(tmp_path):
    model = build(ARGS, torch.float32)
    averages = {n: p.detach() + 1 for n, p in model.named_parameters() if p.requires_grad}
    save_hf(model, tmp_path / "transformer", SPEC, ARGS, torch.float32, weights=averages, format_name="stacked")
    again = build(ARGS, torch.float32)
    load_hf(again, tmp_path, SPEC, ARGS)
    assert torch.equal(again.routers["1"].bias, model.routers["1"].bias)
    assert torch.equal(again.routers["1"].weight, averages["routers.1.weight"])


def test_experts_in_a_config_are_checked(tmp_path):
    config = SPEC.args_to_hf(ARGS)
    for change, message in (
        ({"top_k": 7}, "top_k"),
        ({"num_experts": "6"}, "num_experts"),
        ({"first_dense": 3}, "first_dense"),
        ({"expert_choice": 1}, "expert_choice"),
        ({"route_scale": "x"}, "route_scale"),
        ({"route_scale": math.nan}, "route_scale"),
        ({"kind": 1}, "kind"),
    ):
        with pytest.raises(ValueError, match=message):
            args_from_config(SPEC, config | {"experts": config["experts"] | change}, tmp_path)
    with pytest.raises(ValueError, match="holds a TitanVideoWanExperts"):
        args_from_config(SPEC, {k: v for k, v in config.items() if k != "experts"}, tmp_path)
    with pytest.raises(ValueError, match="holds a WanTransformer3DModel"):
        args_from_config(SPEC, {k: v for k, v in config.items() if k != "_class_name"}, tmp_path)


def test_the_command(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(SPEC.flavors, "narrow", DENSE)
    arguments = [str(dense[1]), str(tmp_path / "moe"), "--flavor", "shared", "--method", "shared", "--dense", "narrow"]
    upcycle.main(arguments)
    assert (tmp_path / "moe/transformer/config.json").is_file()
    with pytest.raises(SystemExit, match="error: DST .* exists"):
        upcycle.main(arguments)


def test_the_benchmark_of_learning():
    from benchmarks.learn_experts import first_step, table

    def scores(*shares):
        return {100 * i: dict.fromkeys(("score_direction", "score_colour", "score_shape"), s) for i, s in shares}

    assert first_step(scores((1, 0.5), (2, 0.9), (3, 1.0))) == pytest.approx(250)
    assert first_step(scores((1, 0.5))) is None
    dense, moe, never = scores((1, 0.9), (2, 1.0)), scores((1, 0.5), (2, 1.0)), scores((1, 0.5))
    text = table(("debug", "moe-debug"), {0: [dense, moe], 4: [moe, dense]})
    assert "| 0 | 150 | 190 | 1.27 | 100% / 100% direction" in text and "| 4 | 190 | 150 | 0.79 |" in text
    assert "| mean | 170 | 170 | 1.00 |" in text and text.endswith("at most 1.1 times the steps: yes")
    assert table(("debug", "moe-debug"), {0: [dense, moe]}).endswith(": no")
    text = table(("debug", "moe-debug"), {0: [dense, dense], 4: [dense, never]})
    assert "| 4 | 150 | none | nan |" in text and text.endswith(": no")


def test_the_benchmark_of_learning_reads_a_finished_run(tmp_path, monkeypatch):
    from benchmarks import learn_experts

    started = []
    monkeypatch.setattr(learn_experts.subprocess, "run", lambda command, **_: started.append(command))
    options = SimpleNamespace(out=tmp_path, steps=20, every=10, config="x.toml")
    (tmp_path / "debug-seed5").mkdir()
    rows = [{"step": n, "validation": {"score_direction": n / 20}} for n in (10, 20)]
    (tmp_path / "debug-seed5" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert learn_experts.train("debug", 5, options, []) == {n: {"score_direction": n / 20} for n in (10, 20)}
    assert not started
    options.steps = 30
    learn_experts.train("debug", 5, options, ["--optimizer.lr", "1e-3"])
    (command,) = started
    assert command[command.index("--debug.seed") + 1] == "5" and command[-2:] == ["--optimizer.lr", "1e-3"]
