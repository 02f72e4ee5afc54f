"""Clips from a checkpoint: `python -m titan_video.sample CHECKPOINT --prompt "a red circle moves left" --out x.mp4`.

CHECKPOINT is a step-N folder, or a run's dump folder, of which the newest valid step is taken. The run's own resolved
model is built; under torchrun its weights are sharded over the ranks, as in training. Image-to-video needs --image; of
two experts (Wan 2.2 A14B) CHECKPOINT is the high one, --low the other.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_video import kernels
from titan_video.checkpoint.files import is_valid_fast, list_steps, step_folder
from titan_video.checkpoint.manager import load_weights
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import load
from titan_video.data.batching import bucket_errors
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.utils import init_distributed
from titan_video.encoders import build_encoders
from titan_video.encoders.spec import Encoders
from titan_video.ingest.conditioning_frames import encode_cond_frames, encode_images
from titan_video.ingest.video import read_image
from titan_video.lora.adapters import add_adapters, is_adapter
from titan_video.models import get_args, get_spec
from titan_video.models.conditioning import ConditioningSpec
from titan_video.tasks.sampling import Experts, sample_latents
from titan_video.tools.device import get_device
from titan_video.tools.logging import init_logger, logger
from titan_video.tools.video import write_mp4
from titan_video.weights.initial_weights import load_initial_weights


def find_checkpoint(path: Path) -> tuple[Path, JobConfig]:
    """The step-N folder that `path` means, and the configuration of its run. ValueError if there is none."""
    if (path / "config.toml").is_file():
        config = load(path / "config.toml")
        folder = path / config.checkpoint.folder
        steps = [step for step in list_steps(folder) if is_valid_fast(step_folder(folder, step))]
        if not steps:
            raise ValueError(f"{folder} holds no valid step-N folder")
        return step_folder(folder, steps[-1]), config
    for parent in path.resolve().parents[:3]:
        if (parent / "config.toml").is_file():
            return path, load(parent / "config.toml")
    raise ValueError(
        f"{path}: there is no config.toml in or above it; give a step-N folder inside a run's dump folder, or "
        f"the dump folder"
    )


def pad(text_LD: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, length, D], zero beyond the text, and its mask [1, length]."""
    text_BLD = torch.nn.functional.pad(text_LD, (0, 0, 0, length - len(text_LD))).unsqueeze(0)
    return text_BLD, (torch.arange(length, device=text_LD.device) < len(text_LD)).unsqueeze(0)


def load_model(
    config: JobConfig, args: Any, folder: Path, weights: str | None, device: torch.device
) -> torch.nn.Module:
    """The model of a run with the weights of one of its checkpoints, sharded over the ranks. weights: "model", "ema"
    or None, which is what the run validated."""
    spec, lora, c = get_spec(config.model.name), config.lora, config.checkpoint
    with torch.device("meta"):
        model = spec.build(args)
    if lora.enable:
        add_adapters(model, spec, lora, getattr(torch, config.training.mixed_precision_param))
    meshes = ParallelDims(dp_shard=dist.get_world_size()).build_mesh(device.type)
    parallelize(
        model, spec.plan, meshes, config.parallelism, config.training, config.activation_checkpoint, config.compile
    )
    model.to_empty(device=device)
    source = weights or ("ema" if config.ema.enable and config.validation.use_ema else "model")
    if lora.enable:  # the checkpoint holds the adapters only
        subfolder = f"{spec.hf_folder}_2" if config.model.expert == "low" else spec.hf_folder
        start = c.initial_load_path or (config.model.hf_assets_path if c.initial_load_in_hf else "")
        load_initial_weights(model, start, spec, args, subfolder, config.debug.seed, lora)
    step = load_weights(folder, model, source, which=is_adapter if lora.enable else None)
    logger.info(f"{source} weights of step {step} from {folder}")
    return model


def prepare(
    encoders: Encoders, conditioning: ConditioningSpec, length: int, options: argparse.Namespace, device: torch.device
) -> tuple[list, dict, dict]:
    """Text and mask of the prompt and of the empty one, and what else the model is given for each:

    see `sample_latents`.
    """
    cond, null_cond, text_options = {}, {}, {}
    if conditioning.num_cond_frames:
        cond_frames_CNHW = torch.cat(
            [read_image(str(path), options.size) for path in (options.image, options.last_image) if path], dim=1
        )
        cond["cond_latents_BCFHW"] = encode_cond_frames(encoders, conditioning, cond_frames_CNHW, options.size[0])[None]
        if conditioning.image_tokens:
            cond["image_BSD"] = encode_images(encoders, cond_frames_CNHW)[None]
        if conditioning.text_image_tokens:
            first_CHW = cond_frames_CNHW[:, 0]
            text_options = {
                "images": [first_CHW, torch.zeros_like(first_CHW)],
                "image_tokens": conditioning.text_image_tokens,
            }
    texts = encoders.encode_text([options.prompt, ""], **text_options)
    if conditioning.pooled_text:
        cond["pooled_text_BD"], null_cond["pooled_text_BD"] = (
            pooled_D[None] for pooled_D in encoders.encode_pooled([options.prompt, ""])
        )
    padded = [x for text_LD in texts for x in pad(text_LD.to(device), length)]
    return padded, *({name: x.to(device) for name, x in d.items()} for d in (cond, null_cond))


@torch.no_grad()
def generate(config: JobConfig, folder: Path, options: argparse.Namespace) -> torch.Tensor:
    """Frames of one clip, uint8 [F, H, W, 3], on the host."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    args = get_args(
        get_spec(config.model.name), config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length
    )
    kernels.set_backend(kernels.resolve_backend(config.model.kernels, device))
    conditioning = args.conditioning
    check_images(conditioning, options)
    low = find_low(config, options.low) if options.low else None
    encoders = build_encoders(config.encoder, config.model.hf_assets_path, device)
    text, cond, null_cond = prepare(encoders, conditioning, args.text_len, options, device)
    encoders.free()

    model = load_model(config, args, folder, options.weights, device)
    if low:
        model = Experts(
            model, load_model(low[1], args, low[0], options.weights, device), config.model.boundary or args.boundary
        )
    frames, height, width = options.size
    latent_CFHW = (
        encoders.channels,
        (frames - 1) // encoders.stride_t + 1,
        height // encoders.stride_s,
        width // encoders.stride_s,
    )
    settings = options.seed, options.steps, options.guidance, options.shift
    told = {
        "conditions": conditioning,
        "cond": cond,
        "null_cond": null_cond,
        "embedded_guidance": options.embedded_guidance,
    }
    latents = sample_latents(model, args.patch, *text, latent_CFHW, [0], *settings, **told)
    return encoders.decode_video(latents)[0].permute(1, 2, 3, 0).cpu()


def check_images(conditioning: ConditioningSpec, options: argparse.Namespace) -> None:
    """ValueError unless the images given are those that the model needs."""
    for name, place in (("image", 1), ("last_image", 2)):
        given, needed = getattr(options, name) is not None, conditioning.num_cond_frames >= place
        if given != needed:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"this model needs {flag}: it starts from images"
                if needed
                else f"{flag}: this model is not given such an image"
            )


def find_low(high: JobConfig, path: Path) -> tuple[Path, JobConfig]:
    """The checkpoint of the low-noise expert.

    ValueError unless the two are a high and a low expert of one architecture and boundary.
    """
    folder, low = find_checkpoint(path)
    experts = high.model.expert, low.model.expert
    if experts != ("high", "low") or replace(high.model, expert="low") != low.model:
        raise ValueError(
            f"--low: {path} and the first checkpoint must be a low and a high expert of one model; "
            f"their model.expert are {experts[1]} and {experts[0]}, their other fields of [model] must be equal"
        )
    return folder, low


def size(text: str) -> tuple[int, int, int]:
    try:
        frames, height, width = (int(n) for n in text.lower().split("x"))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 81x480x832") from e
    return frames, height, width


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Generate a clip from a checkpoint. What is not given is taken from the run's TOML."
    parser = argparse.ArgumentParser(prog="python -m titan_video.sample", description=about)
    parser.add_argument("checkpoint", type=Path, help="step-N folder, or a run's dump folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, required=True, help="mp4 file to write")
    parser.add_argument("--image", type=Path, help="first frame, for image-to-video")
    parser.add_argument("--last-image", type=Path, help="last frame, for models that are given one")
    parser.add_argument("--low", type=Path, help="the low-noise expert's step-N or dump folder")
    parser.add_argument("--size", type=size, help="FRAMESxHEIGHTxWIDTH (default: the first of data.buckets)")
    parser.add_argument("--steps", type=int, help="Euler steps (validation.sample_steps)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (validation.guidance_scale)")
    parser.add_argument(
        "--embedded-guidance",
        type=float,
        help="what models that take a guidance scale are told (validation.embedded_guidance)",
    )
    parser.add_argument("--shift", type=float, help="shift of the schedule (validation.sample_shift)")
    parser.add_argument("--fps", type=float, help="frames per second of the file (data.fps)")
    parser.add_argument("--seed", type=int, default=0, help="key of the first noise")
    parser.add_argument(
        "--weights", choices=("model", "ema"), help="which weights (ema where the run kept and used them)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    init_logger()
    try:
        folder, config = find_checkpoint(options.checkpoint)
        v = config.validation
        defaults = {"size": config.data.sizes[0], "fps": config.data.fps}
        defaults |= {
            "steps": v.sample_steps,
            "guidance": v.guidance_scale,
            "embedded_guidance": v.embedded_guidance,
            "shift": v.sample_shift,
        }
        for name, value in defaults.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        check_options(options)
        init_distributed(get_device(int(os.environ.get("LOCAL_RANK", 0))), config.comm.init_timeout_seconds)
        frames = generate(config, folder, options)
    except ValueError as e:
        sys.exit(f"error: {e}")
    if dist.get_rank() == 0:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(options.out, frames.numpy(), options.fps)
        logger.info(f"{len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} written to {options.out}")
    dist.destroy_process_group()


def check_options(options: argparse.Namespace) -> None:
    problems = [f"--size {'x'.join(map(str, options.size))}: {p}" for p in bucket_errors(options.size)]
    problems += [f"--{name} must be above 0" for name in ("steps", "shift", "fps") if not getattr(options, name) > 0]
    problems += ["--embedded-guidance must be above 0"] * (not options.embedded_guidance > 0)
    problems += ["--guidance must be at least 1"] * (not options.guidance >= 1)
    if problems:
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
