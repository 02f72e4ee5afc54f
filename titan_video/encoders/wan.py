"""Wan's frozen encoders from a local diffusers folder: `vae/`, `text_encoder/`, `tokenizer/`, and for Wan 2.1's
image-to-video `image_encoder/`, `image_processor/`. Nothing is downloaded.

    uint8 frames -> AutoencoderKLWan, posterior mode -> (mu - mean) / std -> latents
    prompt -> cleaned -> tokenizer -> UMT5 encoder -> the prompt's own tokens
    uint8 image -> squeezed to CLIP's square, normalised -> CLIP vision, last layer but one -> image tokens

Two VAEs are known: that of Wan 2.1 and A14B, 4x8x8 to 16 channels, and that of Wan 2.2's TI2V-5B, 4x16x16 to 48.
Letters: B batch, C channels, F frames, H height, W width, L tokens, D width.
"""

import html
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_video.config.job_config import Encoder
from titan_video.encoders.folders import (
    digest,
    load,
    load_tokenizer,
    offload_models,
    read_config,
    settings_files,
    weight_files,
)

# By keys of vae/config.json; for dim_mult its length. Keys that only newer files have default to the values of Wan 2.1.
WAN21_VAE = {
    "z_dim": 16,
    "dim_mult": 4,
    "temperal_downsample": [False, True, True],
    "in_channels": 3,
    "patch_size": None,
    "is_residual": False,
}
TI2V_VAE = WAN21_VAE | {"z_dim": 48, "in_channels": 12, "patch_size": 2, "is_residual": True}


def clean_prompt(text: str) -> str:
    """The prompt as Wan's text encoder was trained to read it: repaired Unicode, no HTML entities, single spaces."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class WanEncoders:
    """See `titan_video.encoders.spec.Encoders`. Clips and prompts are encoded one at a time, so a result never depends
    on the rest of its batch, and memory does not grow with the batch.

    dtype: compute dtype of the text encoder; the VAE runs in float32. max_text_length: tokens a prompt is cut to.
    vae_tiling: run the VAE in spatial tiles of 256 x 256. clip_resize: how an image becomes CLIP's square: "squeeze",
    as in Wan's own code, or "crop", its middle, as in diffusers. ValueError names the file or folder that is missing or
    wrong.
    """

    stride_t = 4
    pooled_dim = 0

    def __init__(
        self,
        hf_assets_path: str,
        dtype: torch.dtype,
        max_text_length: int,
        vae_tiling: bool,
        device: torch.device | str,
        clip_resize: str = "squeeze",
    ):
        root = Path(hf_assets_path)
        if not hf_assets_path or not root.is_dir():
            raise ValueError(
                f'model.hf_assets_path = "{hf_assets_path}" is no folder; it should hold vae/, text_encoder/, '
                f"tokenizer/"
            )
        self.vae_folder = root / "vae"
        self.text_folder = root / "text_encoder"
        self.tokenizer_folder = root / "tokenizer"
        self.dtype = dtype
        self.max_text_length = max_text_length
        self.vae_tiling = vae_tiling
        self.clip_resize = clip_resize
        self.device = torch.device(device)
        self.image_folder, self.processor_folder = root / "image_encoder", root / "image_processor"
        mean, std, self.stride_s = _latent_statistics(self.vae_folder)
        self.channels = len(mean)
        self.mean_11111 = torch.tensor(mean, device=self.device).view(1, -1, 1, 1, 1)
        self.std_11111 = torch.tensor(std, device=self.device).view(1, -1, 1, 1, 1)
        text_config = read_config(self.text_folder)
        if "d_model" not in text_config:
            raise ValueError(
                f"{self.text_folder / 'config.json'} has no d_model; it should be the configuration of a UMT5 encoder"
            )
        self.text_dim = text_config["d_model"]
        if not any((self.tokenizer_folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise ValueError(
                f"{self.tokenizer_folder} holds neither tokenizer.json nor spiece.model; copy tokenizer/ of a "
                f"diffusers Wan 2.1"
            )
        self.image_dim = read_config(self.image_folder).get("hidden_size", 0) if self.image_folder.is_dir() else 0
        self._vae: Any = None
        self._image_encoder: Any = None
        self._text_encoder: Any = None
        self._tokenizer: Any = None

    def video_id(self) -> str:
        """SHA-256 of the VAE's configuration, weights and tiling. Reads all weights once (0.5 GB)."""
        return self._video_id

    def text_id(self) -> str:
        """SHA-256 of the text encoder, the tokenizer, the dtype and the maximal length. Reads all weights once: Wan's
        11 GB take seconds to a minute, so one rank should call it and broadcast the result.
        """
        return self._text_id

    @cached_property
    def _video_id(self) -> str:
        return digest(weight_files(self.vae_folder, "diffusion_pytorch_model"), f"tiling={self.vae_tiling}")

    @cached_property
    def _text_id(self) -> str:
        files = weight_files(self.text_folder, "model") + settings_files(self.tokenizer_folder)
        return digest(files, f"dtype={self.dtype} length={self.max_text_length}")

    def image_id(self) -> str:
        """SHA-256 of the image encoder, its processor and clip_resize."""
        self._check_images()
        settings = (
            "" if self.clip_resize == "crop" else f"resize={self.clip_resize}"
        )  # "": caches made before the option
        return digest(weight_files(self.image_folder, "model") + settings_files(self.processor_folder), settings)

    @torch.no_grad()
    def encode_video(self, frames_BCFHW: Tensor) -> Tensor:
        """RGB [B, 3, 4k+1, H, W], uint8 or float32 from -1 to 1 -> float32 latents [B, C, k+1, H/stride, W/stride] on
        the encoders' device.
        """
        num_frames, height, width = frames_BCFHW.shape[2:]
        s = self.stride_s
        if (
            frames_BCFHW.dtype not in (torch.uint8, torch.float32)
            or (num_frames - 1) % self.stride_t
            or height % s
            or width % s
        ):
            raise ValueError(
                f"Wan's VAE takes uint8 frames of 4k+1 x {s}m x {s}n, got {frames_BCFHW.dtype} "
                f"{num_frames}x{height}x{width}"
            )
        x_BCFHW = frames_BCFHW.to(self.device).contiguous()
        x_BCFHW = x_BCFHW if x_BCFHW.is_floating_point() else x_BCFHW.float() / 127.5 - 1
        return (self.vae.encode(x_BCFHW).latent_dist.mode() - self.mean_11111) / self.std_11111

    @torch.no_grad()
    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Normalised latents [B, C, k+1, h, w] -> uint8 RGB [B, 3, 4k+1, H, W], on the encoders' device."""
        z_BCFHW = latents_BCFHW.to(self.device, torch.float32) * self.std_11111 + self.mean_11111
        return ((self.vae.decode(z_BCFHW).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def num_tokens(self, prompts: list[str]) -> list[int]:
        self._tokenizer = self._tokenizer or load_tokenizer(self.tokenizer_folder)
        return [len(ids) for ids in self._tokenizer([clean_prompt(p) for p in prompts], verbose=False).input_ids]

    @torch.no_grad()
    def encode_text(
        self, prompts: list[str], images: list[Tensor] | None = None, image_tokens: int = 0
    ) -> list[Tensor]:
        """Last hidden state [L_i, text_dim] of each prompt's own tokens, in `dtype`. The encoder sees the prompt padded
        to max_text_length under its mask, as in diffusers' WanPipeline.
        """
        assert images is None, "Wan's text has no image tokens"
        return [self._encode_prompt(prompt) for prompt in prompts]

    def encode_pooled(self, prompts: list[str]) -> list[Tensor]:
        raise AssertionError("Wan has no pooled text")

    @torch.no_grad()
    def encode_images(self, frames_BCHW: Tensor) -> Tensor:
        """Uint8 RGB [B, 3, H, W] -> tokens [B, 257, D] of CLIP's last layer but one, float32."""
        encoder, processor = self.image_encoder
        pixels = self._squeezed(frames_BCHW) if self.clip_resize == "squeeze" else _cropped(processor, frames_BCHW)
        pixels_BCHW = pixels.to(self.device)
        return torch.cat([encoder(pixels[None], output_hidden_states=True).hidden_states[-2] for pixels in pixels_BCHW])

    def _squeezed(self, frames_BCHW: Tensor) -> Tensor:
        """The whole frame at CLIP's size, whatever its sides: Wan2.1's wan/modules/clip.py, `CLIPModel.visual`. There
        the frame is float, from -1 to 1, resized without antialiasing, then moved to 0 to 1 without clamping.
        """
        encoder, processor = self.image_encoder
        size = (encoder.config.image_size,) * 2
        x_BCHW = frames_BCHW.to(self.device).float() / 127.5 - 1
        x_BCHW = F.interpolate(x_BCHW, size=size, mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (x_BCHW.new_tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
        return (x_BCHW - mean) / std

    def _check_images(self) -> None:
        for folder in (self.image_folder, self.processor_folder):
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is missing; Wan 2.1's image-to-video needs it: set model.hf_assets_path to its "
                    f"diffusers folder"
                )

    def _encode_prompt(self, prompt: str) -> Tensor:
        encoder, tokenizer = self.text_encoder, self._tokenizer
        tokens = tokenizer(
            [clean_prompt(prompt)],
            padding="max_length",
            max_length=self.max_text_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        hidden_BLD = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden_BLD[0, : int(tokens.attention_mask.sum())].to(self.dtype).clone()

    @property
    def vae(self):
        """The float32 AutoencoderKLWan, loaded at the first use."""
        if self._vae is None:
            from diffusers import AutoencoderKLWan

            # low_cpu_mem_usage needs one more package, for a small model.
            options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
            self._vae = load(AutoencoderKLWan, self.vae_folder, "diffusion_pytorch_model", **options).to(self.device)
            self._vae.enable_slicing()
            if self.vae_tiling:
                self._vae.enable_tiling()
        return self._vae.to(self.device)

    @property
    def text_encoder(self):
        """The UMT5EncoderModel, loaded with its tokenizer at the first use."""
        if self._text_encoder is None:
            from transformers import UMT5EncoderModel

            self._tokenizer = load_tokenizer(self.tokenizer_folder)
            self._text_encoder = load(UMT5EncoderModel, self.text_folder, "model", dtype=self.dtype).to(self.device)
        return self._text_encoder.to(self.device)

    @property
    def image_encoder(self):
        """The float32 CLIP vision model and its processor, loaded at the first use. With a projection it is published
        too; the projection follows the last layer, so it changes nothing here.
        """
        if self._image_encoder is None:
            from transformers import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection

            self._check_images()
            processor = CLIPImageProcessor.from_pretrained(self.processor_folder, local_files_only=True)
            classes = CLIPVisionModel, CLIPVisionModelWithProjection
            self._image_encoder = (
                load(classes, self.image_folder, "model", dtype=torch.float32).to(self.device),
                processor,
            )
        self._image_encoder[0].to(self.device)
        return self._image_encoder

    def offload_to_cpu(self) -> None:
        """Move the weights to host memory; the next use brings them back."""
        offload_models([self._vae, self._text_encoder, *(self._image_encoder or ())[:1]], self.device)

    def free(self) -> None:
        """Drop the weights; the next use loads them again."""
        self._vae = self._text_encoder = self._tokenizer = self._image_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _cropped(processor: Any, frames_BCHW: Tensor) -> Tensor:
    """The short side at CLIP's size, then the middle: what diffusers' WanImageToVideoPipeline does."""
    from PIL import Image

    images = [Image.fromarray(frame_CHW.permute(1, 2, 0).cpu().numpy()) for frame_CHW in frames_BCHW]
    return processor(images=images, return_tensors="pt").pixel_values


def _latent_statistics(folder: Path) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation per latent channel, and the spatial stride; ValueError for any other VAE than Wan's
    two.
    """
    config = read_config(folder)
    geometry = TI2V_VAE if config.get("z_dim") == TI2V_VAE["z_dim"] else WAN21_VAE
    found = {
        **{key: config.get(key, default) for key, default in WAN21_VAE.items()},
        "dim_mult": len(config.get("dim_mult", ())),
    }
    wrong = [f"{key} = {config.get(key)}" for key, value in geometry.items() if found[key] != value]
    mean, std = config.get("latents_mean", ()), config.get("latents_std", ())
    if len(mean) != geometry["z_dim"] or len(std) != geometry["z_dim"] or min(std) <= 0:
        wrong.append(f"latents_mean or latents_std without {geometry['z_dim']} values")
    if wrong:
        known = "Wan 2.1's VAE (4x8x8, 16 channels) and TI2V-5B's (4x16x16, 48 channels)"
        raise ValueError(f"{folder / 'config.json'}: {', '.join(wrong)}; supported are only {known}")
    return mean, std, 8 if geometry is WAN21_VAE else 16


def build(section: Encoder, hf_assets_path: str, device: torch.device | str) -> WanEncoders:
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[section.dtype]
    length, resize = section.max_text_length, section.clip_resize
    return WanEncoders(hf_assets_path, dtype, length, section.vae_tiling, device, resize)
