"""All randomness of the objective, as a function of (seed, sample id).

The state of a rank's generator would make a sample's noise depend on the layout and on earlier draws. Here each draw is
keyed by its purpose, so two layouts, or a run and its resumption, train on the same noise. The generator is Philox
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key = (seed, sample id), and the counter's top word
names the stream. It runs on the host, so CPU and GPU runs agree as well.
"""

import numpy as np
import torch
from torch import Tensor

from titan_video.tools.device import send

_STREAMS = {"noise": 1, "timestep": 2, "caption": 3, "validation": 4, "sampling": 5, "which caption": 6, "image": 7}


def generator(seed: int, sample_id: int, stream: str) -> np.random.Generator:
    """A fresh generator for one purpose of one sample. Both keys are taken modulo 2^64."""
    mask = (1 << 64) - 1
    return np.random.Generator(
        np.random.Philox(key=[seed & mask, sample_id & mask], counter=[0, 0, 0, _STREAMS[stream]])
    )


def draw_noise(
    seed: int, sample_ids_B: Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu", stream: str = "noise"
) -> Tensor:
    """Standard normal noise [B, *shape], float32; row b depends on (seed, sample_ids_B[b], shape) alone."""
    rows = [generator(seed, i, stream).standard_normal(shape, dtype=np.float32) for i in sample_ids_B.tolist()]
    return send(torch.from_numpy(np.stack(rows)), device)


def draw_uniform(seed: int, sample_ids_B: Tensor) -> Tensor:
    """One number per sample in the open interval (0, 1), float64, from which its timestep is made."""
    draws = [generator(seed, i, "timestep").random() for i in sample_ids_B.tolist()]
    return torch.tensor(draws, dtype=torch.float64).clamp_(1e-7, 1 - 1e-7)


def drop_caption(seed: int, sample_id: int, probability: float, stream: str = "caption") -> bool:
    """Whether this draw is trained with the empty caption, or, with the stream "image", without its image."""
    return bool(generator(seed, sample_id, stream).random() < probability)


def choose_caption(seed: int, sample_id: int, count: int) -> int:
    """Which of a clip's captions this draw is trained with, from 0 to count - 1."""
    return int(generator(seed, sample_id, "which caption").random() * count) if count > 1 else 0
