"""Frozen encoders. A family is a module of this folder with a function `build`; `encoder.name` is the module's name."""

import torch

from titan_video.config.job_config import Encoder
from titan_video.encoders.spec import Encoders
from titan_video.tools.parts import resolve


def build_encoders(section: Encoder, hf_assets_path: str, device: torch.device | str) -> Encoders:
    """The encoders that `encoder.name` names.

    All but `debug` read a local diffusers folder at first use, and import diffusers and transformers.
    """
    build = resolve(f"titan_video.encoders.{section.name}:build", asked_by=f'encoder.name = "{section.name}"')
    return build(section, hf_assets_path, device)
