"""The debug encoders with another video transform: for one-coloured shapes on grey, the outline apart from the colour.

The three colours of a pixel are its deviation from a fixed grey: a length, which draws the outline, and a direction,
the hue. Each block of 4 x 8 x 8 pixels keeps one hue and 13 coefficients of the lengths in an orthonormal 3-D cosine
basis (DCT). The transform of debug.py spends its 16 coefficients on each colour axis anew, so that little of an outline
is left, and that depends on the colour. As in Wan the first frame is a block of its own; it does not move, and so has
more coefficients in space. What is of several colours in a block gets their mean hue.

Shapes: as in debug.py; K values of one block's lengths (4 x 8 x 8).
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from titan_video.config.job_config import Encoder
from titan_video.encoders.debug import DebugEncoders, as_blocks, cosines

GREY = 64 / 127.5 - 1  # the background of the embedded clips
HUE = 3  # channels; the coefficients follow
SMALL = 0.05  # a block's mean length at which its hue has half its strength, so that a grey one has none
VERSION = 1

# (order in time, in height, in width), mean and standard deviation over the large embedded shapes.
HUES = ((0.1, 0.3), (0.1, 0.28), (0.05, 0.25))
FIRST = (
    ((0, 0, 0), 3.5, 7.0),
    ((0, 0, 1), 0.0, 2.1),
    ((0, 0, 2), 0.0, 0.9),
    ((0, 1, 0), 0.0, 2.1),
    ((0, 1, 1), 0.0, 0.8),
    ((0, 2, 0), 0.0, 0.9),
    ((0, 0, 3), 0.0, 0.55),
    ((0, 0, 4), 0.0, 0.35),
    ((0, 1, 2), 0.0, 0.55),
    ((0, 1, 3), 0.0, 0.4),
    ((0, 2, 1), 0.0, 0.4),
    ((0, 3, 0), 0.0, 0.55),
    ((0, 4, 0), 0.0, 0.4),
)
LATER = (
    ((0, 0, 0), 3.5, 7.0),
    ((0, 0, 1), 0.0, 1.8),
    ((0, 0, 2), 0.0, 0.6),
    ((0, 1, 0), 0.0, 1.8),
    ((0, 1, 1), 0.0, 0.5),
    ((0, 2, 0), 0.0, 0.6),
    ((1, 0, 0), 0.0, 2.0),
    ((1, 0, 1), 0.0, 0.95),
    ((1, 1, 0), 0.0, 0.95),
    ((1, 1, 1), 0.0, 0.5),
    ((2, 0, 0), 0.0, 0.55),
    ((2, 0, 1), 0.0, 0.55),
    ((2, 1, 0), 0.0, 0.55),
)


class DebugOutlinesEncoders(DebugEncoders):
    """See `encoders.spec.Encoders` and, for texts and image tokens, `DebugEncoders`."""

    def __init__(self, max_text_length: int):
        super().__init__(max_text_length)
        self.first, self.later = Basis(FIRST), Basis(LATER)

    def video_id(self) -> str:
        return f"debug-outlines-video-{VERSION}"

    def encode_video(self, frames_BCFHW: Tensor) -> Tensor:
        """As `DebugEncoders.encode_video`."""
        x_BFHWCK = as_blocks(frames_BCFHW).unflatten(-1, (3, -1)) - GREY
        length_BFHWK = x_BFHWCK.norm(dim=-2)
        hue_BFHWC = x_BFHWCK.mean(-1) / (length_BFHWK.mean(-1, keepdim=True) + SMALL)
        first = self.first.encode(hue_BFHWC[:, :1], length_BFHWK[:, :1])
        later = self.later.encode(hue_BFHWC[:, 1:], length_BFHWK[:, 1:])
        return torch.cat([first, later], dim=1).permute(0, 4, 1, 2, 3).contiguous()

    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """As `DebugEncoders.decode_video`."""
        if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != self.channels:
            raise ValueError(f"latents must be [B, {self.channels}, F, H, W], got {list(latents_BCFHW.shape)}")
        x_BFHWC = latents_BCFHW.float().permute(0, 2, 3, 4, 1)
        first, later = self.first.decode(x_BFHWC[:, :1]), self.later.decode(x_BFHWC[:, 1:])
        blocks = "b f h w c (t y x) -> b c (f t) (h y) (w x)"
        x_BCFHW = rearrange(torch.cat([first, later], dim=1), blocks, t=4, y=8, x=8)
        x_BCFHW = torch.cat([x_BCFHW[:, :, :1], x_BCFHW[:, :, 4:]], dim=2) + GREY
        return ((x_BCFHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Basis:
    """Hue and lengths of blocks to 16 normalised channels, and back."""

    def __init__(self, coefficients: Sequence[tuple[tuple[int, int, int], float, float]]):
        time, space = cosines(4), cosines(8)
        rows = [np.einsum("t,h,w->thw", time[t], space[h], space[w]).ravel() for (t, h, w), _, _ in coefficients]
        numbers = [*HUES, *((mean, std) for _, mean, std in coefficients)]
        self.rows_CK = torch.tensor(np.stack(rows), dtype=torch.float32)
        self.mean_C, self.std_C = torch.tensor(numbers).unbind(1)

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows_CK.to(device), self.mean_C.to(device), self.std_C.to(device)

    def encode(self, hue_BFHWC: Tensor, length_BFHWK: Tensor) -> Tensor:
        """Channels last."""
        rows_CK, mean_C, std_C = self._tensors(hue_BFHWC.device)
        return (torch.cat([hue_BFHWC, length_BFHWK @ rows_CK.T], dim=-1) - mean_C) / std_C

    def decode(self, x_BFHWC: Tensor) -> Tensor:
        """Deviations from grey [B, F, H, W, 3, K]."""
        rows_CK, mean_C, std_C = self._tensors(x_BFHWC.device)
        hue_BFHWC, coefficients = (x_BFHWC * std_C + mean_C).split([HUE, len(rows_CK)], dim=-1)
        direction = hue_BFHWC / hue_BFHWC.norm(dim=-1, keepdim=True).clamp_min(SMALL)
        return direction.unsqueeze(-1) * (coefficients @ rows_CK).clamp_min(0).unsqueeze(-2)


def build(section: Encoder, hf_assets_path: str, device: torch.device | str) -> DebugOutlinesEncoders:
    return DebugOutlinesEncoders(section.max_text_length)
