"""Model families by name: the folders of this package."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_video.config.families import model_families
from titan_video.models.spec import ModelSpec
from titan_video.tools.parts import resolve

FAMILIES = model_families()


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
        try:
            args = spec.args_from_hf(json.loads(path.read_text()))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: {e}") from e
    elif flavor in spec.flavors:
        args = spec.flavors[flavor]
    else:
        raise ValueError(
            f'model.flavor = "{flavor}" is unknown for {spec.name}; use one of: hf, {", ".join(spec.flavors)}'
        )
    return replace(args, text_len=args.conditioning.text_image_tokens + max_text_length)
