"""Saved activations in host memory: copied out after forward, copied back before backward.

    compute   | block 0 | block 1 | block 2 | ...  ... | backward 2 | backward 1 | backward 0 |
    copies              | 0 out   | 1 out   | ...    1 in           | 0 in       |

On a GPU the copies run on their own stream, between pinned host memory and the device, overlapped with compute. At most
IN_FLIGHT blocks' tensors wait on the device to be copied out, and one block's are copied back ahead of their use, so
device memory stays bounded. Backward starts with the last blocks; their tensors are used from where they still are.
On a CPU the same code copies without streams.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

IN_FLIGHT = 2


class OffloadedTensor:
    """A tensor's copy in host memory and, while there is one, its copy on the device."""

    def __init__(self, host: Tensor, device_tensor: Tensor, copied: "torch.cuda.Event | None", block: "_Block"):
        self.host = host
        self.device_tensor: Tensor | None = device_tensor
        self.device = device_tensor.device
        self.copied = copied  # the end of a copy on the side stream
        self.block = block
        self.used = False


class _Block:
    """What one forward of a block has offloaded.

    The autograd graph owns the tensors; here they are only looked up, except while they are copied out.
    """

    def __init__(self, before: "_Block | None"):
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.offloaded: weakref.WeakSet[OffloadedTensor] = weakref.WeakSet()
        self.in_flight: set[OffloadedTensor] = set()


class HostOffload:
    """Moves what blocks save to the host and back.

    Any order of use gives the right tensors; the order in which backward meets the blocks is fast.
    """

    def __init__(self):
        self.stream = None
        self.block: _Block | None = None
        self.in_flight: deque[_Block] = deque()
        self.min_bytes = 0  # smaller tensors stay on the device
        self.num_offloaded = 0
        self.num_reloaded = 0

    def pack(self, x: Tensor) -> Tensor | OffloadedTensor:
        """x, offloaded if it is at least as large as the tokens of the running block."""
        return self.offload(x) if x.nbytes >= self.min_bytes else x

    def unpack(self, packed: Any) -> Any:
        """The inverse of `pack`; anything else is returned as it is."""
        return self.reload(packed) if isinstance(packed, OffloadedTensor) else packed

    def offload(self, x: Tensor) -> OffloadedTensor:
        """Start the copy to the host. The caller drops x, and nobody changes it."""
        x = x.detach()
        host = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        moved = OffloadedTensor(host, x, self._copy(x, host), self.block)
        self.block.offloaded.add(moved)
        self.block.in_flight.add(moved)
        self.num_offloaded += 1
        return moved

    def reload(self, moved: OffloadedTensor) -> Tensor:
        """The tensor on its device, bitwise the same and with the same strides.

        Starts to copy back what else its block and the one before it have offloaded.
        """
        if moved.device_tensor is None:
            self._start_reload(moved)
        moved.block.in_flight.discard(moved)
        moved.used = True
        x = self._release(moved)
        for block in (moved.block, moved.block.before()):
            for other in list(block.offloaded) if block is not None else ():
                if other.device_tensor is None and not other.used:
                    self._start_reload(other)
        return x

    @contextmanager
    def block_context(self, weights: Iterable[Tensor], tokens: Tensor) -> Iterator[None]:
        """Around the forward of a block: what autograd saves is offloaded if it has at least as many bytes as `tokens`.

        Not offloaded: the weights, small tensors, and what all blocks share, such as the text.
        """
        if len(self.in_flight) == IN_FLIGHT:
            oldest = self.in_flight.popleft().in_flight
            while oldest:
                self._release(oldest.pop())
        self.block = _Block(self.block)
        self.in_flight.append(self.block)
        self.min_bytes = tokens.nbytes
        storages = {_storage(w) for w in weights}

        def pack(x: Tensor) -> Tensor | OffloadedTensor:
            return x if _storage(x) in storages else self.pack(x)

        with saved_tensors_hooks(pack, self.unpack):
            yield

    def _start_reload(self, moved: OffloadedTensor) -> None:
        host = moved.host
        moved.device_tensor = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=moved.device)
        moved.copied = self._copy(host, moved.device_tensor)
        self.num_reloaded += 1
        if self.stream is not None:
            moved.device_tensor.record_stream(self.stream)  # it could be dropped, unused, before the copy has ended

    def _release(self, moved: OffloadedTensor) -> Tensor:
        """The device's tensor, once the copy has ended; afterwards only the host has it."""
        if moved.copied is not None:
            torch.cuda.current_stream(moved.device).wait_event(moved.copied)
        x = moved.device_tensor
        moved.device_tensor = moved.copied = None
        return x

    def _copy(self, source: Tensor, target: Tensor) -> "torch.cuda.Event | None":
        """Copy on the side stream, after all work queued so far on the current one."""
        device = source.device if source.is_cuda else target.device
        if device.type != "cuda":
            target.copy_(source)
            return None
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()


def _storage(x: Tensor) -> int:
    return getattr(x, "_local_tensor", x).untyped_storage()._cdata
