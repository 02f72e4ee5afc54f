"""What both ways of encoding during training have in common: a loader's steps, and the cache that it reads."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from titan_video.data.batch import Batch
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, LatentLoader, MicroBatchSpec
from titan_video.data.sampler import MicroBatch
from titan_video.models.conditioning import ConditioningSpec


class OverlayCache:
    """A cache whose `entries`, those of the current micro-batches, are looked up first."""

    def __init__(self, cache: LatentCache):
        self.cache = cache
        self.entries: dict[tuple[str, str], Tensor] = {}

    @property
    def conditioning(self) -> ConditioningSpec:
        return self.cache.conditioning

    def text_key(self, caption: str) -> str:
        return self.cache.text_key(caption)

    def read(self, kind: str, key: str) -> Tensor:
        return self.entries[kind, key] if (kind, key) in self.entries else self.cache.read(kind, key)


class OnlineEncoder(ABC):
    """Encodes what a micro-batch of this rank needs.

    cache: holds the entries of the last micro-batch that `specs` gave.
    """

    cache: OverlayCache

    @abstractmethod
    def specs(
        self, draw_plan: DrawPlan, steps: Iterable[list[MicroBatch]], num_steps: int | None
    ) -> Iterator[MicroBatchSpec]:
        """This rank's micro-batches, each as soon as its entries are there. steps: those of all ranks."""

    def steps(
        self, loader: LatentLoader, state: dict[str, Any], num_steps: int | None
    ) -> Iterator[tuple[dict[str, Any], list[Batch]]]:
        """See LatentLoader.iter_with_state: the steps after `state`. `specs` looks ahead in the draw plan itself."""
        sampler, states, step = loader.draw_plan.sampler, deque(), []
        sampler.reset(state)

        def drawn() -> Iterator[list[MicroBatch]]:
            for micro_batches in islice(sampler, num_steps):
                states.append(sampler.state_dict())
                yield micro_batches

        for spec in self.specs(loader.draw_plan, drawn(), num_steps):
            step.append(Batch(**loader.reader[spec]))
            if len(step) == loader.num_micro_batches:
                yield states.popleft(), step
                step = []
