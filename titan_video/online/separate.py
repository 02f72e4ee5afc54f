"""Encoding during training on ranks of their own.

    training ranks    evaluate the order of clips, and post a receive for each of the next `queue_depth` clips, from the rank that will encode it
    encoder ranks     evaluate the same order, and encode and send ahead, each its own clips; a send waits until its receive is posted

So nothing is asked for: both sides know who sends what to whom, and the number of a clip in the order is the tag of its
message. Ranks that share a clip are sent one part of its bytes each, and gather them. A message is a header of int64,
which is checked, and bytes of cache entries.

Messages travel between hosts' memories (gloo), in a group that training has no part in: the default process group, and
the training ranks alone, and none of its collectives waits for an encoder. Latents are small: 8 MB for 81 frames of 480
x 832.
"""

import math
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, tee
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, Item
from titan_video.data.sampler import MicroBatch
from titan_video.ingest.encode import TEXT_COST, ClipEncoder, EncodeStats, Job, draw_job, missing
from titan_video.online.colocated import OverlayCache

MAGIC = 0x746974616E0001
SENT, FAILED = 0, 1
KINDS = ("video", "given", "image", "text", "pooled")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# magic, status, number, sample id, bytes; what was spent on it, in microseconds of encoding and of waiting, and frames
FIXED = 8
HEADER = FIXED + 6 * len(KINDS)  # for each kind its type, number of dims and four sizes, or zeros
LEAST = 1024  # bytes of a message's part, in which an error finds room
TAGS = 1 << 30  # of clips, in turn; above are those of hello and goodbye
HANDSHAKE, SHUTDOWN = TAGS + 1, TAGS + 3
FOREVER = timedelta(days=30)


class PeerDisconnected(RuntimeError):
    """A rank of the other side cannot be reached."""


class EncoderChannel:
    """Messages between `num_training` training ranks and `num_encoders` encoder ranks, which follow them. store:

    that of all ranks.
    """

    def __init__(self, store: dist.Store, rank: int, num_training: int, num_encoders: int, timeout_seconds: int):
        self.store, self.rank, self.num_training, self.num_encoders = (
            dist.PrefixStore("wire", store),
            rank,
            num_training,
            num_encoders,
        )
        self.tell("starting")
        ranks = num_training + num_encoders
        self.group = dist.ProcessGroupGloo(
            dist.PrefixStore("wire/gloo", store), rank, ranks, timedelta(seconds=timeout_seconds)
        )

    def name(self, rank: int) -> str:
        return f"training rank {rank}" if rank < self.num_training else f"encoder rank {rank}"

    def tell(self, state: str) -> None:
        """What this rank is at, for the message of another that loses it."""
        with suppress(RuntimeError):  # a store that is gone takes its host along, whose silence the messages notice
            self.store.set(f"state of {self.rank}", state)

    def send(self, rank: int, tag: int, data: Tensor) -> Any:
        with self._names(rank, "about to send to it"):
            return self.group.send([data], rank, tag)

    def receive(self, rank: int, tag: int, data: Tensor) -> Any:
        with self._names(rank, "about to receive from it"):
            return self.group.recv([data], rank, tag)

    def wait(self, work: Any, rank: int, doing: str, timeout: timedelta = FOREVER) -> None:
        """Wait for a message to or from `rank`."""
        with self._names(rank, doing):
            work.wait(timeout)

    @contextmanager
    def _names(self, rank: int, doing: str) -> Iterator[None]:
        """A failure to reach `rank` becomes a `Lost` that names both sides and what they were at."""
        try:
            yield
        except RuntimeError as e:
            raise PeerDisconnected(
                f"{self.name(self.rank)} lost {self.name(rank)} while {doing}: {str(e).splitlines()[0]}\n"
                f"  {self.name(rank)} was last {self._state(rank)}"
            ) from e

    def _state(self, rank: int) -> str:
        try:
            self.store.set_timeout(timedelta(seconds=5))
            return self.store.get(f"state of {rank}").decode()
        except RuntimeError:
            return "at what cannot be told: the store is gone too"

    def send_object(self, rank: int, what: Any) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8)
        for tag, part in ((HANDSHAKE, torch.tensor([len(data)])), (HANDSHAKE + 1, data)):
            self.wait(self.send(rank, tag, part), rank, "telling it what to encode")

    def receive_object(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        self.wait(self.receive(rank, HANDSHAKE, size), rank, "waiting to be told what to encode")
        data = torch.empty(int(size), dtype=torch.uint8)
        self.wait(self.receive(rank, HANDSHAKE + 1, data), rank, "being told what to encode")
        return pickle.loads(data.numpy().tobytes())


@dataclass(frozen=True)
class Sizes:
    """Bytes of entries: latents by bucket, how many of these a clip has, and the most that all others take."""

    latents: Mapping[Bucket, int]
    num_latents: int
    others: int

    def message(self, bucket: Bucket, parts: int) -> int:
        """Bytes of one of so many parts of a clip."""
        part = -(-(self.num_latents * self.latents[bucket] + self.others) // parts)
        return 8 * HEADER + max(part + -part % 8, LEAST)


def dealt(
    order: DrawPlan, steps: Iterable[list[MicroBatch]], dp_size: int, num_encoders: int
) -> Iterator[tuple[int, MicroBatch, int, list[int]]]:
    """(data rank, micro-batch, number of its first clip, encoders of its clips):

    each clip goes to the encoder that has had least to do.
    """
    loads, number = [0] * num_encoders, 0
    for step in steps:
        for j, m in enumerate(step):
            frames, height, width = order.sizes[m.bucket]
            owners = []
            for _ in m.sample_ids:
                owner = loads.index(min(loads))
                loads[owner] += frames * height * width + TEXT_COST
                owners.append(owner)
            yield j % dp_size, m, number, owners
            number += len(owners)


def pack(
    entries: Mapping[tuple[str, str], Tensor], spent: EncodeStats, number: int, sample_id: int, size: int, parts: int
) -> list[Tensor]:
    """A clip's message, of `size` bytes for each part."""
    header = torch.zeros(HEADER, dtype=torch.int64)
    raw = []
    for (kind, _), tensor in sorted(entries.items(), key=lambda entry: KINDS.index(entry[0][0])):
        at = FIXED + 6 * KINDS.index(kind)
        header[at : at + 2 + tensor.ndim] = torch.tensor([1 + DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape])
        raw.append(tensor.flatten().view(torch.uint8))
    data = torch.cat(raw)
    times = round(1e6 * spent.encode_seconds), round(1e6 * spent.decode_wait_seconds)
    header[:FIXED] = torch.tensor([MAGIC, SENT, number, sample_id, len(data), *times, spent.encoded_frames])
    return _parts(header, data, size, parts)


def pack_error(error: str, number: int, sample_id: int, size: int, parts: int) -> list[Tensor]:
    """The same, of a clip that cannot be encoded: every part holds the whole message."""
    data = torch.frombuffer(bytearray(error.encode()[:LEAST]), dtype=torch.uint8)
    header = torch.zeros(HEADER, dtype=torch.int64)
    header[:5] = torch.tensor([MAGIC, FAILED, number, sample_id, len(data)])
    return [
        torch.cat([part, data, data.new_zeros(size - len(part) - len(data))])
        for part in [header.view(torch.uint8)] * parts
    ]


def _parts(header: Tensor, data: Tensor, size: int, parts: int) -> list[Tensor]:
    room = size - 8 * HEADER
    assert len(data) <= room * parts, "a clip's entries are larger than the training ranks expect"
    data = torch.cat([data, data.new_zeros(room * parts - len(data))])
    return [torch.cat([header.view(torch.uint8), part]) for part in data.split(room)]


def unpack(header: Tensor, data: Tensor, keys: Mapping[str, str]) -> dict[tuple[str, str], Tensor]:
    """The entries of a message. keys: of the kinds that are expected."""
    entries, first = {}, 0
    for i, kind in enumerate(KINDS):
        code, ndim, *sizes = header[FIXED + 6 * i : FIXED + 6 * i + 6].tolist()
        if bool(code) != (kind in keys):
            raise RuntimeError(f"it has {'a' if code else 'no'} {kind}")
        if code:
            dtype, shape = DTYPES[code - 1], sizes[:ndim]
            last = first + torch.Size(shape).numel() * dtype.itemsize
            entries[kind, keys[kind]] = data[first:last].clone().view(dtype).view(shape)
            first = last
    if first != header[4]:
        raise RuntimeError(f"it has {int(header[4])} bytes, its shapes take {first}")
    return entries


class Separate:
    """The side of a training rank; see Live in loader.py.

    latent_shape: of a bucket; others: bytes that a clip's other entries take at most.
    groups: of training ranks that share clips, by data rank; group: this rank's (None: it is alone). queue_depth: clips
        received ahead.
    first_timeout: seconds to wait for the first clip, while encoders load; timeout: for each later one.
    """

    def __init__(
        self,
        channel: EncoderChannel,
        cache: LatentCache,
        latent_shape: Callable[[Bucket], tuple[int, ...]],
        others: int,
        groups: Sequence[Sequence[int]],
        dp_rank: int,
        group: dist.ProcessGroup | None,
        queue_depth: int,
        first_timeout: int,
        timeout: int,
    ):
        self.channel, self.groups, self.dp_rank, self.group, self.queue_depth = (
            channel,
            groups,
            dp_rank,
            group,
            queue_depth,
        )
        self.latent_shape, self.others, self.num_latents = (
            latent_shape,
            others,
            2 if cache.conditioning.num_cond_frames else 1,
        )
        self.cache, self.timeout, self.next_timeout = (
            OverlayCache(cache),
            timedelta(seconds=timeout),
            timedelta(seconds=first_timeout),
        )
        self.parts = len(groups[dp_rank])
        self.posted: deque[tuple[Any, Tensor, int, int]] = deque()
        self.is_started, self.spent = False, EncodeStats()

    def items(self, order: DrawPlan, steps: Iterable[list[MicroBatch]], num_steps: int | None) -> Iterator[Item]:
        assert not self.is_started, "encoder ranks are told once what to encode"
        self.sizes = Sizes(
            {bucket: 4 * math.prod(self.latent_shape(bucket)) for bucket in order.sizes}, self.num_latents, self.others
        )
        self._hello((self.cache.cache.identity, order, num_steps, self.sizes, self.groups, self.queue_depth))
        everyones = dealt(order, steps, len(self.groups), self.channel.num_encoders)
        ahead, now = tee((m, number, owners) for dp_rank, m, number, owners in everyones if dp_rank == self.dp_rank)
        feed = (
            (order.sizes[m.bucket], number + i, owner) for m, number, owners in ahead for i, owner in enumerate(owners)
        )
        self.posted.extend(self._post(*clip) for clip in islice(feed, self.queue_depth))
        for m, _, _ in now:
            item = order.item(m)
            received: dict[Any, Tensor] = {}
            for clip, text_key, sample_id in item:
                received |= self._receive(draw_job(self.cache.cache, clip, text_key), sample_id)
                self.posted.extend(self._post(*following) for following in islice(feed, 1))
            self.channel.tell(f"training on samples {m.sample_ids}")
            self.cache.entries = received
            yield item

    def _hello(self, what: Any) -> None:
        self.is_started = True
        for e in range(self.channel.num_encoders if self.channel.rank == 0 else 0):
            self.channel.send_object(self.channel.num_training + e, what)

    def _post(self, bucket: Bucket, number: int, owner: int) -> tuple[Any, Tensor, int, int]:
        data = torch.zeros(self.sizes.message(bucket, self.parts), dtype=torch.uint8)
        rank = self.channel.num_training + owner
        return self.channel.receive(rank, number % TAGS, data), data, number, rank

    def _receive(self, job: Job, sample_id: int) -> dict[tuple[str, str], Tensor]:
        work, message, number, rank = self.posted.popleft()
        self.channel.tell(f"waiting for sample {sample_id} of {self.channel.name(rank)}")
        self.channel.wait(work, rank, f"waiting for sample {sample_id}, clip {number} of this run's", self.next_timeout)
        self.next_timeout = self.timeout
        header, data = message[: 8 * HEADER].view(torch.int64), message[8 * HEADER :]
        magic, status, sent_number, sent_id, size, encoding, waiting, frames = header[:FIXED].tolist()
        if magic == MAGIC and status == FAILED:
            raise ValueError(data[:size].numpy().tobytes().decode(errors="replace"))
        try:
            if (magic, sent_number, sent_id) != (MAGIC, number, sample_id):
                raise RuntimeError(f"it is sample {sent_id}, clip {sent_number}, magic {magic:x}")
            if self.group:
                parts = [torch.empty_like(data) for _ in range(self.parts)]
                dist.all_gather(parts, data, group=self.group)
                data = torch.cat(parts)
            entries = unpack(header, data, dict(job.keys))
            latents = entries[job.keys[0]]
            if latents.dtype != torch.float32 or latents.nbytes != self.sizes.latents[job.entry.bucket]:
                raise RuntimeError(f"its latents are {latents.dtype} {list(latents.shape)}")
        except RuntimeError as e:
            raise RuntimeError(
                f"what {self.channel.name(rank)} sent as sample {sample_id}, clip {number} of this run's, is "
                f"another: {e}; "
                "do all ranks run the same code with the same configuration?"
            ) from e
        self.spent.encode_seconds += encoding / 1e6
        self.spent.decode_wait_seconds += waiting / 1e6
        self.spent.encoded_frames += frames
        return entries

    def stats(self) -> dict[str, float]:
        """For the log:

        clips that have come and wait; and what encoder ranks spent on those given out since the last call.
        """
        spent, self.spent = self.spent, EncodeStats()
        return {
            "queue_depth": sum(int(data[:8].view(torch.int64)) == MAGIC for _, data, _, _ in self.posted),
            **spent.numbers(),
        }

    def close(self) -> None:
        """Send the encoder ranks home, when every training rank has had its last batch."""
        if not self.is_started:
            self._hello(None)
        elif self.channel.rank == 0:
            for e in range(self.channel.num_encoders):
                rank = self.channel.num_training + e
                self.channel.wait(
                    self.channel.send(rank, SHUTDOWN, torch.ones(1)), rank, "ending the run", self.timeout
                )
        self.posted.clear()


class ShutdownListener(threading.Thread):
    """Waits for training to end; `came` says whether it did so in order."""

    def __init__(self, channel: EncoderChannel):
        super().__init__(daemon=True)
        self.channel, self.came, self.error = channel, threading.Event(), None
        self.start()

    def run(self) -> None:
        try:
            self.channel.wait(self.channel.receive(0, SHUTDOWN, torch.zeros(1)), 0, "waiting for the end of training")
            self.came.set()
        except PeerDisconnected as e:
            self.error = e


def serve(
    channel: EncoderChannel,
    maker: ClipEncoder,
    order: DrawPlan,
    num_steps: int | None,
    sizes: Sizes,
    groups: Sequence[Sequence[int]],
    queue_depth: int,
) -> None:
    """The side of an encoder rank: encode and send until training ends. Raises Lost when a training rank is, and
    ValueError for a clip that cannot be encoded, when training has come to it."""
    goodbye, sent = ShutdownListener(channel), 0
    ahead: deque[tuple[int, int, int, Bucket, Job, Job]] = deque()
    under_way: deque[list[tuple[Any, int, int]]] = deque()

    def parts() -> Iterator[list[Job]]:
        for dp_rank, m, number, owners in dealt(
            order, order.steps(num_steps, deque(maxlen=1)), len(groups), channel.num_encoders
        ):
            if channel.rank - channel.num_training in owners:
                for i, (clip, text_key, sample_id) in enumerate(order.item(m)):
                    if owners[i] == channel.rank - channel.num_training:
                        job = draw_job(maker.cache, clip, text_key)
                        part = missing(maker.cache, job)
                        ahead.append((dp_rank, number + i, sample_id, clip.bucket, job, part))
                        yield [part]

    def finish(keep: int) -> None:
        while len(under_way) > keep:
            for work, rank, sample_id in under_way.popleft():
                channel.wait(work, rank, f"sending it sample {sample_id}, after {sent} others")

    try:
        for (decoded,) in maker.decoded(parts()):
            dp_rank, number, sample_id, bucket, job, part = ahead.popleft()
            channel.tell(f"encoding sample {sample_id} for {channel.name(groups[dp_rank][0])}, after {sent} others")
            to, error = (number, sample_id, sizes.message(bucket, len(groups[dp_rank])), len(groups[dp_rank])), None
            try:
                entries = maker.entries(job, part, decoded)
                messages = pack(entries, maker.spent, *to)
                maker.spent = EncodeStats()
            except ValueError as e:
                messages, error = pack_error(str(e), *to), e
            under_way.append(
                [
                    (channel.send(rank, number % TAGS, data), rank, sample_id)
                    for rank, data in zip(groups[dp_rank], messages, strict=True)
                ]
            )
            if error:
                with suppress(PeerDisconnected):  # of ranks that have read it and are gone
                    finish(0)
                goodbye.join()  # what has been sent before is still to be trained on
                if goodbye.error:
                    raise error
                return
            finish(queue_depth)
            sent += 1
            if goodbye.came.is_set():
                return
        finish(0)
        goodbye.join()
        if goodbye.error:
            raise goodbye.error
    except PeerDisconnected:
        goodbye.join(10)  # training that ends before its last step says so, and closes its connections
        if not goodbye.came.is_set():
            raise
    finally:
        maker.cache.flush()
