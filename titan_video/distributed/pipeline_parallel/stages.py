"""Which blocks each pipeline stage has, and how many micro-batches a schedule can run."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.config.job_config import JobConfig, Parallelism
from titan_video.config.values import divisors
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.spec import ParallelPlan


def split_blocks(num_blocks: int, num_stages: int, first_cost: float = 0.0, last_cost: float = 0.0) -> list[range]:
    """Blocks of each stage, in order: at least one each, and the costliest stage as cheap as possible.

    first_cost, last_cost: cost of what the first and the last stage compute beside blocks, in units of a block. Of
    equal splits, the one that gives more to later stages: earlier ones hold the activations of more micro-batches.
    """
    assert 1 <= num_stages <= num_blocks
    costs, counts = [1.0] * num_stages, [1] * num_stages
    costs[0] += first_cost
    costs[-1] += last_cost
    for _ in range(num_blocks - num_stages):
        cheapest = min(range(num_stages), key=lambda s: (costs[s], -s))
        costs[cheapest] += 1
        counts[cheapest] += 1
    starts = [sum(counts[:s]) for s in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stages_per_rank(section: Parallelism) -> int:
    """Two for the schedules that interleave stages."""
    return 1 if section.pipeline_parallel_degree == 1 or section.pipeline_parallel_schedule in ("GPipe", "1F1B") else 2


def check_microbatches(section: Parallelism, num_microbatches: int) -> None:
    """ValueError unless the schedule can run a step of `num_microbatches`; it names the nearest legal numbers."""
    if _is_legal(section, num_microbatches):
        return
    ranks, schedule = section.pipeline_parallel_degree, section.pipeline_parallel_schedule
    below = next((n for n in range(num_microbatches, 0, -1) if _is_legal(section, n)), None)
    above = next(n for n in range(num_microbatches, num_microbatches + 2 * ranks) if _is_legal(section, n))
    nearest = f"{above}" if below is None else f"{below} or {above}"
    if schedule == "1F1B":
        rule = f"{ranks} or more"
    else:
        rule = f"a multiple of {ranks} always, other numbers where they make equal rounds"
    raise ValueError(
        f"training.global_batch_size: each data-parallel rank has {num_microbatches} micro-batches of "
        f"parallelism.pipeline_parallel_microbatch_size {section.pipeline_parallel_microbatch_size} in a step, which "
        f"pipeline_parallel_schedule {schedule} on {ranks} ranks cannot run; legal: {rule}; nearest: {nearest}. "
        f"Change one "
        f"of the two sizes"
    )


def _is_legal(section: Parallelism, num_microbatches: int) -> bool:
    ranks = section.pipeline_parallel_degree
    if section.pipeline_parallel_schedule == "GPipe":
        return True
    if section.pipeline_parallel_schedule == "1F1B":
        return num_microbatches >= ranks
    return num_microbatches % max(1, num_microbatches // ranks) == 0


@dataclass(frozen=True)
class Stages:
    """What `keep_stages` leaves on this rank.

    blocks: (container, key) of the blocks of each of this rank's stages, by the stage's global index.
    ends: the model without blocks, on the meta device; from it every rank infers the shapes that are sent.
    """

    num_stages: int
    blocks: dict[int, list[tuple[str, str]]]
    ends: nn.Module


def keep_stages(
    model: nn.Module, plan: ParallelPlan, pp_mesh: DeviceMesh, section: Parallelism, args: Any, num_tokens: int
) -> Stages:
    """Remove from a model on the meta device, in place and before `parallelize`, what this rank's stages do not run.

    Without section.pipeline_parallel_split it is balanced by FLOPs for clips of num_tokens tokens. args: the model's
    arguments (see ModelSpec).
    """
    ranks, rank = pp_mesh.size(), pp_mesh.get_local_rank()
    num_stages = ranks * stages_per_rank(section)
    containers = {path: model.get_submodule(path) for path in plan.blocks}
    assert not plan.per_block_params or len(containers) == 1, "the keys of per-block parameters would be ambiguous"
    roots = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    placed = {name.split(".")[0] for name in (*plan.blocks, *plan.per_block_params, *plan.first, *plan.last)}
    assert roots <= placed, f"the plan does not say which stage has {sorted(roots - placed)}"

    ends = copy.deepcopy(model)
    for path in plan.blocks:
        ends.get_submodule(path).clear()
    names = [(path, key) for path in plan.blocks for key in containers[path]]
    block_flops = args.block_flops(num_tokens)
    end_cost = (args.flops(num_tokens) - block_flops) / (block_flops / len(names)) / 2
    split = split_blocks(len(names), num_stages, first_cost=end_cost, last_cost=end_cost)
    if firsts := section.pipeline_parallel_split:
        split = [range(first, end) for first, end in pairwise((*firsts, len(names)))]
    blocks = {stage: [names[i] for i in split[stage]] for stage in range(num_stages) if stage % ranks == rank}
    _remove_others(model, plan, num_stages, blocks)
    return Stages(num_stages, blocks, ends)


def _remove_others(
    model: nn.Module, plan: ParallelPlan, num_stages: int, blocks: dict[int, list[tuple[str, str]]]
) -> None:
    own = {name for stage in blocks.values() for name in stage}
    for path in plan.blocks:
        container = model.get_submodule(path)
        for key in [key for key in container if (path, key) not in own]:
            del container[key]
            for params in map(model.get_submodule, plan.per_block_params):
                if key in params:
                    del params[key]
    for stage, names in ((0, plan.first), (num_stages - 1, plan.last)):
        if stage not in blocks:
            for name in names:
                setattr(model, name, None)


def layout_errors(dims: ParallelDims, section: Parallelism, args: Any) -> Iterator[str]:
    """What a model's architecture does not allow, one line per mistake. args: the model's (see ModelSpec)."""
    per_rank, split = stages_per_rank(section), section.pipeline_parallel_split
    if dims.pp * per_rank > args.num_layers:
        yield (
            f"parallelism.pipeline_parallel_degree: given {dims.pp}, which makes {dims.pp * per_rank} stages of "
            f"{args.num_layers} blocks with pipeline_parallel_schedule {section.pipeline_parallel_schedule}; legal: at "
            f"most {args.num_layers // per_rank}"
        )
    elif split and split[-1] >= args.num_layers:
        yield (
            f"parallelism.pipeline_parallel_split: given {list(split)}, but the last of the model's blocks is "
            f"{args.num_layers - 1}; let the last stage begin there at the latest"
        )


def _split_errors(p: Parallelism) -> Iterator[str]:
    split, num_stages = p.pipeline_parallel_split, p.pipeline_parallel_degree * stages_per_rank(p)
    given = f"parallelism.pipeline_parallel_split: given {list(split)}"
    if p.pipeline_parallel_degree == 1:
        yield f"{given}, but parallelism.pipeline_parallel_degree is 1; set that, too, or leave this empty"
    elif len(split) != num_stages:
        yield (
            f"{given}, the first blocks of {len(split)} stages, but pipeline_parallel_schedule "
            f"{p.pipeline_parallel_schedule} has {num_stages} on {p.pipeline_parallel_degree} ranks; legal: "
            f"{num_stages} numbers"
        )
    if split[0] != 0 or any(b <= a for a, b in pairwise(split)):
        yield f"{given}; it must begin with 0 and rise, as every stage has a block, such as {list(range(len(split)))}"


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about pipelines, one line per mistake."""
    p, local = config.parallelism, config.training.local_batch_size
    if p.pipeline_parallel_split:
        yield from _split_errors(p)
    if p.pipeline_parallel_degree == 1:
        return
    if p.pipeline_parallel_schedule == "InterleavedZeroBubble" and config.compile.enable:
        yield (
            "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble, but the backward of a compiled block "
            "cannot be split; leave compile.enable false, or choose another schedule, such as Interleaved1F1B"
        )
    if not config.data.tokens_per_microbatch and local % p.pipeline_parallel_microbatch_size:
        yield (
            f"parallelism.pipeline_parallel_microbatch_size: given {p.pipeline_parallel_microbatch_size}; it must "
            f"divide training.local_batch_size {local}; legal: {divisors(local)}"
        )
