"""Model families by name: the folders of this package."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from titan_video.config.families import model_families
from titan_video.models.spec import ModelSpec
from titan_video.tools.bounded import read_json, short
from titan_video.tools.parts import resolve

FAMILIES = model_families()
MAX_LAYERS, MAX_WIDTH = 1024, 1 << 16  # of any model


def get_spec(name: str) -> ModelSpec:
    """The declaration of a family; ValueError naming model.name and the known ones."""
    if name not in FAMILIES:
        raise ValueError(f'model.name = "{name}" is unknown; use one of: {", ".join(FAMILIES)}')
    return resolve(f"titan_video.models.{name}:SPEC", asked_by=f'model.name = "{name}"')


def get_args(spec: ModelSpec, flavor: str, hf_assets_path: str, max_text_length: int) -> Any:
    """Architecture arguments of a flavor; `hf` reads them from the diffusers folder's transformer/config.json.

    max_text_length: tokens of a prompt, to which those of a given image may be added.
    """
    if flavor == "hf":
        path = Path(hf_assets_path) / spec.hf_folder / "config.json"
        if not path.is_file():
            raise ValueError(
                f'model.flavor = "hf" reads {path}, which does not exist; set model.hf_assets_path to a '
                f"diffusers folder"
            )
        config, index = read_json(path), Path(hf_assets_path) / "model_index.json"
        if index.is_file() and isinstance(config, dict) and isinstance(found := read_json(index), dict):
            config |= {"boundary_ratio": found.get("boundary_ratio")}  # of Wan 2.2 A14B: the only file that says it
        args = args_from_config(spec, config, path)
    elif flavor in spec.flavors:
        args = spec.flavors[flavor]
    else:
        raise ValueError(
            f'model.flavor = "{flavor}" is unknown for {spec.name}; use one of: hf, {", ".join(spec.flavors)}'
        )
    return replace(args, text_len=args.conditioning.text_image_tokens + max_text_length)


def args_from_config(spec: ModelSpec, config: dict[str, Any], path: Path) -> Any:
    """Architecture arguments from the content of diffusers' `transformer/config.json`.

    ValueError: it is another model's, or no model can have these numbers; the message names `path`.
    """
    try:
        args = spec.args_from_hf(config)
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {short(str(e), 300)}") from e
    for f in fields(args):
        value, kind = getattr(args, f.name), get_type_hints(type(args))[f.name]
        numbers, kind = (value, int) if get_origin(kind) is tuple else ((value,), kind)
        least, most = int(kind is int and f.default != 0), MAX_LAYERS if f.name.endswith("layers") else MAX_WIDTH
        types, is_number = int | float if kind is float else kind, kind in (int, float)
        if not all(isinstance(x, types) and (not is_number or least <= x <= most) for x in numbers):
            legal = f"{kind.__name__}{f' from {least} to {most:,}' if is_number else ''}"
            raise ValueError(f"{path}: {f.name} = {short(repr(value))}; legal: {legal}")
    if args.dim % args.num_heads:
        raise ValueError(f"{path}: the width {args.dim} does not divide among {args.num_heads} heads")
    return args
