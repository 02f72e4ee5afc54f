"""An exponential moving average of the weights that are trained, sharded as they are, in float32 where they are
bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_video.config.job_config import Ema
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name
from titan_video.kernels import upcast


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


class EmaWeights:
    """ema <- decay * ema + (1 - decay) * weights, every `interval` steps after `start_step`; before that, a copy
    (Polyak and Juditsky 1992).
    """

    def __init__(self, model: nn.Module, section: Ema):
        self.section, self.model = section, model
        self._weights = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: upcast(p.detach()).clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer step `step`."""
        if step <= self.section.start_step:
            self.reset()
        elif (step - self.section.start_step) % self.section.interval == 0:
            pairs = [(_local(self.shadow[n]), _local(p)) for n, p in self._weights.items()]
            for shadow, weight in pairs:
                if shadow.dtype != weight.dtype:
                    shadow.lerp_(upcast(weight), 1 - self.section.decay)
            if alike := [pair for pair in pairs if pair[0].dtype == pair[1].dtype]:
                shadows, weights = zip(*alike, strict=True)
                torch._foreach_lerp_(list(shadows), list(weights), 1 - self.section.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the weights as they are."""
        for name, p in self._weights.items():
            _local(self.shadow[name]).copy_(_local(p))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; its own come back afterwards, bit for bit."""
        kept = self._swap({})
        try:
            yield
        finally:
            self._swap(kept)

    @torch.no_grad()
    def _swap(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Exchange weights and averages, in place where they have one type. Weights of another are set to `kept`, or
        returned as a copy and set to the averages."""
        reshard(self.model)
        copies = {}
        for name, p in self._weights.items():
            a, b = _local(p), _local(self.shadow[name])
            copy = a.clone()
            if a.dtype == b.dtype:
                a.copy_(b)
                b.copy_(copy)
            else:
                a.copy_(kept.get(name, b))
                copies[name] = copy
        return copies

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by clean parameter name: the live tensors, for checkpoints to write from and load into."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing is left to do: `state` holds the averages themselves."""
