"""Wan 2.1's frozen encoders from a local diffusers folder: `vae/`, `text_encoder/`, `tokenizer/`. Nothing is downloaded.

    uint8 frames -- AutoencoderKLWan, posterior mode -- (mu - mean) / std -- latents
    prompt -- clean -- tokenizer -- UMT5 encoder -- cut to the prompt's own tokens

Letters: B batch, C channels, F frames, H height, W width, L text tokens, D text width.
"""

import hashlib
import html
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Wan 2.1's, by keys of vae/config.json; of dim_mult the length counts. Keys that only newer files have default to these values.
GEOMETRY = {"z_dim": 16, "dim_mult": 4, "temperal_downsample": [False, True, True], "in_channels": 3, "patch_size": None, "is_residual": False}


def clean_prompt(text: str) -> str:
    """The prompt as Wan's text encoder was trained to read it: repaired Unicode, no HTML entities, single spaces."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class WanEncoders:
    """See `titan_video.encoders.spec.Encoders`. Clips and prompts pass one at a time: a result never depends on its neighbours,
    and memory does not grow with the batch.

    dtype: arithmetic of the text encoder; the VAE runs in float32. max_text_length: tokens a prompt is cut to.
    vae_tiling: run the VAE in spatial tiles of 256 x 256. ValueError names the file or folder that is missing or unfit.
    """

    stride_t = 4
    stride_s = 8
    channels = 16

    def __init__(self, hf_assets_path: str, dtype: torch.dtype, max_text_length: int, vae_tiling: bool, device: torch.device | str):
        root = Path(hf_assets_path)
        if not hf_assets_path or not root.is_dir():
            raise ValueError(f'model.hf_assets_path = "{hf_assets_path}" is no folder; it should hold vae/, text_encoder/, tokenizer/')
        self.vae_folder, self.text_folder, self.tokenizer_folder = root / "vae", root / "text_encoder", root / "tokenizer"
        self.dtype, self.max_text_length, self.vae_tiling, self.device = dtype, max_text_length, vae_tiling, torch.device(device)
        mean, std = _latent_statistics(self.vae_folder)
        self.mean_11111 = torch.tensor(mean, device=self.device).view(1, -1, 1, 1, 1)
        self.std_11111 = torch.tensor(std, device=self.device).view(1, -1, 1, 1, 1)
        text_config = _read_config(self.text_folder)
        if "d_model" not in text_config:
            raise ValueError(f"{self.text_folder / 'config.json'} has no d_model; it should be the configuration of a UMT5 encoder")
        self.text_dim = text_config["d_model"]
        if not any((self.tokenizer_folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise ValueError(f"{self.tokenizer_folder} holds neither tokenizer.json nor spiece.model; copy tokenizer/ of a diffusers Wan 2.1")
        self._vae: Any = None
        self._text_encoder: Any = None
        self._tokenizer: Any = None

    def video_id(self) -> str:
        """SHA-256 of the VAE's configuration, weights and tiling. Reads the whole weights once (0.5 GB: under a second from a warm disk)."""
        return self._video_id

    def text_id(self) -> str:
        """SHA-256 of the text encoder, the tokenizer, the type and the maximal length. Reads the whole weights once: Wan's 11 GB take
        seconds to a minute, by the disk, so ask one rank and share the answer.
        """
        return self._text_id

    @cached_property
    def _video_id(self) -> str:
        return _digest(_weight_files(self.vae_folder, "diffusion_pytorch_model"), f"tiling={self.vae_tiling}")

    @cached_property
    def _text_id(self) -> str:
        tokenizer = sorted(p for p in self.tokenizer_folder.iterdir() if p.is_file() and p.suffix in (".json", ".model"))
        return _digest(_weight_files(self.text_folder, "model") + tokenizer, f"dtype={self.dtype} length={self.max_text_length}")

    @torch.no_grad()
    def encode_video(self, frames_BCFHW: Tensor) -> Tensor:
        """uint8 RGB [B, 3, 4k+1, H, W], H and W multiples of 8 -> float32 latents [B, 16, k+1, H/8, W/8] on the encoders' device."""
        num_frames, height, width = frames_BCFHW.shape[2:]
        if frames_BCFHW.dtype != torch.uint8 or (num_frames - 1) % self.stride_t or height % self.stride_s or width % self.stride_s:
            raise ValueError(f"Wan's VAE takes uint8 frames of 4k+1 x 8m x 8n, got {frames_BCFHW.dtype} {num_frames}x{height}x{width}")
        x_BCFHW = frames_BCFHW.to(self.device).float() / 127.5 - 1
        return (self.vae.encode(x_BCFHW).latent_dist.mode() - self.mean_11111) / self.std_11111

    @torch.no_grad()
    def decode_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Normalised latents [B, 16, k+1, h, w] -> uint8 RGB [B, 3, 4k+1, 8h, 8w] on the encoders' device."""
        z_BCFHW = latents_BCFHW.to(self.device, torch.float32) * self.std_11111 + self.mean_11111
        return ((self.vae.decode(z_BCFHW).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> list[Tensor]:
        """Last hidden state [L_i, text_dim] of each prompt's own tokens, in `dtype`. The encoder sees the prompt padded to
        max_text_length under its mask, as in diffusers' WanPipeline.
        """
        return [self._encode_prompt(prompt) for prompt in prompts]

    def _encode_prompt(self, prompt: str) -> Tensor:
        encoder, tokenizer = self.text_encoder, self._tokenizer
        tokens = tokenizer([clean_prompt(prompt)], padding="max_length", max_length=self.max_text_length, truncation=True,
                           add_special_tokens=True, return_attention_mask=True, return_tensors="pt").to(self.device)  # fmt: skip
        hidden_BLD = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden_BLD[0, : int(tokens.attention_mask.sum())].to(self.dtype).clone()

    @property
    def vae(self):
        """The float32 AutoencoderKLWan, loaded at the first use."""
        if self._vae is None:
            from diffusers import AutoencoderKLWan

            options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}  # the low-memory path needs one more package, for a small model
            self._vae = _load(AutoencoderKLWan, self.vae_folder, "diffusion_pytorch_model", **options).to(self.device)
            self._vae.enable_slicing()
            if self.vae_tiling:
                self._vae.enable_tiling()
        return self._vae

    @property
    def text_encoder(self):
        """The UMT5EncoderModel, loaded with its tokenizer at the first use."""
        if self._text_encoder is None:
            from transformers import AutoTokenizer, UMT5EncoderModel

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)
            except Exception as e:  # the tokenizer library raises bare Exception for a file that it cannot parse
                raise ValueError(f"{self.tokenizer_folder} holds no tokenizer that can be read: {e}") from e
            self._text_encoder = _load(UMT5EncoderModel, self.text_folder, "model", dtype=self.dtype).to(self.device)
        return self._text_encoder

    def free(self) -> None:
        """Drop the weights; the next use loads them again."""
        self._vae = self._text_encoder = self._tokenizer = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e}); model.hf_assets_path should be a diffusers Wan 2.1 folder") from e


def _latent_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel; ValueError for any other VAE than Wan 2.1's 4x8x8 of 16 channels."""
    config = _read_config(folder)
    found = {**{key: config.get(key, default) for key, default in GEOMETRY.items()}, "dim_mult": len(config.get("dim_mult", ()))}
    wrong = [f"{key} = {config.get(key)}" for key, value in GEOMETRY.items() if found[key] != value]
    mean, std = config.get("latents_mean", ()), config.get("latents_std", ())
    if len(mean) != GEOMETRY["z_dim"] or len(std) != GEOMETRY["z_dim"] or min(std) <= 0:
        wrong.append("latents_mean or latents_std without 16 values")
    if wrong:
        raise ValueError(f"{folder / 'config.json'}: {', '.join(wrong)}; only Wan 2.1's VAE is supported (4x8x8, 16 channels)")
    return mean, std


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """config.json and the safetensors files that make up the weights; ValueError naming the first that is missing."""
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        try:
            names = [index.name, *sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as e:
            raise ValueError(f"{index} is no index of safetensors files") from e
    files = [folder / name for name in ("config.json", *names)]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing; model.hf_assets_path should be a complete diffusers Wan 2.1 folder with safetensors weights")
    return files


def _load(cls, folder: Path, stem: str, **kwargs):
    """from_pretrained that refuses what the libraries only warn about: weights that are missing would be left random."""
    _weight_files(folder, stem)
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **kwargs)
    except Exception as e:  # SafetensorError derives from Exception alone
        raise ValueError(f"{folder} cannot be loaded as {cls.__name__}: {e}") from e
    bad = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind, ()))
    if bad:
        raise ValueError(f"{folder}: {len(bad)} weights are missing, unexpected or of another shape than config.json says: {', '.join(bad[:5])}")
    return model.eval().requires_grad_(False)


def _digest(files: list[Path], settings: str) -> str:
    with ThreadPoolExecutor() as pool:
        parts = [f"{path.name} {digest}" for path, digest in zip(files, pool.map(_sha256, files), strict=True)]
    return hashlib.sha256("\n".join([settings, *parts]).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
