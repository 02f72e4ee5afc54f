"""Clips from a checkpoint: `python -m titan_video.sample CHECKPOINT --prompt "a red circle moves left" --out x.mp4`.

`--prompts FILE --out FOLDER` makes one clip of each line of a text file; the model is loaded once.
CHECKPOINT is a step-N folder, or the dump folder of a run, whose newest valid step is used. The model is built from the
run's resolved TOML; under torchrun its weights are sharded over the ranks, as in training. Image-to-video needs
--image. With two experts (Wan 2.2 A14B) CHECKPOINT is the high-noise expert and --low the other.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_video import kernels
from titan_video.checkpoint.files import is_valid_fast, list_steps, step_folder
from titan_video.checkpoint.manager import load_weights
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import main_guard
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.utils import init_distributed
from titan_video.encoders import build_encoders
from titan_video.encoders.spec import Encoders
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS
from titan_video.ingest.bucketing import bucket_errors
from titan_video.ingest.cache.conditioning_frames import encode_cond_frames, encode_images
from titan_video.ingest.decode.video import read_image
from titan_video.ingest.files.text import read_prompts
from titan_video.ingest.plan.captions import lost_words
from titan_video.ingest.prepare import check_encoders
from titan_video.ingest.sampling_defaults import OFFICIAL, sampling_defaults, sampling_section
from titan_video.ingest.started import load_run
from titan_video.models import get_args, get_spec
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import is_adapter
from titan_video.models.spec import LatentGeometry, ModelSpec
from titan_video.tasks.conditioning import COND_LATENTS
from titan_video.tasks.sampling import Prompt, SamplerSettings, file_name, sample_latents
from titan_video.tools.device import get_device
from titan_video.tools.logging import init_logger, logger
from titan_video.tools.parts import resolve
from titan_video.tools.video import write_mp4
from titan_video.weights.trained import WeightsSettings, build_weights

LORA_SECTION = "titan_video.lora.files:section_of"  # an optional part


class Experts:
    """Two models that share the noise levels (Wan 2.2 A14B), called like one; a call has one noise level.

    high: used at and above the sigma `boundary`; low: below it.
    """

    @staticmethod
    def is_high(time: float, boundary: float) -> bool:
        """Whether a time, 1000 sigma, is the high-noise expert's. 0.9 in float32 is below 0.9."""
        return round(time, 3) >= round(NUM_TRAIN_TIMESTEPS * boundary, 3)

    def __init__(self, high: Callable[..., Tensor], low: Callable[..., Tensor], boundary: float):
        self.high, self.low, self.boundary = high, low, boundary

    def __call__(self, *, t_B: Tensor, **kwargs: Any) -> Tensor:
        model = self.high if self.is_high(t_B[0].item(), self.boundary) else self.low
        return model(t_B=t_B, **kwargs)


def find_checkpoint(path: Path) -> tuple[Path, JobConfig]:
    """The step-N folder at `path`, and the configuration of its run. ValueError if there is none."""
    if (path / "config.toml").is_file():
        config = load_run(path / "config.toml")
        folder = path / config.checkpoint.folder
        steps = [step for step in list_steps(folder) if is_valid_fast(step_folder(folder, step))]
        if not steps:
            raise ValueError(f"{folder} holds no valid step-N folder")
        return step_folder(folder, steps[-1]), config
    for parent in path.resolve().parents[:3]:
        if (parent / "config.toml").is_file():
            return path, load_run(parent / "config.toml")
    raise ValueError(
        f"{path}: there is no config.toml in or above it; give a step-N folder inside a run's dump folder, or "
        f"the dump folder"
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


# ---- model ----


def load_model(
    config: JobConfig,
    spec: ModelSpec,
    args: Any,
    folder: Path,
    source: str | None,
    device: torch.device,
    lora: Path | None = None,
) -> nn.Module:
    """The model of a run with the weights of one of its checkpoints, sharded over all ranks.

    source: "model" or "ema"; None: the weights that the run validated. lora: a file of adapters, which are added, or
    take the place of the run's own.
    """
    section = resolve(LORA_SECTION, asked_by=f"--lora {lora}")(lora, spec, args) if lora else config.lora
    settings = WeightsSettings(config.model, config.checkpoint, config.training, section, seed=config.debug.seed)
    weights = build_weights(settings, spec, args)
    with torch.device("meta"):
        model = spec.build(args)
    if section.enable:  # without adapters the weights stay in float32: EMA weights are, and FSDP casts for compute
        weights.prepare(model)
    meshes, training = ParallelDims(dp_shard=dist.get_world_size()).build_mesh(device.type), config.training
    if meshes.world.size() > 1:  # they share the weights instead
        training = replace(training, swap_blocks=0)
    parallelize(model, spec.plan, meshes, config.parallelism, training, config.activation_checkpoint, config.compile)
    model.to_empty(device=device)
    source = source or ("ema" if config.ema.enable and config.validation.use_ema else "model")
    if config.lora.enable:
        weights.load_frozen(model)
    if not (config.lora.enable and lora):  # else the file stands for all that the checkpoint holds
        which = (lambda name: not is_adapter(name)) if lora else weights.is_saved
        step = load_weights(folder, model, source, which=which)
        logger.info(f"{source} weights of step {step} from {folder}")
    if lora:
        weights.load_initial(model)
    return model


# ---- prompt ----


def pad(text_LD: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """[1, length, D], zero beyond the text, and its mask [1, length]."""
    text_BLD = torch.nn.functional.pad(text_LD, (0, 0, 0, length - len(text_LD))).unsqueeze(0)
    return text_BLD, (torch.arange(length, device=text_LD.device) < len(text_LD)).unsqueeze(0)


def encode_prompts(
    encoders: Encoders, args: Any, texts: list[str], options: argparse.Namespace
) -> tuple[list[Prompt], Prompt]:
    """The prompts with their conditioning frames, and the negative prompt. args: the model's (see ModelSpec)."""
    conditioning, texts = args.conditioning, [*texts, options.negative_prompt]
    cond, text_options = {}, {}
    if conditioning.num_cond_frames:
        paths = [path for path in (options.image, options.last_image) if path]
        cond_frames_CNHW = torch.cat([read_image(str(path), options.size) for path in paths], dim=1)
        cond[COND_LATENTS] = encode_cond_frames(encoders, conditioning, cond_frames_CNHW, options.size[0])[None]
        if conditioning.image_tokens:
            cond["image_BSD"] = encode_images(encoders, cond_frames_CNHW)[None]
        if conditioning.text_image_tokens:
            first_CHW = cond_frames_CNHW[:, 0]
            text_options["images"] = [first_CHW] * (len(texts) - 1) + [torch.zeros_like(first_CHW)]
            text_options["image_tokens"] = conditioning.text_image_tokens
    padded = [pad(text_LD, args.text_len) for text_LD in encoders.encode_text(texts, **text_options)]
    pooled = [{} for _ in texts]
    if conditioning.pooled_text:
        pooled = [{"pooled_text_BD": pooled_D[None]} for pooled_D in encoders.encode_pooled(texts)]
    prompts = [Prompt(text, mask, cond | more) for (text, mask), more in zip(padded, pooled, strict=True)]
    return prompts[:-1], replace(prompts[-1], cond=pooled[-1])


# ---- clips ----


def find_guidance(options: argparse.Namespace, low: JobConfig | None, args: Any) -> float | Callable[[float], float]:
    """The scale of classifier-free guidance; with two experts as a function of sigma.

    low: configuration of the low-noise expert, whose own scale it samples with; None: there is one model.
    """
    high = options.guidance
    if low is None:
        if options.low_guidance is not None:
            raise ValueError("--low-guidance: there is no low-noise expert; give it by --low, or leave this out")
        return high
    scale, boundary = options.low_guidance, low.model.boundary or args.boundary
    if scale is None:
        scale = sampling_section(low, args, options.size).guidance_scale
    if scale == high:
        return high
    return lambda sigma: high if Experts.is_high(NUM_TRAIN_TIMESTEPS * sigma, boundary) else scale


@torch.no_grad()
def generate(config: JobConfig, folder: Path, texts: list[str], options: argparse.Namespace) -> Iterator[Tensor]:
    """Frames of one clip for each prompt, uint8 [F, H, W, 3], on the host."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    geometry = spec.geometry(args)
    kernels.set_backend(kernels.resolve_backend(config.model.kernels, device))
    check_size(options.size, geometry, args.patch)
    check_images(args.conditioning, options)
    low = find_low(config, options.low) if options.low else None
    encoders = build_encoders(config.encoder, config.model.hf_assets_path, device)
    check_encoders(encoders, args, geometry, config)
    guidance = find_guidance(options, low[1] if low else None, args)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for line in lost_words([*texts, options.negative_prompt], encoders) if is_first else ():
        logger.warning(f"prompt {line}")
    prompts, null = encode_prompts(encoders, args, texts, options)
    encoders.free()

    model = load_model(config, spec, args, folder, options.weights, device, options.lora)
    if low:
        low_folder, low_config = low
        low_model = load_model(low_config, spec, args, low_folder, options.weights, device, options.low_lora)
        model = Experts(model, low_model, config.model.boundary or args.boundary)
    settings = SamplerSettings(
        num_steps=options.steps,
        guidance_scale=guidance,
        shift=options.shift,
        embedded_guidance=options.embedded_guidance,
        seed=options.seed,
        solver=options.solver,
        param_dtype=config.training.mixed_precision_param,
    )
    latent_CFHW = geometry.latent_shape(options.size)
    for index, prompt in enumerate(prompts):  # with the noise that validation gives the prompt of this number
        latents = sample_latents(model, args, prompt.to(device), null.to(device), latent_CFHW, [index], settings)
        yield encoders.decode_video(latents)[0].permute(1, 2, 3, 0).cpu()


# ---- command line ----


def check_images(conditioning: ConditioningSpec, options: argparse.Namespace) -> None:
    """ValueError unless the images on the command line are those that the model needs."""
    for name, position in (("image", 1), ("last_image", 2)):
        is_present, is_needed = getattr(options, name) is not None, conditioning.num_cond_frames >= position
        flag = f"--{name.replace('_', '-')}"
        if is_needed and not is_present:
            raise ValueError(f"this model needs {flag}: it starts from images")
        if is_present and not is_needed:
            raise ValueError(f"{flag}: this model takes no such image")


def check_size(size: tuple[int, int, int], geometry: LatentGeometry, patch: tuple[int, int, int]) -> None:
    """ValueError unless the model can make clips of [frames, height, width]."""
    problems = [f"--size {'x'.join(map(str, size))}: {problem}" for problem in bucket_errors(size, geometry, patch)]
    if problems:
        raise ValueError("; ".join(problems))


def check_options(options: argparse.Namespace) -> None:
    """ValueError, with all mistakes, unless the numbers are legal."""
    if options.low_lora and not options.low:
        raise ValueError("--low-lora: given without --low, the expert that it is for")
    problems = [f"--{name} must be above 0" for name in ("steps", "shift", "fps") if not getattr(options, name) > 0]
    problems += ["--embedded-guidance must be above 0"] * (not options.embedded_guidance > 0)
    for name in ("guidance", "low_guidance"):
        value = getattr(options, name)
        problems += [f"--{name.replace('_', '-')} must be at least 1"] * (value is not None and not value >= 1)
    if problems:
        raise ValueError("; ".join(problems))


def parse_size(text: str) -> tuple[int, int, int]:
    """[frames, height, width] from such as 81x480x832."""
    try:
        frames, height, width = (int(n) for n in text.lower().split("x"))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 81x480x832") from e
    return frames, height, width


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Generate a clip from a checkpoint. Defaults come from the run's TOML."
    parser = argparse.ArgumentParser(prog="python -m titan_video.sample", description=about)
    parser.add_argument("checkpoint", type=Path, help="step-N folder, or a run's dump folder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="text of the clip")
    prompts.add_argument("--prompts", metavar="FILE", help="text file in UTF-8, one prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="mp4 file to write; with --prompts a folder of them")
    parser.add_argument(
        "--negative-prompt",
        help="what guidance moves away from; `official`: that of the model's own code (validation.negative_prompt)",
    )
    parser.add_argument("--image", type=Path, help="first frame, for image-to-video")
    parser.add_argument("--last-image", type=Path, help="last frame, for models that take one")
    parser.add_argument("--low", type=Path, help="the low-noise expert's step-N or dump folder")
    parser.add_argument(
        "--lora",
        type=Path,
        help="file or folder of adapters (diffusers, ComfyUI, diffusion-pipe, musubi-tuner, kohya, DiffSynth, PEFT), "
        "added to the checkpoint's weights; of a LoRA run they take the place of its own",
    )
    parser.add_argument("--low-lora", type=Path, help="the same for the low-noise expert")
    parser.add_argument("--size", type=parse_size, help="FRAMESxHEIGHTxWIDTH (default: the first of data.buckets)")
    parser.add_argument("--solver", choices=("euler", "unipc"), help="(validation.solver)")
    parser.add_argument("--steps", type=int, help="steps of the solver (validation.sample_steps)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (validation.guidance_scale)")
    parser.add_argument(
        "--low-guidance", type=float, help="the same for the low-noise expert (its run's validation.guidance_scale)"
    )
    parser.add_argument(
        "--embedded-guidance",
        type=float,
        help="guidance scale for models that take it as an input (validation.embedded_guidance)",
    )
    parser.add_argument("--shift", type=float, help="shift of the schedule (validation.sample_shift)")
    parser.add_argument("--fps", type=float, help="frames per second of the file (data.fps)")
    parser.add_argument("--seed", type=int, default=0, help="key of the first noise")
    parser.add_argument(
        "--weights", choices=("model", "ema"), help="which weights (default: ema if the run validated EMA weights)"
    )
    return parser.parse_args(argv)


def fill_defaults(options: argparse.Namespace, config: JobConfig) -> None:
    """Options that are not on the command line come from the run's configuration; what it leaves to the model, from
    the model's own code.
    """
    options.size = options.size or config.data.sizes[0]
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    validation, own = sampling_section(config, args, options.size), sampling_defaults(config, args, options.size)
    negative = options.negative_prompt
    negative = config.validation.negative_prompt if negative is None else negative
    options.negative_prompt = own.negative_prompt if negative == OFFICIAL else negative
    defaults = {
        "fps": config.data.fps,
        "solver": validation.solver,
        "steps": validation.sample_steps,
        "guidance": validation.guidance_scale,
        "embedded_guidance": validation.embedded_guidance,
        "shift": validation.sample_shift,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def find_texts(options: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """The prompts, and the file of each one's clip. ValueError names a file of prompts that cannot be read."""
    if options.prompts is None:
        return [options.prompt], [options.out]
    texts = read_prompts(options.prompts, "--prompts")
    return texts, [options.out / f"{i}_{file_name(text)}.mp4" for i, text in enumerate(texts)]


def main(argv: list[str]) -> None:
    options = parse(argv)
    init_logger()
    with main_guard():
        folder, config = find_checkpoint(options.checkpoint)
        fill_defaults(options, config)
        check_options(options)
        texts, paths = find_texts(options)
        init_distributed(get_device(int(os.environ.get("LOCAL_RANK", 0))), config.comm.init_timeout_seconds)
        for path, frames in zip(paths, generate(config, folder, texts, options), strict=True):
            if dist.get_rank() == 0:
                write_mp4(path, frames.numpy(), options.fps, "sampled clip")
                logger.info(f"{len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} written to {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
