"""The contract between data and training: what a micro-batch holds."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from titan_video.tools.device import send


@dataclass
class Batch:
    """One micro-batch of one bucket. It holds no frames and no strings, and needs no encoder.

    streams: clean, normalised latents by modality, float32: "video" [B, C, F, H, W].
    text_BLD: text embeddings, zero beyond each prompt's length.
    text_mask_BL: bool, true on a prompt's own tokens.
    sample_ids_B: int64, unique per draw over the whole run: keys all randomness of the objective.
    cond: further inputs of the model (models/conditioning.py), batch first: cond_latents_BCFHW, latents of conditioning
        frames; image_BSD, image tokens; pooled_text_BD. Empty for Wan text-to-video.
    """

    streams: dict[str, Tensor]
    text_BLD: Tensor
    text_mask_BL: Tensor
    sample_ids_B: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)

    def split(self, size: int) -> "list[Batch]":
        """Batches of `size` samples."""

        def rows(x, start):
            return {k: rows(v, start) for k, v in x.items()} if isinstance(x, dict) else x[start : start + size]

        return [
            Batch(**{f.name: rows(getattr(self, f.name), start) for f in fields(self)})
            for start in range(0, len(self.sample_ids_B), size)
        ]

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on the device, made without host-device synchronisation."""

        def move(x):
            return {k: move(v) for k, v in x.items()} if isinstance(x, dict) else send(x, device)

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})
