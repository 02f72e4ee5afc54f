"""Frozen encoders. A family is a module of this folder with a function `build`; `encoder.name` is the module's name."""

from collections.abc import Iterator

import torch

from titan_video.config.job_config import Encoder, JobConfig
from titan_video.encoders.spec import Encoders
from titan_video.tools.parts import resolve


def build_encoders(section: Encoder, hf_assets_path: str, device: torch.device | str) -> Encoders:
    """The encoders that `encoder.name` names.

    All but `debug` read a local diffusers folder at first use, and import diffusers and transformers.
    """
    build = resolve(f"titan_video.encoders.{section.name}:build", asked_by=f'encoder.name = "{section.name}"')
    return build(section, hf_assets_path, device)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Fields of [encoder] that have no effect with its placement, one line per mistake."""
    e = config.encoder
    where = f"but encoder.placement is {e.placement}"
    if e.placement != "separate" and e.num_ranks:
        yield f"encoder.num_ranks: given {e.num_ranks}, {where}; set that to separate, or leave this at 0"
    if e.placement != "separate" and e.queue_depth != Encoder.queue_depth:
        yield (
            f"encoder.queue_depth: given {e.queue_depth}, {where}; set that to separate, or leave this at "
            f"{Encoder.queue_depth}"
        )
    if e.placement != "colocated" and e.offload_policy != Encoder.offload_policy:
        yield (
            f"encoder.offload_policy: given {e.offload_policy}, {where}; set that to colocated, or leave this at "
            f"{Encoder.offload_policy}"
        )
    if e.placement == "cached" and e.write_cache:
        yield (
            f"encoder.write_cache: true, {where}, which writes all clips before training; leave it false, or choose "
            f"colocated or separate"
        )
