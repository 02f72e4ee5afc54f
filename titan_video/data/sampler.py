"""Which clips each optimizer step takes: a pure function of a few counters, the same for every layout of ranks and workers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_STREAM = 16  # top word of the Philox counter, apart from the streams of flow.noise


@dataclass(frozen=True)
class GlobalBatch:
    """The clips of one optimizer step: positions within one bucket, and the number of each draw over the whole run."""

    bucket: int
    positions: list[int]
    sample_ids: list[int]


def fingerprint(keys_by_bucket: Iterable[Iterable[str]]) -> str:
    """Identity of a list of clips, by content and order."""
    digest = hashlib.sha256()
    for keys in keys_by_bucket:
        digest.update("\n".join([*keys, "\n"]).encode())
    return digest.hexdigest()


class GlobalSampler:
    """Draws `global_batch_size` clips a step, all from one bucket.

    The bucket that lags most behind its share of the clips is next (stride scheduling), so after any number of steps each has had its
    share to within one batch. Within a bucket draw c is place c mod size of epoch c // size, whose order is a permutation keyed by
    (seed, bucket, epoch). So a batch may span epochs, nothing is ever left out, and a bucket may be smaller than a batch.
    """

    def __init__(self, bucket_sizes: Sequence[int], global_batch_size: int, seed: int, shuffle: bool, fingerprint: str = ""):
        if not bucket_sizes or min(bucket_sizes) < 1:
            raise ValueError(f"every bucket needs a clip, got sizes {list(bucket_sizes)}")
        self.sizes, self.global_batch_size = list(bucket_sizes), global_batch_size
        self.seed, self.shuffle, self.fingerprint = seed, shuffle, fingerprint
        self.draws = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> the order of the epoch last asked for

    def next(self) -> GlobalBatch:
        """The clips of the next step; advances the counters."""
        total, batch = sum(self.draws), self.global_batch_size
        lag = [size * (total + batch) - drawn * sum(self.sizes) for size, drawn in zip(self.sizes, self.draws, strict=True)]
        bucket = lag.index(max(lag))
        first = self.draws[bucket]
        self.draws[bucket] += batch
        return GlobalBatch(bucket, [self._position(bucket, c) for c in range(first, first + batch)], list(range(total, total + batch)))

    def _position(self, bucket: int, draw: int) -> int:
        epoch, place = divmod(draw, self.sizes[bucket])
        if not self.shuffle:
            return place
        if bucket not in self._orders or self._orders[bucket][0] != epoch:
            words = np.random.Philox(key=[self.seed % 2**64, epoch], counter=[0, 0, bucket, _STREAM]).random_raw(self.sizes[bucket])
            self._orders[bucket] = epoch, np.argsort(words, kind="stable")  # of raw words, whose values no version of numpy changes
        return int(self._orders[bucket][1][place])

    def state_dict(self) -> dict[str, Any]:
        return {"draws": list(self.draws), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the clips are not those of the checkpoint: its position means nothing in another list."""
        if state["fingerprint"] != self.fingerprint or len(state["draws"]) != len(self.sizes):
            raise ValueError(
                "the training clips (files, captions, data.fps, data.buckets, validation.holdout, encoders) are not those of the checkpoint, so its "
                "place among them is lost; restore them, or start a new run from its weights: another job.dump_folder and "
                "checkpoint.initial_load_path = its step-N folder"
            )
        self.draws = [int(n) for n in state["draws"]]
