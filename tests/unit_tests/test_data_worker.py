"""Decoding processes: the shared memory they decode into, and what happens when one hangs or dies."""

import os
import signal
import time
from collections import deque

import pytest

from tests.unit_tests.data_clips import captioned, number
from titan_video.ingest import worker
from titan_video.ingest.encode import Decoder, Job
from titan_video.ingest.plan import make_plan
from titan_video.ingest.worker import MAX_BLOCKS, alloc_shared, map_in_workers, release
from titan_video.models.conditioning import TEXT_ONLY


class Filled:
    """(a block full of `index`, whether it was used before)."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __getitem__(self, index):
        known = {b.data_ptr() for b in worker._blocks}
        x = alloc_shared(self.sizes[index])
        assert len(worker._blocks) <= MAX_BLOCKS
        return x.fill_(index), x.data_ptr() in known

    def __len__(self):
        return len(self.sizes)


def read(sizes, held):
    """Take blocks from one worker, check each and release it when `held` later ones have come. Returns how many of them
    were used before.
    """
    waiting, count = deque(), 0
    for index, (x, again) in enumerate(map_in_workers(Filled(sizes), range(len(sizes)), 1)):
        waiting.append((index, x))
        count += again
        if len(waiting) > held:
            k, first = waiting.popleft()
            assert first.numel() == sizes[k] and (first == k).all()
            release(first)
    assert all((x == k).all() for k, x in waiting)
    return count


@pytest.mark.parametrize("held", [0, 1, 2, 40])
def test_what_is_not_released_is_not_overwritten(held):
    again = read([1 << 16] * 40, held)
    if held < 2:
        assert again >= 30
    if held == 40:
        assert again == 0
    read([(3 + k * 5 % 7) << 14 for k in range(40)], held)


def test_in_the_main_process_nothing_is_shared():
    x = alloc_shared(8).fill_(7)
    release(x, None)
    assert not x.is_shared() and (x == 7).all() and not worker._blocks


def test_clips_go_through_it(tmp_path):
    for k in range(6):
        captioned(tmp_path / f"{k}.mp4", count=9 + 2 * k, fps=16)
    plan = make_plan(tmp_path, [(9, 48, 64), (5, 32, 32), (17, 48, 64)], 16, 0, tmp_path / "cache")
    jobs = [[Job((("video", ""),), "", entry)] for entry in plan.kept] * 4
    decoded = map_in_workers(Decoder(TEXT_ONLY), jobs, 1)
    for ((frames_CFHW, _),), (job,) in zip(decoded, jobs, strict=True):
        assert [number(f) for f in frames_CFHW.permute(1, 2, 3, 0).numpy()] == list(range(job.entry.bucket[0]))
        assert frames_CFHW.is_shared()
        release(frames_CFHW)


class Failing:
    """A worker that hangs, or is killed, at item 2."""

    def __init__(self, is_killed):
        self.is_killed = is_killed

    def __getitem__(self, index):
        if index == 2 and self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        elif index == 2:
            time.sleep(600)
        return index


@pytest.mark.parametrize("is_killed, message", [(False, "gave nothing for 2 s"), (True, "exited unexpectedly")])
def test_a_worker_that_hangs_or_dies_is_an_error(monkeypatch, is_killed, message):
    monkeypatch.setattr(worker, "TIMEOUT", 2)
    found = []
    with pytest.raises(RuntimeError, match=message):
        for item in map_in_workers(Failing(is_killed), range(5), 1, prefetch_factor=1):
            found.append(item)
    assert found == [0, 1]


def test_without_workers_items_are_made_in_this_process():
    made = map_in_workers(Filled([4, 4]), [1, 0], 0)
    assert [x.tolist() for x, _ in made] == [[1] * 4, [0] * 4]
