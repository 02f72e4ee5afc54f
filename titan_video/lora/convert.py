"""`python -m titan_video.convert` for adapters: from any file that names.py reads, or a step-N folder of a LoRA run, to
any form.

A file does not say the architecture. Its names say the family, and its shapes must fit a flavor: of all that fit, the
sizes that matter (width, heads, feed-forward) must be the same.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from titan_video.checkpoint import files
from titan_video.checkpoint.state import read_tensors, saved_under
from titan_video.config.job_config import JobConfig
from titan_video.lora.files import (
    ADAPTER_FORMATS,
    FOR_COMFYUI,
    AdapterFormat,
    adapter_shapes,
    pair_up,
    write_adapters,
)
from titan_video.lora.matrices import find_modules, public_matrices
from titan_video.lora.names import PEFT_CONFIG, PEFT_FILE, AdapterPair, StoredAdapters, read_adapters
from titan_video.models import FAMILIES, args_from_config, get_args, get_spec
from titan_video.models.spec import ModelSpec
from titan_video.tools.bounded import read_json
from titan_video.tools.files import atomic_write
from titan_video.weights.formats import preview

FORMS = ADAPTER_FORMATS | {
    "musubi": AdapterFormat(
        "musubi.safetensors",
        "original",
        "lora_unet_",
        "lora_down.weight",
        "lora_up.weight",
        "the form of musubi-tuner and kohya's scripts",
        has_alpha=True,
        is_flat=True,
    ),
    "diffsynth": AdapterFormat(
        "diffsynth.safetensors",
        "original",
        "",
        "lora_A.default.weight",
        "lora_B.default.weight",
        f"the form of DiffSynth. {FOR_COMFYUI}",
    ),
    "peft": AdapterFormat(
        PEFT_FILE,
        "diffusers",
        "base_model.model.",
        "lora_A.weight",
        "lora_B.weight",
        f"the form of PEFT, with {PEFT_CONFIG} beside it. {FOR_COMFYUI}",
    ),
}
Adapters = tuple[Mapping[str, AdapterPair], ModelSpec, Any]  # by our modules; of which model


def read_step(folder: Path, config: JobConfig, weights: str) -> Adapters:
    """The adapters of a step-N folder. config: of its run. weights: "model" or "ema".

    ValueError: the folder is invalid, or holds no such adapters.
    """
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    shapes = adapter_shapes(spec, args, config.lora)
    _, metadata = files.verify(folder)
    saved = saved_under(metadata, weights)
    odd = [n for n in sorted(saved.keys() | shapes.keys()) if n not in saved or saved[n].size != shapes.get(n)]
    if odd:
        raise ValueError(f"{folder}: its `{weights}` tensors are not the adapters of its run's [lora]: {preview(odd)}")
    tensors = {name: torch.empty(shape, dtype=saved[name].properties.dtype) for name, shape in shapes.items()}
    read_tensors(folder, metadata, {f"{weights}.{name}": tensor for name, tensor in tensors.items()})
    return pair_up(tensors, config.lora.alpha / config.lora.rank), spec, args


def read_file(path: Path, options: argparse.Namespace) -> Adapters:
    """The adapters of a file or folder. options: `model`, `flavor` and `config` of the command, each may be empty.

    ValueError: they cannot be read, fit no known model, or could be of several.
    """
    stored = read_adapters(path)
    adapters, unknown, spec, args = _find_model(stored, list(_candidates(options)))
    if left := [*stored.others, *unknown]:
        raise ValueError(f"{path} holds what no form of adapters here has a place for: {preview(left)}")
    return adapters, spec, args


def _candidates(options: argparse.Namespace) -> Iterator[tuple[ModelSpec, Any]]:
    for spec in map(get_spec, [options.model] if options.model else FAMILIES):
        if options.config:
            yield spec, args_from_config(spec, read_json(options.config), options.config)
        for flavor in () if options.config else [options.flavor] if options.flavor else spec.flavors:
            if flavor in spec.flavors:
                yield spec, spec.flavors[flavor]


def _find_model(stored: StoredAdapters, candidates: list[tuple[ModelSpec, Any]]) -> tuple:
    """(adapters by our modules, modules without one, spec, arguments) of the model with the most of the modules."""
    fits, problems, widths = [], [], {pair.down.shape[1] for pair in stored.pairs.values()}
    for spec, args in candidates:
        if not widths & {args.dim, args.ffn_dim, args.dim + args.ffn_dim}:  # of the inputs of a block's Linears
            continue
        try:
            adapters, unknown = find_modules(stored, spec, args)
        except ValueError as e:
            problems.append(str(e))
            continue
        fits.append((adapters, unknown, spec, args))
    fewest = min((len(unknown) for _, unknown, _, _ in fits), default=0)
    fits = [fit for fit in fits if len(fit[1]) == fewest]
    sizes = {(spec.name, args.dim, args.num_heads, args.ffn_dim) for _, _, spec, args in fits}
    if len(sizes) == 1:
        return fits[0]
    hint = "give --model with --flavor, or with --config, a transformer/config.json of diffusers"
    if not fits:
        first = f" ({problems[0]})" if problems else ""
        raise ValueError(f"{stored.path} has adapters that fit no known model{first}; {hint}")
    raise ValueError(f"{stored.path} has adapters that fit models of several sizes, {sorted(sizes)}; {hint}")


def write(adapters: Adapters, target: Path, form: str, dtype: torch.dtype | None) -> Path:
    """Write adapters to `target`, a file or the folder of one. Returns the file."""
    by_module, spec, args = adapters
    if form == "diffsynth" and spec.name != "wan":
        raise ValueError(f"--format diffsynth: DiffSynth's code of {spec.name} has other modules; it is for wan")
    if form == "peft" and target.suffix == ".safetensors":
        raise ValueError(f"DST {target}: --format peft makes a folder, of {PEFT_FILE} and {PEFT_CONFIG}; give its name")
    path = target if target.suffix == ".safetensors" else target / FORMS[form].file
    write_adapters(path, by_module, spec, args, FORMS[form], dtype)
    if form == "peft":
        atomic_write(path.parent / PEFT_CONFIG, json.dumps(_peft_config(by_module, spec, args), indent=2) + "\n")
    return path


def _peft_config(adapters: Mapping[str, AdapterPair], spec: ModelSpec, args: Any) -> dict[str, Any]:
    """The scale is in lora_B, so alpha equals the rank of each."""
    pairs = {m.name: m.join(adapters, args) for m in public_matrices(spec, args, FORMS["peft"].layout)}
    ranks = {name: len(pair.down) for name, pair in pairs.items() if pair}
    rank = max(ranks.values())
    lower = {name: r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": sorted(ranks),
        "bias": "none",
    }
