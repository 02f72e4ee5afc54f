"""Which blocks each pipeline stage has: the slowest stage as fast as possible, by dynamic programming over cuts."""

import math
from collections.abc import Callable
from itertools import pairwise

StageSeconds = Callable[
    [int, int, int], float
]  # (stage, first block, end of blocks) -> seconds, infinity: does not fit

ROUNDING = 1 + 1e-9  # a bound and the sum that it bounds round differently


def balanced(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """First block of each stage, with numbers of blocks that differ by one at most, the smaller stages first."""
    return tuple(stage * num_blocks // num_stages for stage in range(num_stages))


def split(
    num_blocks: int, num_stages: int, seconds: StageSeconds, at_least: StageSeconds | None = None
) -> tuple[float, tuple[int, ...]]:
    """(seconds of the slowest stage, first block of each stage); every stage has a block, at least.

    Of equal splits the one with the smallest sum over stages; infinity and () if none fits.
    at_least: a lower bound on `seconds` that is cheaper, and does not fall with more blocks. Cuts that it shows to be
    slower than the balanced split are not tried.
    """
    cuts = balanced(num_blocks, num_stages)
    limit = max(seconds(s, a, b) for s, (a, b) in enumerate(pairwise((*cuts, num_blocks))))
    at_least = at_least or (lambda stage, first, end: 0.0)
    starts = _earliest_starts(num_blocks, num_stages, limit, at_least)
    # best[end] of the stages so far, whose blocks are 0 to end - 1: (slowest, sum), and their first blocks.
    best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), ())}
    for stage in range(num_stages):
        later = num_stages - 1 - stage
        ends = range(max(stage + 1, starts[stage + 1]), num_blocks - later + 1) if later else (num_blocks,)
        after: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
        for end in ends:
            found, cuts = (math.inf, math.inf), ()
            for first, ((slowest, total), firsts) in best.items():
                bound = at_least(stage, first, end) if first < end else math.inf
                if max(slowest, bound) > min(found[0], limit) * ROUNDING:
                    continue
                own = seconds(stage, first, end)
                cost = (max(slowest, own), total + own)
                if cost < found:
                    found, cuts = cost, (*firsts, first)
            if found[0] < math.inf:
                after[end] = (found, cuts)
        best = after
    if num_blocks not in best:
        return math.inf, ()
    (slowest, _), cuts = best[num_blocks]
    return slowest, cuts


def _earliest_starts(num_blocks: int, num_stages: int, limit: float, at_least: StageSeconds) -> list[int]:
    """Of each stage, the first block before which it cannot start, if all stages are to be within `limit`."""
    starts = [0] * num_stages + [num_blocks]
    for stage in reversed(range(num_stages)):
        end = starts[stage + 1]
        first = max(end - 1, 0)
        while first > 0 and at_least(stage, first - 1, end) <= limit * ROUNDING:
            first -= 1
        starts[stage] = first
    return starts
