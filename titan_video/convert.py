"""Converts weights, or adapters, between formats:

    python -m titan_video.convert SRC DST --format diffusers|original|single_file|comfyui|stacked
    python -m titan_video.convert SRC DST --format diffusers|comfyui|musubi|diffsynth|peft      SRC holds adapters

SRC is a folder or file of weights in any of these formats, which is detected from its names, a file or folder of
adapters (lora/convert.py), or a step-N folder of a run. One tensor of weights at a time is read and written, so memory
does not grow with the model. What was written is read back.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_video.checkpoint import files
from titan_video.checkpoint.state import read_tensors, saved_weights
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import load
from titan_video.models import FAMILIES, args_from_config, get_args, get_spec
from titan_video.models.spec import ModelSpec
from titan_video.tools.bounded import read_json
from titan_video.tools.logging import init_logger, logger
from titan_video.tools.parts import find_module, resolve
from titan_video.weights.export.pipeline_folder import PIPELINE, complete_pipeline
from titan_video.weights.export.save import GIB, WritePlan, Writer
from titan_video.weights.formats import (
    CONFIG,
    FORMAT_NAMES,
    StoredWeights,
    get_format,
    is_diffusers,
    preview,
    read_slice,
)
from titan_video.weights.hf_storage import global_shapes
from titan_video.weights.safetensors_io import opened

DETECT = "titan_video.weights.original:detect"  # an optional part
LORA = "titan_video.lora"  # an optional part
ADAPTER_FORMATS = ("diffusers", "comfyui", "musubi", "diffsynth", "peft")


def run_config(folder: Path) -> tuple[JobConfig, Path]:
    """(configuration of the run that wrote a step-N folder, its file). ValueError: it is none, or outside its run."""
    if not (folder / files.MANIFEST).is_file():
        steps = ", ".join(f"step-{step}" for step in files.list_steps(folder))
        raise ValueError(f"{folder} is no step-N folder; it holds {steps}: give one of them")
    config_paths = [parent / "config.toml" for parent in folder.resolve().parents[:3]]
    config_path = next((path for path in config_paths if path.is_file()), None)
    if config_path is None:
        raise ValueError(
            f"{folder}: there is no config.toml above it to define the model's architecture; leave the folder "
            f"inside its run's folder"
        )
    return load(config_path), config_path


class StepSource:
    """The weights of a step-N folder. The run's config.toml defines the architecture.

    weights: "model" or "ema". ValueError: the folder is invalid, or not of a full model.
    """

    def __init__(self, folder: Path, weights: str):
        config, config_path = run_config(folder)
        if config.lora.enable:
            raise ValueError(
                f"{folder} is of a run with lora.enable and holds adapters, not the full weights: --format is one of "
                f"{', '.join(ADAPTER_FORMATS)}; for full weights run it to its end with checkpoint.last_save_in_hf "
                f'true and "merged" in lora.export'
            )
        self.spec = get_spec(config.model.name)
        self.args = get_args(
            self.spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length
        )
        self.shapes = global_shapes(self.spec, self.args)
        self.folder = folder
        _, self.metadata = files.verify(folder)
        saved, self.full_names = saved_weights(self.metadata, weights)
        if not saved:
            raise ValueError(f"{folder} holds no `{weights}` weights")
        names = sorted(saved.keys() | self.shapes.keys())
        odd = [name for name in names if name not in saved or saved[name].size != self.shapes.get(name)]
        if odd:
            raise ValueError(f"{folder}: the tensors are not those of the model in {config_path}: {preview(odd)}")
        self.dtypes = {name: saved[name].properties.dtype for name in self.shapes}

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        read_tensors(self.folder, self.metadata, {self.full_names[name]: tensor})
        return tensor


class PublicSource:
    """Weights in a public format. Options, config.json or the shapes of a known flavor define the architecture."""

    def __init__(self, path: Path, options: argparse.Namespace):
        subfolder = options.subfolder or get_spec(FAMILIES[0]).hf_folder
        stored = StoredWeights(path, subfolder)
        self.spec = _detect_spec(stored, [options.model] if options.model else FAMILIES)
        layout, _ = stored.layout(self.spec)
        self.args = _architecture(stored, self.spec, layout, options)
        self.shapes = global_shapes(self.spec, self.args)
        self.locations = stored.locate(self.spec, self.args, self.shapes)
        self.dtypes = {name: location.dtype for name, location in self.locations.items()}

    def read(self, name: str) -> Tensor:
        location = self.locations[name]
        # Opened anew for each tensor: a file's mapped pages count as this process's memory until it is closed.
        with opened(location.file) as file:
            return read_slice(file, location, (slice(None),) * len(self.shapes[name]), self.args)


def _detect_spec(stored: StoredWeights, families: Sequence[str]) -> ModelSpec:
    """The family with the most names in common with the files."""
    specs = [get_spec(name) for name in families]
    for spec in specs:
        if is_diffusers(stored.found, spec):
            return spec
    detect = resolve(DETECT, asked_by=f"{stored.root}: not all names of its tensors are a model's in diffusers' layout")
    return max(specs, key=lambda spec: detect(stored.found, spec)[0])


def _architecture(stored: StoredWeights, spec: ModelSpec, layout: str, options: argparse.Namespace) -> Any:
    if options.flavor:
        return get_args(spec, options.flavor, "", _text_len(spec, options.flavor))
    if options.config:
        return args_from_config(spec, read_json(options.config), options.config)
    if layout == "diffusers" and stored.root.is_dir():
        return args_from_config(spec, stored.config(), stored.root / CONFIG)
    fits: dict[str, tuple[str, Any]] = {}
    first_error = None
    for flavor, args in spec.flavors.items():
        try:
            stored.locate(spec, args, global_shapes(spec, args))
            fits.setdefault(_identity(spec, args), (flavor, args))
        except ValueError as e:
            first_error = first_error or e
    if len(fits) == 1:
        flavor, args = next(iter(fits.values()))
        logger.info(f"the weights fit {spec.name} {flavor}")
        return args
    if not fits:
        hint = "give --flavor, or --config, a transformer/config.json of diffusers"
        raise ValueError(f"{stored.root} fits no flavor of {spec.name}: {hint}. The first: {first_error}")
    raise ValueError(
        f"{stored.root} fits several flavors of {spec.name}: give one with --flavor: "
        f"{', '.join(flavor for flavor, _ in fits.values())}"
    )


def _text_len(spec: ModelSpec, flavor: str) -> int:
    return spec.flavors[flavor].text_len if flavor in spec.flavors else 1


def _identity(spec: ModelSpec, args: Any) -> str:
    """Text that is equal for two architectures if their files are."""
    return json.dumps([spec.args_to_hf(args), spec.args_to_original(args) if spec.args_to_original else None])


@torch.no_grad()
def convert(
    source: StepSource | PublicSource, path: Path, format_name: str, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """Write the weights of `source` to `path`. dtype: None keeps each tensor's type.

    StorageError or RuntimeError: it cannot be written.
    """
    dtypes = {name: dtype or kind for name, kind in source.dtypes.items()}
    writer = Writer(WritePlan(path, source.spec, source.args, source.shapes, dtypes, format_name, max_shard_bytes))
    for tensor_slice in writer.plan.slices():
        if writer.error is None:
            writer.write(tensor_slice.to_public(source.read(tensor_slice.ours), source.args))
    writer.commit()
    if writer.error is not None:
        raise writer.error


def parse(argv: list[str]) -> argparse.Namespace:
    about = (
        "Convert weights or adapters (LoRA) between public formats, and from a run's checkpoint. The names in SRC "
        "identify its format: weights in the formats of diffusers, of the models' public code (also in one file, or "
        "with ComfyUI's prefix); adapters of diffusers, ComfyUI, diffusion-pipe, musubi-tuner, kohya, DiffSynth, PEFT."
    )
    parser = argparse.ArgumentParser(prog="python -m titan_video.convert", description=about, allow_abbrev=False)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="folder or file of weights or of adapters, pipeline folder, or step-N folder of a run, also of a LoRA run",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="DST",
        help="file or folder to make; a diffusers folder gets its weights in transformer/",
    )
    parser.add_argument(
        "--format",
        choices=list(dict.fromkeys((*FORMAT_NAMES, *ADAPTER_FORMATS))),
        required=True,
        help=f"of weights: {', '.join(FORMAT_NAMES)}; of adapters: {', '.join(ADAPTER_FORMATS)}",
    )
    parser.add_argument("--model", choices=FAMILIES, help="model family (else detected from the names)")
    parser.add_argument("--flavor", help="architecture (else config.json, or the flavor with these shapes)")
    parser.add_argument(
        "--config", type=Path, help="transformer/config.json of diffusers, for an architecture that is no flavor"
    )
    parser.add_argument(
        "--subfolder",
        default="",
        help="folder of the weights in a pipeline folder: transformer, or transformer_2 of Wan 2.2 A14B",
    )
    parser.add_argument("--weights", choices=("model", "ema"), default="model", help="which weights of a step-N folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type to write (else as in SRC)")
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="size of the files in a folder, at most")
    parser.add_argument(
        "--assets", type=Path, help="diffusers pipeline folder to complete DST from (else SRC, if it is one)"
    )
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> Path:
    """Convert; return the folder or file with the result. ValueError: the source or an option is not valid."""
    source, target = options.source, options.target
    if not source.exists():
        raise ValueError(f"SRC {source} does not exist")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"DST {target} exists; give a new path")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if adapters := find_adapters(source, options):
        return resolve(f"{LORA}.convert:write", asked_by=f"{source}")(adapters, target, options.format, dtype)
    if options.format not in FORMAT_NAMES:
        raise ValueError(f"--format {options.format} is of adapters, and SRC {source} holds none")
    if get_format(options.format).one_file and target.suffix != ".safetensors":
        raise ValueError(f"DST {target}: --format {options.format} is one file, whose name should end in .safetensors")
    if options.max_shard_gib <= 0:
        raise ValueError("--max-shard-gib must be above 0")
    weights = StepSource(source, options.weights) if files.is_checkpoint(source) else PublicSource(source, options)
    path = target
    if options.format in ("diffusers", "stacked"):
        path = target / (subfolder := options.subfolder or weights.spec.hf_folder)
    if options.format == "diffusers":
        pipeline = next(
            (folder for folder in (options.assets, source, source.parent) if folder and (folder / PIPELINE).is_file()),
            None,
        )
        if pipeline:
            complete_pipeline(pipeline, target, subfolder)
    convert(weights, path, options.format, dtype, int(options.max_shard_gib * GIB))
    return path


def find_adapters(source: Path, options: argparse.Namespace) -> Any:
    """The adapters of `source`, for lora/convert.py; None: it holds weights. ValueError: they are not valid."""
    if files.is_checkpoint(source):
        config, _ = run_config(source)
        if config.lora.enable and options.format in ADAPTER_FORMATS:
            read = resolve(f"{LORA}.convert:read_step", asked_by=f"{source}, of a run with lora.enable")
            return read(source, config, options.weights)
    elif find_module(LORA) and resolve(f"{LORA}.names:holds_adapters", asked_by=f"{source}")(source):
        if options.format in ADAPTER_FORMATS:
            return resolve(f"{LORA}.convert:read_file", asked_by=f"{source}")(source, options)
        raise ValueError(f"SRC {source} holds adapters: --format is one of {', '.join(ADAPTER_FORMATS)}")
    return None


def main(argv: list[str]) -> None:
    options = parse(argv)
    init_logger()
    try:
        path = run(options)
    except (OSError, ValueError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    logger.info(f"written to {path} in the format {options.format}, and read back")


if __name__ == "__main__":
    main(sys.argv[1:])
