"""benchmarks/planner_here.py: its cases are runs of ours, and its numbers are right."""

from types import SimpleNamespace

import pytest

from benchmarks.planner_here import CASES, CLIPS, WARM_UP, main, ranks, report, spearman
from titan_video.config.check import check
from titan_video.config.manager import parse_args
from titan_video.planner.plan_file import to_candidate


def test_cases_are_twelve_layouts_of_one_step():
    configs = [parse_args(case.arguments()) for case in CASES]
    for case, config in zip(CASES, configs, strict=True):
        check(config, case.world_size)
        candidate = to_candidate(config, case.world_size, num_blocks=4)
        assert candidate.num_training_ranks == case.world_size
        assert candidate.local_batch_size * candidate.microbatches * candidate.dp == CLIPS
    candidates = {to_candidate(config, case.world_size, 4) for case, config in zip(CASES, configs, strict=True)}
    assert len(candidates) == len({case.name for case in CASES}) == 12
    assert {case.world_size for case in CASES} == {1, 2, 4}


def test_rank_correlation():
    assert ranks([3.0, 1.0, 2.0]) == [3, 1, 2] and ranks([1.0, 1.0, 0.0]) == [2.5, 2.5, 1]
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0]) == pytest.approx(1)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # By hand: the sum of squared differences of ranks is 2, and 1 - 6 x 2 / (4 (16 - 1)) = 0.8.
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "factors, expected", [([1.0] * 12, "1.000 (bar 0.85, reached)"), (range(12, 0, -1), "-1.000 (bar 0.85, missed)")]
)
def test_the_report(factors, expected):
    measured = {case.name: 0.1 * (i + 1) for i, case in enumerate(CASES)}
    predicted = {
        case.name: SimpleNamespace(step_seconds=factor * measured[case.name] if expected.startswith("1") else factor)
        for case, factor in zip(CASES, factors, strict=True)
    }
    text = report(predicted, measured)
    assert expected in " ".join(text.split()) and text.count("\n| ") == 12
    first = CASES[0] if expected.startswith("1") else CASES[-1]
    assert f"first choice, {first.name}, takes {0.0 if first is CASES[0] else 1100.0} % longer" in " ".join(
        text.split()
    )


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", str(WARM_UP)])
    assert f"more than {WARM_UP}" in capsys.readouterr().err
