"""Encoding during training on ranks of their own.

    training ranks    draw the clips of each step, and post a receive for each of the next `queue_depth` clips, from the
                      rank that will encode it
    encoder ranks     draw the same clips; each encodes those that are assigned to it, and sends them ahead of time; a
                      send waits until its receive is posted

No request is sent: both sides know who sends what to whom, and the number of a clip in the run is the tag of its
message. Ranks that have the same clips are sent one part of the bytes each, and gather them.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice, tee
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, MicroBatchSpec
from titan_video.data.sampler import MicroBatch
from titan_video.ingest.cache.encode import TEXT_COST, ClipEncoder, EncodeStats, Job, draw_job, missing_part
from titan_video.online.channel import (
    FAILED,
    FIXED,
    HEADER_BYTES,
    MAGIC,
    MAX_TAG,
    SHUTDOWN,
    ClipMessage,
    EncoderChannel,
    EncodingPlan,
    PeerDisconnected,
    unpack,
)
from titan_video.online.encoder import OnlineEncoder, OverlayCache


@dataclass(frozen=True)
class Assignment:
    """A micro-batch of a data rank, the number of its first clip in the run, and the encoder of each of its clips."""

    dp_rank: int
    micro_batch: MicroBatch
    first: int
    encoders: list[int]


def assign_clips(
    draw_plan: DrawPlan, steps: Iterable[list[MicroBatch]], dp_size: int, num_encoders: int
) -> Iterator[Assignment]:
    """Assign each clip to the encoder with the least work so far."""
    loads, first = [0] * num_encoders, 0
    for step in steps:
        for j, micro_batch in enumerate(step):
            frames, height, width = draw_plan.sizes[micro_batch.bucket]
            encoders = []
            for _ in micro_batch.sample_ids:
                encoder = loads.index(min(loads))
                loads[encoder] += frames * height * width + TEXT_COST
                encoders.append(encoder)
            yield Assignment(j % dp_size, micro_batch, first, encoders)
            first += len(encoders)


@dataclass(frozen=True)
class Receive:
    """A posted receive: its work, the buffer of the message, the number of the clip, and the encoder's rank."""

    work: Any
    message: Tensor
    number: int
    rank: int


class Separate(OnlineEncoder):
    """The side of a training rank of encoding on ranks of their own.

    latent_shape: of a bucket. group: of the ranks with the same clips (None: this rank is alone).
    first_timeout: seconds to wait for the first clip, while encoders load; timeout: for each later one.
    """

    def __init__(
        self,
        channel: EncoderChannel,
        cache: LatentCache,
        plan: EncodingPlan,
        latent_shape: Callable[[Bucket], tuple[int, ...]],
        dp_rank: int,
        group: dist.ProcessGroup | None,
        first_timeout: int,
        timeout: int,
    ):
        self.channel = channel
        self.cache = OverlayCache(cache)
        self.plan = plan
        self.latent_shape = latent_shape
        self.dp_rank = dp_rank
        self.group = group
        self.next_timeout = timedelta(seconds=first_timeout)
        self.timeout = timedelta(seconds=timeout)
        self.posted: deque[Receive] = deque()
        self.is_started = False
        self.spent = EncodeStats()

    def specs(
        self, draw_plan: DrawPlan, steps: Iterable[list[MicroBatch]], num_steps: int | None
    ) -> Iterator[MicroBatchSpec]:
        assert not self.is_started, "the handshake with encoder ranks is made once"
        latent_bytes = {bucket: 4 * math.prod(self.latent_shape(bucket)) for bucket in draw_plan.sizes}
        self.plan = replace(self.plan, latent_bytes=latent_bytes)
        self._send_handshake((self.cache.cache.identity, draw_plan, num_steps, self.plan))
        assigned = assign_clips(draw_plan, steps, len(self.plan.groups), self.channel.num_encoders)
        posted, current = tee(a for a in assigned if a.dp_rank == self.dp_rank)
        clips = (
            (draw_plan.sizes[a.micro_batch.bucket], a.first + i, encoder)
            for a in posted
            for i, encoder in enumerate(a.encoders)
        )
        self.posted.extend(self._post(*clip) for clip in islice(clips, self.plan.queue_depth))
        for assignment in current:
            spec = draw_plan.spec(assignment.micro_batch)
            received: dict[Any, Tensor] = {}
            for clip, text_key, sample_id in spec:
                received |= self._receive(draw_job(self.cache.cache, clip, text_key), sample_id)
                self.posted.extend(self._post(*following) for following in islice(clips, 1))
            self.channel.report_status(f"training on samples {assignment.micro_batch.sample_ids}")
            self.cache.entries = received
            yield spec

    def _send_handshake(self, value: Any) -> None:
        self.is_started = True
        for e in range(self.channel.num_encoders if self.channel.rank == 0 else 0):
            self.channel.send_object(self.channel.num_training + e, value)

    def _post(self, bucket: Bucket, number: int, encoder: int) -> Receive:
        message = torch.zeros(self.plan.message_bytes(bucket, self.dp_rank), dtype=torch.uint8)
        rank = self.channel.num_training + encoder
        return Receive(self.channel.receive(rank, number % MAX_TAG, message), message, number, rank)

    def _receive(self, job: Job, sample_id: int) -> dict[tuple[str, str], Tensor]:
        receive = self.posted.popleft()
        sender, number = self.channel.name(receive.rank), receive.number
        self.channel.report_status(f"waiting for sample {sample_id} of {sender}")
        doing = f"waiting for sample {sample_id}, clip {number} of this run"
        self.channel.wait(receive.work, receive.rank, doing, self.next_timeout)
        self.next_timeout = self.timeout
        header, data = receive.message[:HEADER_BYTES].view(torch.int64), receive.message[HEADER_BYTES:]
        magic, status, sent_number, sent_id, size, encoding, waiting, frames = header[:FIXED].tolist()
        if magic == MAGIC and status == FAILED:
            raise ValueError(data[:size].numpy().tobytes().decode(errors="replace"))
        try:
            if (magic, sent_number, sent_id) != (MAGIC, number, sample_id):
                raise RuntimeError(f"it is sample {sent_id}, clip {sent_number}, magic {magic:x}")
            entries = unpack(header, self._gather(data), dict(job.keys))
            latents = entries[job.keys[0]]
            if latents.dtype != torch.float32 or latents.nbytes != self.plan.latent_bytes[job.entry.bucket]:
                raise RuntimeError(f"its latents are {latents.dtype} {list(latents.shape)}")
        except RuntimeError as e:
            raise RuntimeError(
                f"{sender} sent something else than sample {sample_id}, clip {number} of this run: {e}; do all ranks "
                "run the same code with the same configuration?"
            ) from e
        self.spent.encode_seconds += encoding / 1e6
        self.spent.decode_wait_seconds += waiting / 1e6
        self.spent.encoded_frames += frames
        return entries

    def _gather(self, part: Tensor) -> Tensor:
        """The bytes of all parts of a clip's message."""
        if not self.group:
            return part
        parts = [torch.empty_like(part) for _ in self.plan.groups[self.dp_rank]]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts)

    def stats(self) -> dict[str, float]:
        """For the log: the clips that have been received and wait, and what encoder ranks spent on the clips given to
        training since the last call.
        """
        spent, self.spent = self.spent, EncodeStats()
        waiting = sum(int(receive.message[:8].view(torch.int64)) == MAGIC for receive in self.posted)
        return {"queue_depth": waiting, **spent.numbers()}

    def close(self) -> None:
        """End the encoder ranks, when every training rank has had its last batch."""
        if not self.is_started:
            self._send_handshake(None)
        elif self.channel.rank == 0:
            for e in range(self.channel.num_encoders):
                rank = self.channel.num_training + e
                work = self.channel.send(rank, SHUTDOWN, torch.ones(1))
                self.channel.wait(work, rank, "ending the run", self.timeout)
        self.posted.clear()


class ShutdownListener(threading.Thread):
    """Waits for the end of training. `received`: it ended in order; `error`: training rank 0 is gone."""

    def __init__(self, channel: EncoderChannel):
        super().__init__(daemon=True)
        self.channel = channel
        self.received = threading.Event()
        self.error: PeerDisconnected | None = None
        self.start()

    def run(self) -> None:
        try:
            work = self.channel.receive(0, SHUTDOWN, torch.zeros(1))
            self.channel.wait(work, 0, "waiting for the end of training")
            self.received.set()
        except PeerDisconnected as e:
            self.error = e


@dataclass(frozen=True)
class AssignedClip:
    """A clip to encode for a data rank. missing: the part of its job that the cache lacks."""

    dp_rank: int
    number: int
    sample_id: int
    bucket: Bucket
    job: Job
    missing: Job


class EncoderServer:
    """The side of an encoder rank; `serve` runs it."""

    def __init__(self, channel: EncoderChannel, clip_encoder: ClipEncoder, plan: EncodingPlan):
        self.channel = channel
        self.clip_encoder = clip_encoder
        self.plan = plan
        self.encoder = channel.rank - channel.num_training
        self.decoding: deque[AssignedClip] = deque()
        self.sending: deque[list[tuple[Any, int, int]]] = deque()  # of each clip: (work, rank, sample id) of each part
        self.num_sent = 0

    def missing_parts(self, draw_plan: DrawPlan, num_steps: int | None) -> Iterator[list[Job]]:
        """What this rank has to encode, one clip at a time; `decoding` receives the clip."""
        steps = islice(draw_plan.sampler, num_steps)
        for a in assign_clips(draw_plan, steps, len(self.plan.groups), self.channel.num_encoders):
            if self.encoder not in a.encoders:
                continue
            for i, (clip, text_key, sample_id) in enumerate(draw_plan.spec(a.micro_batch)):
                if a.encoders[i] == self.encoder:
                    job = draw_job(self.clip_encoder.cache, clip, text_key)
                    part = missing_part(self.clip_encoder.cache, job)
                    self.decoding.append(AssignedClip(a.dp_rank, a.first + i, sample_id, clip.bucket, job, part))
                    yield [part]

    def encode_and_send(self, clip: AssignedClip, decoded: Any) -> ValueError | None:
        """Returns the error of a clip that cannot be encoded; it is sent too."""
        ranks = self.plan.groups[clip.dp_rank]
        self.channel.report_status(
            f"encoding sample {clip.sample_id} for {self.channel.name(ranks[0])}, after {self.num_sent} others"
        )
        size = self.plan.message_bytes(clip.bucket, clip.dp_rank)
        message, error = ClipMessage(clip.number, clip.sample_id, size, len(ranks)), None
        try:
            entries = self.clip_encoder.entries(clip.job, clip.missing, decoded)
            parts = message.pack(entries, self.clip_encoder.spent)
            self.clip_encoder.spent = EncodeStats()
        except ValueError as e:
            parts, error = message.pack_error(str(e)), e
        self.sending.append(
            [
                (self.channel.send(rank, clip.number % MAX_TAG, part), rank, clip.sample_id)
                for rank, part in zip(ranks, parts, strict=True)
            ]
        )
        return error

    def finish_sending(self, keep: int) -> None:
        """Wait until at most `keep` clips are still being sent."""
        while len(self.sending) > keep:
            for work, rank, sample_id in self.sending.popleft():
                self.channel.wait(work, rank, f"sending it sample {sample_id}, after {self.num_sent} others")


def serve(
    channel: EncoderChannel, clip_encoder: ClipEncoder, draw_plan: DrawPlan, num_steps: int | None, plan: EncodingPlan
) -> None:
    """Encode and send until training ends.

    PeerDisconnected: a training rank is gone. ValueError: a clip cannot be encoded, and training has come to it.
    """
    shutdown = ShutdownListener(channel)
    server = EncoderServer(channel, clip_encoder, plan)
    try:
        for (decoded,) in clip_encoder.decoded(server.missing_parts(draw_plan, num_steps)):
            if error := server.encode_and_send(server.decoding.popleft(), decoded):
                with suppress(PeerDisconnected):  # of ranks that have read the error and are gone
                    server.finish_sending(keep=0)
                shutdown.join()  # training still uses the clips sent before
                if shutdown.error:
                    raise error
                return
            server.finish_sending(keep=plan.queue_depth)
            server.num_sent += 1
            if shutdown.received.is_set():
                return
        server.finish_sending(keep=0)
        shutdown.join()
        if shutdown.error:
            raise shutdown.error
    except PeerDisconnected:
        shutdown.join(10)  # training that ends before its last step says so, and then closes its connections
        if not shutdown.received.is_set():
            raise
    finally:
        clip_encoder.cache.flush()
