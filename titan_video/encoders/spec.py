"""What a frozen encoder pair (VAE and text encoder) offers the rest of the program."""

from typing import Protocol

from torch import Tensor


class Encoders(Protocol):
    """A causal video VAE and a text encoder. Weights, if any, are loaded at the first use of each half.

    Frames are uint8 RGB [B, 3, F, H, W] with F = 4k+1; latents are float32, normalised to about zero mean and unit variance,
    [B, channels, (F-1)/stride_t + 1, H/stride_s, W/stride_s]. Latent frame 0 depends on frame 0 alone.
    """

    stride_t: int
    stride_s: int
    channels: int
    text_dim: int
    max_text_length: int

    def video_id(self) -> str:
        """Identity of the video half for the cache key: changes when a latent of the same frames would change."""

    def text_id(self) -> str:
        """Identity of the text half for the cache key."""

    def encode_video(self, frames_BCFHW: Tensor) -> Tensor: ...

    def decode_video(self, latents_BCFHW: Tensor) -> Tensor: ...

    def encode_text(self, prompts: list[str]) -> list[Tensor]:
        """One [L_i, text_dim] tensor per prompt, unpadded, 1 <= L_i <= max_text_length. The empty prompt is legal."""

    def free(self) -> None:
        """Drop the weights from memory; the next use loads them again."""
