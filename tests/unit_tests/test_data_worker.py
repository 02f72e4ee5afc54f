"""The memory that workers decode into."""

from collections import deque

import pytest
import torch
from torch.utils.data import DataLoader

from tests.unit_tests.data_clips import captioned, number
from titan_video.data import worker
from titan_video.data.worker import ALIGNMENT, BUFFERS, buffer, pack, release, set_up_worker, unpack
from titan_video.ingest.encode import Decoder, Job
from titan_video.ingest.plan import make_plan
from titan_video.models.conditioning import TEXT_ONLY


class Filled:
    """(a buffer full of `index`, whether it was in use before)."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __getitem__(self, index):
        known = {b.data_ptr() for b in worker._buffers}
        x = buffer(self.sizes[index])
        assert len(worker._buffers) <= BUFFERS
        return x.fill_(index), x.data_ptr() in known

    def __len__(self):
        return len(self.sizes)


def read(sizes, held):
    """Take buffers from one worker, look at each and let go of it when `held` later ones have come; how many were used
    again.
    """
    waiting, count = deque(), 0
    for index, (x, again) in enumerate(
        DataLoader(Filled(sizes), batch_size=None, num_workers=1, worker_init_fn=set_up_worker)
    ):
        waiting.append((index, x))
        count += again
        if len(waiting) > held:
            k, first = waiting.popleft()
            assert first.numel() == sizes[k] and (first == k).all()
            release(first)
    assert all((x == k).all() for k, x in waiting)
    return count


@pytest.mark.parametrize("held", [0, 1, 2, 40])
def test_what_is_not_let_go_is_not_overwritten(held):
    again = read([1 << 16] * 40, held)
    if held < 2:
        assert again >= 30
    if held == 40:
        assert again == 0
    read([(3 + k * 5 % 7) << 14 for k in range(40)], held)


def test_in_the_main_process_nothing_is_shared():
    x = buffer(8).fill_(7)
    release(x, None)
    assert not x.is_shared() and (x == 7).all() and not worker._buffers


def test_clips_go_through_it(tmp_path):
    for k in range(6):
        captioned(tmp_path / f"{k}.mp4", count=9 + 2 * k, fps=16)
    plan = make_plan(tmp_path, [(9, 48, 64), (5, 32, 32), (17, 48, 64)], 16, 0, tmp_path / "cache")
    jobs = [[Job((("video", ""),), "", entry)] for entry in plan.kept] * 4
    given = DataLoader(Decoder(TEXT_ONLY), batch_size=None, sampler=jobs, num_workers=1, worker_init_fn=set_up_worker)
    for ((frames_CFHW, _),), (job,) in zip(given, jobs, strict=True):
        assert [number(f) for f in frames_CFHW.permute(1, 2, 3, 0).numpy()] == list(range(job.entry.bucket[0]))
        assert frames_CFHW.is_shared()
        release(frames_CFHW)


def test_pack_and_unpack():
    given = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "b": torch.tensor([True, False]),
        "c": {"d": torch.arange(7), "e": torch.empty(0, 4)},
        "f": torch.randn(4, 6).T,
        "g": torch.tensor(2.5),
    }
    whole, layout = pack(given)
    found = unpack(whole, layout)
    for x, y in ((given[k], found[k]) for k in "abfg"):
        assert (
            x.dtype == y.dtype
            and torch.equal(x, y)
            and y.is_contiguous()
            and y.data_ptr() % ALIGNMENT == whole.data_ptr() % ALIGNMENT
        )
    assert list(found) == list(given) and found["c"]["d"].tolist() == list(range(7)) and found["c"]["e"].shape == (0, 4)
    assert whole.is_shared() and whole.dtype == torch.uint8 and unpack(*pack({})) == {}


def test_what_pinning_makes_of_it_is_unpacked_too(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *args: x.clone())
    given = {"a": torch.randn(3, 5), "b": {"c": torch.arange(4).view(2, 2)}}
    whole, layout = pin_memory(pack(given))
    found = unpack(whole, layout)
    assert (
        torch.equal(found["a"], given["a"])
        and torch.equal(found["b"]["c"], given["b"]["c"])
        and not found["a"].is_shared()
    )
