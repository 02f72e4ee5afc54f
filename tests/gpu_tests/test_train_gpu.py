"""The embedded default config on a GPU. These tests have not been run on one yet."""

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# without decay, learning rates do not depend on training.steps
SMALL = {
    "data.path": "embedded:shapes-48",
    "training.steps": 12,
    "lr_scheduler.warmup_steps": 2,
    "lr_scheduler.decay_ratio": 0,
    "validation.enable": "false",
}


def losses(folder, cache, **options):
    argv = {
        "job.dump_folder": folder,
        "data.cache_folder": cache,
        **SMALL,
        **{k.replace("__", "."): v for k, v in options.items()},
    }
    command = [sys.executable, str(ROOT / "train.py"), "--job.config_file", str(ROOT / "train_configs" / "debug.toml")]
    subprocess.run([*command, *(str(x) for k, v in argv.items() for x in (f"--{k}", v))], check=True, timeout=280)
    return [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory, cache):
    return losses(
        tmp_path_factory.mktemp("bf16") / "run",
        cache,
        training__mixed_precision_param="bfloat16",
        debug__deterministic="true",
    )


def test_bfloat16_follows_float32(bf16, cache, tmp_path):
    float32 = losses(tmp_path / "run", cache)
    assert bf16 == pytest.approx(float32, rel=2e-2)


def test_compiled_with_checkpointing_follows_eager(bf16, cache, tmp_path):
    compiled = losses(
        tmp_path / "run",
        cache,
        training__mixed_precision_param="bfloat16",
        compile__enable="true",
        activation_checkpoint__mode="full",
    )
    assert compiled == pytest.approx(bf16, rel=2e-2)


def test_resume_is_bitwise(bf16, cache, tmp_path):
    options = {"training__mixed_precision_param": "bfloat16", "debug__deterministic": "true"}
    losses(tmp_path / "run", cache, training__steps=5, **options)
    assert losses(tmp_path / "run", cache, **options) == bf16


NO_SYNC = """
import sys, torch, train
run_step, read = train.Trainer.train_step, train.read

def train_step(self, *args):
    # In the first steps kernels are compiled and memory is allocated.
    torch.cuda.set_sync_debug_mode("error" if self.step > 2 else "default")
    run_step(self, *args)
    torch.cuda.set_sync_debug_mode("default")

def allowed(numbers):
    torch.cuda.set_sync_debug_mode("default")
    return read(numbers)

train.Trainer.train_step, train.read = train_step, allowed
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "activation_checkpoint.mode": "selective",
            "activation_checkpoint.save_min_kv": 1,
            "training.global_batch_size": 8,
        },
    ],
)
def test_a_step_synchronises_only_to_read_its_numbers(options, cache, tmp_path):
    argv = {
        "job.config_file": ROOT / "train_configs" / "debug.toml",
        "job.dump_folder": tmp_path / "run",
        "data.cache_folder": cache,
        **SMALL,
        "training.mixed_precision_param": "bfloat16",
        "checkpoint.enable": "false",
        **options,
    }
    command = [sys.executable, "-c", NO_SYNC, *(str(x) for k, v in argv.items() for x in (f"--{k}", v))]
    subprocess.run(command, check=True, timeout=280, cwd=ROOT)
