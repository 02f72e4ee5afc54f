"""Messages between training ranks and encoder ranks: the channel, and how a clip's cache entries are packed.

A message is a header of int64, which is checked, and the bytes of cache entries. It travels from host memory to host
memory (gloo), in a group of its own: the default process group is of the training ranks alone, and none of its
collectives waits for an encoder. Latents are small: 8 MB for 81 frames of 480 x 832.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.data.latent_cache import GIVEN
from titan_video.ingest.cache.encode import EncodeStats

MAGIC = 0x746974616E0001
SENT, FAILED = 0, 1
KINDS = ("video", GIVEN, "image", "text", "pooled")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Magic number, status, number of the clip, sample id, bytes; then the cost of the clip: microseconds of encoding and of
# waiting, and frames.
FIXED = 8
HEADER = FIXED + 6 * len(KINDS)  # for each kind its dtype, number of dims and four sizes, or zeros
HEADER_BYTES = 8 * HEADER
MIN_BYTES = 1024  # of a message's part, so that an error message fits
MAX_TAG = 1 << 30  # tags of clips are their numbers modulo this; the tags of handshake and shutdown are above
HANDSHAKE, SHUTDOWN = MAX_TAG + 1, MAX_TAG + 3
FOREVER = timedelta(days=30)


class PeerDisconnected(RuntimeError):
    """A rank of the other side cannot be reached."""


class EncoderChannel:
    """Messages between `num_training` training ranks and the `num_encoders` encoder ranks that follow them.

    store: shared by all ranks.
    """

    def __init__(self, store: dist.Store, rank: int, num_training: int, num_encoders: int, timeout_seconds: int):
        self.store = dist.PrefixStore("encoder_channel", store)
        self.rank = rank
        self.num_training = num_training
        self.num_encoders = num_encoders
        self.report_status("starting")
        store, ranks = dist.PrefixStore("encoder_channel/gloo", store), num_training + num_encoders
        self.group = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=timeout_seconds))

    def name(self, rank: int) -> str:
        return f"training rank {rank}" if rank < self.num_training else f"encoder rank {rank}"

    def report_status(self, status: str) -> None:
        """Publish what this rank is doing, for the error message of a rank that loses it."""
        with suppress(RuntimeError):  # a store that is gone takes its host along, and the messages notice that
            self.store.set(f"state of {self.rank}", status)

    def send(self, rank: int, tag: int, data: Tensor) -> Any:
        with self._naming(rank, "about to send to it"):
            return self.group.send([data], rank, tag)

    def receive(self, rank: int, tag: int, data: Tensor) -> Any:
        with self._naming(rank, "about to receive from it"):
            return self.group.recv([data], rank, tag)

    def wait(self, work: Any, rank: int, doing: str, timeout: timedelta = FOREVER) -> None:
        """Wait for a message to or from `rank`."""
        with self._naming(rank, doing):
            work.wait(timeout)

    @contextmanager
    def _naming(self, rank: int, doing: str) -> Iterator[None]:
        """A failure to reach `rank` becomes a PeerDisconnected that names both sides and what they were doing."""
        try:
            yield
        except RuntimeError as e:
            raise PeerDisconnected(
                f"{self.name(self.rank)} lost {self.name(rank)} while {doing}: {str(e).splitlines()[0]}\n"
                f"  {self.name(rank)} was last {self._status(rank)}"
            ) from e

    def _status(self, rank: int) -> str:
        try:
            self.store.set_timeout(timedelta(seconds=5))
            return self.store.get(f"state of {rank}").decode()
        except RuntimeError:
            return "in an unknown state: the store is gone too"

    def send_object(self, rank: int, value: Any) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        for tag, part in ((HANDSHAKE, torch.tensor([len(data)])), (HANDSHAKE + 1, data)):
            self.wait(self.send(rank, tag, part), rank, "sending it the handshake")

    def receive_object(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        self.wait(self.receive(rank, HANDSHAKE, size), rank, "waiting for the handshake")
        data = torch.empty(int(size), dtype=torch.uint8)
        self.wait(self.receive(rank, HANDSHAKE + 1, data), rank, "receiving the handshake")
        return pickle.loads(data.numpy().tobytes())


@dataclass(frozen=True)
class EncodingPlan:
    """What both sides agree on beside the draw plan.

    groups: training ranks that have the same clips, by data rank. queue_depth: clips received ahead.
    num_latents: latents of a clip (2 with conditioning frames). other_bytes: the most that its other entries take.
    latent_bytes: of one latent, by bucket; the training ranks fill it in before the handshake.
    """

    groups: Sequence[Sequence[int]]
    queue_depth: int
    num_latents: int
    other_bytes: int
    latent_bytes: Mapping[Bucket, int] = field(default_factory=dict)

    def message_bytes(self, bucket: Bucket, dp_rank: int) -> int:
        """Bytes of each of the parts of a clip's message, one part for each rank of the group."""
        entries = self.num_latents * self.latent_bytes[bucket] + self.other_bytes
        part = -(-entries // len(self.groups[dp_rank]))
        return HEADER_BYTES + max(part + -part % 8, MIN_BYTES)


@dataclass(frozen=True)
class ClipMessage:
    """A clip's message: its number in the run, its sample id, and `parts` parts of `size` bytes each."""

    number: int
    sample_id: int
    size: int
    parts: int

    def pack(self, entries: Mapping[tuple[str, str], Tensor], spent: EncodeStats) -> list[Tensor]:
        """The parts, uint8 [size] each, with the cache entries {(kind, key): tensor}."""
        header = torch.zeros(HEADER, dtype=torch.int64)
        raw = []
        for (kind, _), tensor in sorted(entries.items(), key=lambda entry: KINDS.index(entry[0][0])):
            at = FIXED + 6 * KINDS.index(kind)
            described = [1 + DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
            header[at : at + len(described)] = torch.tensor(described)
            raw.append(tensor.flatten().view(torch.uint8))
        data = torch.cat(raw)
        cost = [round(1e6 * spent.encode_seconds), round(1e6 * spent.decode_wait_seconds), spent.encoded_frames]
        header[:FIXED] = torch.tensor([MAGIC, SENT, self.number, self.sample_id, len(data), *cost])
        room = self.size - HEADER_BYTES
        assert len(data) <= room * self.parts, "a clip's entries are larger than the training ranks expect"
        data = torch.cat([data, data.new_zeros(room * self.parts - len(data))])
        return [torch.cat([header.view(torch.uint8), part]) for part in data.split(room)]

    def pack_error(self, error: str) -> list[Tensor]:
        """The parts for a clip that cannot be encoded. Each holds the whole error message."""
        data = torch.frombuffer(bytearray(error.encode()[:MIN_BYTES]), dtype=torch.uint8)
        header = torch.zeros(HEADER, dtype=torch.int64)
        header[:5] = torch.tensor([MAGIC, FAILED, self.number, self.sample_id, len(data)])
        padding = data.new_zeros(self.size - HEADER_BYTES - len(data))
        return [torch.cat([header.view(torch.uint8), data, padding]) for _ in range(self.parts)]


def unpack(header: Tensor, data: Tensor, keys: Mapping[str, str]) -> dict[tuple[str, str], Tensor]:
    """The cache entries of a message. keys: {kind: key} of the entries that are expected."""
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
