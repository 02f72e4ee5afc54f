"""Micro-batches of cached latents for one data-parallel rank.

    Order (main process) -- items of one micro-batch -- worker processes read the cache -- list[Batch] per step

The order runs ahead of training by what the workers hold ready; the state that is saved is that of the last step given
out. Instead of being read, entries can be encoded when their turn comes (`Live`: live.py, remote.py); the batches are
the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titan_video.data.batch import Batch
from titan_video.data.batching import Batching, Bucket, Work
from titan_video.data.latent_cache import CachedClip, LatentCache
from titan_video.data.sampler import GlobalSampler, MicroBatch, fingerprint
from titan_video.data.worker import Layout, pack, set_up_worker, unpack
from titan_video.flow.noise import choose_caption, drop_caption

MEMORY_LIMIT = 1 << 30  # bytes of entries kept by a loader without workers

Item = list[tuple[CachedClip, str, int]]  # (clip, key of the text it is given, sample id) of one micro-batch


class EntryReader:
    """Reads micro-batches from the cache, with what cache.conditions names; with `keep` it holds up to 1 GiB of entries
    in memory.
    """

    def __init__(self, cache: LatentCache, max_text_length: int, text_dim: int, keep: bool = False):
        self.cache, self.max_text_length, self.text_dim = cache, max_text_length, text_dim
        self.kept: dict[tuple[str, str], Tensor] | None = {} if keep else None
        self.kept_bytes = 0

    def _read(self, kind: str, key: str) -> Tensor:
        if self.kept is None:
            return self.cache.read(kind, key)
        if (kind, key) in self.kept:
            return self.kept[kind, key]
        tensor = self.cache.read(kind, key)
        if self.kept_bytes + tensor.nbytes < MEMORY_LIMIT:
            self.kept[kind, key] = tensor
            self.kept_bytes += tensor.nbytes
        return tensor

    def __getitem__(self, item: Item) -> dict[str, Tensor]:
        """The fields of a `Batch`.

        All clips of an item have one bucket; text is padded with zeros to max_text_length.
        """
        text_BLD, mask_BL = self.text([text_key for _, text_key, _ in item])
        cond = self.pooled([text_key for _, text_key, _ in item])
        if self.cache.conditioning.num_cond_frames:
            cond["cond_latents_BCFHW"] = torch.stack([self._read("given", clip.given_key) for clip, _, _ in item])
        if self.cache.conditioning.image_tokens:
            cond["image_BSD"] = torch.stack([self._read("image", clip.image_key) for clip, _, _ in item])
        return {
            "streams": {"video": torch.stack([self._read("video", clip.video_key) for clip, _, _ in item])},
            "text_BLD": text_BLD,
            "text_mask_BL": mask_BL,
            "sample_ids_B": torch.tensor([sample_id for _, _, sample_id in item], dtype=torch.int64),
            "cond": cond,
        }

    def text(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_text_length, text_dim], zero beyond each text's length, and the mask of the tokens that
        are its own.
        """
        texts = [self._read("text", key) for key in keys]
        text_BLD = torch.zeros(len(texts), self.max_text_length, self.text_dim, dtype=texts[0].dtype)
        mask_BL = torch.zeros(len(texts), self.max_text_length, dtype=torch.bool)
        for b, text_LD in enumerate(texts):
            length, dim = text_LD.shape
            if length > self.max_text_length or dim != self.text_dim:
                raise ValueError(
                    f"text/{keys[b]} of the cache has {length} x {dim}, the run takes {self.max_text_length} x "
                    f"{self.text_dim}"
                )
            text_BLD[b, :length] = text_LD
            mask_BL[b, :length] = True
        return text_BLD, mask_BL

    def pooled(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """{"pooled_text_BD": vectors of these texts}, or {} where the model has none."""
        return (
            {"pooled_text_BD": torch.stack([self._read("pooled", key) for key in keys])}
            if self.cache.conditioning.pooled_text
            else {}
        )

    def batch(self, clips: Sequence[CachedClip], sample_ids: Sequence[int]) -> Batch:
        """A batch of given clips of one bucket, with their captions."""
        return Batch(**self[[(c, c.text_key, i) for c, i in zip(clips, sample_ids, strict=True)]])


class _Packed:
    def __init__(self, reader: EntryReader):
        self.reader = reader

    def __getitem__(self, item: Item) -> tuple[Tensor, Layout]:
        return pack(self.reader[item])


class DrawPlan:
    """Which clips and captions each micro-batch of all ranks holds. work: of one clip of a bucket.

    It can be sent to another process.
    """

    def __init__(
        self,
        clips: Sequence[CachedClip],
        null_text_key: str,
        batching: Batching,
        work: Callable[[Bucket], Work],
        seed: int,
        shuffle: bool,
        caption_dropout: float,
    ):
        by_bucket: dict[Bucket, list[CachedClip]] = {}
        for clip in clips:
            by_bucket.setdefault(clip.bucket, []).extend([clip] * clip.repeats)
        self.sizes = sorted(by_bucket)
        self.buckets = [by_bucket[size] for size in self.sizes]
        self.null_text_key, self.seed, self.caption_dropout = null_text_key, seed, caption_dropout
        counts = [len(bucket) for bucket in self.buckets]
        self.classes = batching.classes(counts, [work(size) for size in self.sizes])
        mark = fingerprint(
            ["".join((c.video_key, *c.text_keys, c.given_key)) for c in bucket] for bucket in self.buckets
        )
        self.sampler = GlobalSampler(
            counts, self.classes, batching.micro_batches // batching.parts, batching.parts, seed, shuffle, mark
        )

    def steps(self, num_steps: int | None, states: deque[dict[str, Any]]) -> Iterator[list[MicroBatch]]:
        """All ranks' micro-batches, for so many steps (None: for ever); `states` receives the state after each step."""
        for _ in range(num_steps) if num_steps is not None else count():
            step = self.sampler.next()
            states.append(self.sampler.state_dict())
            yield step

    def item(self, micro_batch: MicroBatch) -> Item:
        return [
            self._draw(self.buckets[micro_batch.bucket][position], sample_id)
            for position, sample_id in zip(micro_batch.positions, micro_batch.sample_ids, strict=True)
        ]

    def _draw(self, clip: CachedClip, sample_id: int) -> tuple[CachedClip, str, int]:
        dropped = drop_caption(self.seed, sample_id, self.caption_dropout)
        return (
            clip,
            self.null_text_key
            if dropped
            else clip.text_keys[choose_caption(self.seed, sample_id, len(clip.text_keys))],
            sample_id,
        )


class OnlineEncoder(Protocol):
    """Where the entries of a micro-batch come from when they are not simply read from the cache."""

    cache: Any
    """The cache, in which the entries of the item last given out are to be found too."""

    def items(self, order: DrawPlan, steps: Iterable[list[MicroBatch]], num_steps: int | None) -> Iterator[Item]:
        """This rank's micro-batches, each as soon as its entries are there."""

    def stats(self) -> dict[str, float]:
        """For the log, by name; since the last call."""


class LatentLoader:
    """Endless iterator over optimizer steps: each is the list of this rank's micro-batches.

    Rank r takes every dp_size-th of a step's micro-batches from number r on, so the clips of a step, their sample ids
    the same for every number of ranks. Iterating again goes on after the last step given out. work: of one clip of a
    bucket.
    """

    def __init__(
        self,
        clips: Sequence[CachedClip],
        cache: LatentCache,
        null_text_key: str,
        batching: Batching,
        work: Callable[[Bucket], Work],
        *,
        max_text_length: int,
        text_dim: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        caption_dropout: float = 0.0,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        live: OnlineEncoder | None = None,
    ):
        b = batching
        if b.micro_batches % (b.parts * dp_size):
            raise ValueError(
                f"{b.micro_batches} micro-batches a step are no multiple of data-parallel degree {dp_size} x "
                f"{b.parts} buckets a step"
            )
        self.order = DrawPlan(clips, null_text_key, batching, work, seed, shuffle, caption_dropout)
        self.sampler, self.classes = self.order.sampler, self.order.classes
        self.dp_rank, self.dp_size, self.num_micro_batches = dp_rank, dp_size, b.micro_batches // dp_size
        self.live = live
        self.reader = EntryReader(
            live.cache if live else cache, max_text_length, text_dim, keep=num_workers == 0 and live is None
        )
        self.workers = {"num_workers": num_workers, "worker_init_fn": set_up_worker, "pin_memory": pin_memory}
        if num_workers:
            self.workers["prefetch_factor"] = prefetch_factor
        self._state = self.sampler.state_dict()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.steps(None)

    def steps(self, num_steps: int | None) -> Iterator[list[Batch]]:
        """So many steps (None: for ever) after the last one given out; nothing beyond them is prepared."""
        for position, step in self.iter_with_state(num_steps):
            self.commit(position)
            yield step

    def commit(self, position: dict[str, Any]) -> None:
        """The step after which `position` is has been given to training."""
        self._state = position

    def iter_with_state(self, num_steps: int | None) -> Iterator[tuple[dict[str, Any], list[Batch]]]:
        """The same steps, each with the position after it, of which the caller says when they are given out."""
        self.sampler.load_state_dict(self._state)
        states: deque[dict[str, Any]] = deque()
        steps = self.order.steps(num_steps, states)
        if self.live:
            items = self.live.items(self.order, steps, num_steps)
        else:
            items = (self.order.item(m) for step in steps for m in step[self.dp_rank :: self.dp_size])
        if self.live or not self.workers["num_workers"]:
            micro_batches = (self.reader[item] for item in items)
        else:
            micro_batches = (
                unpack(*packed)
                for packed in DataLoader(_Packed(self.reader), batch_size=None, sampler=items, **self.workers)
            )
        for fields in micro_batches:
            step = [Batch(**fields), *(Batch(**next(micro_batches)) for _ in range(self.num_micro_batches - 1))]
            yield states.popleft(), step

    @property
    def samples(self) -> int:
        """Clips drawn by all ranks since the start of the run, up to the last step given out."""
        return sum(self._state["draws"])

    def stats(self) -> dict[str, float]:
        """Further numbers for the log, by name."""
        return self.live.stats() if self.live else {}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step given out; the same on every rank, and JSON."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that step; takes effect at the next `iter`."""
        self.sampler.load_state_dict(state)
        self._state = self.sampler.state_dict()
