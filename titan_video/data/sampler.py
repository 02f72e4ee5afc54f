"""The clips of each optimizer step: a pure function of a few counters, for any number of ranks and threads."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torchdata.nodes import BaseNode

_STREAM = 16  # top word of the Philox counter, apart from the streams of flow.noise
OTHER_CLIPS = (
    "the training clips (files, captions, [data], validation.holdout, encoders) are not those of the checkpoint, so "
    "its position among them is lost; restore them, or start a new run from its weights: another job.dump_folder and "
    "checkpoint.initial_load_path = its step-N folder"
)


@dataclass(frozen=True)
class MicroBatch:
    """Clips of one bucket: their positions in it, and their sample ids (the number of each draw over the whole run)."""

    bucket: int
    positions: list[int]
    sample_ids: list[int]


@dataclass(frozen=True)
class CostClass:
    """Buckets, by index, whose micro-batches of `clips` clips cost the same."""

    buckets: tuple[int, ...]
    clips: int


def fingerprint(keys_by_bucket: Iterable[Iterable[str]]) -> str:
    """Identity of a list of clips, by content and order."""
    digest = hashlib.sha256()
    for keys in keys_by_bucket:
        digest.update("\n".join([*keys, "\n"]).encode())
    return digest.hexdigest()


class GlobalSampler(BaseNode[list[MicroBatch]]):
    """Draws one optimizer step at a time: the micro-batches of all ranks, in `groups_per_step` groups of
    `micro_batches` micro-batches each. All micro-batches of a group are of one cost class.

    Ranks take the micro-batches round-robin. Any number of ranks that divides `micro_batches` therefore has work of
    equal cost at every moment.
    Which class takes the next group, and which bucket of the class the next micro-batch, is decided by worst-case fair
    queueing (Bennett and Zhang 1996): among those that are not ahead of the epoch, the one that would be the first to
    finish its next turn. After any number of steps each has had its share of the clips to within one group.
    Within a bucket, draw c is position c mod size of epoch c // size; the order of an epoch is a permutation keyed by
    (seed, bucket, epoch). A micro-batch may span epochs, no clip is ever skipped, and a bucket may be smaller than a
    micro-batch.

    ValueError: a bucket is empty.
    """

    def __init__(
        self,
        bucket_sizes: Sequence[int],
        classes: Sequence[CostClass],
        micro_batches: int,
        groups_per_step: int,
        seed: int,
        shuffle: bool,
        fingerprint: str = "",
    ):
        super().__init__()
        if not bucket_sizes or min(bucket_sizes) < 1:
            raise ValueError(f"every bucket needs a clip, got sizes {list(bucket_sizes)}")
        covered = sorted(b for c in classes for b in c.buckets)
        assert covered == list(range(len(bucket_sizes))), "each bucket is in one class"
        self.sizes = list(bucket_sizes)
        self.classes = list(classes)
        self.micro_batches = micro_batches
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.reset()

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Continue after the step at which `initial_state` was taken; None: from the beginning.

        ValueError: the clips are not those of the checkpoint, so a position in their list means nothing.
        """
        super().reset(initial_state)
        draws = [0] * len(self.sizes) if initial_state is None else list(initial_state["draws"])
        if initial_state and (initial_state["fingerprint"] != self.fingerprint or len(draws) != len(self.sizes)):
            raise ValueError(OTHER_CLIPS)
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in draws):
            raise ValueError(f"the position in the data is none: {draws} clips drawn; load an older checkpoint")
        self.draws = draws
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> its last epoch, and the order of that

    def get_state(self) -> dict[str, Any]:
        """The counters after the last step: the same on every rank, and JSON."""
        return {"draws": list(self.draws), "fingerprint": self.fingerprint}

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step, in the order in which ranks take them."""
        step = []
        for _ in range(self.groups_per_step):
            group_clips = [c.clips * self.micro_batches for c in self.classes]
            chosen = self.classes[self.next_turn([c.buckets for c in self.classes], group_clips)]
            for _ in range(self.micro_batches):
                turn = self.next_turn([[b] for b in chosen.buckets], [chosen.clips] * len(chosen.buckets))
                step.append(self._draw(chosen.buckets[turn], chosen.clips))
        return step

    def _draw(self, bucket: int, count: int) -> MicroBatch:
        first_id = sum(self.draws)
        first = self.draws[bucket]
        self.draws[bucket] += count
        positions = [self._position(bucket, draw) for draw in range(first, first + count)]
        return MicroBatch(bucket, positions, list(range(first_id, first_id + count)))

    def next_turn(self, groups: Sequence[Sequence[int]], clips: Sequence[int]) -> int:
        """Which group of buckets is next. clips: how many each would draw."""
        drawn = [sum(self.draws[b] for b in group) for group in groups]
        sizes = [sum(self.sizes[b] for b in group) for group in groups]
        behind = [g for g in range(len(groups)) if drawn[g] * sum(sizes) <= sum(drawn) * sizes[g]]
        return min(behind, key=lambda g: (drawn[g] + clips[g]) / sizes[g])

    def _position(self, bucket: int, draw: int) -> int:
        size = self.sizes[bucket]
        epoch, position = divmod(draw, size)
        if not self.shuffle:
            return position
        if bucket not in self._epochs or self._epochs[bucket][0] != epoch:
            philox = np.random.Philox(key=[self.seed % 2**64, epoch], counter=[0, 0, bucket, _STREAM])
            # The order of the raw words: no version of numpy changes their values.
            self._epochs[bucket] = epoch, np.argsort(philox.random_raw(size), kind="stable")
        return int(self._epochs[bucket][1][position])
