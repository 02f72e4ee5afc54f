"""`checkpoint.export_every`: exports while a run goes on: what is in them, and what a kill or a full disk leaves."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import run_ranks
from tests.integration_tests.test_sample import decode, run_sample
from titan_video import convert, sample
from titan_video.config.manager import load
from titan_video.models import get_spec
from titan_video.models.layers import patchify, token_shape, unpatchify
from titan_video.tools.video import write_mp4

LORA = {
    "lora.enable": "true",
    "lora.rank": 4,
    "lora.alpha": 8,
    "optimizer.lr": 0.01,
    "training.steps": 4,
    "training.mixed_precision_param": "float32",
    "ema.enable": "true",
    "ema.decay": 0.5,
    "checkpoint.interval": 2,
    "checkpoint.export_every": 2,
    "checkpoint.export_dtype": "float32",
}
SEEN = {"validation.enable": "true", "validation.freq": 2, "validation.num_videos": 1, "validation.sample_steps": 3}
SEEN |= {"validation.path": "embedded:shapes-12", "validation.timesteps": "0.5"}


def keep_at(step, source, target):
    """A hook: a copy of what is in `source` in the middle of optimizer step `step`."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        if self.step == step:
            shutil.copytree(source, target)
        run_step(self, *args)

    train.Trainer.train_step = train_step


@pytest.fixture(scope="module")
def base(shared_front):
    return shared_front.run("base", {"training.steps": 2, "optimizer.lr": 0.01}).ok().checkpoint(2)


@pytest.fixture(scope="module")
def watched(shared_front, base):
    """A LoRA run that validates and exports every two steps; `kept` has what was there during step 3."""
    root = shared_front.root
    hook = partial(keep_at, 3, root / "watched" / "exports", root / "kept")
    return shared_front.run("watched", {**LORA, **SEEN, "checkpoint.initial_load_path": base}, hook=hook).ok()


class Diffusers:
    """diffusers' model, called like ours, for text to video."""

    def __init__(self, model, latent_CFHW, patch):
        self.model, self.latent_CFHW, self.patch = model, latent_CFHW, patch

    def __call__(self, x_BLP, t_B, text_BSD, **_):
        latents = unpatchify(x_BLP, token_shape(self.latent_CFHW[1:], self.patch), self.patch)
        return patchify(self.model(latents, t_B, text_BSD, return_dict=False)[0], self.patch)


def sampled(model, run, clip, path, monkeypatch):
    """The frames that diffusers' model gives for the prompt of a validated clip, through the same codec."""
    config = load(run.folder / "config.toml")
    prompt = clip.stem.partition("_")[2].replace("_", " ")
    options = sample.parse(["x", "--out", "x", "--prompt", prompt])
    sample.fill_defaults(options, config)
    spec = get_spec(config.model.name)
    args = spec.flavors[config.model.flavor]
    theirs = Diffusers(model, spec.geometry(args).latent_shape(options.size), args.patch)
    monkeypatch.setattr(sample, "load_model", lambda *_: theirs)
    (clip,) = sample.generate(config, run.folder, [options.prompt], options)
    write_mp4(path, clip.numpy(), options.fps, "clip")
    return decode(path).astype(int)


def test_interim_adapters_load_in_diffusers_and_give_the_clips_of_that_step(watched, base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from diffusers import WanPipeline, WanTransformer3DModel

    kept = watched.folder.parent / "kept" / "step-2"
    assert sorted(str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file()) == [
        "lora/comfyui.safetensors",
        "lora/pytorch_lora_weights.safetensors",
    ]
    convert.main([str(base), str(tmp_path / "base"), "--format", "diffusers"])
    model = WanTransformer3DModel.from_pretrained(tmp_path / "base" / "transformer")
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    WanPipeline(**parts, transformer=model).load_lora_weights(kept / "lora")
    (clip,) = (watched.folder / "samples" / "step-2").glob("*.mp4")
    (later,) = (watched.folder / "samples" / "step-4").glob("*.mp4")
    (first,) = (watched.folder / "samples" / "step-0").glob("*.mp4")
    frames, seen = sampled(model, watched, clip, tmp_path / "x.mp4", monkeypatch), decode(clip).astype(int)
    assert np.abs(frames - seen).max() <= 4 and np.abs(frames - seen).mean() < 0.05
    assert min(np.abs(seen - decode(other).astype(int)).mean() for other in (first, later)) > 0.2
    # The same adapters, from the checkpoint of that step.
    for form in ("comfyui", "diffusers"):
        convert.main([str(watched.checkpoint(2)), str(tmp_path / form), "--format", form, "--weights", "ema"])
        (written,) = (tmp_path / form).iterdir()
        exported, converted = load_file(kept / "lora" / written.name), load_file(written)
        assert exported.keys() == converted.keys() and all(exported[n].equal(converted[n]) for n in exported)


def test_adapters_of_a_file_are_sampled(watched, base, tmp_path):
    """Added to the weights of a full run, or in the place of a LoRA run's own: the clip of the step that wrote them."""
    (clip,) = (watched.folder / "samples" / "step-2").glob("*.mp4")
    prompt = clip.stem.partition("_")[2].replace("_", " ")
    convert.main([str(watched.checkpoint(2)), str(tmp_path / "x"), "--format", "peft", "--weights", "ema"])
    for checkpoint in (base, watched.checkpoint(4)):
        more = ["--weights", "model", "--steps", 3, "--lora", tmp_path / "x", "--out", tmp_path / "x.mp4"]
        run_ranks(run_sample, 1, [checkpoint, "--prompt", prompt, *more], init=False)
        assert np.abs(decode(tmp_path / "x.mp4").astype(int) - decode(clip).astype(int)).mean() < 0.05


def test_exports_change_nothing_and_a_kill_leaves_no_half(watched, front, base):
    """The same run without validation and with a kill: the losses and the exports of the uninterrupted run."""
    options = {**LORA, "checkpoint.initial_load_path": base, "checkpoint.keep_exports": 1}
    run = front.run("cut", options, hook=partial(kill_in_export, 2))
    exports = run.folder / "exports"
    assert run.code == -9 and [p.name for p in exports.iterdir()] == ["step-2.partial"]
    run = front.run("cut", options).ok()
    assert run.records == watched.records
    assert [p.name for p in exports.iterdir()] == ["step-4"]  # step-2 was made up for, and removed after the next
    for name in ("comfyui", "pytorch_lora_weights"):
        file = f"exports/step-4/lora/{name}.safetensors"
        assert (run.folder / file).read_bytes() == (watched.folder / file).read_bytes()
    changed = (exports / "step-4").stat().st_mtime_ns
    assert "is already at step 4" in front.run("cut", options).ok().output  # and exports nothing again
    assert (exports / "step-4").stat().st_mtime_ns == changed


def kill_in_export(step):
    """A hook: the process is killed when the export of `step` is written, but not renamed."""
    import os
    import signal

    from titan_video.weights.export import interim

    commit = interim._commit

    def _commit(partial, final, keep):
        if final.name == f"step-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(partial, final, keep)

    interim._commit = _commit


def refuse_export(step):
    """A hook: the disk is full when the export of `step` is written."""
    from titan_video.lora import files
    from titan_video.tools.files import StorageError

    write = files._write

    def _write(path, *args):
        if f"step-{step}." in str(path):
            raise StorageError(f"{path}: cannot write the exported adapters: No space left on device")
        write(path, *args)

    files._write = _write


def test_a_full_disk(front, base):
    options = {**LORA, "checkpoint.initial_load_path": base, "training.steps": 3, "checkpoint.export_every": 1}
    run = front.run("stop", options, hook=partial(refuse_export, 2)).fails_with("cannot write the exported adapters")
    assert [p.name for p in (run.folder / "exports").iterdir()] == ["step-1"]
    options |= {"checkpoint.on_error": "continue", "checkpoint.last_save_in_hf": "true"}
    run = front.run("go_on", options, hook=partial(refuse_export, 2)).ok()
    assert "training goes on, and the next export is tried" in run.output
    assert [p.name for p in (run.folder / "exports").iterdir()] == ["step-1"]
    assert (run.folder / "lora" / "comfyui.safetensors").is_file()  # of step 3, which is not exported twice


def test_two_ranks_full_weights_and_the_last_export(front):
    """Sharded weights, in the form of the last export, whose step is not exported twice."""
    options = {"training.steps": 2, "checkpoint.export_every": 1, "checkpoint.last_save_in_hf": "true"}
    options |= {"checkpoint.enable": "false", "training.mixed_precision_param": "float32"}
    run = front.run("full", options, world=2).ok()
    assert [p.name for p in (run.folder / "exports").iterdir()] == ["step-1"]
    name = "hf/transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(run.folder / "exports" / "step-1" / name), load_file(run.folder / name)
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
