"""One micro-batch is prepared ahead: the same order, the state of the step given to training; and updates that are left
out on the device.
"""

from dataclasses import dataclass

import pytest
import torch

from tests.unit_tests.test_data_loader import data, make, same, samples  # noqa: F401
from titan_video.data.prefetch import Prefetch, iter_tensors
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.sequence import MAX_CACHED, SequenceShard
from titan_video.distributed.utils import init_distributed
from titan_video.models.layers import positions, rope_freqs_cis, token_shape
from titan_video.training.fault_tolerance import NonFiniteGuard

CPU = torch.device("cpu")


def ids(batch):
    return batch.sample_ids_B.tolist()


def run(loader, num_steps, ahead=True, size=0):
    """(position, ids of each micro-batch) after each step, and the order of preparation and use of micro-batches."""
    events, steps = [], []

    def prepare(batch):
        events.append(("prepare", ids(batch)))
        return batch

    prefetch = Prefetch(loader, num_steps, prepare, CPU, size)
    for _ in range(num_steps):
        batches, used = prefetch.step(), []
        for batch in prefetch.micro_batches(batches):
            events.append(("use", ids(batch)))
            used.append(ids(batch))
        if ahead:
            prefetch.prefetch_next()
        steps.append((loader.state_dict(), loader.samples, used))
    assert prefetch.data_wait_seconds > 0
    return steps, events


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_restart_goes_on_after_the_last_step_given(data, num_workers):  # noqa: F811
    """Also where the following step is there already, and for more steps than were asked for."""
    prefetch = Prefetch(make(data, num_workers=num_workers), 3, lambda batch: batch, CPU)
    reference = [[ids(batch) for batch in step] for step in make(data).steps(8)]
    seen = []
    for number in range(8):
        batches = prefetch.step()
        seen.append([ids(batch) for batch in prefetch.micro_batches(batches)])
        prefetch.prefetch_next()
        if number == 1:
            prefetch.restart(6)
    assert seen == reference and prefetch.loader.samples == 32
    with pytest.raises(TypeError):  # nothing more was asked for
        prefetch.step()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prefetching_changes_neither_steps_nor_state(data, num_workers):  # noqa: F811
    reference, loader = [], make(data)
    for step in loader.steps(5):
        reference.append((loader.state_dict(), loader.samples, [ids(batch) for batch in step]))
    for ahead in (False, True):
        steps, events = run(make(data, num_workers=num_workers), 5, ahead)
        assert steps == reference
    # Each is prepared once, and the first of a step before that step begins.
    order = [micro for _, _, used in reference for micro in used]
    assert (
        [micro for kind, micro in events if kind == "prepare"]
        == [micro for kind, micro in events if kind == "use"]
        == order
    )
    assert [kind for kind, _ in events] == ["prepare", "use"] * len(order)


def test_a_run_resumes_after_the_last_step_given_to_training(data):  # noqa: F811
    whole = make(data)
    expected = [samples(step) for step in whole.steps(6)]
    first = make(data)
    prefetch = Prefetch(first, 6, lambda batch: batch, CPU)
    for _ in range(3):
        prefetch.step()
        prefetch.prefetch_next()
    second = make(data)
    second.load_state_dict(first.state_dict())
    assert all(same(samples(ours), theirs) for ours, theirs in zip(second.steps(3), expected[3:], strict=True))


def test_batches_are_split_for_a_pipeline(data):  # noqa: F811
    (_, _, whole), *_ = run(make(data), 1)[0]
    (_, _, parts), *_ = run(make(data), 1, size=1)[0]
    assert parts == [[i] for batch in whole for i in batch]


def test_tensors_are_found_wherever_they_are():
    @dataclass
    class Inputs:
        x: torch.Tensor
        n: int
        more: dict

    a, b, c, d = torch.arange(4).unbind()
    assert [int(t) for t in iter_tensors([Inputs(a, 3, {"b": b, "none": None, "c": [c]}), (d,)])] == [0, 1, 2, 3]


@pytest.fixture
def one_rank():
    init_distributed(CPU, 60)
    yield SequenceShard.from_meshes(ParallelDims().build_mesh("cpu"))
    torch.distributed.destroy_process_group()


def test_positions_and_rotations_are_made_once_for_each_size(one_rank):
    shapes = [token_shape((frames, 4, 4), (1, 2, 2)) for frames in range(1, MAX_CACHED + 2)]
    kept = one_rank.positions(shapes[0], CPU)
    assert torch.equal(kept, positions(shapes[0])) and one_rank.positions(shapes[0], CPU) is kept
    table = rope_freqs_cis(kept, (4, 2, 2), 1e4)
    assert rope_freqs_cis(kept, (4, 2, 2), 1e4) is table
    assert rope_freqs_cis(kept, (4, 2, 2), 256.0) is not table
    assert torch.equal(rope_freqs_cis(kept.clone(), (4, 2, 2), 1e4), table)
    for shape in shapes[1:]:
        one_rank.positions(shape, CPU)
    assert one_rank.positions(shapes[0], CPU) is not kept  # the oldest went


# ---- updates that are left out ----


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_an_update_that_is_not_finite_leaves_no_trace(implementation):
    def train(numbers):
        p = torch.nn.Parameter(torch.arange(5.0))
        flags = {"fused": implementation == "fused", "foreach": implementation == "foreach"}
        optimizer = torch.optim.AdamW([p], lr=0.1, **flags)
        for i, (loss, norm) in enumerate(numbers):
            p.grad = torch.full((5,), 1.0 + i) if norm == norm else torch.full((5,), norm)
            NonFiniteGuard().update(optimizer, torch.tensor([loss, 1.0, norm]))
            assert not hasattr(optimizer, "found_inf")
        return p.detach(), optimizer.state[p]["step"].item(), optimizer.state[p]["exp_avg"]

    nan, inf = float("nan"), float("inf")
    p, steps, average = train([(1.0, 1.0), (nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, 2.0)])
    assert steps == 2 and p.isfinite().all()
    # As if the three in between had not been.
    q = torch.nn.Parameter(torch.arange(5.0))
    optimizer = torch.optim.AdamW([q], lr=0.1, foreach=False)
    for grad in (1.0, 5.0):
        q.grad = torch.full((5,), grad)
        optimizer.step()
    torch.testing.assert_close(p, q.detach())
    torch.testing.assert_close(average, optimizer.state[q]["exp_avg"])
