"""The fastest plans that fit: all layouts by a bound, the best ones exactly.

1. Every candidate of the space (space.py) gets a lower bound of its step: what its blocks compute and send, without
   recomputation, collectives of FSDP or a limit of memory. A few microseconds each.
2. In the order of their bounds, candidates get a better one: each block saves what the linear relaxation of the
   knapsack lets it save, and the stages of a pipeline are equally fast. Those that lack memory even so are rejected.
3. Whose better bound is the next in order is solved exactly (knapsack.py, stages.py). The search ends when the next
   bound is above the plateau of the best found: no candidate that is left out can be the fastest.
4. The plans on the plateau differ by less than the model's error. Of these the chosen one is the first in the order of
   `preference`.

What the cost model must offer is `Layout` below.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from titan_video.planner.candidate import Candidate, Prediction, Range
from titan_video.planner.plan_file import merged
from titan_video.planner.search import stages
from titan_video.planner.search.knapsack import Bound, Choice, Group, solve

PLATEAU = 0.02  # plans whose times differ by less are taken as equally fast
MAX_SOLVED = 64  # candidates that are solved exactly
TRIES = 8  # corrections of the budgets by what the whole step's memory turned out to be
SLACK = 0.003  # of the memory: less is not worth a correction
COMMUNICATION = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "expert parallel", "ring")
COMMUNICATION += ("tensor parallel", "offload", "pipeline sends", "pipeline bubble", "encoders", "data", "host")


@dataclass(frozen=True)
class StageBudget:
    """What a pipeline stage has for its blocks.

    budget: bytes for its blocks, at the peak: what they hold (`Layout.held`), save, and need in backward. in_flight:
    micro-batches whose activations it holds. seconds: of what it computes beside blocks, for one micro-batch.
    """

    budget: float
    in_flight: float = 1
    seconds: float = 0.0


class Layout(Protocol):
    """A candidate's costs but for its checkpointing and split.

    stages: in forward order; of an interleaved schedule, two for each rank. choices: by block type, by `Checkpointing`
    (the name of a choice). held: bytes by block type that a stage holds of a block all the time, such as its weights.
    usable: bytes of a GPU that may be counted.
    """

    stages: Sequence[StageBudget]
    choices: dict[str, tuple[Choice, ...]]
    held: dict[str, float]
    usable: float

    def step_seconds(self, of_stages: Sequence[float]) -> float:
        """Of a step whose stages take so many seconds for one micro-batch. Rises with each of them."""


class Model(Protocol):
    """layers: the type of each block, in forward order. least_seconds: a cheap lower bound of a step."""

    layers: Sequence[str]

    def least_seconds(self, candidate: Candidate) -> float: ...

    def layout(self, candidate: Candidate, allow_offload: bool) -> Any: ...

    def predict(self, candidate: Candidate) -> Prediction: ...

    def fits(self, candidate: Candidate) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """A candidate with checkpointing and split, and what it costs. binding: what keeps it from being faster."""

    candidate: Candidate
    prediction: Prediction
    binding: str

    @property
    def seconds(self) -> float:
        return self.prediction.step_seconds


@dataclass(frozen=True)
class Rejected:
    """A candidate that does not fit. missing: bytes that its fullest stage lacks even if its blocks save the least."""

    candidate: Candidate
    missing: float


@dataclass(frozen=True)
class Result:
    """plans: solved exactly, the fastest first. slower: (bound, candidate) of those whose bound excluded them.
    They may or may not fit.
    """

    plans: list[Plan]
    rejected: list[Rejected]
    slower: list[tuple[float, Candidate]]
    num_candidates: int
    chosen: Plan | None = field(default=None)

    @property
    def plateau(self) -> list[Plan]:
        return [plan for plan in self.plans if plan.seconds <= self.plans[0].seconds * (1 + PLATEAU)]


def search(
    model: Model,
    space: Iterable[Candidate],
    gpus_per_node: int,
    max_solved: int = MAX_SOLVED,
    allow_offload: bool = False,
) -> Result:
    """allow_offload: activations may wait in host memory. max_solved: plans to find at most."""
    queue = [(model.least_seconds(candidate), i, False, candidate) for i, candidate in enumerate(space)]
    number = len(queue)
    heapq.heapify(queue)
    plans: list[Plan] = []
    rejected: list[Rejected] = []
    groups, known = grouped(model.layers), {}
    best = math.inf
    while queue and queue[0][0] <= best * (1 + PLATEAU) and len(plans) < max_solved:
        _, i, is_bound, candidate = heapq.heappop(queue)
        if not is_bound:  # so far only what its compute takes at least
            bound, missing = lower_bound(model.layout(candidate, allow_offload), groups, known)
            if missing > 0:
                rejected.append(Rejected(candidate, missing))
            else:
                heapq.heappush(queue, (bound, i, True, candidate))
            continue
        plan = solve_candidate(model, candidate, allow_offload)
        if plan is None:
            rejected.append(Rejected(candidate, 0.0))
        else:
            plans.append(plan)
            best = min(best, plan.seconds)
    plans.sort(key=lambda plan: plan.seconds)
    result = Result(plans, rejected, [(entry[0], entry[3]) for entry in sorted(queue, key=lambda e: e[:2])], number)
    chosen = min(result.plateau, key=lambda plan: preference(plan, gpus_per_node)) if plans else None
    return replace(result, chosen=chosen)


def preference(plan: Plan, gpus_per_node: int) -> tuple:
    """The order on a plateau: all-to-alls inside a node, fewer ranks a clip, more of them by Ulysses, fewer over which
    experts are divided, then room.

    Fewer ranks a clip leave more room for longer clips; Ulysses needs less tuning than a ring. At last the seconds.
    """
    c = plan.candidate
    crosses = c.ulysses * c.tp > gpus_per_node or c.ep > gpus_per_node
    return crosses, c.pp, c.tp, c.cp, -c.ulysses, c.ep, plan.prediction.fullest.total, plan.seconds


def grouped(layers: Sequence[str]) -> list[tuple[str, int]]:
    """[(block type, number of blocks)] of neighbours of one type."""
    found: list[tuple[str, int]] = []
    for kind in layers:
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + 1)
        else:
            found.append((kind, 1))
    return found


def lower_bound(
    layout: Layout, groups: Sequence[tuple[str, int]], known: dict[tuple[int, ...], Bound]
) -> tuple[float, float]:
    """(seconds of the step at least, bytes that are missing at least).

    All stages share what all of them can save, and the blocks' time equally: no split does better.
    known: bounds by the identity of a layout's choices, which many layouts share.
    """
    stages, key = layout.stages, tuple(map(id, layout.choices.values()))
    bound = known.get(key)
    if bound is None:
        bound = known[key] = Bound([Group(count, layout.choices[kind]) for kind, count in groups])
    # What is held takes the least room where the most micro-batches are in flight.
    held = sum(count * layout.held[kind] for kind, count in groups) / max(s.in_flight for s in stages)
    room = sum((s.budget - bound.working) / s.in_flight for s in stages) - held
    missing = max(bound.working - s.budget for s in stages)
    missing = max(missing, (bound.saved - room) / sum(1 / s.in_flight for s in stages))
    if missing > 0:
        return math.inf, missing
    mean = (bound.at(room) + sum(s.seconds for s in stages)) / len(stages)
    return layout.step_seconds([mean] * len(stages)), 0.0


def solve_candidate(model: Model, candidate: Candidate, allow_offload: bool = False) -> Plan | None:
    """The candidate with the checkpointing and split that make it fastest, or None if none of them fits."""
    layout = model.layout(candidate, allow_offload)
    budgets = list(layout.stages)
    best: Plan | None = None
    for number in range(TRIES):
        found = assign(layout, budgets, model.layers)
        if found is None:
            break
        solved = replace(candidate, ranges=found[0], split=found[1])
        prediction = model.predict(solved)
        fits = model.fits(solved)
        if fits and (best is None or prediction.step_seconds < best.seconds):
            best = Plan(solved, prediction, binding(prediction))
        elif best is not None:
            break
        # Of each rank, which may have two stages: what it has left, or lacks.
        left = [layout.usable - memory.total for memory in prediction.memory]
        if fits and (max(left) < SLACK * layout.usable or not prediction.seconds.get("recomputation")):
            break
        per_rank = len(budgets) // len(left)
        # Choices are steps: a correction that is too small changes nothing, so what lacks counts more each time.
        share = [min(x, 0.0) * 2**number + max(x, 0.0) for x in left]
        budgets = [replace(s, budget=s.budget + share[i % len(left)] / per_rank) for i, s in enumerate(budgets)]
    return best


def assign(
    layout: Layout, budgets: Sequence[StageBudget], layers: Sequence[str]
) -> tuple[tuple[Range, ...], tuple[int, ...]] | None:
    """(ranges, split) that make the step fastest; None if none fits. Without a pipeline, the split is ()."""
    solver = _Stages(layout, budgets, layers)
    if len(budgets) == 1:
        choices = solver.choices(0, 0, len(layers))
        return None if choices is None else (_ranges(choices), ())
    seconds, cuts = stages.split(len(layers), len(budgets), solver.seconds, solver.at_least)
    if math.isinf(seconds):
        return None
    ends = (*cuts[1:], len(layers))
    chosen = [solver.choices(s, first, end) for s, (first, end) in enumerate(zip(cuts, ends, strict=True))]
    return _ranges([choice for some in chosen for choice in some or ()]), cuts


class _Stages:
    """The blocks of each stage, solved once for each set of equal blocks."""

    def __init__(self, layout: Layout, budgets: Sequence[StageBudget], layers: Sequence[str]):
        self.layout, self.budgets, self.layers = layout, budgets, layers
        self.solved: dict[Any, list[Choice] | None] = {}
        self.bounds: dict[Any, Bound] = {}

    def choices(self, stage: int, first: int, end: int) -> list[Choice] | None:
        budget = self.budgets[stage]
        groups = grouped(self.layers[first:end])
        key = (budget.budget, budget.in_flight, *groups)
        if key not in self.solved:
            blocks = [Group(n, self.layout.choices[kind]) for kind, n in groups]
            found = solve(blocks, budget.budget - self._held(groups), budget.in_flight)
            self.solved[key] = None if found is None else [choice for some in found for choice in some]
        return self.solved[key]

    def at_least(self, stage: int, first: int, end: int) -> float:
        """A lower bound of `seconds`."""
        budget = self.budgets[stage]
        groups = tuple(grouped(self.layers[first:end]))
        if groups not in self.bounds:
            self.bounds[groups] = Bound([Group(n, self.layout.choices[kind]) for kind, n in groups])
        bound = self.bounds[groups]
        room = budget.budget - bound.working - self._held(groups)
        return budget.seconds + bound.at(room / budget.in_flight)

    def _held(self, groups: Iterable[tuple[str, int]]) -> float:
        return sum(n * self.layout.held[kind] for kind, n in groups)

    def seconds(self, stage: int, first: int, end: int) -> float:
        choices = self.choices(stage, first, end)
        return math.inf if choices is None else self.budgets[stage].seconds + sum(c.seconds for c in choices)


def _ranges(choices: Sequence[Choice]) -> tuple[Range, ...]:
    return merged(Range(i, i + 1, choice.name) for i, choice in enumerate(choices))


def binding(prediction: Prediction) -> str:
    """What keeps the plan from being faster: memory, communication that compute waits for, or the compute itself."""
    total, parts = prediction.step_seconds, prediction.seconds
    waits = {name: parts.get(name, 0.0) for name in COMMUNICATION}
    largest = max(waits, key=lambda name: waits[name])
    recomputation = parts.get("recomputation", 0.0)
    if recomputation > max(0.01 * total, waits[largest]):
        return f"memory: {recomputation / total:.0%} of the step recomputes"
    if waits[largest] > 0.02 * total:
        return f"{largest}: {waits[largest] / total:.0%} of the step"
    compute = max(("products", "attention", "memory-bound"), key=lambda name: parts.get(name, 0.0))
    return f"compute: {compute} {parts.get(compute, 0.0) / total:.0%}"
