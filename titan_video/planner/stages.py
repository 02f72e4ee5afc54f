"""Which blocks each pipeline stage has: the slowest stage as fast as possible, by dynamic programming over cuts."""

from collections.abc import Callable

StageSeconds = Callable[[int, int, int], float]  # (stage, first block, end of blocks) -> seconds, infinity: does not fit


def balanced(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """First block of each stage, with numbers of blocks that differ by one at most, the smaller stages first."""
    return tuple(stage * num_blocks // num_stages for stage in range(num_stages))


def split(num_blocks: int, num_stages: int, seconds: StageSeconds) -> tuple[float, tuple[int, ...]]:
    """(seconds of the slowest stage, first block of each stage); every stage has a block, at least.

    Of equal splits the one with the smallest sum over stages; infinity and () if none fits.
    """
    infinite = (float("inf"), float("inf"))
    # best[end] of the stages so far, whose blocks are 0 to end - 1: (slowest, sum), and their first blocks.
    best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), ())}
    for stage in range(num_stages):
        later = num_stages - 1 - stage
        ends = range(stage + 1, num_blocks - later + 1) if later else (num_blocks,)
        after: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
        for end in ends:
            found, cuts = infinite, ()
            for first, ((slowest, total), firsts) in best.items():
                if first >= end or slowest > found[0]:
                    continue
                own = seconds(stage, first, end)
                cost = (max(slowest, own), total + own)
                if cost < found:
                    found, cuts = cost, (*firsts, first)
            if found < infinite:
                after[end] = (found, cuts)
        best = after
    if num_blocks not in best:
        return float("inf"), ()
    (slowest, _), cuts = best[num_blocks]
    return slowest, cuts
