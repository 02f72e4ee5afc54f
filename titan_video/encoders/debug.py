"""Encoders that need no weights: a fixed video transform with the geometry of Wan's VAE, and hashed words.

Video: each block of 4 x 8 x 8 pixels is expanded in an orthonormal 3-D cosine basis (DCT) over three colour axes:
brightness, blue against yellow, red against green. The 16 coefficients that hold most of the energy of simple clips are
kept. As in Wan the first frame is a block of its own, coded as 4 equal frames. The basis is orthonormal, so decoding is
the transpose.

Text: each word is a fixed random vector, keyed by the hash of the word.

Image tokens: a random projection of each of 16 x 16 patches after one token of the whole image, as many as CLIP has.
A text can begin with them too.

Shapes: B batch, C latent channels, F H W frames, height, width, K values of one block (3 x 4 x 8 x 8), D width,
L tokens.
"""

import hashlib
import string

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from titan_video.config.job_config import Encoder

# (colour, order in time, in height, in width), mean and standard deviation over shapes and ordinary clips.
# Colours: 0 brightness, 1 blue against yellow, 2 red against green.
COEFFICIENTS = (
    ((0, 0, 0, 0), -10.0, 6.0),
    ((0, 0, 0, 1), 0.0, 1.6),
    ((0, 0, 1, 0), 0.0, 1.6),
    ((0, 0, 0, 2), 0.0, 0.7),
    ((0, 0, 2, 0), 0.0, 0.6),
    ((0, 1, 0, 0), 0.0, 0.7),
    ((0, 1, 0, 1), 0.0, 0.4),
    ((0, 1, 1, 0), 0.0, 0.4),
    ((1, 0, 0, 0), -0.5, 2.6),
    ((1, 0, 0, 1), 0.0, 0.7),
    ((1, 0, 1, 0), 0.0, 0.7),
    ((1, 1, 0, 0), 0.0, 0.5),
    ((2, 0, 0, 0), 0.0, 1.8),
    ((2, 0, 0, 1), 0.0, 0.5),
    ((2, 0, 1, 0), 0.0, 0.5),
    ((2, 1, 0, 0), 0.0, 0.4),
)
COLORS = np.array([[1, 1, 1], [-1, -1, 2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])  # orthonormal rows over R, G, B
VERSION = 1
TEXT_DIM = IMAGE_DIM = 64
PATCHES, PATCH = 16, 4  # of an image, a side; pixels of a patch, a side, after shrinking
BEGIN = "\0begin"  # no word of a caption starts like this


def cosines(n: int) -> np.ndarray:
    """Orthonormal cosine basis [order, position] (DCT-II)."""
    order, position = np.arange(n)[:, None], np.arange(n) + 0.5
    return np.cos(np.pi * order * position / n) * np.sqrt(np.where(order == 0, 1, 2) / n)


def as_blocks(frames_BCFHW: Tensor) -> Tensor:
    """RGB [B, 3, 4k+1, 8h, 8w], uint8 or float32 from -1 to 1 -> blocks from -1 to 1 [B, k+1, h, w, K], the first of
    the first frame alone. ValueError: other shapes or types.
    """
    _, colors, num_frames, height, width = frames_BCFHW.shape
    is_shaped = colors == 3 and num_frames % 4 == 1 and height % 8 == 0 and width % 8 == 0
    if frames_BCFHW.dtype not in (torch.uint8, torch.float32) or not is_shaped:
        raise ValueError(
            f"frames must be uint8 [B, 3, 4k+1, 8h, 8w], got {frames_BCFHW.dtype} {list(frames_BCFHW.shape)}"
        )
    frames_BCFHW = frames_BCFHW.contiguous()
    x_BCFHW = frames_BCFHW if frames_BCFHW.is_floating_point() else frames_BCFHW.float() / 127.5 - 1
    x_BCFHW = torch.cat([x_BCFHW[:, :, :1].expand(-1, -1, 3, -1, -1), x_BCFHW], dim=2)
    return rearrange(x_BCFHW, "b c (f t) (h y) (w x) -> b f h w (c t y x)", t=4, y=8, x=8)


class DebugEncoders:
    """See `encoders.spec.Encoders`. Deterministic. Of a clip only the 16 coefficients are kept."""

    stride_t = 4
    stride_s = 8
    channels = len(COEFFICIENTS)
    text_dim = TEXT_DIM
    pooled_dim = TEXT_DIM
    image_dim = IMAGE_DIM

    def __init__(self, max_text_length: int):
        self.max_text_length = max_text_length
        time, space = cosines(4), cosines(8)
        rows = [
            np.einsum("c,t,h,w->cthw", COLORS[c], time[t], space[h], space[w]).ravel()
            for (c, t, h, w), _, _ in COEFFICIENTS
        ]
        self.basis_CK = torch.tensor(np.stack(rows), dtype=torch.float32)
        self.mean_C = torch.tensor([mean for _, mean, _ in COEFFICIENTS])
        self.std_C = torch.tensor([std for _, _, std in COEFFICIENTS])
        random = np.random.Generator(np.random.Philox(key=VERSION)).standard_normal((IMAGE_DIM, 3 * PATCH * PATCH))
        self.projection_DK = torch.tensor(random / np.sqrt(3 * PATCH * PATCH), dtype=torch.float32)

    def video_id(self) -> str:
        return f"debug-video-{VERSION}"

    def text_id(self) -> str:
        return f"debug-text-{VERSION}-{TEXT_DIM}-{self.max_text_length}"

    def image_id(self) -> str:
        return f"debug-image-{VERSION}-{IMAGE_DIM}"

    def encode_video(self, frames_BCFHW: Tensor) -> Tensor:
        """RGB [B, 3, 4k+1, 8h, 8w], uint8 or float32 from -1 to 1 -> latents [B, 16, k+1, h, w], float32."""
        x_BFHWK = as_blocks(frames_BCFHW)
        basis_CK, mean_C, std_C = (t.to(x_BFHWK.device) for t in (self.basis_CK, self.mean_C, self.std_C))
        return ((F.linear(x_BFHWK, basis_CK) - mean_C) / std_C).permute(0, 4, 1, 2, 3).contiguous()

    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Latents [B, 16, k+1, h, w] -> uint8 RGB [B, 3, 4k+1, 8h, 8w]."""
        if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != self.channels:
            raise ValueError(f"latents must be [B, {self.channels}, F, H, W], got {list(latents_BCFHW.shape)}")
        basis_CK, mean_C, std_C = (t.to(latents_BCFHW.device) for t in (self.basis_CK, self.mean_C, self.std_C))
        x_BFHWC = latents_BCFHW.float().permute(0, 2, 3, 4, 1) * std_C + mean_C
        blocks = "b f h w (c t y x) -> b c (f t) (h y) (w x)"
        x_BCFHW = rearrange(x_BFHWC @ basis_CK, blocks, c=3, t=4, y=8, x=8)
        # The first block is one frame four times, so its coefficients of motion mean nothing.
        first = x_BCFHW[:, :, :4].mean(dim=2, keepdim=True)
        x_BCFHW = torch.cat([first, x_BCFHW[:, :, 4:]], dim=2)
        return ((x_BCFHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def num_tokens(self, prompts: list[str]) -> list[int]:
        return [1 + len(_words(prompt)) for prompt in prompts]

    def encode_text(
        self, prompts: list[str], images: list[Tensor] | None = None, image_tokens: int = 0
    ) -> list[Tensor]:
        """A begin token, then one fixed Gaussian vector per lower-case word: [1 + words, 64] each, cut at
        max_text_length.

        images: their tokens come first, repeated to `image_tokens`.
        """
        texts = [
            torch.stack([_word_vector(w) for w in [BEGIN, *_words(prompt)][: self.max_text_length]])
            for prompt in prompts
        ]
        if images is None:
            return texts
        rows = torch.arange(image_tokens) % (PATCHES * PATCHES + 1)
        return [
            torch.cat([self.encode_images(image[None])[0, rows].cpu(), text])
            for image, text in zip(images, texts, strict=True)
        ]

    def encode_pooled(self, prompts: list[str]) -> list[Tensor]:
        """The mean of the text's tokens, of unit variance: [64] each."""
        return [text_LD.sum(0) / len(text_LD) ** 0.5 for text_LD in self.encode_text(prompts)]

    def encode_images(self, frames_BCHW: Tensor) -> Tensor:
        """Uint8 RGB [B, 3, H, W] -> tokens [B, 257, 64], float32."""
        x_BCHW = F.adaptive_avg_pool2d(frames_BCHW.float() / 127.5 - 1, PATCHES * PATCH)
        x_BLK = F.unfold(x_BCHW, PATCH, stride=PATCH).transpose(1, 2)
        x_BLK = torch.cat([x_BLK.mean(1, keepdim=True), x_BLK], dim=1)
        return F.linear(x_BLK, self.projection_DK.to(x_BLK.device))

    def offload_to_cpu(self) -> None:
        """No weights."""

    def free(self) -> None:
        """No weights."""


def _words(prompt: str) -> list[str]:
    return list(filter(None, (word.strip(string.punctuation) for word in prompt.lower().split())))


def _word_vector(word: str) -> Tensor:
    key = np.frombuffer(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:16], dtype="<u8")
    return torch.tensor(np.random.Generator(np.random.Philox(key=key)).standard_normal(TEXT_DIM), dtype=torch.float32)


def build(section: Encoder, hf_assets_path: str, device: torch.device | str) -> DebugEncoders:
    return DebugEncoders(section.max_text_length)
