"""Where clips are encoded during training (`encoder.placement`): how ranks come together, what the loader takes entries
from, what an encoder rank does."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from titan_video.config.job_config import Comm, Data, Encoder, JobConfig
from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import init_distributed, rendezvous
from titan_video.encoders import build_encoders
from titan_video.encoders.spec import Encoders
from titan_video.ingest.encode import ClipEncoder
from titan_video.online.colocated import Colocated
from titan_video.online.separate import EncoderChannel, Separate, serve
from titan_video.tools.device import get_device
from titan_video.tools.logging import logger
from titan_video.training.fault_tolerance import SignalFlag


def join(section: Encoder, comm: Comm, device: torch.device, num_training: int) -> EncoderChannel | None:
    """Set up the default process group, of the training ranks alone; return the connection to the encoder ranks, if
    there are any.
    """
    if section.placement != "separate":
        init_distributed(device, comm.init_timeout_seconds)
        return None
    store = rendezvous(comm.init_timeout_seconds)
    init_distributed(device, comm.init_timeout_seconds, store, num_training)
    return EncoderChannel(store, dist.get_rank(), num_training, section.num_ranks, comm.init_timeout_seconds)


def build_online_encoder(
    section: Encoder,
    data: Data,
    comm: Comm,
    encoders: Encoders,
    cache: LatentCache,
    dims: ParallelDims,
    channel: EncoderChannel | None,
    latent_shape: Callable[[Bucket], tuple[int, ...]],
    max_text_length: int,
) -> Colocated | Separate | None:
    """For a training rank; all of these call it. None: entries are read from the cache. max_text_length:

    tokens, with those of an image.
    """
    if section.placement == "cached":
        return None
    groups, group = dims.sample_groups(), None
    if len(groups[0]) > 1:  # on the host, where entries are
        group, _ = dist.new_subgroups_by_enumeration(
            groups, timeout=timedelta(seconds=comm.init_timeout_seconds), backend="gloo"
        )
    dp_rank = next(r for r, ranks in enumerate(groups) if dist.get_rank() in ranks)
    if section.placement == "colocated":
        maker = ClipEncoder(encoders, cache, section.write_cache, data.num_workers, data.prefetch_factor)
        return Colocated(maker, dp_rank, len(groups), group, section.offload_policy)
    c, e = cache.conditioning, encoders
    others = 4 * (
        max_text_length * e.text_dim + c.pooled_text * e.pooled_dim + c.image_tokens * e.image_dim
    )  # bytes, at most four a number
    # Shorter than a collective's: of ranks that wait for an encoder and ranks that wait for these, the first are to
    # speak, who can name it.
    timeouts = (max(1, seconds * 9 // 10) for seconds in (comm.init_timeout_seconds, comm.train_timeout_seconds))
    return Separate(channel, cache, latent_shape, others, groups, dp_rank, group, section.queue_depth, *timeouts)


def run_encoder_rank(section: Encoder, data: Data, comm: Comm, hf_assets_path: str, num_training: int) -> None:
    """All that an encoder rank does, from start to end."""
    encoders = build_encoders(section, hf_assets_path, get_device(int(os.environ["LOCAL_RANK"])))
    channel = EncoderChannel(
        rendezvous(comm.init_timeout_seconds),
        int(os.environ["RANK"]),
        num_training,
        section.num_ranks,
        comm.init_timeout_seconds,
    )
    with SignalFlag():  # training ranks decide when to stop, and say so
        channel.tell("waiting to be told what to encode")
        told = channel.receive_object(0)
        if told is None:
            return
        identity, *rest = told
        maker = ClipEncoder(
            encoders, LatentCache(*identity), section.write_cache, data.num_workers, data.prefetch_factor
        )
        logger.info(f"{channel.name(channel.rank)} encodes for {num_training} training ranks")
        serve(channel, maker, *rest)


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
