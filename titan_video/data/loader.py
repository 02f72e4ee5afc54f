"""Micro-batches of cached latents for one data-parallel rank, as a pipeline of `torchdata.nodes`.

    GlobalSampler      counters -> the micro-batches of a step, of all ranks
    RankMicroBatches   those of this rank, one at a time: which clip, which caption, which sample id
    ParallelMapper     threads read the cache -> the fields of a Batch
    Prefetcher         more of them, where data.prefetch_factor asks for that
    PinMemory          with a GPU
    Batcher            the micro-batches of a step

The pipeline runs ahead of training. Each node's state is that of the item it has handed over, and is the sampler's
counters and nothing else, so a run resumes on any number of ranks and threads. The loader's state, which checkpoints
save, is that of the last step given to training.
With online encoding (encoder.placement) entries are encoded when they are needed; the batches are the same.
"""

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, Batcher, ParallelMapper, PinMemory, Prefetcher

from titan_video.config.job_config import Data
from titan_video.data.batch import Batch
from titan_video.data.batching import Batching, Bucket, Work
from titan_video.data.latent_cache import GIVEN, CachedClip, LatentCache
from titan_video.data.sampler import GlobalSampler, MicroBatch, fingerprint
from titan_video.flow.noise import choose_caption, drop_caption

MEMORY_LIMIT = 1 << 30  # bytes of entries that a reader with `keep` holds


class ClipDraw(NamedTuple):
    """One sample of a micro-batch: a clip, the key of the text that goes with it, and the sample id."""

    clip: CachedClip
    text_key: str
    sample_id: int


MicroBatchSpec = list[ClipDraw]


class EntryReader:
    """Reads micro-batches from the cache, with all that cache.conditioning asks for.

    max_text_length, text_dim: of the padded text embeddings. keep: hold up to 1 GiB of entries in memory.
    """

    def __init__(self, cache: LatentCache, max_text_length: int, text_dim: int, keep: bool = False):
        self.cache = cache
        self.max_text_length = max_text_length
        self.text_dim = text_dim
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

    def __getitem__(self, spec: MicroBatchSpec) -> dict[str, Any]:
        """The fields of a `Batch`. All clips have one bucket; text is padded with zeros to max_text_length.

        ValueError: an entry is missing, damaged or of another size; the message names the file.
        """
        text_keys = [draw.text_key for draw in spec]
        text_BLD, mask_BL = self.text(text_keys)
        cond = self.pooled(text_keys)
        if self.cache.conditioning.num_cond_frames:
            cond["cond_latents_BCFHW"] = torch.stack([self._read(GIVEN, draw.clip.cond_key) for draw in spec])
        if self.cache.conditioning.image_tokens:
            cond["image_BSD"] = torch.stack([self._read("image", draw.clip.image_key) for draw in spec])
        return {
            "streams": {"video": torch.stack([self._read("video", draw.clip.video_key) for draw in spec])},
            "text_BLD": text_BLD,
            "text_mask_BL": mask_BL,
            "sample_ids_B": torch.tensor([draw.sample_id for draw in spec], dtype=torch.int64),
            "cond": cond,
        }

    def read(self, spec: MicroBatchSpec) -> dict[str, Any] | ValueError:
        """`self[spec]` in a thread, whose error torchdata would turn into the text of its traceback: it is returned."""
        try:
            return self[spec]
        except ValueError as error:
            return error

    def text(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_text_length, text_dim], zero beyond each text's length, and the mask [B, max_text_length]
        of its own tokens.
        """
        texts = [self._read("text", key) for key in keys]
        text_BLD = torch.zeros(len(texts), self.max_text_length, self.text_dim, dtype=texts[0].dtype)
        mask_BL = torch.zeros(len(texts), self.max_text_length, dtype=torch.bool)
        for b, text_LD in enumerate(texts):
            length, dim = text_LD.shape
            if length > self.max_text_length or dim != self.text_dim:
                limit = f"{self.max_text_length} x {self.text_dim}"
                raise ValueError(f"text/{keys[b]} of the cache has {length} x {dim}, the run takes {limit}")
            text_BLD[b, :length] = text_LD
            mask_BL[b, :length] = True
        return text_BLD, mask_BL

    def pooled(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """{"pooled_text_BD": vectors of these texts}, or {} for a model without pooled text."""
        if not self.cache.conditioning.pooled_text:
            return {}
        return {"pooled_text_BD": torch.stack([self._read("pooled", key) for key in keys])}

    def batch(self, clips: Sequence[CachedClip], sample_ids: Sequence[int]) -> Batch:
        """A batch of these clips of one bucket, with their first captions."""
        return Batch(**self[[ClipDraw(c, c.text_key, i) for c, i in zip(clips, sample_ids, strict=True)]])


class ClipsByBucket(NamedTuple):
    """sizes: ascending. buckets: the clips of each, as often as an epoch holds them. identity: see `fingerprint`."""

    sizes: list[Bucket]
    buckets: list[Sequence[CachedClip]]
    identity: str


def by_bucket(clips: Sequence[CachedClip]) -> ClipsByBucket:
    found: dict[Bucket, list[CachedClip]] = {}
    for clip in clips:
        found.setdefault(clip.bucket, []).extend([clip] * clip.repeats)
    sizes = sorted(found)
    keys = (("".join((c.video_key, *c.text_keys, c.cond_key)) for c in found[size]) for size in sizes)
    return ClipsByBucket(sizes, [found[size] for size in sizes], fingerprint(keys))


class DrawPlan:
    """Which clips and captions each micro-batch of all ranks holds. It can be sent to another process.

    null_text_key: of the empty caption. work: the cost of one clip of a bucket. image_dropout: of clips whose caption
    and image are dropped apart; -1: the share of HunyuanVideo-I2V's own code (sematic_cond_drop_p, hyvideo/config.py).
    """

    def __init__(
        self,
        clips: Sequence[CachedClip] | ClipsByBucket,
        null_text_key: str,
        batching: Batching,
        work: Callable[[Bucket], Work],
        seed: int = 0,
        shuffle: bool = True,
        caption_dropout: float = 0.0,
        image_dropout: float = 0.0,
    ):
        self.sizes, self.buckets, identity = clips if isinstance(clips, ClipsByBucket) else by_bucket(clips)
        self.null_text_key = null_text_key
        self.batching = batching
        self.seed = seed
        self.caption_dropout, self.image_dropout = caption_dropout, image_dropout if image_dropout >= 0 else 0.1
        counts = [len(bucket) for bucket in self.buckets]
        self.sampler = GlobalSampler(
            counts,
            batching.classes(counts, [work(size) for size in self.sizes]),
            batching.micro_batches // batching.groups_per_step,
            batching.groups_per_step,
            seed,
            shuffle,
            identity,
        )

    def spec(self, micro_batch: MicroBatch) -> MicroBatchSpec:
        bucket = self.buckets[micro_batch.bucket]
        return [
            self._draw(bucket[position], sample_id)
            for position, sample_id in zip(micro_batch.positions, micro_batch.sample_ids, strict=True)
        ]

    def _draw(self, clip: CachedClip, sample_id: int) -> ClipDraw:
        null_key, keys = self.null_text_key, clip.text_keys
        if apart := clip.imageless_keys:
            is_black = drop_caption(self.seed, sample_id, self.image_dropout, "image")
            null_key, keys = (null_key, apart[1:]) if is_black else (apart[0], keys)
        if drop_caption(self.seed, sample_id, self.caption_dropout):
            return ClipDraw(clip, null_key, sample_id)
        return ClipDraw(clip, keys[choose_caption(self.seed, sample_id, len(keys))], sample_id)


class RankMicroBatches(BaseNode[MicroBatchSpec]):
    """One rank's micro-batches of `num_steps` steps after `start`: numbers dp_rank, dp_rank + dp_size, ... of a step.

    Its state is the sampler's, so it is a position to resume from at the end of a step only.
    """

    def __init__(self, draw_plan: DrawPlan, dp_rank: int, dp_size: int, num_steps: int | None, start: dict[str, Any]):
        super().__init__()
        self.draw_plan = draw_plan
        # A copy: the threads of an earlier iteration that was left may still draw from theirs.
        self.sampler = copy(draw_plan.sampler)
        self.ranks = slice(dp_rank, None, dp_size)
        self.num_steps = num_steps
        self.start = start

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.sampler.reset(initial_state or self.start)
        self.steps_left = self.num_steps
        self.waiting: deque[MicroBatch] = deque()

    def next(self) -> MicroBatchSpec:
        if not self.waiting:
            if self.steps_left == 0:
                raise StopIteration
            if self.steps_left is not None:
                self.steps_left -= 1
            self.waiting.extend(next(self.sampler)[self.ranks])
        return self.draw_plan.spec(self.waiting.popleft())

    def get_state(self) -> dict[str, Any]:
        return self.sampler.state_dict()


def sampler_state(node: BaseNode) -> dict[str, Any]:
    """The sampler's state behind the item that a node gave last. Every node wraps its source's state in its own."""
    state = node.state_dict()
    while "draws" not in state:
        state = next(inner for inner in state.values() if isinstance(inner, dict))
    return state


class LatentLoader:
    """Endless iterator over optimizer steps. Each is the list of this rank's micro-batches.

    Rank r takes every dp_size-th of a step's micro-batches, beginning with number r, so the clips of a step and their
    sample ids are the same for every number of ranks. Iterating again continues after the last step given to training.

    num_workers: threads that read the cache; 0: it is read when a step is asked for.
    prefetch_factor: micro-batches read ahead for each thread. pin_memory: needs a GPU and a thread.
    online: what encodes during training, an OnlineEncoder of titan_video/online (optional); None: the cache has all.
    ValueError: the micro-batches of a step do not divide among the ranks.
    """

    def __init__(
        self,
        draw_plan: DrawPlan,
        reader: EntryReader,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        online: Any = None,
    ):
        b = draw_plan.batching
        if b.micro_batches % (b.groups_per_step * dp_size):
            raise ValueError(
                f"{b.micro_batches} micro-batches a step are no multiple of data-parallel degree {dp_size} x "
                f"{b.groups_per_step} groups a step"
            )
        self.draw_plan = draw_plan
        self.reader = reader
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.num_micro_batches = b.micro_batches // dp_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.pin_memory = pin_memory
        self.online = online
        self._state = self.state_before = draw_plan.sampler.state_dict()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.steps(None)

    def steps(self, num_steps: int | None) -> Iterator[list[Batch]]:
        """The `num_steps` steps (None: endless) after the last one given to training. Nothing beyond them is read."""
        for state, step in self.iter_with_state(num_steps):
            self.commit(state)
            yield step

    def commit(self, state: dict[str, Any]) -> None:
        """The step that came with `state` has been given to training."""
        self.state_before, self._state = self._state, state

    def iter_with_state(self, num_steps: int | None) -> Iterator[tuple[dict[str, Any], list[Batch]]]:
        """The same steps, each with the state after it. The caller commits a state when training has got the step."""
        if self.online:
            yield from self.online.steps(self, self._state, num_steps)
            return
        num_threads = torch.get_num_threads()
        pipeline = [self._build_pipeline(num_steps)]
        # Dropping the nodes stops their threads. A thread inside torch while the interpreter shuts down could abort the
        # process, so that is also done at exit.
        atexit.register(pipeline.clear)
        try:
            while (step := next(pipeline[0], None)) is not None:
                # Every thread of ParallelMapper sets torch's number of threads to 1 for all threads that start later.
                torch.set_num_threads(num_threads)
                for error in (fields for fields in step if isinstance(fields, ValueError)):
                    raise error
                yield sampler_state(pipeline[0]), [Batch(**fields) for fields in step]
        finally:
            atexit.unregister(pipeline.clear)
            pipeline.clear()

    def _build_pipeline(self, num_steps: int | None) -> Batcher:
        specs = RankMicroBatches(self.draw_plan, self.dp_rank, self.dp_size, num_steps, self._state)
        node: BaseNode = ParallelMapper(
            specs,
            self.reader.read,
            num_workers=self.num_workers,
            method="thread",
            # Micro-batches in flight; None is two for each thread, which the class allows only as the default.
            max_concurrent=self.num_workers if self.prefetch_factor == 1 else None,
            snapshot_frequency=1,
        )
        if self.num_workers and self.prefetch_factor > 2:
            node = Prefetcher(node, self.num_workers * (self.prefetch_factor - 2), snapshot_frequency=1)
        if self.num_workers and self.pin_memory:
            node = PinMemory(node, snapshot_frequency=1)
        return Batcher(node, self.num_micro_batches)

    @property
    def samples(self) -> int:
        """Clips drawn by all ranks since the start of the run, up to the last step given to training."""
        return sum(self._state["draws"])

    def stats(self) -> dict[str, float]:
        """Further numbers for the log, by name."""
        return self.online.stats() if self.online else {}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step given to training: the same on every rank, and JSON."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that step; takes effect at the next `iter`. ValueError: the clips are not those of `state`."""
        self.draw_plan.sampler.reset(state)
        self._state = self.draw_plan.sampler.state_dict()


def build_loader(
    section: Data,
    draw_plan: DrawPlan,
    cache: LatentCache,
    text_shape: tuple[int, int],
    dp: tuple[int, int],
    pin_memory: bool = False,
    online: Any = None,
) -> LatentLoader:
    """The loader of a run. text_shape: [max_text_length, text_dim]. dp: data-parallel rank and degree."""
    entries = online.cache if online else cache
    keep = section.num_workers == 0 and online is None
    reader = EntryReader(entries, max_text_length=text_shape[0], text_dim=text_shape[1], keep=keep)
    return LatentLoader(
        draw_plan,
        reader,
        dp_rank=dp[0],
        dp_size=dp[1],
        num_workers=section.num_workers,
        prefetch_factor=section.prefetch_factor,
        pin_memory=pin_memory,
        online=online,
    )
