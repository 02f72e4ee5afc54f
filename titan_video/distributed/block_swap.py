"""Blocks whose frozen weights live in host memory and come to the device for their turn.

    compute   | block 0 | block 1 | block 2 | ...  ... | backward 2 | backward 1 | backward 0 |
    copies    | 1 in    | 2 in    | 3 in    |          | 1 in       | 0 in       |

On the device there are two slots, each of the size of one block. Swapped block number k uses slot k % 2, always at the
same address: while it computes, the next one is copied into the other slot, on a stream of its own. In backward the
order is reversed. Nothing is copied back, since frozen weights do not change.

A slot's tensors are the block's parameters from its first forward on, so what autograd or a compiled graph has saved
of them is right again when the block is back in its slot: without checkpointing, too. Backward is announced by the
gradient of a block's output, before anything of the block runs in it. Neither a storage that is resized nor a parameter
that changes its address in between is involved (the usual ways, which keep every weight alive without checkpointing,
or fail where a recomputation ends early).

`model.to_empty` makes a swapped block's frozen weights in host memory, pinned for a GPU, where they are loaded and
read; `reshard` (distributed/fsdp.py) makes them the block's parameters again until its next forward.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from titan_video.config.job_config import JobConfig
from titan_video.distributed.fsdp import get_blocks
from titan_video.models.spec import ParallelPlan

NUM_SLOTS = 2
SEVERAL_RANKS = "training.swap_blocks: it is for one rank; on several, FSDP shards the weights: set it to 0"
ALIGNMENT = 256  # bytes: what a GPU's allocator aligns to, so that matmuls are as fast as with weights of their own


def apply_block_swap(model: nn.Module, plan: ParallelPlan, number: int, world_size: int) -> None:
    """Swap `number` of the blocks, evenly spread, in place; after compile, on the meta device.

    ValueError: there are fewer blocks, or several ranks.
    """
    if world_size > 1:
        raise ValueError(SEVERAL_RANKS)
    blocks = get_blocks(model, plan)
    if number > len(blocks):
        raise ValueError(f"training.swap_blocks: given {number}; legal: 0, or {NUM_SLOTS + 1} to {len(blocks)}")
    swap = BlockSwap(number)
    for k in range(number):
        container, key = blocks[(2 * k + 1) * len(blocks) // (2 * number)]
        container[key] = SwappedBlock(container[key], swap, k)
        swap.blocks.append(container[key])


class BlockSwap:
    """The slots on the device, and which block each of them holds."""

    def __init__(self, number: int):
        self.number = number
        self.blocks: list[SwappedBlock] = []
        self.slots: list[Tensor] = []
        self.holds: list[int | None] = [None] * NUM_SLOTS
        self.copied: list[torch.cuda.Event | None] = [None] * NUM_SLOTS
        self.stream: torch.cuda.Stream | None = None

    def use(self, k: int, backward: bool = False) -> None:
        """Block k computes next: wait for its weights, and start to copy those of the one after it."""
        self._fetch(k)
        slot = k % NUM_SLOTS
        if self.copied[slot] is not None:
            torch.cuda.current_stream(self.slots[slot].device).wait_event(self.copied[slot])
            self.copied[slot] = None
        following = k - 1 if backward else k + 1
        if not backward and not torch.is_grad_enabled():
            following %= self.number  # another forward follows, and not a backward
        if 0 <= following < self.number:
            self._fetch(following)

    def allocate(self) -> list[Tensor]:
        """The slots."""
        if not self.slots:
            largest, device = max(block.host.nbytes for block in self.blocks), self.blocks[0].device
            self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        return self.slots

    def _fetch(self, k: int) -> None:
        slot = k % NUM_SLOTS
        if self.holds[slot] == k:
            return
        self.holds[slot] = k
        source, device = self.blocks[k].host, self.allocate()[slot].device
        # Not seen by autograd: what it has saved of a slot is not "modified", the same weights will be there again.
        target = self.slots[slot].data[: source.nbytes]
        if device.type != "cuda":
            target.copy_(source)
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # the slot's last block has computed
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.copied[slot] = self.stream.record_event()


class SwappedBlock(ActivationWrapper):
    """A block, number k of those that are swapped.

    host: its frozen weights, one after another. device: where it computes.
    """

    def __init__(self, block: nn.Module, swap: BlockSwap, k: int):
        super().__init__(block)
        self.swap, self.k = swap, k
        self.host = torch.empty(0, dtype=torch.uint8)
        self.device = torch.device("meta")
        self.is_on_device = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_on_device:
            self._place(self.swap.allocate()[self.k % NUM_SLOTS])
            self.is_on_device = True
        self.swap.use(self.k)
        out = self._checkpoint_wrapped_module(*args, **kwargs)
        for t in out if isinstance(out, tuple) else (out,):
            if t.requires_grad:
                t.register_hook(lambda grad: self.swap.use(self.k, backward=True))
        return out

    def reshard(self) -> None:
        """Make the weights in host memory the block's parameters, to be read or changed."""
        if self.is_on_device:
            self._place(self.host)
            self.is_on_device = False
        self.swap.holds[self.k % NUM_SLOTS] = None

    @torch.no_grad()
    def _place(self, memory: Tensor) -> None:
        for p, start in self.offsets():
            p.data = _view(memory, start, p)

    def offsets(self) -> Iterator[tuple[nn.Parameter, int]]:
        """(frozen parameter, its first byte)"""
        start = 0
        for p in self.parameters():
            if not p.requires_grad:
                yield p, start
                start += _aligned(p.nbytes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`to_empty`: trained parameters go to the device, frozen ones to host memory."""
        self.device = fn(torch.empty(0, device="meta")).device
        starts = {p: start for p, start in self.offsets()}
        num_bytes = max((start + _aligned(p.nbytes) for p, start in starts.items()), default=0)
        self.host = _host_memory(num_bytes, self.device)
        return super()._apply(lambda t: fn(t) if t.requires_grad else _view(self.host, starts[t], t), recurse)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of `memory` from `start` on as a tensor of the shape and type of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _host_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised host memory; pinned if the device is a GPU.

    It is registered with the driver rather than taken from torch's pinned allocator, which would round it up to a power
    of two.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda":
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
        if int(status) != 0:
            raise ValueError(
                f"training.swap_blocks: {num_bytes / 2**30:.1f} GiB of host memory could not be pinned for a block "
                f"({status}); swap fewer blocks, free host memory, or raise its limit (ulimit -l)"
            )
        weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
    return memory


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about swapped blocks, one line per mistake."""
    n = config.training.swap_blocks
    if not n:
        return
    if n <= NUM_SLOTS:
        yield (
            f"training.swap_blocks: given {n}, but the weights of {NUM_SLOTS} blocks are on the device at any time, so "
            f"nothing is saved; legal: 0, or {NUM_SLOTS + 1} and more"
        )
    if not config.lora.enable:
        yield "training.swap_blocks: only frozen weights are swapped; set lora.enable, or training.enable_cpu_offload"
    if config.encoder.num_training_ranks(world_size) > 1:
        yield SEVERAL_RANKS
    if config.training.enable_cpu_offload:
        yield "training.swap_blocks: training.enable_cpu_offload moves all weights to the host; set one of the two"
