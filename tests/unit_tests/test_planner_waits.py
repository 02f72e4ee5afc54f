"""The planner's costs of a host that computes, of waits for other ranks and of updates: a GPU's files have none."""

from dataclasses import replace

import pytest

from tests.unit_tests.test_planner_cost import CANDIDATES, changed, on, traced_model
from titan_video.planner.candidate import Candidate
from titan_video.planner.cluster import load


@pytest.fixture(scope="module")
def traced():
    return traced_model()


def test_launches_add_where_the_host_computes(traced):
    """On a GPU they run beside it."""
    gpu = changed(load("h100x8"), host={"operator_us": 1e-3})
    slow = changed(gpu, host={"operator_us": 2e-3})
    for candidate in (Candidate(), CANDIDATES[2]):
        found = []
        for cluster in (gpu, slow):
            cluster = changed(cluster, gpu={"peak_tflops": 1e-3, "hbm_gb_per_s": 1e-3})
            cpu = changed(cluster, host={"synchronous": True, "collective_us": 1e9})  # part of the collectives' seconds
            found += [on(traced, c).predict(candidate).step_seconds for c in (cluster, cpu)]
        assert found[0] == found[2] < found[1] < found[3]
        assert found[3] - found[1] == pytest.approx(found[1] - found[0], rel=1e-6)


@pytest.mark.parametrize(
    "section, field", [("links", "wait_us"), ("links", "unit_wait_us"), ("host", "tensor_us"), ("host", "operator_us")]
)
def test_waits_add_to_the_step_of_every_layout_that_has_them(section, field, traced):
    """What is waited for is linear in it: twice as much adds twice as much."""
    cluster = changed(load("h100x8"), host={"synchronous": True, "operator_us": 0.0})
    models = [on(traced, changed(cluster, **{section: {field: us}})) for us in (0.0, 1e5, 2e5)]
    for candidate in (Candidate(), *CANDIDATES):
        steps = [model.predict(candidate).step_seconds for model in models]
        is_there = candidate.world_size > 1 or section == "host"
        assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0]) and (steps[1] > steps[0]) == is_there


@pytest.mark.parametrize(
    "candidate, part",
    [
        (Candidate(ulysses=2), "all-to-all"),
        (Candidate(tp=2), "tensor parallel"),
        (Candidate(pp=2, microbatches=4), "pipeline sends"),
    ],
)
def test_each_collective_of_a_block_and_each_send_is_waited_for(candidate, part, traced):
    usual, found = (
        on(traced, changed(load("h100x8"), links={"wait_us": us})).predict(candidate).seconds[part] for us in (0.0, 1e6)
    )
    number = 2 * (4 + 2 - 1)  # of sends, to and fro
    if part != "pipeline sends":
        ops = [op for op in traced.trace(candidate)[0]["blocks"].ops if op.kind == "collective"]
        ends = [op for op in traced.trace(candidate)[1].ops if op.kind == "collective"]
        number = 4 * len(ops) + len(ends)
    assert found - usual == pytest.approx(number)


def test_waits_of_fsdp_are_counted():
    """Of each of 4 blocks two gathers and a reduction; of what is around them (three modules and the root), and of the
    first block once more, a gather and a reduction."""
    model, cluster, candidate = traced_model(), load("h100x8"), Candidate(dp_shard=8)
    parts = [on(model, changed(cluster, links={"unit_wait_us": us})).predict(candidate).seconds for us in (0.0, 1e6)]
    units = model.units(candidate)
    ends = len(units.first) + len(units.last) + 1
    added = {part: parts[1][part] - parts[0][part] for part in ("all-gather", "reduce-scatter")}
    assert added == pytest.approx({"all-gather": 2 * 4 + ends, "reduce-scatter": 4 + ends})
    kept = [
        on(model, changed(cluster, links={"unit_wait_us": us})).predict(replace(candidate, reshard=False)).seconds
        for us in (0.0, 1e6)
    ]
    assert kept[1]["all-gather"] - kept[0]["all-gather"] == pytest.approx(4 + ends)


def test_weights_are_counted(traced):
    """As many tensors as the model has."""
    for candidate in (Candidate(), Candidate(dp_shard=8)):
        steps = [
            on(traced, changed(load("h100x8"), host={"tensor_us": us})).predict(candidate).seconds["optimizer"]
            for us in (0.0, 1e6)
        ]
        assert steps[1] - steps[0] == pytest.approx(sum(1 for _ in traced.tracer.model.parameters()))


def test_the_model_s_own_memory_rate_is_not_that_of_updates(traced):
    cluster = load("h100x8")
    half = changed(cluster, efficiency={"model": cluster.efficiency.copy / 2})
    first, second = (on(traced, c).predict(Candidate()).seconds for c in (cluster, half))
    assert second["memory-bound"] == pytest.approx(2 * first["memory-bound"])
    assert second["optimizer"] == first["optimizer"]


def test_stages_that_take_turns_take_longer(traced):
    """All of a pipeline's stages and its bubble, and nothing else."""
    slow = changed(load("h100x8"), links={"pipeline_slowdown": 2.0})
    for candidate in (*CANDIDATES, Candidate()):
        usual, found = (on(traced, c).predict(candidate).seconds for c in (load("h100x8"), slow))
        rest = {part: seconds for part, seconds in found.items() if part != "pipeline bubble"}
        assert rest == {part: seconds for part, seconds in usual.items() if part != "pipeline bubble"}
        if candidate.pp == 1:
            continue
        stage = max(rank.total for rank in on(traced, slow).clock.ranks(candidate))
        bubble = usual["pipeline bubble"]
        assert found["pipeline bubble"] == pytest.approx(2 * bubble + candidate.microbatches * stage)
