"""The planner's search against all candidates, all checkpointings and all splits of small cases."""

import itertools
import math
import random

import pytest

from tests.planner_model import random_case
from titan_video.planner import knapsack, stages
from titan_video.planner.knapsack import GRID, Bound, Choice, Group, in_order, needed, solve
from titan_video.planner.search import PLATEAU, grouped, lower_bound, search

# ---- the knapsack ----


def random_choices(draw, number=3):
    return tuple(Choice(str(i), draw.uniform(1, 2), draw.uniform(0.1, 3), draw.uniform(0, 4)) for i in range(number))


def fastest_by_trying(groups, budget, in_flight):
    """Seconds of the fastest choice of all blocks that fits, in any order of choices."""
    best = math.inf
    for chosen in itertools.product(*(g.choices for g in groups for _ in range(g.count))):
        if needed([chosen], in_flight) <= budget:
            best = min(best, sum(c.seconds for c in chosen))
    return best


@pytest.mark.parametrize("in_flight", [1, 3])
def test_few_blocks_are_tried_in_all_ways(in_flight):
    draw = random.Random(in_flight)
    for _ in range(60):
        groups = [Group(draw.randint(1, 3), random_choices(draw)), Group(draw.randint(1, 3), random_choices(draw))]
        budget = draw.uniform(3, 20) * in_flight
        found = solve(groups, budget, in_flight)
        seconds = math.inf if found is None else sum(c.seconds for choices in found for c in choices)
        assert seconds == pytest.approx(fastest_by_trying(groups, budget, in_flight))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_the_dynamic_program_equals_trying_all(in_flight, monkeypatch):
    monkeypatch.setattr(knapsack, "MAX_WAYS", 0)
    draw = random.Random(in_flight)
    fitting = 0
    for _ in range(60):
        groups = [Group(draw.randint(1, 3), random_choices(draw)), Group(draw.randint(1, 3), random_choices(draw))]
        budget = draw.uniform(3, 20) * in_flight
        found = solve(groups, budget, in_flight)
        # Sizes are rounded up to the grid; with several in flight the working set is counted whatever the order.
        most = max(c.working for g in groups for c in g.choices) if in_flight > 1 else 0
        best = fastest_by_trying(groups, budget, in_flight)
        at_most = fastest_by_trying(groups, budget * (1 - 7 / GRID) - most, in_flight)
        if found is None:
            assert at_most == math.inf
            continue
        fitting += 1
        assert needed(found, in_flight) <= budget * (1 + 1e-9)
        assert [len(choices) for choices in found] == [g.count for g in groups]
        seconds = sum(c.seconds for choices in found for c in choices)
        assert best - 1e-9 <= seconds <= at_most + 1e-9
        assert Bound(groups).at(budget / in_flight) <= best + 1e-9
    assert fitting > 30


def test_the_order_of_equal_blocks_needs_the_least():
    draw = random.Random(0)
    for _ in range(50):
        chosen = [draw.choice(random_choices(draw, 4)) for _ in range(5)]
        least = min(needed([order]) for order in itertools.permutations(chosen))
        assert needed([in_order(chosen)]) == pytest.approx(least)


def test_more_memory_is_never_slower():
    draw = random.Random(7)
    groups = [Group(6, random_choices(draw, 5)), Group(4, random_choices(draw, 5))]
    seconds = []
    for budget in range(5, 60, 3):
        found = solve(groups, budget)
        seconds.append(math.inf if found is None else sum(c.seconds for some in found for c in some))
    assert seconds[0] > seconds[-1] < math.inf
    assert all(b <= a * (1 + 1e-2) for a, b in itertools.pairwise(seconds))  # but for the grid


# ---- stages ----


def test_the_split_equals_trying_all():
    draw = random.Random(1)
    for _ in range(100):
        blocks, num_stages = draw.randint(2, 6), draw.randint(1, 4)
        if num_stages > blocks:
            continue
        costs = [[draw.uniform(0.5, 2) for _ in range(blocks)] for _ in range(num_stages)]
        most = [draw.randint(1, blocks) for _ in range(num_stages)]  # blocks that fit

        def seconds(stage, first, end, costs=costs, most=most):
            return sum(costs[stage][first:end]) if end - first <= most[stage] else math.inf

        def slowest(cuts, seconds=seconds, blocks=blocks):
            return max(seconds(s, a, b) for s, (a, b) in enumerate(itertools.pairwise((*cuts, blocks))))

        every = [(0, *cuts) for cuts in itertools.combinations(range(1, blocks), num_stages - 1)]

        def at_least(stage, first, end, seconds=seconds):
            return 0.9 * seconds(stage, first, end)

        best, cuts = stages.split(blocks, num_stages, seconds)
        assert stages.split(blocks, num_stages, seconds, at_least)[0] == best
        assert best == pytest.approx(min(map(slowest, every)))
        assert cuts == () if best == math.inf else slowest(cuts) == pytest.approx(best)


# ---- the whole search ----


def test_picks_what_an_exhaustive_search_picks():
    fitting, compared = 0, 0
    for seed in range(200):
        model, space = random_case(seed)
        best = min((seconds for seconds, _ in model.every_plan(space)), default=math.inf)
        result = search(model, space, space.gpus_per_node)
        compared += 1
        if not result.plans:
            # Only what the grid rounds up may be missed.
            assert best == math.inf, seed
            continue
        fitting += 1
        assert best * (1 - 1e-9) <= result.plans[0].seconds <= best * 1.005, seed
        assert result.chosen in result.plateau
        assert result.chosen.seconds <= result.plans[0].seconds * (1 + PLATEAU)
        assert all(model.fits(plan.candidate) for plan in result.plans)
        assert result.num_candidates == len(list(space))
    assert compared == 200 and 100 < fitting < 200


def test_the_bound_is_below_every_plan_of_a_candidate():
    for seed in range(20):
        model, space = random_case(seed)
        least = {}
        for seconds, c in model.every_plan(space):
            least[c] = min(seconds, least.get(c, math.inf))
        for c in space:
            bound, _ = lower_bound(model.layout(c), grouped(model.layers), {})
            assert bound <= least.get(c, math.inf) * (1 + 1e-9)
