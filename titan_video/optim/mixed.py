"""AdamW, 8-bit AdamW and Muon in one optimizer, also for bfloat16 weights."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video import kernels
from titan_video.config.job_config import JobConfig
from titan_video.distributed.utils import derive_seed, to_local
from titan_video.kernels import upcast
from titan_video.optim.low_bit import BLOCK, codebooks, dequantize, quantize, stochastic_round
from titan_video.optim.optimizer import SLOTS, new_slot
from titan_video.tools.parts import resolve

CHUNK_ELEMENTS = 1 << 24  # elements that are updated at a time, which bounds temporary memory
OWNERS = "titan_video.optim.muon:RoundRobinOwners"  # an optional part of its own
FUSED = "titan_video.kernels.triton.optimizer"  # an optional part of its own, which model.kernels chooses


class MixedOptimizer(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019), 8-bit AdamW (low_bit.py) or Muon (muon.py), by the "kind" of each group.

    Updates are computed in float32. bfloat16 weights are rounded stochastically, so that updates below their resolution
    are not lost. The random numbers depend on the seed, the step and the element, not on the layout.

    With model.kernels = triton, one kernel updates all tensors of one local shape (kernels/triton/optimizer.py). What
    that does not take, stacked experts, and all tensors on a CPU, are updated one after another in plain torch.
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
                continue
            fused, plain = self._divide(params)
            if fused:
                parts = [self._adamw_part(p, group) for p in fused]
                self._kernels.adamw(parts, group, codebooks(parts[0].weight.device))
            for p in plain:
                self._adamw(p, group)

    @property
    def _kernels(self) -> Any:
        return resolve(FUSED, asked_by="model.kernels = triton")

    def _divide(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those that the kernels update, and the others."""
        if kernels.current_backend() != "triton":
            return [], params
        is_fused = {p: p.ndim < 3 and self._kernels.is_used(to_local(p), to_local(p.grad)) for p in params}
        return [p for p in params if is_fused[p]], [p for p in params if not is_fused[p]]

    def _part(self, p: Tensor, state: list[Tensor | None], step_size: float, root_factor: float = 0.0) -> Any:
        """What the kernels need of one parameter."""
        key, offsets = 0, (0, 0)
        if p.dtype == torch.bfloat16:
            key, offsets = self._rounding_key(p), (0, *_shard_offsets(p))[-2:]
        first_row, first_col = offsets
        return self._kernels.Part(
            weight=to_local(p),
            grad=to_local(p.grad),
            state=(*state, *[None] * (4 - len(state))),
            step_size=step_size,
            root_factor=root_factor,
            key=key,
            first_row=first_row,
            first_col=first_col,
            row_length=p.shape[-1],
        )

    def _adamw_part(self, p: Tensor, group: dict) -> Any:
        step, state = int(self.state[p]["step"]), [to_local(self.state[p][slot]) for slot in SLOTS[group["kind"]][1:]]
        if group["kind"] == "AdamW":
            state = [state[0], None, state[1], None]
        (beta1, beta2), lr = group["betas"], group["lr"]
        return self._part(p, state, -lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step))

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
            self._write(p, rows, weight)

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
        lr, decay, momentum = group["lr"], group["lr"] * group["weight_decay"], group["momentum"]
        fused, plain = self._divide(params)
        scale = {p: -lr * 0.2 * math.sqrt(max(p.shape[-2:])) for p in params}
        states = {p: to_local(self.state[p]["momentum"]) for p in params}
        updates = {p: torch.empty_like(states[p], dtype=working_dtype(p)) for p in fused}
        if fused:
            parts = [self._part(p, [states[p], updates[p]], scale[p]) for p in fused]
            self._kernels.muon_momentum(parts, momentum)
        for p in plain:
            grad = upcast(to_local(p.grad))
            states[p].lerp_(grad, 1 - momentum)
            updates[p] = grad.lerp(states[p], momentum).to(working_dtype(p))
        updates = self.owners.orthogonalize({p: updates[p] for p in params})  # in the same order on all ranks
        if fused:
            parts = [self._part(p, [states[p], updates[p]], scale[p]) for p in fused]
            self._kernels.muon_apply(parts, decay)
        for p in plain:
            for rows in self._chunks(p):
                weight = upcast(to_local(p)[rows]).mul(1 - decay)
                weight.add_(updates[p][rows], alpha=scale[p])
                self._write(p, rows, weight)

    def _chunks(self, p: Tensor) -> Iterator[slice]:
        """Slices over the rows of the local shard, each of about CHUNK_ELEMENTS elements."""
        num_rows, *row = to_local(p).shape
        height = max(CHUNK_ELEMENTS // max(math.prod(row), 1), 1)
        return (slice(start, start + height) for start in range(0, num_rows, height))

    def _write(self, p: Tensor, rows: slice, weight: Tensor) -> None:
        """Set these rows of the local shard to `weight`, rounded stochastically to bfloat16."""
        if p.dtype == torch.bfloat16:
            first, *others = _shard_offsets(p)
            key, first = self._rounding_key(p), first + rows.start
            if p.ndim == 3:  # as a matrix in which the rows of each expert follow those of the one before
                (row, col), num_rows = others, p.shape[1]
                starts = [((first + i) * num_rows + row, col) for i in range(len(weight))]
                rounded = [
                    stochastic_round(x, start, p.shape[-1], key) for x, start in zip(weight, starts, strict=True)
                ]
                weight = torch.stack(rounded) if rounded else weight
            else:
                weight = stochastic_round(weight, (first, *others), p.shape[-1], key)
        to_local(p)[rows].copy_(weight)

    def _rounding_key(self, p: Tensor) -> int:
        return derive_seed(f"{self.names[p]}/{int(self.state[p]['step'])}", self.seed)


def _shard_offsets(p: Tensor) -> tuple[int, ...]:
    """Index of the local shard's first element in the parameter."""
    if not isinstance(p, DTensor):
        return (0,) * p.ndim
    return tuple(compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1])


def working_dtype(p: Tensor) -> torch.dtype:
    """In which Muon's updates are orthogonalized and sent: bfloat16 on a GPU, where that is many times faster."""
    return torch.bfloat16 if p.is_cuda else torch.promote_types(p.dtype, torch.float32)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the dtype of the weights, one line per mistake."""
    t = config.training
    if t.dtype == "bfloat16" and t.mixed_precision_param != "bfloat16":
        yield (
            f"training.dtype: bfloat16, but training.mixed_precision_param is {t.mixed_precision_param}; set that to "
            f"bfloat16 too"
        )
