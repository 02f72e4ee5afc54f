"""Sizes of a model's FSDP units on one rank: weights, gradients, optimizer state, and what is gathered and reduced."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from titan_video.config.job_config import JobConfig
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.spec import ModelSpec
from titan_video.optim.optimizer import updated_by
from titan_video.planner.memory import get_unit, shard_shape, state_bytes

STEP_BYTES = 4  # of an optimizer's step count, for each weight


@dataclass(frozen=True)
class Unit:
    """Bytes of one FSDP unit on a rank.

    parameters, gradients, optimizer, ema: of its shard. gathered: of its weights as the rank computes with them.
    reduced: of its gradients in the type of the reduction, before they are scattered. elements: of the gathered
    weights; sharded: of the shard. tensors: how many weights it has.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0
    gathered: int = 0
    reduced: int = 0
    elements: int = 0
    sharded: int = 0
    tensors: int = 0

    @property
    def state(self) -> int:
        """What is there all the time; gradients are not."""
        return self.parameters + self.optimizer + self.ema

    def __add__(self, other: "Unit") -> "Unit":
        return Unit(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Units:
    """blocks: of one block, by container; what belongs to a block but is in the root's unit is in `per_block`.

    first, last: by name, of what is outside the blocks, by pipeline end; "" is the root's float32 unit.
    """

    blocks: dict[str, Unit]
    per_block: Unit
    first: dict[str, Unit]
    last: dict[str, Unit]


class UnitSizes:
    """Sizes by layout, cached. model: all of it, on the meta device."""

    def __init__(self, config: JobConfig, spec: ModelSpec, model: nn.Module):
        self.config, self.spec, self.model = config, spec, model
        self.compute = getattr(torch, config.training.mixed_precision_param)
        self.reduce = getattr(torch, config.training.mixed_precision_reduce)
        self._units: dict[tuple[int, int, str], Units] = {}

    def units(self, shards: int, tp: int, optimizer: str) -> Units:
        """shards: dp_shard x context parallel."""
        key = shards, tp, optimizer
        if key not in self._units:
            self._units[key] = self._build(ParallelDims(dp_shard=shards, tp=tp), optimizer)
        return self._units[key]

    def _build(self, dims: ParallelDims, optimizer: str) -> Units:
        plan = self.spec.plan
        blocks: dict[str, Unit] = defaultdict(Unit)
        ends: dict[str, dict[str, Unit]] = {"first": defaultdict(Unit), "last": defaultdict(Unit)}
        per_block, stored = Unit(), getattr(torch, self.config.training.dtype)
        for name, p in self.model.named_parameters():
            path = next((p for p in plan.blocks if name.startswith(f"{p}.")), None)
            root = name.partition(".")[0]
            if path is not None and name[len(path) + 1 :].partition(".")[0] != "0":
                continue  # blocks are equal
            is_float32 = root in plan.fp32
            unit = self._unit(
                name, tuple(p.shape), dims, optimizer, torch.float32 if is_float32 else stored, is_float32
            )
            if path is not None:
                blocks[path] += unit
            elif root in plan.per_block_params:
                per_block = unit  # of any block
            else:
                end = "last" if root in plan.last else "first"
                ends[end][get_unit(name, plan)] += unit
        return Units(dict(blocks), per_block, dict(ends["first"]), dict(ends["last"]))

    def _unit(
        self,
        name: str,
        shape: tuple[int, ...],
        dims: ParallelDims,
        optimizer: str,
        stored: torch.dtype,
        is_float32: bool,
    ) -> Unit:
        plan = self.spec.plan
        # Rows of a shard are rounded up; a rank computes with what tensor parallel leaves it.
        shard, local = shard_shape(name, shape, plan, dims), shard_shape(name, shape, plan, ParallelDims(tp=dims.tp))
        if get_unit(name, plan).partition(".")[0] not in {path.partition(".")[0] for path in plan.blocks}:
            local = shape  # outside the blocks nothing is split
        kind = updated_by(name, len(shape), optimizer, plan.blocks)
        sharded, elements = _numel(shard), _numel(local)
        padded = sharded * dims.dp_shard * (1 if local is not shape else dims.tp)
        compute = torch.float32 if is_float32 else self.compute
        reduce = torch.promote_types(self.reduce, torch.float32) if is_float32 else self.reduce
        return Unit(
            parameters=sharded * stored.itemsize,
            gradients=sharded * stored.itemsize,
            optimizer=state_bytes(kind, shard) + STEP_BYTES,
            ema=4 * sharded if self.config.ema.enable else 0,
            gathered=elements * compute.itemsize,
            reduced=padded * reduce.itemsize,
            elements=elements,
            sharded=sharded,
            tensors=1,
        )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
