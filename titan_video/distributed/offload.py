"""Saved activations in host memory: out after forward, back in before backward.

    compute   | block 0 | block 1 | block 2 | ...  ... | backward 2 | backward 1 | backward 0 |
    copies              | 0 out   | 1 out   | ...    1 in           | 0 in       |

On a GPU the copies run on a stream of their own, between pinned host memory and the device, beside the arithmetic. What
keep waits on the device to be copied out, and one block's is copied in ahead of its use, so device memory stays
bounded. What the last
blocks keep is what backward asks for first: it is used from where it still is. On a CPU the same code copies without
    streams.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

IN_FLIGHT = 2


class OffloadedTensor:
    """One tensor's copy in host memory and, while there is one, its copy on the device."""

    def __init__(self, host: Tensor, here: Tensor, copied: "torch.cuda.Event | None", block: "_Block"):
        self.host, self.here, self.device, self.block = host, here, here.device, block
        self.copied = copied  # the end of a copy under way on the side stream
        self.used = False


class _Block:
    """What one forward of a block has sent.

    The graph holds the tensors; here they are only looked up, except on their way out.
    """

    def __init__(self, before: "_Block | None"):
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.sent: weakref.WeakSet[OffloadedTensor] = weakref.WeakSet()
        self.leaving: set[OffloadedTensor] = set()


class HostOffload:
    """Moves out what blocks keep, and in again.

    Any order of use is right; that in which backward meets the blocks is fast.
    """

    def __init__(self):
        self.stream = None
        self.block: _Block | None = None
        self.leaving: deque[_Block] = deque()
        self.least = 0  # bytes of a tensor that is worth sending
        self.num_sent = self.num_fetched = 0  # copies out, copies in

    def pack(self, x: Tensor) -> Tensor | OffloadedTensor:
        """x, sent if it is as large as the tokens of the block that runs."""
        return self.send(x) if x.nbytes >= self.least else x

    def send(self, x: Tensor) -> OffloadedTensor:
        """Start the copy to the host. The caller drops x, which nobody may change."""
        x = x.detach()
        host = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        moved = OffloadedTensor(host, x, self._copy(x, host), self.block)
        self.block.sent.add(moved)
        self.block.leaving.add(moved)
        self.num_sent += 1
        return moved

    def fetch(self, moved: OffloadedTensor) -> Tensor:
        """The tensor on its device, bitwise the same and with the same strides.

        What else its block and the one before have sent is on its way.
        """
        if moved.here is None:
            self._start(moved)
        moved.block.leaving.discard(moved)
        moved.used = True
        x = self._leave(moved)
        for block in (moved.block, moved.block.before()):
            for other in list(block.sent) if block is not None else ():
                if other.here is None and not other.used:
                    self._start(other)
        return x

    @contextmanager
    def of_block(self, weights: Iterable[Tensor], tokens: Tensor) -> Iterator[None]:
        """Around the forward of a block. What autograd saves in it is sent if it has as many bytes as `tokens`: not the
        weights, nor what is small or the same for all blocks, such as the text.
        """
        if len(self.leaving) == IN_FLIGHT:
            leaving = self.leaving.popleft().leaving
            while leaving:
                self._leave(leaving.pop())
        self.block = _Block(self.block)
        self.leaving.append(self.block)
        self.least = tokens.nbytes
        storages = {_storage(w) for w in weights}

        def pack(x: Tensor) -> Tensor | OffloadedTensor:
            return x if _storage(x) in storages else self.pack(x)

        def unpack(packed: Tensor | OffloadedTensor) -> Tensor:
            return self.fetch(packed) if isinstance(packed, OffloadedTensor) else packed

        with saved_tensors_hooks(pack, unpack):
            yield

    def _start(self, moved: OffloadedTensor) -> None:
        moved.here = torch.empty_strided(
            moved.host.size(), moved.host.stride(), dtype=moved.host.dtype, device=moved.device
        )
        moved.copied = self._copy(moved.host, moved.here)
        self.num_fetched += 1
        if self.stream is not None:
            moved.here.record_stream(self.stream)  # it could be dropped, unused, before the copy has ended

    def _leave(self, moved: OffloadedTensor) -> Tensor:
        """The device's tensor, once the copy has ended; from then on only the host has it."""
        if moved.copied is not None:
            torch.cuda.current_stream(moved.device).wait_event(moved.copied)
        x, moved.here, moved.copied = moved.here, None, None
        return x

    def _copy(self, source: Tensor, target: Tensor) -> "torch.cuda.Event | None":
        """Copy on the side stream, after all that the current one has been given so far."""
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
