"""Frozen encoders: `build_encoders` chooses by the [encoder] section."""

import torch

from titan_video.config.job_config import Encoder
from titan_video.encoders.spec import Encoders


def build_encoders(section: Encoder, hf_assets_path: str, device: torch.device | str) -> Encoders:
    """The encoders that `encoder.name` names.

    All but `debug` read a local diffusers folder at first use and import diffusers and transformers.
    """
    if section.name == "debug":
        from titan_video.encoders.debug import DebugEncoders

        return DebugEncoders(section.max_text_length)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[section.dtype]
    settings = hf_assets_path, dtype, section.max_text_length, section.vae_tiling, device
    if section.name == "hunyuan_video":
        from titan_video.encoders.hunyuan_video import HunyuanVideoEncoders

        return HunyuanVideoEncoders(*settings)
    from titan_video.encoders.wan import WanEncoders

    return WanEncoders(*settings)
