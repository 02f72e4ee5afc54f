"""Which activations each block saves, so that a stage fits and is fastest: a knapsack.

A block saves activations in one of several ways (`Choice`). In its backward it needs more than it saved: what it
recomputes, and the gradients of its activations. Blocks run backward last to first, and a block that has run is freed.
With c_i the choice of block i of a stage that holds k micro-batches at once, the stage needs

    (k - 1) sum_i saved(c_i) + max_i [ sum_{j <= i} saved(c_j) + working(c_i) ]      bytes

Of a given set of choices the order with the largest `working` first needs the least (exchange two neighbours: the sum
after both is the same, and the larger `working` is then added to the smaller sum). Equal blocks therefore form at most
as many ranges as there are choices.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np

MAX_WAYS = 70  # of all blocks to choose, up to which they are tried one by one
GRID = 2048  # steps of the budget in the dynamic program; sizes are rounded up to it, so that a result always fits


@dataclass(frozen=True)
class Choice:
    """One way to save a block's activations.

    seconds: of the block's forward and backward, recomputation included.
    saved: bytes from forward to backward. working: bytes that its backward needs beside them.
    """

    name: str
    seconds: float
    saved: float
    working: float


@dataclass(frozen=True)
class Group:
    """`count` equal blocks that follow each other."""

    count: int
    choices: tuple[Choice, ...]


def needed(groups: Sequence[tuple[Choice, ...]], in_flight: float = 1) -> float:
    """Bytes of a stage whose groups of blocks have these choices, one a block, in order."""
    saved = most = 0.0
    for choices in groups:
        for choice in choices:
            saved += choice.saved
            most = max(most, saved + choice.working)
    return (in_flight - 1) * saved + most


def in_order(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Those of equal blocks in the order that needs the least memory."""
    return tuple(sorted(choices, key=lambda c: (-c.working, c.saved, c.name)))


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (saved, seconds), from the fewest bytes to the fewest seconds."""
    points: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.saved, c.seconds)):
        if points and c.seconds >= points[-1].seconds:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], c):
            points.pop()
        points.append(c)
    return points


def _slope(a: Choice, b: Choice) -> float:
    """Seconds for a byte, negative: how much time more bytes save."""
    return (b.seconds - a.seconds) / (b.saved - a.saved) if b.saved > a.saved else -np.inf


class Bound:
    """A lower bound on the seconds of groups of blocks: the linear relaxation of the knapsack, without `working`.

    working: what each of the blocks needs at least beside what is saved. groups: held, so that the identity of their
    choices stays theirs.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        self.working = min(c.working for group in groups for c in group.choices)
        segments = []  # (slope, bytes, seconds saved)
        self.saved, self.seconds = 0.0, 0.0
        for group in groups:
            points = hull(group.choices)
            self.saved += group.count * points[0].saved
            self.seconds += group.count * points[0].seconds
            for a, b in zip(points, points[1:], strict=False):
                size = group.count * (b.saved - a.saved)
                segments.append((_slope(a, b), size, group.count * (a.seconds - b.seconds)))
        self.bytes_at, self.gained_at = [0.0], [0.0]
        for _, size, gained in sorted(segments):
            self.bytes_at.append(self.bytes_at[-1] + size)
            self.gained_at.append(self.gained_at[-1] + gained)

    def at(self, budget: float) -> float:
        """Seconds at least, with `budget` bytes for all that is saved; infinity if even the least does not fit."""
        room = budget - self.saved
        if room < 0:
            return math.inf
        i = bisect_right(self.bytes_at, room)
        if i == len(self.bytes_at):
            return self.seconds - self.gained_at[-1]
        share = (room - self.bytes_at[i - 1]) / (self.bytes_at[i] - self.bytes_at[i - 1])
        return self.seconds - self.gained_at[i - 1] - share * (self.gained_at[i] - self.gained_at[i - 1])


def solve(groups: Sequence[Group], budget: float, in_flight: float = 1) -> list[tuple[Choice, ...]] | None:
    """The choices of each group's blocks, in order, that fit `budget` bytes and are fastest; None if nothing fits.

    Few blocks are tried in all ways. Otherwise a dynamic program rounds sizes up to its grid, and what that left free
    is used afterwards: single blocks get a faster choice while it fits.
    """
    ways = math.prod(math.comb(g.count + len(g.choices) - 1, g.count) for g in groups)
    if ways <= MAX_WAYS:
        return _try_all(groups, budget, in_flight)
    return _polish(_approximate(groups, budget, in_flight), groups, budget, in_flight)


def _try_all(groups: Sequence[Group], budget: float, in_flight: float) -> list[tuple[Choice, ...]] | None:
    best, best_seconds = None, math.inf
    ways = [[in_order(some) for some in combinations_with_replacement(g.choices, g.count)] for g in groups]
    for chosen in product(*ways):
        seconds = sum(c.seconds for choices in chosen for c in choices)
        if seconds < best_seconds and needed(chosen, in_flight) <= budget:
            best, best_seconds = list(chosen), seconds
    return best


def _polish(
    found: list[tuple[Choice, ...]] | None, groups: Sequence[Group], budget: float, in_flight: float
) -> list[tuple[Choice, ...]] | None:
    """With faster choices for single blocks, the greatest gain first, while they fit."""
    while found is not None:
        moves = []
        for g, group in enumerate(groups):
            for old in set(found[g]):
                moves += [
                    (new.seconds - old.seconds, g, old, new) for new in group.choices if new.seconds < old.seconds
                ]
        for _, g, old, new in sorted(moves, key=lambda move: move[0]):
            changed = list(found[g])
            changed[changed.index(old)] = new
            trial = [*found[:g], in_order(changed), *found[g + 1 :]]
            if needed(trial, in_flight) <= budget:
                found = trial
                break
        else:
            return found
    return None


def _approximate(groups: Sequence[Group], budget: float, in_flight: float) -> list[tuple[Choice, ...]] | None:
    """On the grid. With several micro-batches in flight, the largest `working` is counted beside all that is saved."""
    if in_flight == 1:
        return _solve(groups, budget, budget)
    best, best_seconds = None, math.inf
    for working in sorted({c.working for group in groups for c in group.choices}):
        allowed = [Group(g.count, tuple(c for c in g.choices if c.working <= working)) for g in groups]
        if budget < working or not all(g.choices for g in allowed):
            continue
        found = _solve(allowed, (budget - working) / in_flight, math.inf)
        seconds = sum(c.seconds for choices in found or () for c in choices)
        if found is not None and seconds < best_seconds:
            best, best_seconds = found, seconds
    return best


def _solve(groups: Sequence[Group], budget: float, limit: float) -> list[tuple[Choice, ...]] | None:
    """Saved bytes within `budget`, and after each block saved + working within `limit`.

    Dynamic program over blocks and saved bytes: seconds_V[v] is the least time of the blocks so far with v units.
    """
    blocks = [group.choices for group in groups for _ in range(group.count)]
    if budget <= 0 or not all(blocks):
        return None
    unit = budget / GRID
    seconds_V, taken = np.full(GRID + 1, np.inf), []
    seconds_V[0] = 0.0
    for choices in blocks:
        after_V, choice_V = np.full(GRID + 1, np.inf), np.zeros(GRID + 1, dtype=np.int8)
        for i, c in enumerate(choices):
            units = _units(c.saved, unit)
            # The last v that leaves room for what backward needs beside it.
            last = GRID if limit == math.inf else min(GRID, int((limit - c.working) / unit + 1e-9))
            if units > last:
                continue
            new_V = seconds_V[: last + 1 - units] + c.seconds
            is_better_V = new_V < after_V[units : last + 1]
            after_V[units : last + 1][is_better_V] = new_V[is_better_V]
            choice_V[units : last + 1][is_better_V] = i
        seconds_V = after_V
        taken.append(choice_V)
    v = int(np.argmin(seconds_V))
    if not np.isfinite(seconds_V[v]):
        return None
    chosen: list[Choice] = []
    for choices, choice_V in zip(reversed(blocks), reversed(taken), strict=True):
        chosen.append(choices[choice_V[v]])
        v -= _units(chosen[-1].saved, unit)
    chosen.reverse()
    ends = np.cumsum([0, *(group.count for group in groups)])
    return [in_order(chosen[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def _units(size: float, unit: float) -> int:
    return int(np.ceil(size / unit - 1e-9))


def ranges(choices: Sequence[Choice], first: int = 0) -> list[tuple[int, int, str]]:
    """[(first block, number of blocks, name of the choice)] of equal neighbours."""
    found: list[tuple[int, int, str]] = []
    for i, choice in enumerate(choices, start=first):
        if found and found[-1][2] == choice.name:
            start, count, name = found[-1]
            found[-1] = (start, count + 1, name)
        else:
            found.append((i, 1, choice.name))
    return found
