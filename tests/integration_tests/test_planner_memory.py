"""The planner's memory against dry runs, and the dry run against torch's own counter of an FSDP2 step."""

from dataclasses import replace

import pytest

from benchmarks import planner_memory, planner_memtracker
from benchmarks.planner_memory import FLAVOR, Case, compare, configure, few_blocks
from titan_video.config.job_config import JobConfig
from titan_video.models import get_spec
from titan_video.planner.candidate import FULL, NONE, Candidate, Checkpointing, Range

ATTENTION = Checkpointing("selective", ("attention", "down"))
EXCHANGE = Checkpointing("selective", ("attention", "exchange"))
INTERLEAVED = "Interleaved1F1B"
BUCKET, SHORT = (33, 480, 832), (1, 480, 832)


@pytest.mark.parametrize(
    "family, flavor, candidate, mode, stage, load, bucket",
    [
        # With as many text tokens as video tokens.
        ("hunyuan_video", "t2v-13B", Candidate(ring=2, tp=4, local_batch_size=16), FULL, 0, 1, SHORT),
        # Stages whose first backward comes when all micro-batches are in flight, and there is no gradient.
        ("wan", "t2v-1.3B", Candidate(pp=2, dp_shard=4, microbatches=2), NONE, 0, 1, SHORT),
        ("wan", "t2v-1.3B", Candidate(pp=2, ring=2, microbatches=2, schedule=INTERLEAVED), NONE, 0, 1, SHORT),
        # What is summed over the replicas is kept for all units.
        ("hunyuan_video", "t2v-13B", Candidate(dp_replicate=2, dp_shard=2, tp=2, microbatches=2), FULL, 0, 1, SHORT),
        ("wan", "t2v-1.3B", Candidate(dp_replicate=2, ulysses=2), ATTENTION, 0, 1, BUCKET),
        ("wan", "t2v-1.3B", Candidate(pp=2, dp_shard=2, tp=2, microbatches=4), FULL, 1, 1, BUCKET),
        ("hunyuan_video", "t2v-13B", Candidate(ring=4, microbatches=2), NONE, 0, 1, BUCKET),
        ("wan", "moe-14B-shared", Candidate(dp_shard=2, ring=2, tp=2, ep=8), NONE, 0, 1.5, BUCKET),
        *(
            pytest.param("wan", *case, BUCKET, marks=pytest.mark.slow)
            for case in (
                ("moe-14B-copies", Candidate(ulysses=8, ep=8), FULL, 0, 1),
                ("moe-1.3B", Candidate(dp_shard=4), NONE, 0, 1),
                ("moe-1.3B", Candidate(dp_shard=4, ep=2), NONE, 0, 1),
                ("moe-1.3B", Candidate(ulysses=4, ep=4), FULL, 0, 1.5),
                ("moe-1.3B", Candidate(ulysses=2, tp=2), FULL, 0, 1),
                ("moe-1.3B", Candidate(ulysses=2, tp=2, ep=4), ATTENTION, 0, 1),
                ("moe-1.3B", Candidate(dp_replicate=2, dp_shard=4, ep=2, microbatches=2), EXCHANGE, 0, 1),
                ("moe-14B-shared", Candidate(dp_shard=2, ring=2, tp=2), ATTENTION, 0, 1),
                ("moe-14B-shared", Candidate(dp_shard=2, ulysses=4, ep=4), FULL, 0, 1),
                ("moe-14B-copies", Candidate(dp_shard=2, ulysses=4, ep=2), ATTENTION, 0, 1),
                ("moe-14B-copies", Candidate(pp=2, dp_shard=2, ulysses=2, ep=4, microbatches=4), FULL, 0, 1),
                ("moe-14B-copies", Candidate(pp=2, dp_shard=2, ulysses=2, ep=4, microbatches=4), FULL, 1, 1),
            )
        ),
    ],
    ids=str,
)
def test_memory_is_that_of_a_dry_run(family, flavor, candidate, mode, stage, load, bucket, monkeypatch):
    """load: of the rank's experts / mean, in both."""
    spec = get_spec(family)
    monkeypatch.setitem(spec.flavors, FLAVOR, few_blocks(spec.flavors[flavor], 2 if family != "wan" else 4))
    config = JobConfig()
    config = replace(
        config,
        model=replace(config.model, name=family, flavor=FLAVOR),
        data=replace(config.data, buckets=(bucket,)),
        encoder=replace(config.encoder, max_text_length=256),
    )
    candidate = replace(candidate, ranges=(Range(0, 4, mode),))
    row = compare(Case(family, flavor, configure(config, candidate, 4), candidate, stage, load))
    assert abs(row.error) < planner_memory.LIMIT, row.by_kind


@pytest.mark.parametrize(
    "candidate, mode",
    [
        pytest.param(Candidate(dp_shard=4, ep=4), NONE, marks=pytest.mark.slow),
        (Candidate(ulysses=2, tp=2, ep=2), FULL),
    ],
    ids=str,
)
def test_busier_experts_need_as_much_more_as_in_a_dry_run(candidate, mode, monkeypatch):
    spec = get_spec("wan")
    monkeypatch.setitem(spec.flavors, FLAVOR, spec.flavors["moe-debug"])
    candidate = replace(candidate, ranges=(Range(0, 4, mode),))
    config = JobConfig()
    config = replace(
        config,
        model=replace(config.model, name="wan", flavor=FLAVOR),
        data=replace(config.data, buckets=((33, 480, 832),)),
        encoder=replace(config.encoder, max_text_length=256),
    )
    config = configure(config, candidate, 4)
    even, busy = (compare(Case("wan", "moe-debug", config, candidate, 0, load)) for load in (1, 1.5))
    assert busy.counted > 1.03 * even.counted
    assert busy.predicted - even.predicted == pytest.approx(busy.counted - even.counted, rel=0.01)


@pytest.mark.slow
def test_memory_of_sixty_random_candidates():
    rows = planner_memory.run(60, seed=0, blocks=4)
    wrong = [(row.case.flavor, row.case.layout, row.case.modes, row.error) for row in rows if abs(row.error) > 0.05]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("job", planner_memtracker.JOBS, ids=str)
def test_dry_run_is_torch_s_own_count(job):
    theirs = planner_memtracker.by_torch(job)
    assert planner_memtracker.by_dry_run(job) == pytest.approx(theirs, rel=0.05)
