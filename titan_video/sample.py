"""Clips from a checkpoint: `python -m titan_video.sample CHECKPOINT --prompt "a red circle moves left" --out x.mp4`.

CHECKPOINT is a step-N folder, or a run's dump folder, of which the newest valid step is taken. The run's own resolved TOML says how the
model is built; under torchrun its weights are sharded over the ranks, as in training.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from titan_video.components.checkpoint import load_weights
from titan_video.components.checkpoint_io import list_steps, looks_valid, step_folder
from titan_video.components.sampling import sample_latents
from titan_video.config.check import check_bucket
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import load
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.utils import init_distributed
from titan_video.encoders import build_encoders
from titan_video.models import get_args, get_spec
from titan_video.tools.device import get_device
from titan_video.tools.logging import init_logger, logger
from titan_video.tools.video import write_mp4


def find_checkpoint(path: Path) -> tuple[Path, JobConfig]:
    """The step-N folder that `path` means, and the configuration of its run. ValueError if there is none."""
    if (path / "config.toml").is_file():
        config = load(path / "config.toml")
        folder = path / config.checkpoint.folder
        steps = [step for step in list_steps(folder) if looks_valid(step_folder(folder, step))]
        if not steps:
            raise ValueError(f"{folder} holds no valid step-N folder")
        return step_folder(folder, steps[-1]), config
    for parent in path.resolve().parents[:3]:
        if (parent / "config.toml").is_file():
            return path, load(parent / "config.toml")
    raise ValueError(f"{path}: there is no config.toml in or above it; give a step-N folder inside a run's dump folder, or the dump folder")


def pad(text_LD: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, length, D], zero beyond the text, and its mask [1, length]."""
    text_BLD = torch.nn.functional.pad(text_LD, (0, 0, 0, length - len(text_LD))).unsqueeze(0)
    return text_BLD, (torch.arange(length, device=text_LD.device) < len(text_LD)).unsqueeze(0)


@torch.no_grad()
def generate(config: JobConfig, folder: Path, options: argparse.Namespace) -> torch.Tensor:
    """Frames of one clip, uint8 [F, H, W, 3], on the host."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    encoders = build_encoders(config.encoder, config.model.hf_assets_path, device)
    (text, mask), (null, null_mask) = (pad(t.to(device), args.text_len) for t in encoders.encode_text([options.prompt, ""]))
    encoders.free()

    with torch.device("meta"):
        model = spec.build(args)
    meshes = ParallelDims(dp_shard=dist.get_world_size()).build_mesh(device.type)
    parallelize(model, spec.plan, meshes, config.parallelism, config.training, config.activation_checkpoint, config.compile)
    model.to_empty(device=device)
    source = options.weights or ("ema" if config.ema.enable and config.validation.use_ema else "model")
    step = load_weights(folder, model, source)
    logger.info(f"{source} weights of step {step} from {folder}")

    frames, height, width = options.size
    latent_CFHW = (encoders.channels, (frames - 1) // encoders.stride_t + 1, height // encoders.stride_s, width // encoders.stride_s)
    settings = options.seed, options.steps, options.guidance, options.shift
    latents = sample_latents(model, args.patch, text, mask, null, null_mask, latent_CFHW, [0], *settings)
    return encoders.decode_video(latents)[0].permute(1, 2, 3, 0).cpu()


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
    parser.add_argument("--size", type=size, help="FRAMESxHEIGHTxWIDTH (default: the first of data.buckets)")
    parser.add_argument("--steps", type=int, help="Euler steps (validation.sample_steps)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (validation.guidance_scale)")
    parser.add_argument("--shift", type=float, help="shift of the schedule (validation.sample_shift)")
    parser.add_argument("--fps", type=float, help="frames per second of the file (data.fps)")
    parser.add_argument("--seed", type=int, default=0, help="key of the first noise")
    parser.add_argument("--weights", choices=("model", "ema"), help="which weights (ema where the run kept and used them)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    init_logger()
    try:
        folder, config = find_checkpoint(options.checkpoint)
        v = config.validation
        defaults = {"size": config.data.buckets[0], "fps": config.data.fps}
        defaults |= {"steps": v.sample_steps, "guidance": v.guidance_scale, "shift": v.sample_shift}
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
    problems = [f"--size {'x'.join(map(str, options.size))}: {p}" for p in check_bucket(options.size)]
    problems += [f"--{name} must be above 0" for name in ("steps", "shift", "fps") if not getattr(options, name) > 0]
    problems += ["--guidance must be at least 1"] * (not options.guidance >= 1)
    if problems:
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
