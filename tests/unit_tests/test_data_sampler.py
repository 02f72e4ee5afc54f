"""The global sampler: what it draws and in what order, that it is a function of its counters, and that ranks have
equal work.
"""

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from titan_video.data.batching import Batching, Work
from titan_video.data.latent_cache import CachedClip
from titan_video.data.loader import DrawPlan
from titan_video.data.sampler import CostClass, GlobalSampler, fingerprint
from titan_video.ingest.plan.entries import Plan, PlanEntry
from titan_video.ingest.plan.report import report
from titan_video.ingest.prepare import num_steps
from titan_video.models.wan import SPEC

DEBUG = SPEC.flavors["debug"]


def build_sampler(sizes, clips, micro_batches=1, groups=1, seed=0, shuffle=True, identity="", classes=None):
    classes = classes or [CostClass((b,), clips) for b in range(len(sizes))]
    return GlobalSampler(sizes, classes, micro_batches, groups, seed, shuffle, identity)


def draws(sampler, steps):
    return [m for _ in range(steps) for m in next(sampler)]


@pytest.mark.parametrize("sizes, clips", [([10], 4), ([7, 3, 1], 4), ([100, 1], 8), ([2], 5), ([5, 5], 5), ([64], 64)])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("one_class", [True, False])
def test_every_epoch_of_a_bucket_holds_every_clip_once(sizes, clips, shuffle, one_class):
    stream = {b: [] for b in range(len(sizes))}
    ids = []
    classes = [CostClass(tuple(range(len(sizes))), clips)] if one_class else None
    for micro_batch in draws(build_sampler(sizes, clips, 2, 3, shuffle=shuffle, classes=classes), 50):
        assert len(micro_batch.positions) == clips
        stream[micro_batch.bucket] += micro_batch.positions
        ids += micro_batch.sample_ids
    assert ids == list(range(300 * clips))
    for b, size in enumerate(sizes):
        epochs = [stream[b][i : i + size] for i in range(0, len(stream[b]) - size + 1, size)]
        assert epochs and all(sorted(e) == list(range(size)) for e in epochs)
        if not shuffle:
            assert epochs[0] == list(range(size))
        elif size >= 7:
            assert len({tuple(e) for e in epochs}) == len(epochs)


def test_buckets_take_turns_by_their_size():
    drawn = Counter()
    for n, step in enumerate(draws(build_sampler([60, 30, 10], 5), 400), 1):
        drawn[step.bucket] += 5
        for bucket, share in enumerate((0.6, 0.3, 0.1)):
            assert abs(drawn[bucket] - share * 5 * n) <= 5
    assert drawn == {0: 1200, 1: 600, 2: 200}


def test_classes_of_unequal_micro_batches_have_their_share_too():
    classes = [CostClass((0, 2), 1), CostClass((1,), 20)]
    drawn = Counter()
    for step in draws(build_sampler([30, 60, 10], 0, 4, classes=classes), 1000):
        drawn[step.bucket] += len(step.positions)
    total = sum(drawn.values())
    assert [round(drawn[b] / total, 2) for b in range(3)] == [0.3, 0.6, 0.1]


def test_seeds_buckets_and_epochs_have_their_own_order():
    first = draws(build_sampler([50, 50], 50), 4)
    orders = [tuple(s.positions) for s in first] + [
        tuple(s.positions) for s in draws(build_sampler([50, 50], 50, seed=1), 4)
    ]
    assert len(set(orders)) == 8
    assert draws(build_sampler([50, 50], 50), 4) == first
    # A resumed run may use another version of numpy.
    positions = draws(build_sampler([8], 8, seed=2**63 - 1), 1)[0].positions
    assert positions == list(map(int, "60425317"))


@pytest.mark.parametrize("done", [0, 1, 7, 23])
def test_resume_in_the_middle(done):
    whole = draws(build_sampler([11, 4], 6, seed=3, identity="x"), 40)
    sampler = build_sampler([11, 4], 6, seed=3, identity="x")
    draws(sampler, done)
    state = json.loads(json.dumps(sampler.state_dict()))
    draws(sampler, 5)
    resumed = build_sampler([11, 4], 6, seed=3, identity="x")
    resumed.reset(state)
    assert draws(resumed, 40 - done) == whole[done:]


def test_resume_with_another_batch_size_continues_with_the_next_clips():
    sampler = build_sampler([12], 4)
    first = [p for s in draws(sampler, 2) for p in s.positions]
    other = build_sampler([12], 2)
    other.reset(sampler.state_dict())
    rest = draws(other, 2)
    assert sorted(first + [p for s in rest for p in s.positions]) == list(range(12)) and rest[0].sample_ids == [8, 9]


def test_other_clips_are_noticed():
    state = build_sampler([3], 1, identity=fingerprint([["a", "b", "c"]])).state_dict()
    for keys in ([["a", "b", "d"]], [["a", "c", "b"]], [["a", "b"], ["c"]], [["a", "b"]]):
        with pytest.raises(ValueError, match="initial_load_path"):
            build_sampler([len(k) for k in keys], 1, identity=fingerprint(keys)).reset(state)


def test_an_empty_bucket_is_refused():
    for sizes in ([], [3, 0]):
        with pytest.raises(ValueError, match="needs a clip"):
            build_sampler(sizes, 1)


# ---- token budget and equal cost ----

SIZES = [
    (1, 256, 256),
    (17, 256, 256),
    (17, 480, 832),
    (17, 832, 480),
    (33, 480, 832),
    (49, 320, 576),
    (81, 256, 256),
    (81, 480, 832),
]


def work(bucket):
    frames, height, width = bucket
    tokens = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    return Work(tokens, DEBUG.flops(tokens))


WORKS = [work(b) for b in SIZES]


def test_clips_that_fit_into_the_budget():
    counts = [100_000] * len(SIZES)
    classes = Batching(8, token_budget=32760).classes(counts, WORKS)
    assert sorted(b for c in classes for b in c.buckets) == list(range(len(SIZES)))
    for c in classes:
        assert all(c.clips == max(1, 32760 // WORKS[b].tokens) for b in c.buckets)
        costs = [WORKS[b].flops for b in c.buckets]
        assert max(costs) <= 1.05 * min(costs)
    assert any(set(c.buckets) == {2, 3} for c in classes)  # wide and tall of one area
    # A clip larger than the budget is a micro-batch of its own.
    assert {c.clips for c in Batching(8, token_budget=100).classes(counts, WORKS)} == {1}


def test_a_micro_batch_shrinks_rather_than_repeat_clips_in_a_group():
    few = [20] * len(SIZES)
    by_bucket = {b: c.clips for c in Batching(8, token_budget=32760).classes(few, WORKS) for b in c.buckets}
    assert by_bucket[0] == 20 // 8 and by_bucket[7] == 1 and by_bucket[2] == min(4, 40 // 8)
    assert {c.clips for c in Batching(64, token_budget=32760).classes(few, WORKS)} == {1}
    halves = {
        b: c.clips for c in Batching(8, token_budget=32760, groups_per_step=2).classes(few, WORKS) for b in c.buckets
    }
    assert halves[0] == 20 // 4
    sampler = build_sampler(few, 0, 8, classes=Batching(8, token_budget=32760).classes(few, WORKS))
    for _ in range(50):
        step = next(sampler)
        for bucket in {m.bucket for m in step}:
            drawn = [p for m in step if m.bucket == bucket for p in m.positions]
            assert len(drawn) <= 20


def test_pipelines_have_one_size_and_whole_microbatches():
    classes = Batching(8, token_budget=32760, multiple=2).classes([9] * len(SIZES), WORKS)
    assert all(len(c.buckets) == 1 and c.clips % 2 == 0 and c.clips >= 2 for c in classes)


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_differ_by_a_tenth_at_most_at_each_micro_step(ranks):
    counts = [500, 40, 60, 33, 20, 11, 7, 90]
    classes = Batching(16, token_budget=32760, groups_per_step=2).classes(counts, WORKS)
    sampler = build_sampler(counts, 0, 8, 2, classes=classes)
    spreads, seen = [], set()
    for _ in range(200):
        step = next(sampler)
        for j in range(0, 16, ranks):
            costs = [len(m.positions) * WORKS[m.bucket].flops for m in step[j : j + ranks]]
            spreads.append(max(costs) / min(costs) - 1)
            seen |= {m.bucket for m in step[j : j + ranks]}
    assert sum(spreads) / len(spreads) <= 0.1 and max(spreads) <= 0.1 and len(seen) == len(SIZES)


@pytest.mark.parametrize("ranks, groups", [(2, 1), (8, 2)])
def test_the_plan_prints_this_balance(ranks, groups):
    """The report's numbers for 200 steps are those of training; ranks that draw their buckets independently wait far
    longer for each other.
    """
    sizes, counts = [*SIZES, (17, 480, 848)], [500, 40, 60, 33, 20, 11, 7, 90, 41]  # two that cost about the same
    entries = [
        PlanEntry(f"{b}-{n}.mp4", ("a",), bucket=size, width=size[2], height=size[1], sha256=f"{b}-{n}", pts=(0,))
        for b, size in enumerate(sizes)
        for n in range(counts[b])
    ]
    batching = Batching(16, token_budget=32760, groups_per_step=groups)
    text = report(Plan("", 16, tuple(sizes), tuple(entries)), batching, ranks, work, lambda b: (16, 1, 1, 1), 1)
    numbers = re.findall(r"cost differs by ([0-9.]+)% on average, ranks idle ([0-9.]+)%", text)
    (shared, idle), (alone, idle_alone) = [[float(x) / 100 for x in row] for row in numbers]

    clips = [CachedClip(e.content, ("t",), e.bucket, e.captions, e.path, entry=e) for e in entries]
    draw_plan = DrawPlan(clips, "", batching, work, 0, True, 0.0)
    rows, seen = [], []
    for step in islice(draw_plan.sampler, 200):
        costs = [len(m.positions) * work(draw_plan.sizes[m.bucket]).flops for m in step]
        rows += [costs[i : i + ranks] for i in range(0, 16, ranks)]
        seen += costs
    spread = sum(max(row) / min(row) - 1 for row in rows) / len(rows)
    assert 0 < spread == pytest.approx(shared, abs=6e-4) and shared <= 0.1
    assert 1 - sum(map(sum, rows)) / sum(ranks * max(row) for row in rows) == pytest.approx(idle, abs=6e-4)

    rng = random.Random(0)
    rows = [[rng.choice(seen) for _ in range(ranks)] for _ in range(20000)]
    assert 1 - sum(map(sum, rows)) / sum(ranks * max(row) for row in rows) == pytest.approx(idle_alone, rel=0.2)
    assert alone > 10 * shared and idle_alone > 0.2 > 10 * idle


def test_a_step_may_mix_buckets():
    sampler = build_sampler([50, 50], 1, micro_batches=2, groups=3)
    assert any(len({m.bucket for m in next(sampler)}) == 2 for _ in range(3))
    assert all(len({m.bucket for m in next(build_sampler([50, 50], 1, micro_batches=6))}) == 1 for _ in range(3))


# ---- any number of ranks ----


def test_the_sequence_is_the_same_for_all_pairs_of_degrees():
    """Training on one number of ranks and resuming on another, in mid-epoch and mid-bucket, gives the uninterrupted
    sequence.
    """
    counts = [31, 12, 7, 5, 3, 3, 2, 9]

    def build():
        return build_sampler(
            counts, 0, 8, 2, seed=4, classes=Batching(16, token_budget=32760, groups_per_step=2).classes(counts, WORKS)
        )

    def draw_on_ranks(sampler, degree):
        step = next(sampler)
        ranks = [step[r::degree] for r in range(degree)]
        return [m for micro_step in zip(*ranks, strict=True) for m in micro_step]

    whole = draws(build(), 24)
    for before in (1, 2, 4, 8):
        for after in (1, 2, 4, 8):
            for done in (1, 5, 12):
                first = build()
                found = [m for _ in range(done) for m in draw_on_ranks(first, before)]
                second = build()
                second.reset(json.loads(json.dumps(first.state_dict())))
                found += [m for _ in range(24 - done) for m in draw_on_ranks(second, after)]
                assert found == whole


@pytest.mark.parametrize(
    "sizes, classes, micro_batches, groups",
    [
        ([20], [CostClass((0,), 3)], 2, 1),
        ([20, 7, 1], [CostClass((0,), 2), CostClass((1, 2), 2)], 2, 3),
        ([20, 7, 5], [CostClass((0,), 1), CostClass((1,), 4), CostClass((2,), 3)], 2, 1),
        ([20, 7, 5], [CostClass((0, 2), 1), CostClass((1,), 6)], 1, 2),
    ],
)
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_steps_of_epochs(sizes, classes, micro_batches, groups, epochs):
    """The steps counted without drawing are those in which the sampler draws as many clips, and no fewer would do."""
    sampler = GlobalSampler(sizes, classes, micro_batches, groups, seed=1, shuffle=True)
    steps, before = num_steps(sampler, epochs), sampler.state_dict()
    drawn = []
    for _ in range(steps):
        next(sampler)
        drawn.append(sum(sampler.draws))
    assert drawn[-1] >= epochs * sum(sizes) > (drawn[-2] if steps > 1 else 0)
    group = micro_batches * max(c.clips for c in classes)
    assert all(d >= epochs * size - group for d, size in zip(sampler.draws, sizes, strict=True))
    assert before == GlobalSampler(sizes, classes, micro_batches, groups, seed=1, shuffle=True).state_dict()
