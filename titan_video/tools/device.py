"""The device of this process: which one it is, its peak speed, its memory."""

import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Dense bfloat16 tensor-core TFLOP/s with float32 accumulation, from the vendors' data sheets (half of the figure "with
# sparsity"). The first entry applies that has all of its words in the device's name.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.5),
    ("GH200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("H800", 989.5),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),  # one of the module's two dies, each a device of its own
)


def get_device(local_rank: int) -> torch.device:
    """GPU number `local_rank` of this machine, which becomes the current device; the CPU if there are no GPUs.

    ValueError: there are GPUs, but fewer than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are visible. "
            f"Set NGPU to at most {torch.cuda.device_count()}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on CPU."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_deterministic() -> None:
    """Bitwise repeatable operators, or an error where torch has none; slower."""
    # cuBLAS is deterministic only with this, and reads it at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of the device; None if it is not known, as for a CPU."""
    return _peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak_by_name(name: str) -> float | None:
    # Compare whole words: "H20" must not match "H200", nor "A10" match "A100".
    words = set(name.replace("-", " ").split())
    if words & {"MIG", "Laptop"}:  # a slice, or a slower chip, under the same name
        return None
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS if set(key.split()) <= words), None)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy x from the host to the device without host-device synchronisation: a copy to a GPU is from pinned memory."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def read(numbers: Tensor) -> list[float]:
    """Copy numbers to the host. This is a host-device synchronisation; a step makes one, at its end."""
    return numbers.tolist()


def synchronize(device: torch.device) -> None:
    """Wait for all queued work of the device. A CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class MemoryStats:
    """Peaks, in GiB and in percent of the device's memory. On CPU both are the peak resident set of the process."""

    max_active_gib: float
    max_active_pct: float
    max_reserved_gib: float
    max_reserved_pct: float
    num_alloc_retries: int
    num_ooms: int


class DeviceMemory:
    """Memory peaks of the device since the last `reset_peak`."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.capacity = torch.cuda.get_device_properties(device).total_memory
        else:
            self.capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def stats(self) -> MemoryStats:
        if self.device.type == "cuda":
            s = torch.cuda.memory_stats(self.device)
            active, reserved = s.get("active_bytes.all.peak", 0), s.get("reserved_bytes.all.peak", 0)
            retries, ooms = s.get("num_alloc_retries", 0), s.get("num_ooms", 0)
        else:
            active = reserved = _peak_resident_bytes()
            retries = ooms = 0
        gib, pct = 2**30, self.capacity / 100
        return MemoryStats(active / gib, active / pct, reserved / gib, reserved / pct, retries, ooms)

    def reset_peak(self) -> None:
        """Start a new peak. On CPU this does nothing: the system has one peak for the life of the process."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def resident_memory() -> dict[str, float]:
    """Resident host memory in GiB: of this process, and the sum over its worker processes, which share much of it.

    Empty on systems without /proc.
    """
    this_process = _resident_bytes(os.getpid())
    workers = [_resident_bytes(process.pid) for process in multiprocessing.active_children()]
    if not this_process:
        return {}
    found = {"resident_gib": this_process / 2**30}
    return found | {"workers_resident_gib": sum(workers) / 2**30} if workers else found


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # no such file system, or a process that has ended
        return 0


def _peak_resident_bytes() -> int:
    try:
        # Not getrusage: after a fork it still reports the parent's peak.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
