"""Which clips each optimizer step takes:

a pure function of a few counters, the same for every layout of ranks and workers.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_STREAM = 16  # top word of the Philox counter, apart from the streams of flow.noise


@dataclass(frozen=True)
class MicroBatch:
    """Clips of one bucket: their positions in it, and the number of each draw over the whole run."""

    bucket: int
    positions: list[int]
    sample_ids: list[int]


@dataclass(frozen=True)
class CostClass:
    """Buckets, by number, whose micro-batches of `clips` clips cost the same."""

    buckets: tuple[int, ...]
    clips: int


def fingerprint(keys_by_bucket: Iterable[Iterable[str]]) -> str:
    """Identity of a list of clips, by content and order."""
    digest = hashlib.sha256()
    for keys in keys_by_bucket:
        digest.update("\n".join([*keys, "\n"]).encode())
    return digest.hexdigest()


class GlobalSampler:
    """Draws the micro-batches of all ranks: a step has `parts` parts of `micro_batches` micro-batches each, a part is
    of one cost class.

    Dealt out in turn to any number of ranks that divides `micro_batches`, all have work of equal cost at every moment.
    the buckets of a class take micro-batches, by worst-case fair queueing (Bennett and Zhang 1996): of those that are
    the one that is first done with its next. So after any number of steps each has had its share of the clips to within
    one part. Within a bucket draw c is place c mod size of epoch c // size, whose order is a permutation keyed by
    (seed, bucket, epoch). So a micro-batch may So a micro-batch may span epochs, nothing is ever left out, and a bucket
    may be smaller than a micro-batch.
    """

    def __init__(
        self,
        bucket_sizes: Sequence[int],
        classes: Sequence[CostClass],
        micro_batches: int,
        parts: int,
        seed: int,
        shuffle: bool,
        fingerprint: str = "",
    ):
        if not bucket_sizes or min(bucket_sizes) < 1:
            raise ValueError(f"every bucket needs a clip, got sizes {list(bucket_sizes)}")
        assert sorted(b for c in classes for b in c.buckets) == list(range(len(bucket_sizes))), (
            "each bucket is in one class"
        )
        self.sizes, self.classes, self.micro_batches, self.parts = (
            list(bucket_sizes),
            list(classes),
            micro_batches,
            parts,
        )
        self.seed, self.shuffle, self.fingerprint = seed, shuffle, fingerprint
        self.draws = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> the order of the epoch last asked for

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step, in the order in which ranks take them; advances the counters."""
        step = []
        for _ in range(self.parts):
            which = self._turn([c.buckets for c in self.classes], [c.clips * self.micro_batches for c in self.classes])
            chosen = self.classes[which]
            for _ in range(self.micro_batches):
                bucket = chosen.buckets[self._turn([[b] for b in chosen.buckets], [chosen.clips] * len(chosen.buckets))]
                total, first = sum(self.draws), self.draws[bucket]
                self.draws[bucket] += chosen.clips
                positions = [self._position(bucket, c) for c in range(first, first + chosen.clips)]
                step.append(MicroBatch(bucket, positions, list(range(total, total + chosen.clips))))
        return step

    def _turn(self, groups: Sequence[Sequence[int]], clips: Sequence[int]) -> int:
        """Which group of buckets is next; clips: what each would take."""
        drawn, sizes = ([sum(numbers[b] for b in group) for group in groups] for numbers in (self.draws, self.sizes))
        behind = [g for g in range(len(groups)) if drawn[g] * sum(sizes) <= sum(drawn) * sizes[g]]
        return min(behind, key=lambda g: (drawn[g] + clips[g]) / sizes[g])

    def _position(self, bucket: int, draw: int) -> int:
        epoch, place = divmod(draw, self.sizes[bucket])
        if not self.shuffle:
            return place
        if bucket not in self._orders or self._orders[bucket][0] != epoch:
            words = np.random.Philox(key=[self.seed % 2**64, epoch], counter=[0, 0, bucket, _STREAM]).random_raw(
                self.sizes[bucket]
            )
            self._orders[bucket] = (
                epoch,
                np.argsort(words, kind="stable"),
            )  # of raw words, whose values no version of numpy changes
        return int(self._orders[bucket][1][place])

    def state_dict(self) -> dict[str, Any]:
        return {"draws": list(self.draws), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the clips are not those of the checkpoint:

        its position means nothing in another list.
        """
        if state["fingerprint"] != self.fingerprint or len(state["draws"]) != len(self.sizes):
            raise ValueError(
                "the training clips (files, captions, [data], validation.holdout, encoders) are not those of the "
                "checkpoint, so its "
                "place among them is lost; restore them, or start a new run from its weights: another "
                "job.dump_folder and "
                "checkpoint.initial_load_path = its step-N folder"
            )
        self.draws = [int(n) for n in state["draws"]]
