"""The trainer and the convert command together: runs that end in and start from each public format."""

import json

import pytest
from safetensors.torch import load_file

from tests.integration_tests.test_resume import iter_tensors
from titan_video import convert

QUIET = {
    "training.steps": 1,
    "optimizer.lr": 1e-30,
    "checkpoint.interval": 1,
    "checkpoint.export_dtype": "float32",
    "ema.enable": "true",
}


@pytest.fixture(scope="module")
def first(shared_front):
    """One step, exported as one file of original names."""
    run = shared_front.run(
        "first",
        {**QUIET, "optimizer.lr": 1e-2, "checkpoint.last_save_in_hf": "true", "checkpoint.export_format": "comfyui"},
    ).ok()
    assert (run.folder / "comfyui.safetensors").is_file() and not (run.folder / "hf").exists()
    return run


def weights(run, source):
    return {
        name.partition(".")[2]: tensor
        for name, tensor in iter_tensors(run.checkpoint(1)).items()
        if name.startswith(f"{source}.")
    }


def assert_same(ours, theirs, within=0.0):
    assert ours.keys() == theirs.keys() and ours
    assert [name for name in ours if not (ours[name] - theirs[name]).abs().max() <= within] == []


def test_a_run_starts_from_what_another_exported(first, front):
    """From one file, with export of a complete pipeline folder; from a step-N folder in the original layout."""
    assert weights(first, "model")["proj_out.bias"].ne(weights(first, "ema")["proj_out.bias"]).any()
    exported = load_file(first.folder / "comfyui.safetensors")
    assets = front.root / "assets"
    (assets / "vae").mkdir(parents=True)
    (assets / "vae/config.json").write_text("{}")
    (assets / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "vae": ["diffusers", "x"], "transformer": ["diffusers", "y"]})
    )
    options = {
        **QUIET,
        "checkpoint.initial_load_path": first.folder / "comfyui.safetensors",
        "model.hf_assets_path": assets,
        "checkpoint.last_save_in_hf": "true",
    }
    second = front.run("second", options, world=2).ok()
    assert_same(weights(second, "model"), weights(first, "ema"), 1e-29)  # its one step is of that size
    assert (second.folder / "hf/model_index.json").is_file() and (second.folder / "hf/vae/config.json").is_file()
    convert.main([str(second.folder / "hf"), str(front.root / "x.safetensors"), "--format", "comfyui"])
    assert_same(load_file(front.root / "x.safetensors"), exported, 1e-29)

    convert.main(
        [str(first.checkpoint(1)), str(front.root / "y.safetensors"), "--format", "comfyui", "--weights", "ema"]
    )
    assert_same(load_file(front.root / "y.safetensors"), exported)
    convert.main([str(first.checkpoint(1)), str(front.root / "original"), "--format", "original"])
    third = front.run("third", {**QUIET, "checkpoint.initial_load_path": front.root / "original"}).ok()
    assert_same(weights(third, "model"), weights(first, "model"), 1e-29)


def test_nothing_to_start_from_is_said(front):
    (front.root / "empty").mkdir()
    front.run("run", {**QUIET, "checkpoint.initial_load_path": front.root / "empty"}).fails_with(
        "holds no weights", "diffusion_pytorch_model.safetensors"
    )
