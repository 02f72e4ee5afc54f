"""Steps whose numbers are wrong: what is decided, on the device and on the host, and how the clips are named."""

import copy
import json
import random
import statistics

import pytest
import torch

from tests.helpers import run_ranks
from tests.unit_tests.test_data_loader import data, make  # noqa: F401
from titan_video.config.job_config import FaultTolerance
from titan_video.distributed.utils import init_distributed
from titan_video.training import parts
from titan_video.training.fault_tolerance import NonFiniteGuard
from titan_video.training.faults.guard import FaultGuard, limit
from titan_video.training.faults.report import (
    MAX_KEPT,
    MAX_NAMED,
    find_clips,
    read_batches,
    report,
    sample_losses,
    step_clips,
    to_batches,
    to_tensors,
    to_text,
)
from titan_video.training.gradient_check import GradientCheck, describe, digest

NAN, INF = float("nan"), float("inf")


def is_good(guard, loss, norm):
    return guard.is_good(torch.tensor([loss, loss, norm])).item()


@pytest.mark.parametrize("guard", [NonFiniteGuard(), FaultGuard(FaultTolerance(nonfinite="skip"))])
def test_device_and_host_find_the_same(guard):
    for loss, norm in ((1.0, 2.0), (NAN, 2.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (3.4e38, 1.0)):
        fault = guard.check(loss, norm, 7)
        assert is_good(guard, loss, norm) == (not fault)
        assert not fault or fault == f"step 7: loss {loss}, gradient norm {norm} is not finite"


def test_the_default_guard_has_no_state():
    guard = parts.build_guard(FaultTolerance())
    assert type(guard) is NonFiniteGuard and guard.counters() == {}


def test_losses_of_clips_are_kept_until_the_step_is_known_to_be_good():
    guard = NonFiniteGuard()
    loss_B = torch.tensor([1.0, 2.0], requires_grad=True)
    total = guard.sum(1, loss_B)
    assert total.item() == 3 and total.requires_grad and not guard.losses[1].requires_grad
    assert guard.check(NAN, 1.0, 1) and list(guard.losses) == [1]
    assert not guard.check(1.0, 1.0, 2) and guard.losses == {}


def test_skip_counts_only_those_in_a_row():
    guard = parts.build_guard(FaultTolerance(nonfinite="skip", max_nonfinite_steps=3))
    actions = []
    for step, loss in enumerate([INF, INF, 1.0, INF, INF, 1.0, NAN, NAN, NAN]):
        if guard.check(loss, 1.0, step):
            action, words = guard.decide(last_saved=0)
            actions.append((step, action))
    assert actions == [(0, "skip"), (1, "skip"), (3, "skip"), (4, "skip"), (6, "skip"), (7, "skip"), (8, "stop")]
    assert "max_nonfinite_steps" in words and "as in the 2 steps before" in words


def test_rollback_is_bounded_and_needs_a_checkpoint():
    guard = parts.build_guard(FaultTolerance(nonfinite="rollback", max_rollbacks=2))
    for last_saved in (-1, 0):
        action, words = guard.decide(last_saved)
        assert action == "stop" and "no checkpoint yet" in words
    assert [guard.decide(5)[0] for _ in range(3)] == ["rollback", "rollback", "stop"]
    assert "fault_tolerance.max_rollbacks" in guard.decide(5)[1]
    resumed = FaultGuard(FaultTolerance(nonfinite="rollback", max_rollbacks=2))
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.decide(5)[0] == "stop"


# ---- spikes ----

SPIKES = FaultTolerance(spike_deviations=5, spike_window=8)


def feed(guard, values, norm=1.0):
    """The values that are called wrong, and skipped; device and host agree on each."""
    wrong = []
    for step, value in enumerate(values):
        good = is_good(guard, value, norm)
        fault = guard.check(torch.tensor(value).item(), norm, step)
        assert good == (not fault)
        if fault:
            assert guard.decide(0)[0] == "skip"
            wrong.append(value)
    return wrong


def test_the_limit_is_median_and_deviation():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert limit(values, 2.0) == pytest.approx(3 + 2 * 1.4826 * 1.0)
    assert limit([2.0] * 9, 5.0) == pytest.approx(2 + 5 * 0.01 * 2)
    assert limit(values, 2.0) == torch.tensor(limit(values, 2.0)).item()


def test_a_spike_is_skipped_and_does_not_move_the_limit():
    guard = parts.build_guard(SPIKES)
    usual = [1.0, 1.1, 0.9, 1.05, 0.95, 1.2, 0.8, 1.0]
    assert feed(guard, [50.0]) == []  # before there is a history
    assert feed(guard, usual) == []
    limits = guard.limits
    assert feed(guard, [20.0, 30.0]) == [20.0, 30.0] and guard.limits == limits
    assert feed(guard, [1.1, 20.0]) == [20.0]
    assert feed(guard, [1.0], norm=50.0) == [1.0]
    text = guard.check(1.0, 50.0, 9)
    assert text.startswith("step 9: gradient norm 50 is above ") and "5 deviations over the median of 8" in text
    assert feed(guard, [0.001]) == []  # a small loss is none


def test_a_lasting_change_stops_the_run():
    guard = parts.build_guard(FaultTolerance(spike_deviations=5, spike_window=8, max_nonfinite_steps=3))
    assert feed(guard, [1.0] * 8 + [9.0, 9.0]) == [9.0, 9.0]
    assert guard.check(9.0, 1.0, 1) and guard.decide(0)[0] == "stop"


def test_a_number_that_is_not_finite_follows_its_own_policy():
    guard = parts.build_guard(SPIKES)
    feed(guard, [1.0] * 8)
    assert "not finite" in guard.check(NAN, 1.0, 1) and guard.decide(5)[0] == "stop"
    guard.sum(0, torch.ones(2))
    assert guard.check(9.0, 1.0, 1) and guard.decide(5)[0] == "skip" and len(guard.losses) == 1
    assert guard.check(INF, 9.0, 1) and guard.decide(5)[0] == "stop"


def test_without_spike_deviations_nothing_is_a_spike():
    guard = parts.build_guard(FaultTolerance(nonfinite="skip", spike_window=8))
    assert feed(guard, [1.0] * 20 + [1e9]) == [] and guard.state_dict()["history"] == []


def test_the_history_is_saved_exactly():
    guard, rng = parts.build_guard(SPIKES), random.Random(0)
    feed(guard, [torch.tensor(rng.lognormvariate(0, 0.5)).item() for _ in range(20)])
    resumed = parts.build_guard(SPIKES)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.limits == guard.limits and resumed.history == guard.history
    shorter = parts.build_guard(FaultTolerance(spike_deviations=5, spike_window=12))
    shorter.load_state_dict(guard.state_dict())
    assert shorter.limits == (INF, INF)


def test_device_and_host_agree_at_the_limit():
    guard, rng = parts.build_guard(SPIKES), random.Random(1)
    for _ in range(200):
        feed(guard, [torch.tensor(rng.lognormvariate(0, 0.3)).item()])
        if guard.limits[0] < INF:
            at = torch.tensor(guard.limits[0])
            for value in (at, torch.nextafter(at, at * 2), torch.nextafter(at, at * 0)):
                probe = copy.deepcopy(guard)
                assert is_good(probe, value.item(), 1.0) == (not probe.check(value.item(), 1.0, 1)) == (value <= at)
    assert statistics.median(loss for loss, _ in guard.history) < guard.limits[0]


def _other_rounding():
    """Rank 1 has added in another order, and got a number beyond the limit."""
    import torch.distributed as dist

    guard = parts.build_guard(SPIKES)
    for step in range(8):
        guard.check(1.0, 1.0, step)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    at = torch.tensor(guard.limits[0])
    numbers = torch.stack([torch.nextafter(at, at + dist.get_rank()), at, torch.ones(())])
    guard.update(torch.optim.SGD([p], lr=1.0), numbers)
    loss, _, norm = numbers.tolist()
    return p.tolist(), guard.check(loss, norm, 9)


def test_ranks_that_round_otherwise_decide_the_same():
    assert run_ranks(_other_rounding, 2) == [([-1.0, -1.0], "")] * 2


# ---- the clips ----


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_clips_of_a_step_are_those_of_its_batches(data, num_workers):  # noqa: F811
    clips, cache = data
    loader = make(data, total=4, num_workers=num_workers)
    keys = {clip.path: clip.video_key for clip in clips}
    for number, step in enumerate(loader.steps(7)):
        found = step_clips(loader)
        ids = [i for batch in step for i in batch.sample_ids_B.tolist()]
        assert [clip["sample_id"] for clip in found] == ids == list(range(4 * number, 4 * number + 4))
        latents = [x for batch in step for x in batch.streams["video"]]
        for clip, x in zip(found, latents, strict=True):
            assert torch.equal(cache.read("video", keys[clip["path"]]), x)


def test_the_clips_of_other_ranks_are_found_too(data):  # noqa: F811
    loaders = [make(data, total=4, dp_rank=r, dp_size=2) for r in range(2)]
    for steps in zip(*(loader.steps(3) for loader in loaders), strict=True):
        found = [step_clips(loader) for loader in loaders]
        assert found[0] == found[1]
        ids = {i for step in steps for batch in step for i in batch.sample_ids_B.tolist()}
        assert {clip["sample_id"] for clip in found[0]} == ids


def test_bad_clips_are_named_or_all_with_the_largest_loss_first(data):  # noqa: F811
    loader = make(data, total=4)
    step = next(iter(loader.steps(1)))
    size = step[0].streams["video"][0].numel()
    losses = [torch.tensor([1.0, NAN]), torch.tensor([3.0, 2.0])]
    part = sample_losses(losses, step)
    assert part[0] == pytest.approx(1.0 / size) and part[2] == pytest.approx(3.0 / step[1].streams["video"][0].numel())
    clips, is_bad = find_clips(loader, [part, {}])
    assert is_bad and [clip["sample_id"] for clip in clips] == [1]
    assert clips[0]["path"] in to_text(clips, is_bad) and "(sample 1, loss nan)" in to_text(clips, is_bad)
    halves = [{i: i / 2 for i in range(4)}, {i: i / 2 for i in range(4)}]  # of two ranks with half the tokens each
    clips, is_bad = find_clips(loader, halves)
    assert not is_bad and [(clip["sample_id"], clip["loss"]) for clip in clips] == [(3, 3), (2, 2), (1, 1), (0, 0)]
    clips, is_bad = find_clips(loader, [{}, {}])  # nothing is known of the losses
    assert not is_bad and len(clips) == 4
    many = [{"sample_id": i, "path": f"{i}.mp4", "loss": NAN} for i in range(MAX_NAMED + 3)]
    assert to_text(many, True).endswith("and 3 more.") and f"{MAX_NAMED}.mp4" not in to_text(many, True)


def test_batches_are_kept_exactly(data, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    step = next(iter(make(data, total=4).steps(1)))
    step[0].cond = {"image_BSD": torch.rand(2, 3, 4).transpose(1, 2)}
    save_file(to_tensors(step), tmp_path / "x.safetensors")
    again = to_batches(load_file(tmp_path / "x.safetensors"))
    assert len(again) == len(step)
    for ours, theirs in zip(to_tensors(again).items(), to_tensors(step).items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert again[0].cond["image_BSD"].shape == (2, 4, 3)


@pytest.fixture
def alone():
    init_distributed(torch.device("cpu"), 60)
    yield
    torch.distributed.destroy_process_group()


def test_ten_steps_are_kept_and_a_full_disk_is_said(data, tmp_path, alone, monkeypatch):  # noqa: F811
    loader = make(data, total=4)
    for number, batches in enumerate(loader.steps(MAX_KEPT + 2), 1):
        losses = [torch.tensor([NAN, 1.0]), torch.ones(2)]
        text, record = report(tmp_path, number, "it was wrong", losses, batches, loader, None)
        folder = tmp_path / "bad_steps" / f"step-{number}-sample-{4 * number - 4}"
        is_kept = number <= MAX_KEPT
        assert folder.exists() == is_kept == ("titan_video.replay" in text) == ("kept" in record)
        assert is_kept or f"could not be kept: {tmp_path / 'bad_steps'} already holds {MAX_KEPT}" in text
        if number == MAX_KEPT:  # a run that was killed comes to it once more
            assert report(tmp_path, number, "it was wrong", losses, batches, loader, None) == (text, record)
        if number == 2:
            assert record["clips"][0]["loss"] == "nan" and "it was wrong" in (folder / "step.json").read_text()
            kept = read_batches(folder / "rank-0.safetensors")
            assert torch.equal(kept[1].streams["video"], batches[1].streams["video"])
            with monkeypatch.context() as patch:
                patch.setattr(
                    f"{report.__module__}.atomic_write", lambda *args: (_ for _ in ()).throw(OSError("disk full"))
                )
                said = report(tmp_path, 2, "x", losses, batches, loader, None)[0]
                assert "could not be kept: " in said and "disk full" in said


# ---- the check of gradients ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_flipped_bit_changes_the_digest(dtype):
    x = torch.randn(7, 5).to(dtype)
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    before = digest(x).item()
    assert digest(x.clone()).item() == before and digest(x.t().contiguous()).item() != before
    for _ in range(200):
        y = x.clone()
        bits = y.view(-1).view(words)
        place, bit = random.randrange(bits.numel()), random.randrange(8 * x.element_size())
        bits[place] ^= torch.tensor(1 << bit if bit < 8 * x.element_size() - 1 else -(1 << bit)).to(words)
        assert digest(y).item() != before


def test_long_tensors_are_hashed_in_chunks(monkeypatch):
    x = torch.randn(1000)
    monkeypatch.setattr("titan_video.training.gradient_check.CHUNK", 64)
    before = digest(x).item()
    y = x.clone()
    y[[0, 64]] = x[[64, 0]]
    assert digest(x).item() == before and digest(y).item() != before


def test_only_ranks_that_differ_are_named():
    text = describe([[], ["a", "b", "c", "d"], []])
    assert "rank 1 (a, b, c and 1 more)" in text and "rank 0" not in text and "rank 2" not in text


class Runs:
    """Forward and backward of one weight, wrong in some of its runs."""

    def __init__(self, wrong=()):
        self.model, self.count, self.wrong = torch.nn.Linear(4, 4), 0, wrong

    def __call__(self):
        self.count += 1
        loss = self.model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss.detach()


def test_steps_between_run_once(monkeypatch):
    monkeypatch.setattr("titan_video.training.gradient_check.gather_objects", lambda value, group: [value])
    run = Runs()
    check = GradientCheck(3, run.model, None)
    counts = []
    for step in range(1, 7):
        run.model.zero_grad()
        check(step, run)
        counts.append(run.count)
        assert torch.equal(run.model.weight.grad, torch.full((4, 4), 2.0))  # of one run, not two
    assert counts == [1, 2, 4, 5, 6, 8]
    assert (
        parts.build_gradient_check(type("Debug", (), {"verify_every": 0}), run.model, None)(1, run) is not None
        and run.count == 9
    )
