"""The planner's search against all candidates, all checkpointings and all splits of small cases."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from tests.planner_model import random_case
from titan_video.config import manager
from titan_video.config.check import check
from titan_video.distributed.parallel_dims import check_layout
from titan_video.distributed.pipeline_parallel import check_microbatches
from titan_video.models import get_args, get_spec
from titan_video.planner.candidate import Candidate
from titan_video.planner.plan_file import to_tables
from titan_video.planner.search import knapsack, stages
from titan_video.planner.search.fastest import PLATEAU, grouped, lower_bound, search, solve_candidate
from titan_video.planner.search.knapsack import GRID, Bound, Choice, Group, in_order, needed, solve
from titan_video.planner.search.space import DEGREES, Space, StepClips, divisors, parse_fixed, violations

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
    fitting, compared, divided = 0, 0, 0
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
        divided += result.plans[0].candidate.ep > 1
    assert compared == 200 and 100 < fitting < 200 and 20 < divided < fitting


def test_the_bound_is_below_every_plan_of_a_candidate():
    for seed in range(20):
        model, space = random_case(seed)
        least = {}
        for seconds, c in model.every_plan(space):
            least[c] = min(seconds, least.get(c, math.inf))
        for c in space:
            bound, _ = lower_bound(model.layout(c), grouped(model.layers), {})
            assert bound <= least.get(c, math.inf) * (1 + 1e-9)


def test_every_candidate_is_solved_exactly():
    stages_met = set()
    for seed in range(25):
        model, space = random_case(seed)
        model = replace(model, layers=(*model.layers, *model.layers[:1]))
        space = replace(space, layers=len(model.layers))
        least = {}
        for seconds, c in model.every_plan(c for c in space if c.pp > 1 or seed % 5 == 0):
            least[c] = min(seconds, least.get(c, math.inf))
        for c, seconds in least.items():
            assert solve_candidate(model, c).seconds == pytest.approx(seconds), (seed, c)
            stages_met.add(c.pp)
    assert stages_met >= {1, 2, 4}


# ---- the space ----


@pytest.mark.parametrize("flavor, experts, sizes", [("debug", 1, (1, 2, 5)), ("moe-debug", 8, (2,))])
def test_the_space_is_what_the_trainer_accepts(flavor, experts, sizes):
    """All degrees that multiply to 12 ranks, and some sizes of micro-batches, by the trainer's own rules."""
    world = 12
    spec = get_spec("wan")
    args = get_args(spec, flavor, "", 512)  # 4 heads, 4 blocks
    model = args.num_heads, args.ffn_dim, args.num_layers
    space = Space(world, 4, *model, StepClips(12), 1000, experts, schedules=("1F1B",))
    legal = set()
    for pp, replicate, shard, ring, ulysses, tp in itertools.product(*[divisors(world)] * 6):
        if pp * replicate * shard * ring * ulysses * tp != world or 4 % tp:  # 4 GPUs a node
            continue
        for local, ep in itertools.product(sizes, (1, 2, 3, 4, 8) if experts > 1 else (1,)):
            microbatches = 12 // (replicate * shard) // local
            c = Candidate(
                pp, replicate, shard, ring, ulysses, tp, ep, local_batch_size=local, microbatches=microbatches
            )
            config = manager.from_dict({"model": {"name": "wan", "flavor": flavor}, **to_tables(c, args.num_layers)})
            config = replace(config, training=replace(config.training, global_batch_size=12))
            try:
                check(config, world, files=False)
                check_layout(config.parallelism, args, world)
                if pp > 1:
                    check_microbatches(config.parallelism, c.microbatches)
            except ValueError:
                continue
            legal.add((pp, replicate, shard, ring, ulysses, tp, ep, local))
    assert len(legal) > 100
    space = [c for c in space if c.local_batch_size in sizes]
    once = [c for c in space if c.reshard or c.dp_shard * c.cp == 1]
    found = [(*(getattr(c, name) for name in (*DEGREES, "ep")), c.local_batch_size) for c in once]
    assert len(found) == len(set(found)) and set(found) == legal


def test_the_space_of_a_token_budget():
    """As many tokens a step, in micro-batches of one or more of the longest clips."""
    step = StepClips(0, budget_tokens=8 * 3000, groups=2)
    space = Space(4, 4, 4, 512, 4, step, longest=1000, schedules=("1F1B",))
    found = {(c.dp, c.tokens_per_microbatch, c.microbatches) for c in space}
    assert found and all(dp * budget * m == 24000 and m % 2 == 0 and budget >= 1000 for dp, budget, m in found)
    assert (1, 3000, 8) in found and (4, 1000, 6) in found and (2, 12000, 1) not in found


def test_the_space_with_encoder_ranks():
    space = Space(8, 8, 4, 512, 4, StepClips(12), 1000, placement="separate", encoder_ranks=(2, 4), schedules=("1F1B",))
    found = list(space)
    assert {(c.encoder_ranks, c.num_training_ranks) for c in found} == {(2, 6), (4, 4)}
    assert {3, 6} <= {c.dp for c in found}  # not only powers of two
    assert {c.placement for c in found} == {"separate"}
    both = replace(space, encoder_ranks=(0, 4))
    assert {(c.placement, c.num_training_ranks) for c in both} == {("colocated", 8), ("separate", 4)}
    assert {c.placement for c in replace(both, placement="cached", encoder_ranks=(0,))} == {"cached"}
    fixed = replace(space, fixed=parse_fixed("cp=2,encoder_ranks=2,reshard=true", "--fix"))
    assert {(c.cp, c.num_training_ranks, c.reshard) for c in fixed} == {(2, 6, True)}
    assert list(violations(space, {"tp": 3})) and not list(violations(space, {"tp": 2}))


def test_the_space_with_experts():
    space = Space(12, 4, 4, 512, 4, StepClips(12), 1000, experts=8, schedules=("1F1B",))
    assert {c.ep for c in space} == {1, 2, 4}  # 8 does not divide the 12 ranks
    assert all(c.dp_shard * c.cp * c.tp % c.ep == 0 for c in space)
    assert {c.ep for c in replace(space, experts=1)} == {1}
    assert {c.ep for c in replace(space, fixed=parse_fixed("ep=4", "--fix"))} == {4}
    assert "does not divide the model's 8 experts" in next(violations(space, {"ep": 3}))
    assert "the 6 ranks of a model's copy" in next(violations(space, {"ep": 4, "dp_replicate": 2}))
    assert next(violations(replace(space, experts=1), {"ep": 2})) == "ep: the model has no experts"
    assert not list(violations(space, {"ep": 4, "tp": 2}))
