"""Decoding processes: the shared memory they decode into, and what happens when one hangs or dies."""

import os
import re
import signal
import time
from collections import deque

import pytest

from tests.unit_tests.data_clips import captioned, number
from titan_video.ingest.cache.encode import Decoder, Job
from titan_video.ingest.decode import worker
from titan_video.ingest.decode.worker import MAX_BLOCKS, alloc_shared, map_in_workers, release
from titan_video.ingest.files.media import DecodeLimits
from titan_video.ingest.plan.build import make_plan
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


class Viewed(Filled):
    """(a block full of `index`, a view of it), as a clip and its conditioning frame."""

    def __getitem__(self, index):
        x = super().__getitem__(index)[0]
        return x, x[:1]


def test_a_block_that_two_tensors_view_is_given_back_once(monkeypatch):
    """A second time the worker may have decoded another clip into it, and would overwrite that one."""
    give_back, given = worker._give_back, []
    monkeypatch.setattr(worker, "_give_back", lambda storage: (given.append(storage.data_ptr()), give_back(storage)))
    for index, (x, view) in enumerate(map_in_workers(Viewed([1 << 16] * 8), range(8), 1)):
        x[0] = 99
        assert view[0] == 99 and (x[1:] == index).all()
        release(x, view, None)
    assert len(given) == 8


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
    """A data set whose process is killed, stops, or is too slow at items 2 and 5, once or always.

    It stops at item 2 alone: each stop is waited for.
    """

    def __init__(self, folder, how, times=1):
        self.folder, self.how, self.times = folder, how, times

    def __getitem__(self, index):
        if index in items_of(self.how):
            marks = list(self.folder.glob(f"{index}-*"))
            (self.folder / f"{index}-{len(marks)}").touch()
            if len(marks) < self.times:
                self.how()
        return index, os.getpid()

    def name(self, index):
        return f"clips/{index}.mp4"

    def limits(self, index):
        return DecodeLimits(seconds=1.0)


class Replaced(Failing):
    def failed(self, index, reason):
        return index, reason


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def slow():
    time.sleep(60)


def items_of(how):
    return (2,) if how is stopped else (2, 5)


FAULTS = [
    (killed, "crashed: its decoding process ended by SIGKILL"),
    (stopped, "too slow: nothing came for 1 s (data.decode_timeout_seconds)"),
    (slow, "too slow: decoding took more than 1 s (data.decode_timeout_seconds)"),
]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(worker, "GRACE", 1.0)


@pytest.mark.parametrize("how, reason", FAULTS)
def test_a_lost_worker_is_replaced(tmp_path, caplog, how, reason):
    """The items are the same, in the same order; the log names process, file and reason."""
    found = list(map_in_workers(Failing(tmp_path, how), range(8), 2))
    assert [index for index, _ in found] == list(range(8))
    assert os.getpid() not in {pid for _, pid in found} and len({pid for _, pid in found}) > 2
    items = items_of(how)
    for index in items:
        assert re.search(rf"decoding process \d \(pid \d+\) at clips/{index}\.mp4: {re.escape(reason)}", caplog.text)
    assert f"it is replaced, {len(items)} of at most 20 times" in caplog.text


@pytest.mark.parametrize("how, reason", FAULTS[:2])
def test_an_item_that_costs_two_workers_is_given_up(tmp_path, how, reason):
    found = list(map_in_workers(Replaced(tmp_path, how, times=9), range(7), 2, prefetch_factor=3))
    assert [index for index, _ in found] == list(range(7))
    assert [(index, why) for index, why in found if isinstance(why, str)] == [
        (index, reason) for index in items_of(how)
    ]
    assert len(list(tmp_path.iterdir())) == 2 * len(items_of(how))


def test_without_a_result_for_it_the_item_is_an_error_at_its_turn(tmp_path):
    found = []
    with pytest.raises(RuntimeError, match=r"^clips/2.mp4: crashed: .* by SIGKILL$"):
        for index, _ in map_in_workers(Failing(tmp_path, killed, times=9), range(4), 1):
            found.append(index)
    assert found == [0, 1]


def test_restarts_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MAX_RESTARTS", 3)
    with pytest.raises(RuntimeError, match="at clips/[25].mp4: crashed: .* 3 such processes were lost: is the storage"):
        list(map_in_workers(Replaced(tmp_path, killed, times=9), range(8), 2))


class Greedy(Replaced):
    def __init__(self):
        pass

    def __getitem__(self, index):
        x = bytearray(200 << 20) if index == 1 else b""
        return index, len(x)

    def limits(self, index):
        return DecodeLimits(memory_gib=0.1)


def test_memory_of_a_worker_is_bounded():
    (_, zero), (_, reason), (_, again) = map_in_workers(Greedy(), range(3), 1)
    assert (zero, again) == (0, 0)
    assert reason == "too large: decoding needs more than 0.1 GiB of memory (data.decode_memory_gib)"


class Signalled(Filled):
    def __getitem__(self, index):
        os.kill(os.getpid(), [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGUSR1][index])
        return os.getpid()


def test_signals_to_every_process_leave_a_worker_alone():
    """Some schedulers send them so; the trainer decides when its workers end."""
    assert len(set(map_in_workers(Signalled([]), range(4), 1))) == 1


class Raising(Filled):
    def __getitem__(self, index):
        if index == 1:
            raise ValueError("no such package")
        return index


def test_an_error_of_the_data_set_is_raised_at_its_turn():
    made = map_in_workers(Raising([]), range(3), 2)
    assert next(made) == 0
    with pytest.raises(ValueError, match="^no such package$"):
        next(made)


def test_no_worker_is_left(tmp_path):
    made = map_in_workers(Failing(tmp_path, stopped), range(8), 2)
    pids = {next(made)[1], next(made)[1]}
    made.close()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_without_workers_items_are_made_in_this_process():
    made = map_in_workers(Filled([4, 4]), [1, 0], 0)
    assert [x.tolist() for x, _ in made] == [[1] * 4, [0] * 4]
