"""How the Triton kernels are laid out on a GPU: sizes of tiles and warps, pipeline stages, and rows per program."""

from functools import cache
from importlib.util import find_spec

import torch

INTERPRETED_PROGRAMS = 3  # where there is no GPU
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


def warps(tile: int) -> int:
    """Warps for a tile of `tile` elements: 8 elements per thread, bfloat16's widest load; at most 16 warps."""
    return min(max(tile // 256, 1), 16)


def stages(row_bytes: int) -> int:
    """Pipeline stages: the row that is computed, and up to two that are prefetched. row_bytes: of all inputs."""
    return 1 + min(SHARED_MEMORY // row_bytes, 2)


def rows_per_program(rows: int, samples: int, num_warps: int, device: torch.device) -> int:
    """Rows of one sample that a program computes, so that all programs fit on the device at once: 32 warps per SM."""
    programs = _num_sms(device) * max(32 // num_warps, 1) if device.type == "cuda" else INTERPRETED_PROGRAMS
    return -(-rows // max(programs // samples, 1))


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
