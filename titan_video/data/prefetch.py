"""Micro-batches are prepared and copied to the device one ahead of their use, across the border between two steps.

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
from titan_video.tools import heartbeat


class Prefetch:
    """The steps of a loader. The loader's state, which checkpoints save, is that after the last step given to training,
    not after what is prefetched.

    prepare: a micro-batch on the host -> inputs of training, in dataclasses, dicts and lists.
    size: batches are split into micro-batches of this many clips (0: they are not split).
    data_wait_seconds: time the host has waited for the loader since `take_data_wait`.
    """

    def take_data_wait(self) -> float:
        """Seconds that the host has waited for the loader since the last call."""
        seconds, self.data_wait_seconds = self.data_wait_seconds, 0.0
        return seconds

    def __init__(
        self, loader: LatentLoader, num_steps: int, prepare: Callable[[Batch], Any], device: torch.device, size: int = 0
    ):
        self.loader = loader
        self.prepare = prepare
        self.size = size
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.data_wait_seconds = 0.0
        self.restart(num_steps)

    def restart(self, num_steps: int) -> None:
        """Begin again with the step after the last one given to training; then `num_steps` steps follow."""
        self._steps = self.loader.iter_with_state(num_steps)
        self._next: tuple[Any, list[Batch]] | None = None  # the following step, with the state after it
        self._first: tuple[Any, Any] | None = None  # the first micro-batch of that step, prepared

    def step(self) -> list[Batch]:
        """The next step's batches, on the host. From now on the loader's state is that after this step."""
        state, batches = self._next or self._fetch()
        self._next = None
        self.loader.commit(state)
        return batches

    def micro_batches(self, batches: list[Batch]) -> Iterator[Any]:
        """The step's micro-batches, prepared, one at a time."""
        for batch in self._split(batches):
            ready = self._first or self._prepare(batch)
            self._first = None
            yield self._use(*ready)

    def prefetch_next(self) -> None:
        """Fetch the following step and prepare its first micro-batch. Call it when all work of a step is launched."""
        self._next = self._fetch()
        if self._next is not None:
            self._first = self._prepare(next(self._split(self._next[1])))

    def _fetch(self) -> tuple[Any, list[Batch]] | None:
        start = time.perf_counter()
        with heartbeat.own_work("waiting for the data of the next step"):
            fetched = next(self._steps, None)
        self.data_wait_seconds += time.perf_counter() - start
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
                    # It was made on the other stream, which must not reuse its memory too early.
                    tensor.record_stream(current)
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
