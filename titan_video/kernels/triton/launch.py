"""How the Triton kernels are laid out on a GPU:

sizes of tiles and groups of threads, and how many programs share the rows.
"""

from functools import cache
from importlib.util import find_spec

import torch

INTERPRETED_PROGRAMS = 3  # where there is no GPU
SHARED_MEMORY = 128 * 1024  # bytes of an SM, which on Hopper has 227 KB, for rows on their way


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on the CPU: TRITON_INTERPRET=1 when it was imported."""
    if find_spec("triton") is None:
        return False
    from triton.runtime import JITFunction

    from titan_video.kernels.triton.rms_norm_kernels import rms_norm_forward

    return not isinstance(rms_norm_forward, JITFunction)


def power_of_2(n: int) -> int:
    """The first that is not less than n."""
    return 1 << (n - 1).bit_length()


def warps(tile: int) -> int:
    """Groups of 32 threads for a tile of so many elements: 8 elements a thread, or 16 of the widest.

    Of bfloat16, 8 are the widest load.
    """
    return min(max(tile // 256, 1), 16)


def stages(row_bytes: int) -> int:
    """Rows that a program has in hand: the one it computes with, and up to two on their way. row_bytes:

    of all inputs, of one row.
    """
    return 1 + min(SHARED_MEMORY // row_bytes, 2)


def run_length(rows: int, samples: int, num_warps: int, device: torch.device) -> int:
    """Rows of one sample that a program takes, so that all programs of all samples find room on the device at once:

    32 warps on each SM.
    """
    programs = _num_sms(device) * max(32 // num_warps, 1) if device.type == "cuda" else INTERPRETED_PROGRAMS
    return -(-rows // max(programs // samples, 1))


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
