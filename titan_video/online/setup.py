"""Where clips are encoded during training (`encoder.placement`): how ranks come together, where the loader's entries
come from, and what an encoder rank does.
"""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from titan_video.config.job_config import Comm, Data, Encoder, JobConfig
from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import init_distributed
from titan_video.encoders import build_encoders
from titan_video.encoders.spec import Encoders
from titan_video.ingest.cache.encode import ClipEncoder
from titan_video.online.channel import EncoderChannel, EncodingPlan
from titan_video.online.colocated import Colocated
from titan_video.online.separate import Separate, serve
from titan_video.tools.device import get_device
from titan_video.tools.logging import logger


def _rendezvous(timeout_seconds: int) -> dist.Store:
    """The store of all ranks that torchrun started."""
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))[0]


def init_process_groups(section: Encoder, comm: Comm, device: torch.device, num_training: int) -> EncoderChannel | None:
    """Set up the default process group, of the training ranks alone. Returns the channel to the encoder ranks, if there
    are any.
    """
    if section.placement != "separate":
        init_distributed(device, comm.init_timeout_seconds)
        return None
    store, rank = _rendezvous(comm.init_timeout_seconds), int(os.environ["RANK"])
    ranks = {"store": dist.PrefixStore("training", store), "rank": rank, "world_size": num_training}
    init_distributed(device, comm.init_timeout_seconds, **ranks)
    return EncoderChannel(store, dist.get_rank(), num_training, section.num_ranks, comm.init_timeout_seconds)


def build_online_encoder(
    config: JobConfig,
    encoders: Encoders,
    cache: LatentCache,
    dims: ParallelDims,
    channel: EncoderChannel | None,
    latent_shape: Callable[[Bucket], tuple[int, ...]],
    max_text_length: int,
) -> Colocated | Separate | None:
    """The online encoder of a training rank; all training ranks call this. None: entries are read from the cache.

    max_text_length: tokens, including those of an image.
    """
    section, comm = config.encoder, config.comm
    if section.placement == "cached":
        return None
    groups, group = dims.sample_groups(), None
    if len(groups[0]) > 1:  # gloo: entries are in host memory
        timeout = timedelta(seconds=comm.init_timeout_seconds)
        group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout, backend="gloo")
    dp_rank = next(r for r, ranks in enumerate(groups) if dist.get_rank() in ranks)
    if section.placement == "colocated":
        clip_encoder = _build_clip_encoder(section, config.data, encoders, cache)
        return Colocated(clip_encoder, dp_rank, len(groups), group, section.offload_policy)
    c, e = cache.conditioning, encoders
    widths = max_text_length * e.text_dim + c.pooled_text * e.pooled_dim + c.image_tokens * e.image_dim
    other_bytes = 4 * widths  # at most four bytes a number
    plan = EncodingPlan(groups, section.queue_depth, num_latents=2 if c.num_cond_frames else 1, other_bytes=other_bytes)
    # Shorter than the timeout of a collective. Some ranks wait for an encoder and others for these ranks; the first
    # should raise the error, because they can name the encoder.
    first_timeout = max(1, comm.init_timeout_seconds * 9 // 10)
    timeout = max(1, comm.train_timeout_seconds * 9 // 10)
    return Separate(channel, cache, plan, latent_shape, dp_rank, group, first_timeout, timeout)


def _build_clip_encoder(section: Encoder, data: Data, encoders: Encoders, cache: LatentCache) -> ClipEncoder:
    return ClipEncoder(encoders, cache, section.write_cache, data.num_workers, data.prefetch_factor)


def run_encoder_rank(section: Encoder, data: Data, comm: Comm, hf_assets_path: str, num_training: int) -> None:
    """Everything that an encoder rank does, from start to end."""
    encoders = build_encoders(section, hf_assets_path, get_device(int(os.environ["LOCAL_RANK"])))
    timeout = comm.init_timeout_seconds
    store, rank = _rendezvous(timeout), int(os.environ["RANK"])
    channel = EncoderChannel(store, rank, num_training, section.num_ranks, timeout)
    # A stop request is for the training ranks, which decide when to stop and send it.
    channel.report_status("waiting for the handshake: what to encode")
    handshake = channel.receive_object(0)
    if handshake is None:
        return
    cache_identity, draw_plan, num_steps, plan = handshake
    clip_encoder = _build_clip_encoder(section, data, encoders, LatentCache(*cache_identity))
    logger.info(f"{channel.name(channel.rank)} encodes for {num_training} training ranks")
    serve(channel, clip_encoder, draw_plan, num_steps, plan)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about encoder ranks, one line per mistake."""
    e = config.encoder
    if e.placement == "separate" and not 1 <= e.num_ranks < world_size:
        fix = (
            f"legal: 1 to {world_size - 1}"
            if world_size > 1
            else "start more (NGPU), or set encoder.placement to cached or colocated"
        )
        yield (
            f"encoder.num_ranks: given {e.num_ranks} of {world_size} ranks, but encoder.placement separate needs at "
            f"least one rank that encodes and one that trains; {fix}"
        )
