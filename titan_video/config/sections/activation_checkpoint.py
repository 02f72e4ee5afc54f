"""[activation_checkpoint], and the tables of [[activation_checkpoint.range]]."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt


@dataclass(frozen=True)
class CheckpointRange:
    """Blocks that are checkpointed in their own way, a table `[[activation_checkpoint.range]]`."""

    layers: str = opt("", "Numbers of the blocks in forward order: `0-9` with both ends, or one number.")
    mode: Literal["none", "selective", "full"] = opt("full", "As activation_checkpoint.mode.")
    save: tuple[Literal["attention", "down", "exchange", "matmul"], ...] = opt(
        (), "For selective: as activation_checkpoint.save. Empty: that."
    )
    offload: bool = opt(False, "As activation_checkpoint.offload.")


@dataclass(frozen=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full", "memory_budget"] = opt(
        "none",
        "`full` saves the input of each block and recomputes the block in backward. `selective` also saves the outputs "
        "of the ops in `save`. `memory_budget` lets the compiler choose what to save.",
    )
    save: tuple[Literal["attention", "down", "exchange", "matmul"], ...] = opt(
        ("attention", "down"),
        "For selective: saved outputs. attention: all, so attention is never recomputed. down: the matmul after each "
        "GELU. exchange: the all-to-alls of Ulysses and of experts, so that recomputation sends nothing for them. "
        "matmul: every second matmul.",
    )
    save_min_kv: int = opt(
        1024,
        "For selective: attention over fewer keys than this, such as cross-attention to text, is recomputed.",
        ge=0,
    )
    layers: tuple[int, ...] = opt(
        (), "Numbers of the blocks to which the mode applies; other blocks save everything. Empty: all blocks.", ge=0
    )
    range: tuple[CheckpointRange, ...] = opt(
        (), "Blocks with a mode of their own; the others have that of the section."
    )
    offload: bool = opt(False, "Move saved activations to host memory after forward and back before backward.")
    memory_budget: float = opt(
        0.5,
        "For memory_budget: activation memory of a block, from 0 (as little as full) to 1 (as much as none).",
        ge=0,
        le=1,
    )
