"""Optimizer updates in few launches: one for all tensors of one local shape and type, however many they are.

The tensors' addresses and numbers go to the device as a table, in one copy that the host does not wait for.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_video.kernels.triton import launch

TILE, NUM_WARPS = 32, 4  # a program updates 32 blocks of 64 elements: 16 elements a thread
ALIGNMENT = 16  # bytes: the widest load
MAX_ELEMENTS = 2**31 - 1  # of a tensor: offsets have 32 bits


@dataclass(frozen=True)
class Part:
    """One tensor of a launch: this rank's shards, of one shape and contiguous.

    state: of 8-bit AdamW exp_avg, its scales, the root of exp_avg_sq, its scales; of AdamW exp_avg, None, exp_avg_sq,
    None; of Muon momentum, update, None, None. step_size: factor of the update. root_factor: of the root.
    key, first_row, first_col, row_length: for stochastic rounding of bfloat16 weights; see low_bit.stochastic_round.
    """

    weight: Tensor
    grad: Tensor
    state: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    step_size: float = 0.0
    root_factor: float = 0.0
    key: int = 0
    first_row: int = 0
    first_col: int = 0
    row_length: int = 0

    @property
    def matrices(self) -> list[Tensor]:
        """The tensors that have the weight's shape."""
        return [t for t in (self.weight, self.grad, *self.state) if t is not None and t.shape == self.weight.shape]

    def row(self) -> list[int]:
        """The part's row of the table."""
        tensors = (self.weight, self.grad, *self.state)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        numbers = [_bits(self.step_size), _bits(self.root_factor), (self.key & 0xFFFFFFFF) - 2**31]
        return [*addresses, *numbers, self.first_row, self.first_col, self.row_length]


def is_used(shard: Tensor, grad: Tensor) -> bool:
    """Whether kernels update this weight: on a GPU, in a type that they know, and not empty."""
    runs = shard.is_cuda or launch.interpreted()
    known = {shard.dtype, grad.dtype} <= {torch.float32, torch.bfloat16} and 0 < shard.numel() <= MAX_ELEMENTS
    return runs and known and shard.is_contiguous() and grad.is_contiguous()


def adamw(parts: list[Part], group: dict[str, Any], codebooks: Tensor) -> None:
    """AdamW or 8-bit AdamW by the options of a parameter group. codebooks: signed and unsigned, float32 [2, 256]."""
    from titan_video.kernels.triton import optimizer_kernels

    beta1, beta2 = group["betas"]
    keep, is_8bit = 1 - group["lr"] * group["weight_decay"], group["kind"] == "AdamW8bit"
    for table, grid, (R, C), constants in _launches(parts):
        numbers = keep, 1 - beta1, beta2, 1 - beta2, group["eps"]
        del constants["UPDATE"]
        optimizer_kernels.adamw[grid](table, codebooks, R, C, *numbers, IS_8BIT=is_8bit, **constants)


def muon_momentum(parts: list[Part], momentum: float) -> None:
    """Advance the momentum of each part, and write Nesterov's update into its second state tensor."""
    from titan_video.kernels.triton import optimizer_kernels

    for table, grid, (R, C), constants in _launches(parts):
        del constants["WEIGHT"]
        optimizer_kernels.muon_momentum[grid](table, R, C, 1 - momentum, momentum, **constants)


def muon_apply(parts: list[Part], decay: float) -> None:
    """weight <- weight (1 - decay) + step_size update, for each part."""
    from titan_video.kernels.triton import optimizer_kernels

    for table, grid, (R, C), constants in _launches(parts):
        del constants["GRAD"]
        optimizer_kernels.muon_apply[grid](table, R, C, 1 - decay, **constants)


def _launches(parts: list[Part]) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int], dict[str, Any]]]:
    """(table, grid, rows and columns, constants) of each launch; a vector is one row."""
    from titan_video.kernels.triton.optimizer_kernels import BLOCK, tl

    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}
    by_kind = defaultdict(list)
    for part in parts:
        aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in part.matrices)
        update = part.state[1].dtype if part.state[1] is not None else torch.float32
        by_kind[part.weight.shape, part.weight.dtype, part.grad.dtype, update, aligned].append(part)
    for (shape, weight, grad, update, aligned), chosen in by_kind.items():
        C = shape[-1] if shape else 1
        R = shape.numel() // C
        device = chosen[0].weight.device
        table = torch.tensor([part.row() for part in chosen], dtype=torch.int64, pin_memory=device.type == "cuda")
        constants = {"WEIGHT": types[weight], "GRAD": types[grad], "UPDATE": types[update], "ALIGNED": aligned}
        constants |= {"TILE": TILE, "num_warps": NUM_WARPS}
        num_blocks = R * -(-C // BLOCK.value)
        yield table.to(device, non_blocking=True), (-(-num_blocks // TILE), len(chosen)), (R, C), constants


def _bits(x: float) -> int:
    """The bits of a float32, as a number."""
    return struct.unpack("<i", struct.pack("<f", x))[0]
