"""Micro-batches on their way to the device ahead of their use, on to the first of the next step.

    host       | launch i | prepare i+1 | launch i+1 | prepare i+2 | ...
    copies                |     i+1     |            |     i+2     |
    compute         |          i          |         i+1          |

On a GPU they are prepared and copied on a stream of their own. On a CPU there is nothing to overlap: the order of
events is the same.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from titan_video.data.batch import Batch
from titan_video.data.loader import LatentLoader


class Prefetch:
    """The steps of a loader. Its position, which checkpoints save, is that after the last step given out here, not
    after what lies ready.

    prepare: a micro-batch on the host -> what training takes, in dataclasses, dicts and lists. size: clips of the
    micro-batches that batches are split into (0: as they are).
    waited: seconds that the host has waited for the loader, for the caller to read and set back.
    """

    def __init__(
        self, loader: LatentLoader, num_steps: int, prepare: Callable[[Batch], Any], device: torch.device, size: int = 0
    ):
        self.loader, self.prepare, self.size = loader, prepare, size
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0
        self._steps = loader.iter_with_state(num_steps)
        self._next: tuple[Any, list[Batch]] | None = None  # the following step, and its first micro-batch, prepared
        self._first: tuple[Any, Any] | None = None

    def step(self) -> list[Batch]:
        """The next step's batches, on the host; from now on the loader's position is after it."""
        position, batches = self._next or self._fetch()
        self._next = None
        self.loader.commit(position)
        return batches

    def micro_batches(self, batches: list[Batch]) -> Iterator[Any]:
        """What `prepare` makes of each of the step's micro-batches, one at a time."""
        for batch in self._split(batches):
            ready, self._first = self._first or self._prepare(batch), None
            yield self._use(*ready)

    def ahead(self) -> None:
        """Fetch the following step and prepare its first micro-batch.

        To be called when all work of this one is launched.
        """
        self._next = self._fetch()
        if self._next is not None:
            self._first = self._prepare(next(self._split(self._next[1])))

    def _fetch(self) -> tuple[Any, list[Batch]] | None:
        start = time.perf_counter()
        fetched = next(self._steps, None)
        self.waited += time.perf_counter() - start
        return fetched

    def _split(self, batches: list[Batch]) -> Iterator[Batch]:
        return (micro for batch in batches for micro in (batch.split(self.size) if self.size else [batch]))

    def _prepare(self, batch: Batch) -> tuple[Any, "torch.cuda.Event | None"]:
        if self.stream is None:
            return self.prepare(batch), None
        with torch.cuda.stream(self.stream):
            return self.prepare(batch), self.stream.record_event()

    def _use(self, prepared: Any, copied: "torch.cuda.Event | None") -> Any:
        if copied is not None:
            current = torch.cuda.current_stream()
            current.wait_event(copied)
            for tensor in iter_tensors(prepared):
                if tensor.is_cuda:
                    tensor.record_stream(
                        current
                    )  # made on the other stream, which must not use its memory again too early
        return prepared


def iter_tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in dataclasses, dicts, lists and tuples."""
    if isinstance(x, Tensor):
        yield x
    elif is_dataclass(x):
        yield from iter_tensors([getattr(x, f.name) for f in fields(x)])
    elif isinstance(x, (dict, list, tuple)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from iter_tensors(part)
