"""Why a layout is not the plan, what it would cost, and what would make it fit."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from titan_video.planner.candidate import PARTS, Candidate, Prediction
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.search.fastest import Model, Plan, Rejected, Result, search
from titan_video.planner.search.space import DEGREES, Space, violations

MAX_RANGES = 5  # that are listed one by one
SMALL = 0.002  # of a step: differences of parts that are not listed


def name_of(candidate: Candidate) -> str:
    """Short: degrees above 1, and what else is not the default."""
    c = candidate
    words = [f"{name} {getattr(c, name)}" for name in (*DEGREES, "ep") if getattr(c, name) > 1]
    if c.tokens_per_microbatch:
        words.append(f"{c.tokens_per_microbatch:,} tokens")
    elif c.local_batch_size > 1:
        words.append(f"batch {c.local_batch_size}")
    words += [f"{c.microbatches} micro-batches"] if c.microbatches > 1 else []
    words += ["no reshard"] if not c.reshard and c.dp_shard * c.cp > 1 else []
    words += [c.schedule] if c.pp > 1 and c.schedule != "1F1B" else []
    words += [c.optimizer] if c.optimizer != "AdamW" else []
    words += ["state on host"] if c.enable_cpu_offload else []
    words += [c.placement + (f" {c.encoder_ranks}" if c.encoder_ranks else "")] if c.placement != "cached" else []
    return ", ".join(words) or "one rank"


def saved_by(candidate: Candidate) -> str:
    """Its checkpointing, by ranges; of many ranges, the numbers of blocks."""
    ranges = candidate.ranges
    if len(ranges) < 2:
        return str(ranges[0].checkpointing) if ranges else "none"
    if len(ranges) <= MAX_RANGES:
        spans = [f"{r.first}-{r.last - 1}" if r.last - r.first > 1 else f"{r.first}" for r in ranges]
        return ", ".join(f"{span} {r.checkpointing}" for span, r in zip(spans, ranges, strict=True))
    numbers: Counter[str] = Counter()
    for r in ranges:
        numbers[str(r.checkpointing)] += r.last - r.first
    return ", ".join(f"{name} in {number} blocks" for name, number in numbers.items())


def matches(candidate: Candidate, fixed: Mapping[str, Any]) -> bool:
    return all(getattr(candidate, name) == value for name, value in fixed.items())


def rejections(space: Space, result: Result) -> list[str]:
    """What became of all candidates, in a few lines."""
    chosen = result.chosen
    lines = [f"{result.num_candidates:,} candidates", *refused(space)]
    by_cause = Counter(_cause(r) for r in result.rejected)
    for cause, number in by_cause.most_common():
        lines.append(f"{number:,} do not fit: {cause}")
    if result.rejected:
        lines += [line.strip() for line in _shortage(result.rejected)]
    if result.slower:
        bound, candidate = result.slower[0]
        text = f"{len(result.slower):,} were left out: even the lower bound of the best, {name_of(candidate)}, is "
        lines.append(text + f"{bound:.3f} s")
    lines.append(f"{len(result.plans):,} were solved exactly; {len(result.plateau):,} are within 2 % of the fastest")
    if chosen:
        lines += [f"chosen: {name_of(chosen.candidate)}; checkpointing: {saved_by(chosen.candidate)}"]
        lines += [f"what keeps it from being faster: {chosen.binding}"]
    return lines


def refused(space: Space) -> list[str]:
    """Layouts that an option of the job excludes, by rule: a line each, with their number."""
    if space.refusals is None:
        return []
    rules = Counter(line for c in space.every() for line in space.refusals(c))
    return [f"{number:,} are not run with this job's {rule}" for rule, number in rules.most_common()]


def _cause(rejected: Rejected) -> str:
    if rejected.missing <= 0:
        return "no checkpointing of the blocks fits, by the memory of the whole step"
    return "memory, even if every block saves the least"


def why_not(
    model: Model, space: Space, result: Result, fixed: Mapping[str, Any], allow_offload: bool = False
) -> list[str]:
    """Why no candidate with these values is the plan: every rule or size that excludes them, or their cost.

    allow_offload: as in the search of `result`.
    """
    asked = ", ".join(f"{name}={value}" for name, value in fixed.items())
    chosen = result.chosen
    if chosen and matches(chosen.candidate, fixed):
        return [f"{asked}: it is the plan, {name_of(chosen.candidate)}"]
    degrees = {name: value for name, value in fixed.items() if name in (*DEGREES, "ep", "cp")}
    broken = list(violations(space, degrees))
    if broken:
        return [f"{asked}: not legal here", *(f"  {line}" for line in broken)]
    others = replace(space, fixed={**(space.fixed or {}), **fixed})
    by_rule = [f"  {line}" for line in refused(others)]
    if not any(True for _ in others):
        none = f"  no candidate on {space.world_size} ranks has all of these values"
        return [f"{asked}: not legal here", *(by_rule or [none])]
    own = search(model, others, space.gpus_per_node, allow_offload=allow_offload)
    if own.chosen is None:
        return [f"{asked}: does not fit", *_shortage(own.rejected), *by_rule]
    lines = [f"{asked}: {own.num_candidates:,} candidates, of which {len(own.rejected):,} do not fit"]
    lines += [f"  {line}" for line in _shortage(own.rejected)[:1]] if own.rejected else []
    lines += by_rule
    return [*lines, *compare(own.plans[0], chosen)] if chosen else lines


def _shortage(rejected: Iterable[Rejected]) -> list[str]:
    nearest = min(rejected, key=lambda r: r.missing)
    if nearest.missing <= 0:
        return [f"  the nearest to fit, {name_of(nearest.candidate)}: {_cause(nearest)}"]
    return [
        f"  the nearest to fit, {name_of(nearest.candidate)}, lacks {nearest.missing / GIB:.2f} GiB on its fullest "
        f"stage even if its blocks save the least"
    ]


def compare(plan: Plan, chosen: Plan) -> list[str]:
    """How a plan differs from the chosen one, part by part."""
    difference = plan.seconds - chosen.seconds
    how = "slower" if difference > 0 else "faster"
    lines = [
        f"  {name_of(plan.candidate)}; checkpointing: {saved_by(plan.candidate)}",
        f"  {plan.seconds:.3f} s a step, {abs(difference) / chosen.seconds:.1%} {how} than the chosen "
        f"{name_of(chosen.candidate)} ({chosen.seconds:.3f} s)",
    ]
    for part, seconds in part_differences(plan.prediction, chosen.prediction):
        if abs(seconds) > SMALL * chosen.seconds:
            lines.append(f"    {part} {seconds:+.3f} s")
    mine, other = plan.prediction.fullest.needed, chosen.prediction.fullest.needed
    lines.append(f"  needs {mine:.1f} GiB of a GPU; the chosen one {other:.1f}")
    return lines


def part_differences(a: Prediction, b: Prediction) -> Iterator[tuple[str, float]]:
    """(part, seconds of a - seconds of b), the largest difference first."""
    parts = [(part, a.seconds.get(part, 0.0) - b.seconds.get(part, 0.0)) for part in PARTS]
    yield from sorted(parts, key=lambda p: -abs(p[1]))
