"""AdamW, 8-bit AdamW and Muon in one optimizer, also for bfloat16 weights."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.distributed.utils import derive_seed, to_local
from titan_video.kernels import upcast
from titan_video.optim.low_bit import BLOCK, dequantize, quantize, stochastic_round
from titan_video.optim.optimizer import SLOTS, new_slot
from titan_video.tools.parts import resolve

CHUNK_ELEMENTS = 1 << 24  # elements that are updated at a time, which bounds temporary memory
OWNERS = "titan_video.optim.muon:RoundRobinOwners"  # an optional part of its own


class MixedOptimizer(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019), 8-bit AdamW (low_bit.py) or Muon (muon.py), by the "kind" of each group.

    Updates are computed in float32. bfloat16 weights are rounded stochastically, so that updates below their resolution
    are not lost. The random numbers depend on the seed, the step and the element, not on the layout.
    """

    def __init__(
        self, groups: list[dict], names: dict[Tensor, str], seed: int, uses_muon: bool, defaults: dict[str, Any]
    ):
        """groups: as `build_optimizer` makes them. names: clean name of every parameter.

        uses_muon: whether any rank has a group of kind Muon; then all ranks construct the optimizer together.
        ValueError: a tensor-parallel split cuts through the blocks of 8-bit state.
        """
        super().__init__(groups, defaults)
        self.names, self.seed = names, seed
        for group in self.param_groups:
            if group["kind"] == "AdamW8bit":
                for p in group["params"]:
                    self._check_split(p)
        if uses_muon:
            muon = {p: names[p] for group in groups if group["kind"] == "Muon" for p in group["params"]}
            self.owners = resolve(OWNERS, asked_by="optimizer.name = Muon")(muon)

    def _check_split(self, p: Tensor) -> None:
        columns = to_local(p).shape[-1]
        if columns < p.shape[-1] and columns % BLOCK:
            raise ValueError(
                f"optimizer.name: AdamW8bit has one scale for {BLOCK} elements of a row, but tensor parallel gives "
                f"each rank {columns} of {self.names[p]}'s rows; set parallelism.tensor_parallel_degree to fit, or "
                f"take AdamW"
            )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(self._new_state(p, group["kind"]))
                self.state[p]["step"] += 1
            if group["kind"] == "Muon":
                self._muon(params, group)
            else:
                for p in params:
                    self._adamw(p, group)

    def _new_state(self, p: Tensor, kind: str) -> dict[str, Tensor]:
        return {"step": torch.zeros(()), **{slot: new_slot(p, kind, slot) for slot in SLOTS[kind][1:]}}

    def _adamw(self, p: Tensor, group: dict) -> None:
        beta1, beta2 = group["betas"]
        lr, step = group["lr"], int(self.state[p]["step"])
        local_state = {slot: to_local(value) for slot, value in self.state[p].items() if slot != "step"}
        is_8bit = group["kind"] == "AdamW8bit"
        for rows in self._chunks(p):
            weight, grad = upcast(to_local(p)[rows]), upcast(to_local(p.grad)[rows])
            state = {slot: value[rows] for slot, value in local_state.items()}
            exp_avg, exp_avg_sq = self._moments(state, weight.dtype)
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            root = exp_avg_sq.sqrt()
            denominator = root.div(math.sqrt(1 - beta2**step)).add_(group["eps"])
            weight = weight.mul(1 - lr * group["weight_decay"])
            weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
            if is_8bit:
                quantize(exp_avg, state["exp_avg"], state["exp_avg_scale"], signed=True)
                quantize(root, state["exp_avg_root"], state["exp_avg_root_scale"], signed=False)
            self._write(p, rows, weight, step)

    @staticmethod
    def _moments(state: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(exp_avg, exp_avg_sq): the state's own tensors, or copies of 8-bit ones in `dtype`."""
        if "exp_avg_sq" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        exp_avg = dequantize(state["exp_avg"], state["exp_avg_scale"], signed=True)
        root = dequantize(state["exp_avg_root"], state["exp_avg_root_scale"], signed=False)
        return exp_avg.to(dtype), root.to(dtype).square_()

    def _muon(self, params: list[Tensor], group: dict) -> None:
        """Muon with Nesterov momentum (Jordan et al. 2024). Updates are scaled to the root mean square of AdamW's (Liu
        et al. 2025, "Muon is Scalable for LLM Training"), so that both share learning rate and weight decay.
        """
        lr, updates = group["lr"], {}
        for p in params:
            momentum, grad = to_local(self.state[p]["momentum"]), upcast(to_local(p.grad))
            momentum.lerp_(grad, 1 - group["momentum"])
            updates[p] = grad.lerp(momentum, group["momentum"])
        for p, update in self.owners.orthogonalize(updates).items():
            for rows in self._chunks(p):
                weight = upcast(to_local(p)[rows]).mul(1 - lr * group["weight_decay"])
                weight.add_(update[rows], alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
                self._write(p, rows, weight, int(self.state[p]["step"]))

    def _chunks(self, p: Tensor) -> Iterator[slice]:
        """Slices over the rows of the local shard, each of about CHUNK_ELEMENTS elements."""
        num_rows, *row = to_local(p).shape
        height = max(CHUNK_ELEMENTS // max(math.prod(row), 1), 1)
        return (slice(start, start + height) for start in range(0, num_rows, height))

    def _write(self, p: Tensor, rows: slice, weight: Tensor, step: int) -> None:
        """Set these rows of the local shard to `weight`, rounded stochastically to bfloat16."""
        if p.dtype == torch.bfloat16:
            offsets = (0,) * p.ndim
            if isinstance(p, DTensor):
                _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            offsets = (offsets[0] + rows.start, *offsets[1:])
            weight = stochastic_round(weight, offsets, p.shape[-1], derive_seed(f"{self.names[p]}/{step}", self.seed))
        to_local(p)[rows].copy_(weight)
