"""Choice of the device, the table of peak speeds, memory."""

import multiprocessing
import time

import pytest
import torch

from tests.helpers import run_ranks
from titan_video.tools import device as dev


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peak_by_name(name, tflops):
    assert dev._peak_by_name(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name", ["Some GPU 9000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_unknown_devices_have_no_peak(name):
    assert dev._peak_by_name(name) is None


def test_cpu():
    cpu = torch.device("cpu")
    assert dev.peak_flops(cpu) is None
    dev.synchronize(cpu)
    memory = dev.DeviceMemory(cpu)
    memory.reset_peak()
    before = memory.stats()
    assert 0 < before.max_active_gib < memory.capacity / 2**30 and 0 < before.max_active_pct < 100


def peaks():
    """Before and after 256 MiB were touched."""
    before, x = dev._peak_resident_bytes(), bytearray(b"x") * 2**28
    return before, dev._peak_resident_bytes(), len(x)


def test_resident_peak_counts_what_was_touched():
    ((before, after, size),) = run_ranks(peaks, 1, init=False)
    assert size * 0.9 < after - before < size * 1.2


def resident():
    """Of a process: at first, with 256 MiB touched, with a child as well, and after the child has ended."""
    found, x = [dev.resident_memory()], bytearray(b"x") * 2**28
    found.append(dev.resident_memory())
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    found.append(dev.resident_memory())
    child.kill()
    child.join()
    return [*found, dev.resident_memory(), len(x)]


def test_resident_memory_of_this_process_and_its_workers():
    ((first, touched, with_child, last, _),) = run_ranks(resident, 1, init=False)
    assert first.keys() == touched.keys() == last.keys() == {"resident_gib"}
    assert 0.2 < touched["resident_gib"] - first["resident_gib"] < 0.3
    assert 0 < with_child["workers_resident_gib"] < 1


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    assert dev.get_device(1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="NGPU to at most 2"):
        dev.get_device(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_peak():
    device = dev.get_device(0)
    memory = dev.DeviceMemory(device)
    memory.reset_peak()
    before = memory.stats()
    torch.ones(2**28, device=device)
    dev.synchronize(device)
    after = memory.stats()
    assert (
        after.max_active_gib - before.max_active_gib == pytest.approx(1, abs=0.01)
        and after.max_reserved_gib >= after.max_active_gib
    )
