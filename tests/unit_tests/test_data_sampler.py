"""The global sampler: what is drawn, in what order, and that it is a function of its counters."""

import json
from collections import Counter

import pytest

from titan_video.data.sampler import GlobalSampler, fingerprint


def draws(sampler, steps):
    return [sampler.next() for _ in range(steps)]


@pytest.mark.parametrize("sizes, batch", [([10], 4), ([7, 3, 1], 4), ([100, 1], 8), ([2], 5), ([5, 5], 5), ([64], 64)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_of_a_bucket_holds_every_clip_once(sizes, batch, shuffle):
    stream = {b: [] for b in range(len(sizes))}
    ids = []
    for step in draws(GlobalSampler(sizes, batch, 0, shuffle), 300):
        assert len(step.positions) == batch
        stream[step.bucket] += step.positions
        ids += step.sample_ids
    assert ids == list(range(300 * batch))
    for b, size in enumerate(sizes):
        epochs = [stream[b][i : i + size] for i in range(0, len(stream[b]) - size + 1, size)]
        assert epochs and all(sorted(e) == list(range(size)) for e in epochs)
        if not shuffle:
            assert epochs[0] == list(range(size))
        elif size >= 7:
            assert len({tuple(e) for e in epochs}) == len(epochs)


def test_buckets_take_turns_by_their_size():
    sampler = GlobalSampler([60, 30, 10], 5, 0, True)
    drawn = Counter()
    for n, step in enumerate(draws(sampler, 400), 1):
        drawn[step.bucket] += 5
        for bucket, share in enumerate((0.6, 0.3, 0.1)):
            assert abs(drawn[bucket] - share * 5 * n) <= 5
    assert drawn == {0: 1200, 1: 600, 2: 200}


def test_seeds_buckets_and_epochs_have_their_own_order():
    first = draws(GlobalSampler([50, 50], 50, 0, True), 4)
    orders = [tuple(s.positions) for s in first] + [tuple(s.positions) for s in draws(GlobalSampler([50, 50], 50, 1, True), 4)]
    assert len(set(orders)) == 8
    assert draws(GlobalSampler([50, 50], 50, 0, True), 4) == first
    assert draws(GlobalSampler([8], 8, 2**63 - 1, True), 1)[0].positions == [6, 0, 4, 2, 5, 3, 1, 7]  # a resume may meet another numpy


@pytest.mark.parametrize("done", [0, 1, 7, 23])
def test_resume_in_the_middle(done):
    whole = draws(GlobalSampler([11, 4], 6, 3, True, "x"), 40)
    sampler = GlobalSampler([11, 4], 6, 3, True, "x")
    draws(sampler, done)
    state = json.loads(json.dumps(sampler.state_dict()))
    draws(sampler, 5)
    resumed = GlobalSampler([11, 4], 6, 3, True, "x")
    resumed.load_state_dict(state)
    assert draws(resumed, 40 - done) == whole[done:]


def test_resume_with_another_batch_goes_on_with_the_next_clips():
    sampler = GlobalSampler([12], 4, 0, True)
    first = [p for s in draws(sampler, 2) for p in s.positions]
    other = GlobalSampler([12], 2, 0, True)
    other.load_state_dict(sampler.state_dict())
    rest = draws(other, 2)
    assert sorted(first + [p for s in rest for p in s.positions]) == list(range(12)) and rest[0].sample_ids == [8, 9]


def test_other_clips_are_noticed():
    state = GlobalSampler([3], 1, 0, True, fingerprint([["a", "b", "c"]])).state_dict()
    for keys in ([["a", "b", "d"]], [["a", "c", "b"]], [["a", "b"], ["c"]], [["a", "b"]]):
        sampler = GlobalSampler([len(k) for k in keys], 1, 0, True, fingerprint(keys))
        with pytest.raises(ValueError, match="initial_load_path"):
            sampler.load_state_dict(state)


def test_an_empty_bucket_is_refused():
    for sizes in ([], [3, 0]):
        with pytest.raises(ValueError, match="needs a clip"):
            GlobalSampler(sizes, 1, 0, True)
