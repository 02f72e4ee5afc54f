"""Writes run.zip: what the last commit before the house was rebuilt (0021753) left of a small run.

    python tests/old_run/make.py CHECKOUT_OF_0021753

Inside: `tiny/` a model folder; `run/` the dump folder after 3 of 6 steps (checkpoint with EMA, resolved config.toml
with the option names of that commit); `cache/` its clips and latents; `expected.json` the losses of a run without
interruption.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ARGS = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
OPTIONS = {
    "model.flavor": "hf",
    "model.hf_assets_path": "tiny",
    "encoder.name": "debug",
    "encoder.max_text_length": 16,
    "data.path": "embedded:shapes-6",
    "data.cache_folder": "cache",
    "data.buckets": "[[5, 32, 32]]",
    "data.clip_choice": "chunk",
    "data.fps": 4,
    "data.num_workers": 0,
    "training.local_batch_size": 2,
    "training.steps": 6,
    "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 2,
    "ema.enable": "true",
    "metrics.enable_tensorboard": "false",
}


def train(checkout: Path, folder: Path, name: str, steps: int) -> list[dict]:
    """Run to `steps` of the 6 steps; the records of the run."""
    words = [w for key, value in OPTIONS.items() for w in (f"--{key}", str(value))]
    words += ["--job.dump_folder", name, "--checkpoint.interval", str(steps), "--checkpoint.async_mode", "disabled"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, checkout / "train.py", *words], cwd=folder, env=env)
    if steps < 6:
        while not (folder / name / "checkpoint" / f"step-{steps}").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    process.wait()
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def main(checkout: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tiny" / "transformer").mkdir(parents=True)
        (folder / "tiny" / "transformer" / "config.json").write_text(json.dumps(ARGS))
        losses = [row["loss"] for row in train(checkout, folder, "whole", 6)]
        train(checkout, folder, "run", 3)
        (folder / "expected.json").write_text(json.dumps(losses))
        with zipfile.ZipFile(Path(__file__).with_name("run.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in folder.rglob("*") if p.is_file() and "whole" not in p.parts):
                archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
