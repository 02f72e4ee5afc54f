"""Sizes of a model's FSDP units on one rank: weights, gradients, optimizer state, and what is gathered and reduced."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from titan_video.config.job_config import JobConfig
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import has
from titan_video.models.spec import ModelSpec, ParallelPlan
from titan_video.optim.optimizer import updated_by
from titan_video.planner.dry_run.memory import get_unit, shard_shape, state_bytes

STEP_BYTES = 4  # of an optimizer's step count, for each weight


@dataclass(frozen=True)
class Unit:
    """Bytes of one FSDP unit on a rank.

    parameters, gradients, optimizer, ema: of its shard. gathered: of its weights as the rank computes with them.
    reduced: of its gradients in the type of the reduction, before they are scattered. elements: of the gathered
    weights; sharded: of the shard; tensors: how many weights it has. partial: of gradients that each tensor-parallel
    rank has a part of, as experts that they all hold: FSDP sums them first. copied: of weights on one rank, what FSDP
    allocates to divide their gradients by 1, beyond the gradients that it has freed by then.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0
    gathered: int = 0
    reduced: int = 0
    elements: int = 0
    sharded: int = 0
    partial: int = 0
    copied: int = 0
    tensors: int = 0

    @property
    def state(self) -> int:
        """What is there all the time; gradients are not."""
        return self.parameters + self.optimizer + self.ema

    def __add__(self, other: "Unit") -> "Unit":
        return Unit(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Units:
    """blocks: of one block, by type; what belongs to a block but is in the root's unit is in `per_block`. experts:
    of its experts, where they are a unit of their own; whole: of both.

    first, last: by name, of what is outside the blocks, by pipeline end; "" is the root's float32 unit.
    """

    blocks: dict[str, Unit]
    experts: dict[str, Unit]
    per_block: dict[str, Unit]
    first: dict[str, Unit]
    last: dict[str, Unit]

    @cached_property
    def whole(self) -> dict[str, Unit]:
        return {kind: unit + self.experts.get(kind, Unit()) for kind, unit in self.blocks.items()}


def block_kinds(model: nn.Module, plan: ParallelPlan) -> dict[str, list[tuple[str, str]]]:
    """{type of block: (container, key) of its blocks}, in forward order. Blocks of a container are equal, but that some
    may have experts.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for path in plan.blocks:
        for key, block in model.get_submodule(path).items():
            has_experts = any(has(block, experts) for experts in plan.experts)
            found.setdefault(f"{path} with experts" if has_experts else path, []).append((path, key))
    return found


class UnitSizes:
    """Sizes by layout, cached. model: all of it, on the meta device. kinds: see `block_kinds`."""

    def __init__(
        self, config: JobConfig, spec: ModelSpec, model: nn.Module, kinds: Mapping[str, list[tuple[str, str]]]
    ):
        self.config, self.spec, self.model = config, spec, model
        self.first_of = {blocks[0]: kind for kind, blocks in kinds.items()}  # blocks of a kind are equal
        self.compute = getattr(torch, config.training.mixed_precision_param)
        self.reduce = getattr(torch, config.training.mixed_precision_reduce)
        self._units: dict[tuple[int, int, int, str], Units] = {}

    def units(self, shards: int, tp: int, ep: int, optimizer: str) -> Units:
        """shards: dp_shard x context parallel."""
        key = shards, tp, ep, optimizer
        if key not in self._units:
            self._units[key] = self._build(ParallelDims(dp_shard=shards, tp=tp, ep=ep), optimizer)
        return self._units[key]

    def _build(self, dims: ParallelDims, optimizer: str) -> Units:
        plan = self.spec.plan
        of: dict[str, dict[str, Unit]] = {
            part: defaultdict(Unit) for part in ("blocks", "experts", "per_block", "first", "last")
        }
        of["per_block"] |= dict.fromkeys(self.first_of.values(), Unit())
        for name, p in self.model.named_parameters():
            path = next((p for p in plan.blocks if name.startswith(f"{p}.")), None)
            root, _, rest = name.partition(".")
            if path is not None:
                kind = self.first_of.get((path, name[len(path) + 1 :].partition(".")[0]))
                part = "blocks" if get_unit(name, plan, dims.ep) == get_unit(name, plan) else "experts"
            elif root in plan.per_block_params:
                key = rest.partition(".")[0]
                kind = next((self.first_of[b] for b in self.first_of if b[1] == key), None)
                part = "per_block"
            else:
                kind, part = get_unit(name, plan), "last" if root in plan.last else "first"
            if kind is not None:
                of[part][kind] += self._unit(name, p, dims, optimizer, root in plan.fp32)
        return Units(**{part: dict(units) for part, units in of.items()})

    def _unit(
        self,
        name: str,
        p: nn.Parameter,
        dims: ParallelDims,
        optimizer: str,
        is_float32: bool,
    ) -> Unit:
        plan, shape = self.spec.plan, tuple(p.shape)
        unit = get_unit(name, plan, dims.ep)
        is_expert = any(f".{experts}." in name for experts in plan.experts)
        is_divided = is_expert and dims.ep > 1
        # Rows of a shard are rounded up; a rank computes with what tensor or expert parallel leaves it.
        local = ParallelDims(tp=dims.ep, ep=dims.ep) if is_divided else ParallelDims(tp=dims.tp)
        shard, local = shard_shape(name, shape, plan, dims), shard_shape(name, shape, plan, local)
        ranks = dims.dp_shard * dims.tp // dims.ep if is_divided else dims.dp_shard
        if unit.partition(".")[0] not in {path.partition(".")[0] for path in plan.blocks}:
            local, ranks = shape, dims.dp_shard * dims.tp  # outside the blocks nothing is split
        sharded, elements = _numel(shard), _numel(local)
        stored = torch.float32 if is_float32 else getattr(torch, self.config.training.dtype)
        compute = torch.float32 if is_float32 else self.compute
        weights = Unit(
            parameters=sharded * stored.itemsize,
            gathered=elements * compute.itemsize,
            elements=elements,
            sharded=sharded,
            tensors=1,
        )
        if not p.requires_grad:
            return weights
        reduce = torch.promote_types(self.reduce, torch.float32) if is_float32 else self.reduce
        reduced = sharded * ranks * reduce.itemsize
        return replace(
            weights,
            gradients=sharded * stored.itemsize,
            optimizer=state_bytes(updated_by(name, len(shape), optimizer, plan.blocks), shard) + STEP_BYTES,
            ema=4 * sharded if self.config.ema.enable else 0,
            reduced=reduced,
            partial=weights.gathered if is_expert and dims.tp > 1 and not is_divided else 0,
            copied=max(0, reduced - weights.gathered) if ranks == 1 else 0,
        )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
