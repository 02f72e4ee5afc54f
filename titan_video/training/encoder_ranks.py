"""Process groups, and where clips are encoded. Encoding during training is an optional part (online/)."""

from collections.abc import Callable
from typing import Any

import torch

from titan_video.config.job_config import Comm, Encoder, JobConfig
from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import init_distributed
from titan_video.tools.parts import resolve

ONLINE = "titan_video.online.setup"


def init_process_groups(section: Encoder, comm: Comm, device: torch.device, num_training: int) -> Any:
    """Join the default group, of the training ranks. Returns the channel to encoder ranks; None without such ranks."""
    if section.placement == "separate":
        return _online("init_process_groups", section)(section, comm, device, num_training)
    init_distributed(device, comm.init_timeout_seconds)
    return None


def build_online_encoder(
    config: JobConfig,
    encoders: Any,
    cache: LatentCache,
    dims: ParallelDims,
    channel: Any,
    latent_shape: Callable[[Bucket], tuple[int, ...]],
    max_text_length: int,
) -> Any:
    """What encodes during training, for a training rank; None where all is encoded beforehand (placement cached).

    Arguments: see online.setup.build_online_encoder.
    """
    if config.encoder.placement == "cached":
        return None
    build = _online("build_online_encoder", config.encoder)
    return build(config, encoders, cache, dims, channel, latent_shape, max_text_length)


def run_encoder_rank(config: JobConfig, num_training: int) -> None:
    """All that an encoder rank does, from start to end."""
    run = _online("run_encoder_rank", config.encoder)
    run(config.encoder, config.data, config.comm, config.model.hf_assets_path, num_training)


def _online(name: str, section: Encoder) -> Any:
    return resolve(f"{ONLINE}:{name}", asked_by=f"encoder.placement = {section.placement}")
