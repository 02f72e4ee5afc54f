"""The interface of frozen encoders of video, text and images."""

from typing import Protocol

from torch import Tensor


class Encoders(Protocol):
    """A causal video VAE, a text encoder and, for some models, an image encoder. Weights, if any, are loaded at the
    first use of each.

    Frames are RGB [B, 3, F, H, W] with F = 4k+1, uint8 or float32 from -1 to 1 (grey is 0). Latents are float32,
    normalised to about zero mean and unit variance: [B, channels, (F-1)/stride_t + 1, H/stride_s, W/stride_s].
    pooled_dim: width of the pooled vector of a text; image_dim: of image tokens; 0: this family has none.
    """

    stride_t: int
    stride_s: int
    channels: int
    text_dim: int
    pooled_dim: int
    image_dim: int
    max_text_length: int

    def video_id(self) -> str:
        """Identity of the video half for the cache key: changes when a latent of the same frames would change."""

    def text_id(self) -> str:
        """Identity of the text half for the cache key."""

    def image_id(self) -> str:
        """Identity of the image encoder for the cache key."""

    def encode_video(self, frames_BCFHW: Tensor) -> Tensor: ...

    def decode_video(self, latents_BCFHW: Tensor) -> Tensor: ...

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt before it is cut at max_text_length. Loads the tokenizer, and no weights."""

    def encode_text(
        self, prompts: list[str], images: list[Tensor] | None = None, image_tokens: int = 0
    ) -> list[Tensor]:
        """One [L_i, text_dim] tensor per prompt, unpadded, 1 <= L_i <= max_text_length. The empty prompt is legal.

        images: for families whose text begins with `image_tokens` tokens of an image: one uint8 [3, H, W] per prompt.
            L_i then counts these tokens too.
        """

    def encode_pooled(self, prompts: list[str]) -> list[Tensor]:
        """One vector [pooled_dim] per prompt, for families that have it."""

    def encode_images(self, frames_BCHW: Tensor) -> Tensor:
        """Image tokens [B, tokens, image_dim] of uint8 RGB images [B, 3, H, W], for families that have them."""

    def offload_to_cpu(self) -> None:
        """Move the weights to host memory; the next use brings them back."""

    def free(self) -> None:
        """Drop the weights from memory; the next use loads them again."""
