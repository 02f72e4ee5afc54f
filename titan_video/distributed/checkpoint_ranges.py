"""Activation checkpointing by ranges of blocks: `[[activation_checkpoint.range]]`.

Blocks are numbered from 0 in forward order, over all kinds of block: HunyuanVideo's double blocks come first, then its
single blocks. A pipeline's stages keep the numbers of the whole model. The other blocks have the section's own mode.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from titan_video.config.job_config import ActivationCheckpoint, CheckpointRange, JobConfig
from titan_video.config.values import show
from titan_video.distributed import activation_checkpoint
from titan_video.distributed.activation_checkpoint import OFFLOAD
from titan_video.tools.parts import find_module, resolve

SECTION = "activation_checkpoint"
FLEX_RULES = "titan_video.kernels.attention_backends:rules"  # optional


def sections_by_block(section: ActivationCheckpoint, num_blocks: int) -> list[ActivationCheckpoint]:
    """How each block is checkpointed, in forward order: as the section says where no range has it.

    ValueError for a range beyond the last block.
    """
    sections = [replace(section, range=())] * num_blocks
    for i, r in enumerate(section.range):
        numbers = block_numbers(r)
        if numbers[-1] >= num_blocks:
            raise ValueError(
                f"{SECTION}.range: item {i}: layers: given {show(r.layers)}, but the last of the model's blocks is "
                f"{num_blocks - 1}; end the range there at the latest"
            )
        for n in numbers:
            sections[n] = own_section(section, r)
    return sections


def own_section(section: ActivationCheckpoint, r: CheckpointRange) -> ActivationCheckpoint:
    """The section as it is for the blocks of a range."""
    return replace(section, mode=r.mode, save=r.save or section.save, offload=r.offload, layers=(), range=())


def block_numbers(r: CheckpointRange) -> range:
    """ValueError unless `layers` has the form `0-9`, or of one number."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", r.layers, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise ValueError(f"given {show(r.layers)}; legal: the first and the last block, such as 0-9, or one number")
    return range(first, last + 1)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about ranges, one line per mistake."""
    section = config.activation_checkpoint
    if section.mode == "memory_budget":
        yield (
            f"{SECTION}.range: given beside {SECTION}.mode memory_budget, which applies to all blocks; choose another "
            f"mode for the blocks outside the ranges, or remove the ranges"
        )
    if section.layers:
        yield (
            f"{SECTION}.layers: given {list(section.layers)} beside {SECTION}.range, which says the same by ranges; "
            f"leave it empty"
        )
    owner: dict[int, int] = {}  # of a block, the range
    for i, r in enumerate(section.range):
        for line in (*_range_errors(r, i, owner), *_mode_errors(config, r, world_size)):
            yield f"{SECTION}.range: item {i}: {line}"


def _range_errors(r: CheckpointRange, i: int, owner: dict[int, int]) -> Iterator[str]:
    try:
        numbers = block_numbers(r)
    except ValueError as e:
        yield f"layers: {e}"
        return
    for n in numbers:
        if owner.setdefault(n, i) != i:
            yield f"layers: given {show(r.layers)}, but block {n} is in item {owner[n]} too; give it one range"
            return


def _mode_errors(config: JobConfig, r: CheckpointRange, world_size: int) -> Iterator[str]:
    """What the rules of the section, and of FlexAttention, say about a section with the range's mode."""
    if r.save and r.mode != "selective":
        yield f"save: given {list(r.save)}, but mode is {r.mode}; remove it, or choose selective"
    own = replace(config, activation_checkpoint=own_section(config.activation_checkpoint, r))
    outside = replace(config, activation_checkpoint=replace(config.activation_checkpoint, range=(), layers=()))
    all_rules = [activation_checkpoint.rules]
    if config.model.attention == "flex":
        all_rules.append(resolve(FLEX_RULES, asked_by="model.attention = flex"))
    for find_errors in all_rules:
        known = set(find_errors(outside, world_size))
        yield from (line.removeprefix(f"{SECTION}.") for line in find_errors(own, world_size) if line not in known)
    if r.offload and not find_module(OFFLOAD.partition(":")[0]):
        yield "offload: true needs the part titan_video/distributed/offload, which is not installed; leave it out"
