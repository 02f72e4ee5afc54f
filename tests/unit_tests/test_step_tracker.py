"""The step tracker on steps small enough to count by hand."""

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from titan_video.planner.dry_run.step_tracker import Axis, StepTracker, bytes_sent


def test_storages_are_tracked_until_they_are_freed():
    with FakeTensorMode(), StepTracker({}) as tracker:
        saved = torch.empty(100)  # 400 bytes
        tracker.set_category(saved, "inputs")
        y = saved + 1  # 400
        view = y[:50]
        del y
        z = view.double()  # 400
        del view
        w = z + z  # 400, y has been freed
        del w, z
    peak = tracker.peak()
    assert peak.total == 1200 and peak.at_peak == {"inputs": 400, "temporaries": 800} and peak.largest == peak.at_peak


def test_a_category_applies_from_the_allocation_on():
    """What is alive after forward counts as an activation at the peak inside the forward too."""
    with FakeTensorMode(), StepTracker({}) as tracker:
        saved = torch.empty(100)
        temporary = torch.empty(1000)
        del temporary
        tracker.categorize_live("activations")
        later = torch.empty(10)
    assert tracker.peak().at_peak == {"activations": 400, "temporaries": 4000} and saved.shape != later.shape


def test_a_resized_storage():
    """FSDP frees and allocates gathered weights by resizing their storage."""
    resize = torch.UntypedStorage.resize_
    with FakeTensorMode(), StepTracker({}) as tracker:
        x = torch.empty(100)
        x.untyped_storage().resize_(0)
        y = torch.empty(50)
        x.untyped_storage().resize_(400)
    assert tracker.peak().total == 600 and y.numel() == 50
    assert torch.UntypedStorage.resize_ is resize


def test_flops_of_a_linear_and_of_attention():
    with FakeTensorMode(), StepTracker({}) as tracker:
        tracker.phase = "forward"
        x = nn.Linear(16, 32, bias=False)(torch.empty(1, 8, 16))
        assert tracker.flops == {"forward": 2 * 8 * 16 * 32}
        q = x.view(1, 8, 4, 8).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert tracker.flops["forward"] == 2 * 8 * 16 * 32 + 4 * 8 * 8 * 32
        tracker.phase = "backward"
        out.sum().backward()
        assert tracker.flops["backward"] == 10 * 8 * 8 * 32 + 2 * 8 * 16 * 32  # x needs no gradient


def test_the_body_of_a_custom_operator_is_counted():
    @torch.library.custom_op("titan_video_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return (x + x).clone()

    twice.register_fake(lambda x: torch.empty_like(x))
    totals = []
    for bodies in ({}, {torch.ops.titan_video_test.twice: lambda x: (x + x).clone()}):
        with FakeTensorMode(), StepTracker({}, bodies) as tracker:
            twice(torch.empty(100))
        totals.append(tracker.peak().total)
    assert totals == [800, 1200]


def test_bytes_sent():
    axis = Axis("x", 4, 1)
    assert [
        bytes_sent(kind, 400, axis) for kind in ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "send")
    ] == [300, 300, 300, 600, 400]
    assert bytes_sent("all-to-all", 400, axis, [0, 0, 100, 0]) == 400  # all of it goes to another rank
    assert bytes_sent("all-to-all", 400, axis, [50, 50, 0, 0]) == 200  # half of it stays on this rank
