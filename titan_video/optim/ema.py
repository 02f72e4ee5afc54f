"""EMA weights: an exponential moving average of the trained weights, sharded like them, in float32 or wider."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from titan_video.config.job_config import Ema
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name, to_local
from titan_video.kernels import upcast


class EmaWeights:
    """ema <- decay * ema + (1 - decay) * weights, every `interval` steps after `start_step`; until then, a copy of the
    weights (Polyak and Juditsky 1992).
    """

    def __init__(self, model: nn.Module, section: Ema):
        self.section, self.model = section, model
        self._weights = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: upcast(p.detach()).clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA weights after optimizer step `step`."""
        if step <= self.section.start_step:
            self.reset()
            return
        if (step - self.section.start_step) % self.section.interval:
            return
        same_dtype_shadows, same_dtype_weights = [], []
        for name, p in self._weights.items():
            shadow, weight = to_local(self.shadow[name]), to_local(p)
            if shadow.dtype == weight.dtype:
                same_dtype_shadows.append(shadow)
                same_dtype_weights.append(weight)
            else:
                shadow.lerp_(upcast(weight), 1 - self.section.decay)
        if same_dtype_shadows:
            torch._foreach_lerp_(same_dtype_shadows, same_dtype_weights, 1 - self.section.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Set the EMA weights to the current weights."""
        for name, p in self._weights.items():
            to_local(self.shadow[name]).copy_(to_local(p))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model computes with the EMA weights; afterwards it has its own weights back, bit for bit."""
        originals = self._swap({})
        try:
            yield
        finally:
            self._swap(originals)

    @torch.no_grad()
    def _swap(self, originals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Exchange weights and EMA weights.

        Where both have one dtype, they are exchanged in place. A weight of a lower dtype than its EMA cannot be: it is
        set to its entry in `originals` if there is one; else it is set to its EMA, and its copy is returned.
        """
        reshard(self.model)
        copies = {}
        for name, p in self._weights.items():
            weight, shadow = to_local(p), to_local(self.shadow[name])
            copy = weight.clone()
            if weight.dtype == shadow.dtype:
                weight.copy_(shadow)
                shadow.copy_(copy)
            else:
                weight.copy_(originals.get(name, shadow))
                copies[name] = copy
        return copies

    def state_dict(self) -> dict[str, Tensor]:
        """EMA weights by clean parameter name: the live tensors, which checkpoints read from and load into."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to do: `state` holds the live tensors, which the load has already filled."""
