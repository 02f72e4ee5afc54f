"""Which blocks each pipeline stage has: the slowest stage as fast as possible, by dynamic programming over cuts."""

import math
from collections.abc import Callable
from itertools import pairwise

StageSeconds = Callable[
    [int, int, int], float
]  # (stage, first block, end of blocks) -> seconds, infinity: does not fit

ROUNDING = 1e-9  # a bound and the sum that it bounds round differently
MAX_TRIES = 200  # splits that are looked at before the search for a better one ends


def split(
    num_blocks: int, num_stages: int, seconds: StageSeconds, at_least: StageSeconds | None = None
) -> tuple[float, tuple[int, ...]]:
    """(seconds of the slowest stage, first block of each stage); every stage has a block, at least.

    Of equal splits one with a small sum over stages; infinity and () if none fits.
    at_least: a lower bound on `seconds` that is cheaper. The best split by what is known, bounds at first, is computed
    exactly, and again with what that has shown, until the best split is made of exact numbers alone.
    """
    known: dict[tuple[int, int, int], float] = {}  # exact
    bounds: dict[tuple[int, int, int], float] = {}
    best: tuple[tuple[float, float], tuple[int, ...]] = ((math.inf, math.inf), ())

    def so_far(stage: int, first: int, end: int) -> float:
        key = stage, first, end
        if key in known or at_least is None:
            return known[key] if key in known else known.setdefault(key, seconds(stage, first, end))
        return bounds[key] if key in bounds else bounds.setdefault(key, at_least(stage, first, end))

    for _ in range(MAX_TRIES):
        bound, cuts = _best_split(num_blocks, num_stages, so_far)
        if not cuts or bound[0] >= best[0][0] * (1 - ROUNDING):
            break
        stages = [(s, a, b) for s, (a, b) in enumerate(pairwise((*cuts, num_blocks)))]
        for key in stages:
            if key not in known:
                known[key] = seconds(*key)
        exact = [known[key] for key in stages]
        best = min(best, ((max(exact), sum(exact)), cuts))
    (slowest, _), cuts = best
    return (slowest, cuts) if slowest < math.inf else (math.inf, ())


def _best_split(num_blocks: int, num_stages: int, seconds: StageSeconds) -> tuple[tuple[float, float], tuple[int, ...]]:
    """((seconds of the slowest stage, their sum), first block of each stage), by dynamic programming over cuts."""
    # best[end] of the stages so far, whose blocks are 0 to end - 1.
    best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), ())}
    for stage in range(num_stages):
        later = num_stages - 1 - stage
        after: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
        for end in range(stage + 1, num_blocks - later + 1) if later else (num_blocks,):
            found, cuts = (math.inf, math.inf), ()
            for first, ((slowest, total), firsts) in best.items():
                if first >= end or slowest > found[0]:
                    continue
                own = seconds(stage, first, end)
                cost = (max(slowest, own), total + own)
                if cost < found:
                    found, cuts = cost, (*firsts, first)
            if cuts:
                after[end] = (found, cuts)
        best = after
    return best.get(num_blocks, ((math.inf, math.inf), ()))
