"""`--lora.enable` through the trainer: one and two ranks, resume, EMA, validation, exports, sampling."""

import signal
from functools import partial

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from tests.helpers import run_ranks, signal_at
from tests.integration_tests.test_sample import decode, run_sample
from titan_video import convert
from titan_video.config.manager import parse_args
from titan_video.planner.dry_run.run import dry_run

LORA = {
    "lora.enable": "true",
    "lora.rank": 4,
    "lora.alpha": 8,
    "training.steps": 4,
    "training.global_batch_size": 4,
    "ema.enable": "true",
    "ema.decay": 0.5,
    "optimizer.lr": 0.01,
    "training.mixed_precision_param": "bfloat16",
    "checkpoint.interval": 2,
    "checkpoint.last_save_in_hf": "true",
    "lora.export": "diffusers,comfyui,merged",
}


@pytest.fixture(scope="module")
def base(shared_front):
    """Initial weights of all runs. A random model has a head of zeros, and its adapters would get no gradient."""
    return shared_front.run("base", {"training.steps": 2, "optimizer.lr": 0.01}).ok().checkpoint(2)


@pytest.fixture(scope="module")
def options(base):
    return {**LORA, "checkpoint.initial_load_path": base}


@pytest.fixture(scope="module")
def full(shared_front, options):
    return shared_front.run("full", options).ok()


def adapters(run):
    return (run.folder / "lora" / "pytorch_lora_weights.safetensors").read_bytes(), (
        run.folder / "lora" / "comfyui.safetensors"
    ).read_bytes()


def test_a_checkpoint_holds_adapters_only(full):
    metadata = dcp.FileSystemReader(full.checkpoint(4)).read_metadata().state_dict_metadata
    assert metadata and all(".adapter." in name for name in metadata)
    assert {name.split(".")[0] for name in metadata} == {"model", "optimizer", "ema"}
    assert len({r["loss"] for r in full.records}) == 4 and all(r["grad_norm"] > 0 for r in full.records)


def test_resumed_is_bitwise(front, full, options):
    front.run("cut", options, hook=partial(signal_at, 3, signal.SIGTERM)).stopped()
    run = front.run("cut", options).ok()
    assert run.records == full.records and adapters(run) == adapters(full)
    base = f"weights: base from {options['checkpoint.initial_load_path']}; adapters"
    assert f"{base} drawn at random with debug.seed 0" in full.output
    assert f"{base} step 3 of this run's checkpoints" in run.output


def test_another_scale_or_other_frozen_weights_are_refused(front, full, options):
    more = {**options, "training.steps": 5, "job.dump_folder": full.folder}
    front.run("full", {**more, "lora.alpha": 4}).fails_with("lora.alpha / lora.rank is 1", "trained with 2")
    other = front.run("other", {"training.steps": 2, "optimizer.lr": 0.01, "debug.seed": 1}).ok().checkpoint(2)
    front.run("full", {**more, "checkpoint.initial_load_path": other}).fails_with(
        "checkpoint.initial_load_path", "not those", "lora.initial_load_path"
    )


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(shared_front, front, base):
    options = {
        **LORA,
        "checkpoint.initial_load_path": base,
        "training.mixed_precision_param": "float32",
        "training.steps": 3,
        "checkpoint.enable": "false",
    }
    one = front.run("one", options).ok()
    two = front.run(
        "two", {**options, "training.local_batch_size": 1, "parallelism.tensor_parallel_degree": 2}, world=2
    ).ok()
    for a, b in zip(one.records, two.records, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-3
        )
    for name, tensor in load_file(one.folder / "lora" / "comfyui.safetensors").items():
        other = load_file(two.folder / "lora" / "comfyui.safetensors")[name]
        assert (tensor.float() - other.float()).norm() <= 0.02 * tensor.float().norm() + 1e-6, name


@pytest.fixture(scope="module")
def validated(shared_front, full):
    """A run stopped and resumed without pretrained weights: the seed makes the frozen ones."""
    start = full.folder / "lora" / "comfyui.safetensors"
    options = {
        **LORA,
        "lora.initial_load_path": start,
        "validation.enable": "true",
        "validation.freq": 2,
        "validation.num_videos": 1,
        "validation.sample_steps": 1,
        "validation.timesteps": "0.5",
        "validation.path": "embedded:shapes-12",
        "lora.export": "diffusers",
    }
    run = shared_front.run("seeded", {**options, "training.steps": 2}).ok()
    assert (
        f"base drawn at random with debug.seed 0; adapters from {start}" in run.output
        and not (run.folder / "hf").exists()
    )
    return shared_front.run("seeded", options).ok()


def test_a_run_without_pretrained_weights_resumes(validated):
    assert len(validated.records) == 4 and "adapters exported to" in validated.output


def test_a_checkpoint_is_sampled_as_it_validated(validated, tmp_path):
    (seen,) = (validated.folder / "samples" / "step-4").glob("*.mp4")
    prompt = seen.stem.partition("_")[2].replace("_", " ")
    run_ranks(run_sample, 1, [validated.folder, "--prompt", prompt, "--out", tmp_path / "x.mp4"], init=False)
    assert np.array_equal(decode(tmp_path / "x.mp4"), decode(seen))


def test_full_weights_are_exported_and_not_converted(full, tmp_path):
    with pytest.raises(ValueError, match="holds adapters, not the full weights: --format is one of diffusers, comfyui"):
        convert.run(convert.parse([str(full.checkpoint(4)), str(tmp_path / "x"), "--format", "original"]))
    merged = load_file(full.folder / "hf" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert len(merged) > 100 and (full.folder / "hf" / "transformer" / "config.json").is_file()


def test_dry_run_counts_what_is_trained(full):
    argv = ["--job.config_file", str(full.folder / "config.toml")]
    small, large = dry_run(parse_args(argv), 1), dry_run(parse_args([*argv, "--lora.enable=false"]), 1)
    assert (
        small.largest["optimizer"] < large.largest["optimizer"] / 5
        and small.largest["gradients"] < large.largest["gradients"] / 5
    )
    assert small.largest["parameters"] < 0.7 * large.largest["parameters"]


SMALL_GPU = {
    "training.swap_blocks": 3,
    "activation_checkpoint.mode": "full",
    "activation_checkpoint.offload": "true",
}


@pytest.fixture(scope="module")
def int8(shared_front, options):
    return shared_front.run("int8", {**options, "lora.base_dtype": "int8"}).ok()


def test_swapped_blocks_of_a_quantized_base(front, int8, full, options):
    """Stopped and resumed, bit for bit the run whose weights are all on the device; near one that stores them wide."""
    small = {**options, **SMALL_GPU, "lora.base_dtype": "int8"}
    front.run("small", small, hook=partial(signal_at, 3, signal.SIGTERM)).stopped()
    run = front.run("small", small).ok()
    assert "stored in int8" in run.output
    assert run.records == int8.records and adapters(run) == adapters(int8) != adapters(full)
    for a, b in zip(run.records, full.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
    name = "hf/transformer/diffusion_pytorch_model.safetensors"
    merged, wide = load_file(run.folder / name), load_file(full.folder / name)
    assert merged.keys() == wide.keys()
    for key, tensor in merged.items():
        assert (tensor - wide[key]).norm() <= 0.02 * wide[key].norm(), key


def test_a_quantized_base_on_two_ranks(front, int8, options):
    """FSDP shards codes and scales, here in host memory, and computes in bfloat16."""
    two = {**options, "lora.base_dtype": "int8", "checkpoint.enable": "false", "training.enable_cpu_offload": "true"}
    run = front.run("host", two, world=2).ok()
    for a, b in zip(run.records, int8.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_the_type_of_the_frozen_weights_is_kept(front, int8, options):
    more = {**options, "training.steps": 5, "job.dump_folder": int8.folder}
    front.run("int8", more).fails_with("lora.base_dtype is compute", "trained with int8")
