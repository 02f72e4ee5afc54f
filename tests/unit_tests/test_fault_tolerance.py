"""Numbers that are not finite."""

import pytest

from titan_video.training.fault_tolerance import NonFiniteGuard


def test_nonfinite_stop():
    guard = NonFiniteGuard("stop", 3)
    assert guard.check(1.0, 2.0, 1)
    with pytest.raises(FloatingPointError, match="step 2: loss nan, gradient norm 2.0"):
        guard.check(float("nan"), 2.0, 2)
    with pytest.raises(FloatingPointError, match="step 3: loss 1.0, gradient norm inf"):
        guard.check(1.0, float("inf"), 3)


def test_nonfinite_skip_counts_only_those_in_a_row():
    guard = NonFiniteGuard("skip", 3)
    bad = float("inf")
    assert [guard.check(x, 1.0, i) for i, x in enumerate([bad, bad, 1.0, bad, bad, 1.0])] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert not guard.check(1.0, bad, 7) and not guard.check(1.0, bad, 8)
    with pytest.raises(FloatingPointError, match="step 9.*max_nonfinite_steps"):
        guard.check(1.0, bad, 9)
