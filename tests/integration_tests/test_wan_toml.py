"""The TOMLs for real Wan weights, run from start to export on a tiny diffusers folder (VAE, text encoder, tokenizer,
transformer)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import ROOT, diffusers_wan, run_ranks
from tests.unit_tests.data_clips import captioned
from tests.unit_tests.test_encoder_wan import saved  # noqa: F401
from titan_video.config.check import check
from titan_video.config.manager import parse_args
from titan_video.models.wan import WanArgs

ARGS = WanArgs(dim=24, num_heads=2, num_layers=3, ffn_dim=40, text_dim=24, freq_dim=16)
TRAINED = ("wan2.1_t2v_1.3b", "wan2.1_t2v_14b")
# With their world sizes. The others differ from those trained here in layout and size, and are dry-run by
# test_dry_run.py.
TOMLS = {
    "wan2.1_t2v_1.3b": 1,
    "wan2.1_t2v_1.3b_8gpu": 8,
    "wan2.1_t2v_14b": 8,
    "wan2.1_t2v_14b_lora_24gb": 1,
    "wan2.1_t2v_14b_720p": 8,
    "wan2.1_t2v_14b_720p_64gpu": 64,
}


def arguments(name, folder, assets, clips):
    """The TOML with what a user sets, and sizes at which a test can run it."""
    small = {
        "job.dump_folder": folder,
        "model.hf_assets_path": assets,
        "data.path": clips,
        "data.buckets": "[[5,32,32]]",
        "data.fps": 8,
        "data.num_workers": 1,
        "training.global_batch_size": 2,
        "training.steps": 2,
        "lr_scheduler.warmup_steps": 1,
        "validation.sample_steps": 2,
        "validation.holdout": 0.25,
        "activation_checkpoint.save_min_kv": 0,
        "compile.backend": "aot_eager",
        "model.flavor": "hf",
    }
    return [
        "--job.config_file",
        str(ROOT / "train_configs" / f"{name}.toml"),
        *(x for k, v in small.items() for x in (f"--{k}", str(v))),
    ]


def run_train(argv):
    import train

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one process without a launcher
        del os.environ[name]
    train.main(argv)


@pytest.fixture(scope="module")
def assets(saved):  # noqa: F811
    diffusers_wan(ARGS).save_pretrained(saved / "transformer")
    return saved


@pytest.mark.parametrize("name", [TRAINED[0], pytest.param(TRAINED[1], marks=pytest.mark.slow)])
def test_toml_trains_samples_and_exports(name, assets, tmp_path):
    from diffusers import WanTransformer3DModel

    (tmp_path / "clips").mkdir()
    for i in range(4):
        captioned(tmp_path / "clips" / f"{i}.mp4", f"the red circle moves {i}", count=30 + i, fps=12)
    out = tmp_path / "out"
    run_ranks(run_train, 1, arguments(name, out, assets, tmp_path / "clips"), init=False, timeout=200)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 2 and all(0 < x < 1e3 for x in losses)
    assert [sorted(r["validation"])[:2] for r in records if "validation" in r] == [["loss", "loss_t0.1"]] * 2
    # One clip in four is held out, and its caption is the prompt.
    assert len(list((out / "samples" / "step-2").glob("*.mp4"))) == 1
    exported, source = (
        WanTransformer3DModel.from_pretrained(p / "transformer", torch_dtype=torch.float32)
        for p in (out / "hf", assets)
    )
    moved = {
        n: (p - q).abs().max().item()
        for (n, p), q in zip(exported.named_parameters(), source.parameters(), strict=True)
    }
    assert max(moved.values()) > 0
    assert all(m < 0.02 for m in moved.values()), (
        "two steps at 1e-5, and bfloat16 rounding, leave the weights near those it started from"
    )


@pytest.mark.slow
def test_lora_toml_trains_samples_and_exports(assets, tmp_path):
    """All that makes it fit 24 GB: an int8 base from published weights, blocks and activations in host memory."""
    (tmp_path / "clips").mkdir()
    for i in range(4):
        captioned(tmp_path / "clips" / f"{i}.mp4", f"the red circle moves {i}", count=30 + i, fps=12)
    out = tmp_path / "out"
    argv = [*arguments("wan2.1_t2v_14b_lora_24gb", out, assets, tmp_path / "clips"), "--training.swap_blocks", "3"]
    run_ranks(run_train, 1, argv, init=False, timeout=200)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len([r for r in records if 0 < r.get("loss", 0) < 1e3]) == 2
    assert len(list((out / "samples" / "step-2").glob("*.mp4"))) == 1
    adapters = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert len(adapters) == 3 * 2 * 10 and all(t.abs().sum() > 0 for t in adapters.values())
    assert not (out / "hf").exists()


@pytest.mark.parametrize("name, world_size", TOMLS.items())
def test_toml_passes_the_checks_at_its_world_size(name, world_size, assets, tmp_path):
    (tmp_path / "clips").mkdir()
    config = parse_args(
        [
            "--job.config_file",
            str(ROOT / "train_configs" / f"{name}.toml"),
            "--model.hf_assets_path",
            str(assets),
            "--data.path",
            str(tmp_path / "clips"),
        ]
    )
    check(config, world_size)


def test_every_shipped_toml_is_run_by_a_test():
    """debug and shapes are trained by test_front_door.py and by the test of benchmarks/learn_shapes.py. test_dry_run.py
    runs all TOMLs. It alone runs those of image-to-video and HunyuanVideo; test_variants.py trains the debug flavors of
    these families."""
    dry_run_only = {
        "wan2.1_i2v_14b_720p_64gpu",
        "wan2.2_ti2v_5b_8gpu",
        "hunyuan_video_t2v_720p_64gpu",
        "hunyuan_video_i2v_720p_32gpu",
    }
    assert {p.stem for p in Path(ROOT / "train_configs").glob("*.toml")} == {"debug", "shapes", *TOMLS} | dry_run_only
