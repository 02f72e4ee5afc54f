"""HunyuanVideo's frozen encoders from a local diffusers folder. Nothing is downloaded.

    uint8 frames      -> AutoencoderKLHunyuanVideo (vae/), posterior mode -> x scaling factor -> latents
    prompt            -> in a template -> LLaMA (tokenizer/, text_encoder/), third last hidden state
                      -> the prompt's own tokens
    image and prompt  -> in a template -> LLaVA (the same folders, image_processor/), the same hidden state
                      -> some image tokens, then the prompt's tokens
    prompt            -> CLIP (tokenizer_2/, text_encoder_2/) -> pooled vector

A text-to-video folder holds a LLaMA, an image-to-video folder a LLaVA. The templates and where they are cut are those
of the models' own code, Tencent-Hunyuan/HunyuanVideo and HunyuanVideo-I2V. A LLaMA token attends to earlier tokens
only, so prompts need no padding here.

Letters: B batch, C channels, F frames, H height, W width, L text tokens, D text width.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
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

ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    + ASPECTS
    + "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
IMAGE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following "
    "aspects according to the reference image: "
    + ASPECTS
    + "\n\n<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
CROP, IMAGE_CROP = 95, 103  # tokens before the prompt
END_HEADER = "<|end_header_id|>"
HEADERS = 3  # in the image template
TAIL = 4  # tokens that end the prompt and open the assistant's header
HIDDEN_STATE = -3
POOLED_LENGTH = 77


class HunyuanVideoEncoders:
    """See `titan_video.encoders.spec.Encoders`. Clips and prompts are encoded one at a time, so a result never depends
    on the rest of its batch.

    dtype: compute dtype of the text encoders; the VAE runs in float32.
    max_text_length: tokens a prompt is cut to, without those of an image.
    vae_tiling: run the VAE in spatial tiles of 256 x 256. vae_temporal_tiling: encode in overlapping chunks of 16
        frames, as diffusers does; else over the whole clip, as HunyuanVideo-I2V extracts its training latents
        (hyvideo/hyvae_extract/run.py). Decoding always works in chunks, as both sample.
    ValueError names the file or folder that is missing or wrong.
    """

    stride_t, stride_s, image_dim = 4, 8, 0

    def __init__(
        self,
        hf_assets_path: str,
        dtype: torch.dtype,
        max_text_length: int,
        vae_tiling: bool,
        device: torch.device | str,
        vae_temporal_tiling: bool = False,
    ):
        self.root = Path(hf_assets_path)
        if not hf_assets_path or not self.root.is_dir():
            raise ValueError(
                f'model.hf_assets_path = "{hf_assets_path}" is no folder; it should hold vae/, text_encoder/, '
                f"tokenizer/, ..."
            )
        self.dtype = dtype
        self.max_text_length = max_text_length
        self.vae_tiling, self.vae_temporal_tiling = vae_tiling, vae_temporal_tiling
        self.device = torch.device(device)
        vae, text, pooled = (read_config(self.root / name) for name in ("vae", "text_encoder", "text_encoder_2"))
        strides = vae.get("temporal_compression_ratio", 4), vae.get("spatial_compression_ratio", 8)
        if strides != (self.stride_t, self.stride_s) or "scaling_factor" not in vae:
            path = self.root / "vae" / "config.json"
            raise ValueError(
                f"{path} is not that of HunyuanVideo's VAE, which has a scaling_factor and strides of 4 and 8"
            )
        self.channels, self.scaling_factor = vae.get("latent_channels", 16), vae["scaling_factor"]
        self.has_images = text.get("model_type") == "llava"
        sizes = text.get("text_config", {}) if self.has_images else text
        if "hidden_size" not in pooled or not (self.has_images or "hidden_size" in sizes):
            raise ValueError(
                f"{self.root}: text_encoder should hold a LLaMA or a LLaVA, text_encoder_2 a CLIP text model"
            )
        self.text_dim = sizes.get("hidden_size", 4096)  # a LLaVA's configuration leaves out default values
        self.pooled_dim = pooled["hidden_size"]
        for name in ("tokenizer", "tokenizer_2", *(["image_processor"] if self.has_images else [])):
            if not (self.root / name).is_dir():
                raise ValueError(
                    f"{self.root / name} is missing; model.hf_assets_path should be a complete diffusers folder "
                    f"of HunyuanVideo"
                )
        self._vae: Any = None
        self._text: Any = None
        self._pooled: Any = None

    def video_id(self) -> str:
        """SHA-256 of the VAE's configuration, weights and tiling. Reads the whole weights once."""
        return self._video_id

    def text_id(self) -> str:
        """SHA-256 of both text encoders, their tokenizers, the type and the maximal length.

        Reads the whole weights once, 16 GB.
        """
        return self._text_id

    def image_id(self) -> str:
        raise AssertionError("HunyuanVideo's image tokens are part of the text")

    @cached_property
    def _video_id(self) -> str:
        # Caches made before the option hold latents encoded in chunks.
        time = "" if self.vae_temporal_tiling else " time=whole"
        return digest(weight_files(self.root / "vae", "diffusion_pytorch_model"), f"tiling={self.vae_tiling}{time}")

    @cached_property
    def _text_id(self) -> str:
        files = [f for name in ("text_encoder", "text_encoder_2") for f in weight_files(self.root / name, "model")]
        folders = ["tokenizer", "tokenizer_2", *(["image_processor"] if self.has_images else [])]
        files += [f for name in folders for f in settings_files(self.root / name)]
        return digest(files, f"dtype={self.dtype} length={self.max_text_length} {TEMPLATE} {IMAGE_TEMPLATE}")

    # ---- video ----

    @torch.no_grad()
    def encode_video(self, frames_BCFHW: Tensor) -> Tensor:
        """RGB [B, 3, 4k+1, 8h, 8w], uint8 or float32 from -1 to 1 -> float32 latents [B, C, k+1, h, w] on the encoders'
        device.
        """
        num_frames, height, width = frames_BCFHW.shape[2:]
        if frames_BCFHW.dtype not in (torch.uint8, torch.float32) or num_frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"HunyuanVideo's VAE takes uint8 frames of 4k+1 x 8m x 8n, got {frames_BCFHW.dtype} "
                f"{num_frames}x{height}x{width}"
            )
        x_BCFHW = frames_BCFHW.to(self.device).contiguous()
        x_BCFHW = x_BCFHW if x_BCFHW.is_floating_point() else x_BCFHW.float() / 127.5 - 1
        return torch.cat([self.vae.encode(x[None]).latent_dist.mode() for x in x_BCFHW]) * self.scaling_factor

    @torch.no_grad()
    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Normalised latents [B, C, k+1, h, w] -> uint8 RGB [B, 3, 4k+1, 8h, 8w] on the encoders' device."""
        z_BCFHW = latents_BCFHW.to(self.device, torch.float32) / self.scaling_factor
        x_BCFHW = torch.cat([self.vae.decode(z[None]).sample for z in z_BCFHW])
        return ((x_BCFHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def encode_images(self, frames_BCHW: Tensor) -> Tensor:
        raise AssertionError("HunyuanVideo's image tokens are part of the text")

    # ---- text ----

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Of LLaMA's tokens. CLIP's pooled vector is always of a prompt's first 77, as the model was trained."""
        template = IMAGE_TEMPLATE if self.has_images else TEMPLATE
        tokenizer = self._text[1] if self._text else load_tokenizer(self.root / "tokenizer")
        empty, *whole = tokenizer([template.format(p) for p in ["", *prompts]], verbose=False).input_ids
        return [len(ids) - len(empty) for ids in whole]

    @torch.no_grad()
    def encode_text(
        self, prompts: list[str], images: list[Tensor] | None = None, image_tokens: int = 0
    ) -> list[Tensor]:
        """Hidden states [L_i, text_dim] of each prompt's own tokens, in `dtype`; with images, they follow
        `image_tokens` tokens of the image.
        """
        if (images is not None) != self.has_images:
            holds = "a LLaVA, for image-to-video" if self.has_images else "a LLaMA, for text-to-video"
            raise ValueError(f"{self.root / 'text_encoder'} holds {holds}: choose model.flavor to fit")
        if images is None:
            return [self._encode_prompt(prompt) for prompt in prompts]
        return [
            self._encode_image_prompt(prompt, image, image_tokens)
            for prompt, image in zip(prompts, images, strict=True)
        ]

    def _token_ids(self, text: str, max_length: int) -> list[int]:
        return self.text[1](text, truncation=True, max_length=max_length).input_ids

    def _encode_prompt(self, prompt: str) -> Tensor:
        ids = self._token_ids(TEMPLATE.format(prompt), CROP + self.max_text_length)
        hidden = self.text[0](
            input_ids=torch.tensor([ids], device=self.device), output_hidden_states=True
        ).hidden_states[HIDDEN_STATE]
        return hidden[0, CROP:].to(self.dtype).clone()

    def _encode_image_prompt(self, prompt: str, image_CHW: Tensor, image_tokens: int) -> Tensor:
        """The template's single image token is replaced by all tokens of the image. The result has no header of the
        answer.
        """
        from PIL import Image

        model, tokenizer, processor = self.text
        ids = self._token_ids(IMAGE_TEMPLATE.format(prompt), IMAGE_CROP + self.max_text_length)
        image_id = (
            model.config.image_token_index
            if hasattr(model.config, "image_token_index")
            else model.config.image_token_id
        )
        vision = model.config.vision_config
        num_patches = (vision.image_size // vision.patch_size) ** 2
        start = ids.index(image_id)
        whole = torch.tensor([ids[:start] + [image_id] * num_patches + ids[start + 1 :]], device=self.device)
        pixels_BCHW = processor(
            Image.fromarray(image_CHW.permute(1, 2, 0).cpu().numpy()), return_tensors="pt"
        ).pixel_values
        options = {
            "attention_mask": torch.ones_like(whole),
            "pixel_values": pixels_BCHW.to(self.device, self.dtype),
            "output_hidden_states": True,
        }
        hidden_LD = model(input_ids=whole, **options).hidden_states[HIDDEN_STATE][0].to(self.dtype)

        headers = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(END_HEADER)]
        # A long prompt leaves no room for the last header.
        answer = (headers[-1] if len(headers) >= HEADERS else len(ids) - 1) + 1
        text_LD = hidden_LD[num_patches - 1 :]  # numbered like `ids`, from the image token on
        image_LD = hidden_LD[start : start + num_patches : num_patches // image_tokens]
        return torch.cat([image_LD, text_LD[IMAGE_CROP : answer - TAIL], text_LD[answer:]])

    @torch.no_grad()
    def encode_pooled(self, prompts: list[str]) -> list[Tensor]:
        """CLIP's pooled vector [pooled_dim] of each prompt, in `dtype`."""
        model, tokenizer = self.pooled
        ids = [
            tokenizer(p, padding="max_length", max_length=POOLED_LENGTH, truncation=True, return_tensors="pt").input_ids
            for p in prompts
        ]
        return [model(i.to(self.device)).pooler_output[0].to(self.dtype) for i in ids]

    # ---- weights ----

    @property
    def vae(self):
        """The float32 AutoencoderKLHunyuanVideo, loaded at the first use."""
        if self._vae is None:
            from diffusers import AutoencoderKLHunyuanVideo

            options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
            self._vae = load(AutoencoderKLHunyuanVideo, self.root / "vae", "diffusion_pytorch_model", **options).to(
                self.device
            )
            if self.vae_tiling:
                self._vae.enable_tiling()
            self._vae.use_framewise_encoding = self.vae_temporal_tiling
        return self._vae.to(self.device)

    @property
    def text(self) -> tuple:
        """LLaMA or LLaVA, its tokenizer, and the LLaVA's image processor; loaded at the first use."""
        if self._text is None:
            from transformers import CLIPImageProcessor, LlamaForCausalLM, LlamaModel, LlavaForConditionalGeneration

            classes = (LlavaForConditionalGeneration,) if self.has_images else (LlamaModel, LlamaForCausalLM)
            model = load(classes, self.root / "text_encoder", "model", dtype=self.dtype).to(self.device)
            processor = (
                CLIPImageProcessor.from_pretrained(self.root / "image_processor", local_files_only=True)
                if self.has_images
                else None
            )
            self._text = model, load_tokenizer(self.root / "tokenizer"), processor
        self._text[0].to(self.device)
        return self._text

    @property
    def pooled(self) -> tuple:
        """CLIP's text model and its tokenizer, loaded at the first use."""
        if self._pooled is None:
            from transformers import CLIPTextModel

            model = load(CLIPTextModel, self.root / "text_encoder_2", "model", dtype=self.dtype).to(self.device)
            self._pooled = model, load_tokenizer(self.root / "tokenizer_2")
        self._pooled[0].to(self.device)
        return self._pooled

    def offload_to_cpu(self) -> None:
        """Move the weights to host memory; the next use brings them back."""
        offload_models([self._vae, *(self._text or ())[:1], *(self._pooled or ())[:1]], self.device)

    def free(self) -> None:
        """Drop the weights; the next use loads them again."""
        self._vae = self._text = self._pooled = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def build(section: Encoder, hf_assets_path: str, device: torch.device | str) -> HunyuanVideoEncoders:
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[section.dtype]
    length, in_time = section.max_text_length, section.vae_temporal_tiling
    return HunyuanVideoEncoders(hf_assets_path, dtype, length, section.vae_tiling, device, in_time)
