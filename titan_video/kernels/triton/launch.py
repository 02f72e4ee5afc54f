"""How the Triton kernels are laid out on a GPU: warps, pipeline stages, and as many programs as fit on it at once."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

INTERPRETED_PROGRAMS = 4  # where there is no GPU
SHARED_MEMORY = 128 * 1024  # bytes per SM for prefetched rows; an SM of Hopper has 227 KB


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: TRITON_INTERPRET=1 was set when Triton was imported."""
    if find_spec("triton") is None:
        return False
    from triton.runtime import JITFunction

    from titan_video.kernels.triton.rms_norm_kernels import rms_norm_forward

    return not isinstance(rms_norm_forward, JITFunction)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()


def warps(tile: int, backward: bool, most: int = 8) -> int:
    """Warps for a row of `tile` elements, at most `most`.

    What a warp issues for a row beside its elements, reductions above all, costs more than memory does: so a thread has
    32 elements. In backward 16: its sums over rows take as many registers again.
    """
    return min(max(tile // (512 if backward else 1024), 1), most)


def stages(row_bytes: int) -> int:
    """Pipeline stages: the row that is computed, and up to two that are prefetched. row_bytes: of all inputs."""
    return 1 + min(SHARED_MEMORY // row_bytes, 2)


def num_programs(kernel: Any, args: tuple, constants: dict[str, Any], device: torch.device) -> int:
    """How many programs of this launch the device holds at once: one wave, whose programs divide the rows evenly."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    key = kernel, tuple(map(_specialisation, args)), tuple(constants.items())
    if key not in _num_programs:
        compiled = kernel.warmup(*args, grid=(1,), **constants)
        compiled._init_handles()  # loads it, which counts its registers
        gpu = torch.cuda.get_device_properties(device)
        limits = gpu.regs_per_multiprocessor, gpu.shared_memory_per_multiprocessor, gpu.max_threads_per_multi_processor
        fitting = residency(compiled.n_regs, compiled.metadata.shared, constants["num_warps"], limits)
        _num_programs[key] = gpu.multi_processor_count * fitting
    return _num_programs[key]


_num_programs: dict[tuple, int] = {}


def residency(
    registers: int, shared: int, num_warps: int, limits: tuple[int, int, int] = (65536, 228 * 1024, 2048)
) -> int:
    """Programs that fit on an SM. registers: of a thread; shared: bytes of a program.

    limits: registers, bytes of shared memory and threads of an SM; of Hopper unless given.
    """
    threads = 32 * num_warps
    by_registers = limits[0] // (threads * -(-registers // 8) * 8)  # they are given out by eights
    by_shared = limits[1] // (shared + 1024)  # a program takes 1 KB for itself
    return max(min(by_registers, by_shared, limits[2] // threads, 32), 1)


def _specialisation(argument: Any) -> Any:
    """What Triton compiles a kernel apart for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument
