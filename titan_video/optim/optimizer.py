"""The optimizers, over sharded weights.

    name        matrices of blocks   other matrices   vectors, modulation    bytes of state for an element of the first
    AdamW       AdamW                AdamW            AdamW                  8
    AdamW8bit   AdamW8bit            AdamW8bit        AdamW                  2.13
    Muon        Muon                 AdamW            AdamW                  4

The first, of float32 weights, is torch's. All else, and all of bfloat16 weights, is `MixedOptimizer`'s. Either way
there is one optimizer with one state, `InBackward` or not, and everything in that state has the rows of its weight and
is sharded like it.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.config.job_config import JobConfig, Optimizer
from titan_video.data.batching import batch_size_errors, gradient_accumulation, num_data_ranks
from titan_video.distributed.utils import clean_name, derive_seed, get_mesh, to_local, zeros_like_sharded
from titan_video.kernels import upcast
from titan_video.optim.low_bit import BLOCK, decode, encode, stochastic_round
from titan_video.optim.muon import RoundRobinOwners

# What the state of a parameter consists of, by what updates it.
SLOTS = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "AdamW8bit": ("step", "exp_avg", "exp_avg_scale", "exp_avg_root", "exp_avg_root_scale"),
    "Muon": ("step", "momentum"),
}
CHUNK_ELEMENTS = 1 << 24  # elements that are updated at a time, which bounds temporary memory


def updated_by(parameter: str, ndim: int, name: str, blocks: tuple[str, ...]) -> str:
    """Which of `SLOTS` updates a parameter under optimizer.name. blocks:

    paths of the blocks' containers (ParallelPlan.blocks).
    """
    is_matrix = ndim == 2 and "modulation" not in parameter
    if name == "Muon":
        return "Muon" if is_matrix and parameter.startswith(tuple(f"{path}." for path in blocks)) else "AdamW"
    return name if is_matrix else "AdamW"


def state_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of the state of a shard of this shape but for its step count, of weights of float32 or bfloat16."""
    numel = math.prod(shape)
    if kind == "AdamW8bit":
        return 2 * numel + 8 * shape[0] * -(-shape[1] // BLOCK)
    return (8 if kind == "AdamW" else 4) * numel


def build_optimizer(
    model: nn.Module, section: Optimizer, blocks: tuple[str, ...] = (), seed: int = 0
) -> torch.optim.Optimizer:
    """Vectors, i.e. biases, norm weights and modulation tables, are not decayed, frozen weights are left out.

    blocks: see `updated_by`. seed: of stochastic rounding. ValueError where 8-bit blocks do not fit a tensor-parallel
        split.
    """
    groups, names = {}, {}
    for name, p in ((clean_name(name), p) for name, p in model.named_parameters() if p.requires_grad):
        names[p] = name
        decay = 0.0 if p.ndim < 2 or "modulation" in name else section.weight_decay
        kind = updated_by(name, p.ndim, section.name, blocks)
        # torch updates the parameters of one mesh at a time.
        groups.setdefault((kind, decay, get_mesh(p)), {"params": [], "weight_decay": decay, "kind": kind})[
            "params"
        ].append(p)
    told = {"lr": section.lr, "betas": (section.beta1, section.beta2), "eps": section.eps}
    if section.name == "AdamW" and all(p.dtype != torch.bfloat16 for p in names):
        fused, foreach = (section.implementation == name for name in ("fused", "foreach"))
        return torch.optim.AdamW(list(groups.values()), fused=fused, foreach=foreach, **told)
    muon = {p: names[p] for group in groups.values() if group["kind"] == "Muon" for p in group["params"]}
    owners = RoundRobinOwners(muon) if section.name == "Muon" else None
    return MixedOptimizer(list(groups.values()), names, seed, owners, momentum=section.momentum, **told)


class MixedOptimizer(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019), 8-bit AdamW (low_bit.py) and Muon (muon.py), by each group's `kind`.

    Arithmetic is in float32. bfloat16 weights are then rounded up or down at random, with the nearer one likelier, so
    that small updates are not lost but made now and then; chance depends on the seed, the step and the element only,
    not on layout.
    """

    def __init__(
        self, groups: list[dict], names: dict[Tensor, str], seed: int, owners: RoundRobinOwners | None, **defaults
    ):
        super().__init__(groups, defaults)
        self.names, self.seed, self.owners = names, seed, owners
        for group in self.param_groups:
            for p in group["params"]:
                columns = to_local(p).shape[-1]
                if group["kind"] == "AdamW8bit" and columns < p.shape[-1] and columns % BLOCK:
                    raise ValueError(
                        f"optimizer.name: AdamW8bit has one scale for {BLOCK} elements of a row, but tensor "
                        f"parallel gives each rank "
                        f"{columns} of {names[p]}'s rows; set parallelism.tensor_parallel_degree to fit, or take AdamW"
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
        dtype = torch.promote_types(p.dtype, torch.float32)
        moment = {"Muon": dtype, "AdamW": dtype, "AdamW8bit": torch.uint8}[kind]
        state = {"step": torch.zeros(())}
        for slot in SLOTS[kind][1:]:
            is_scale = slot.endswith("_scale")
            state[slot] = zeros_like_sharded(
                p, -(-p.shape[-1] // BLOCK) if is_scale else p.shape[-1], torch.float32 if is_scale else moment
            )
        return state

    def _adamw(self, p: Tensor, group: dict) -> None:
        (beta1, beta2), step = group["betas"], int(self.state[p]["step"])
        state = {slot: to_local(value) for slot, value in self.state[p].items() if slot != "step"}
        is_8bit = group["kind"] == "AdamW8bit"
        for rows in self._chunks(p):
            weight, grad = upcast(to_local(p)[rows]), upcast(to_local(p.grad)[rows])
            part = {slot: value[rows] for slot, value in state.items()}
            if is_8bit:
                mean = decode(part["exp_avg"], part["exp_avg_scale"], signed=True).to(weight.dtype)
                square = (
                    decode(part["exp_avg_root"], part["exp_avg_root_scale"], signed=False).to(weight.dtype).square_()
                )
            else:
                mean, square = part["exp_avg"], part["exp_avg_sq"]
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            root = square.sqrt()
            weight = weight.mul(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(
                mean, root.div(math.sqrt(1 - beta2**step)).add_(group["eps"]), value=-group["lr"] / (1 - beta1**step)
            )
            if is_8bit:
                encode(mean, part["exp_avg"], part["exp_avg_scale"], signed=True)
                encode(root, part["exp_avg_root"], part["exp_avg_root_scale"], signed=False)
            self._set(p, rows, weight, step)

    def _muon(self, params: list[Tensor], group: dict) -> None:
        """Muon (Jordan et al. 2024) with Nesterov's momentum. An update has the root mean square of AdamW's (Liu et al.
        2025, "Muon is scalable for LLM training"), so that rate and decay mean the same for both."""
        updates = {}
        for p in params:
            momentum, grad = to_local(self.state[p]["momentum"]), upcast(to_local(p.grad))
            momentum.lerp_(grad, 1 - group["momentum"])
            updates[p] = grad.lerp(momentum, group["momentum"])
        for p, update in self.owners.orthogonal(updates).items():
            lr = group["lr"]
            for rows in self._chunks(p):
                weight = upcast(to_local(p)[rows]).mul(1 - lr * group["weight_decay"])
                weight.add_(update[rows], alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
                self._set(p, rows, weight, int(self.state[p]["step"]))

    def _chunks(self, p: Tensor) -> Iterator[slice]:
        rows, *row = to_local(p).shape
        height = max(CHUNK_ELEMENTS // max(math.prod(row), 1), 1)
        return (slice(start, start + height) for start in range(0, rows, height))

    def _set(self, p: Tensor, rows: slice, weight: Tensor, step: int) -> None:
        if p.dtype == torch.bfloat16:
            first = (0,) * p.ndim
            if isinstance(p, DTensor):
                _, first = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            first = first[0] + rows.start, *first[1:]
            weight = stochastic_round(weight, first, p.shape[-1], derive_seed(f"{self.names[p]}/{step}", self.seed))
        to_local(p)[rows].copy_(weight)


class InBackward:
    """Steps `optimizer` for each parameter as soon as backward, and the reduction over ranks, have its gradient, which
    is then freed.

    It must be made before the first backward. After a backward everything is updated; `optimizer.step()` finds nothing
    to do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._squares: dict[torch.device, Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self._update, group))

    def _update(self, group: dict, p: Tensor) -> None:
        mesh = get_mesh(p)
        holders = (
            math.prod(mesh.size(i) for i, placement in enumerate(p.placements) if placement.is_replicate())
            if mesh
            else 1
        )
        square = (
            torch.linalg.vector_norm(to_local(p.grad), dtype=torch.promote_types(p.dtype, torch.float32)).square()
            / holders
        )
        self._squares[p.device] = self._squares.get(p.device, 0) + square
        everything, self.optimizer.param_groups = self.optimizer.param_groups, [{**group, "params": [p]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = everything
        p.grad = None

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients of the backward that has just ended, over all ranks."""
        (square,) = self._squares.values()
        self._squares.clear()
        if dist.is_initialized():
            dist.all_reduce(square)
        return square.sqrt()


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the optimizer and the dtype of the weights, one line per mistake."""
    t = config.training
    if config.optimizer.name == "Muon" and config.lora.enable:
        yield (
            "optimizer.name: Muon orthogonalizes the updates of full weights, but lora.enable trains adapters only; "
            "choose AdamW or AdamW8bit"
        )
    if t.dtype == "bfloat16" and t.mixed_precision_param != "bfloat16":
        yield (
            f"training.dtype: bfloat16, but training.mixed_precision_param is {t.mixed_precision_param}; set that to "
            f"bfloat16 too"
        )
    if t.dtype == "bfloat16" and config.lora.enable:
        yield (
            "training.dtype: bfloat16, but with lora.enable frozen weights are stored in "
            "training.mixed_precision_param anyway; leave it float32"
        )


def in_backward_rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about updates in backward, one line per mistake."""
    t, dp = config.training, num_data_ranks(config, world_size)
    if not config.optimizer.in_backward:
        return
    where = "optimizer.in_backward: true, but"
    if config.optimizer.name == "Muon":
        yield (
            f"{where} optimizer.name is Muon, which distributes the matrices over the ranks after backward; choose "
            f"AdamW or AdamW8bit"
        )
    if t.max_norm > 0:
        yield (
            f"{where} training.max_norm is {t.max_norm}, and the norm is only known after all weights are updated; set "
            f"it to 0"
        )
    if not list(batch_size_errors(config, dp)) and gradient_accumulation(config, dp) > 1:
        name = "data.global_micro_batches" if config.data.tokens_per_microbatch else "training.global_batch_size"
        yield f"{where} {name} needs several backwards for one update; set it to -1"
    if config.parallelism.pipeline_parallel_degree > 1:
        yield (
            f"{where} a pipeline accumulates gradients over several backwards; set "
            f"parallelism.pipeline_parallel_degree to 1"
        )
    if config.parallelism.data_parallel_replicate_degree > 1:
        yield (
            f"{where} replicas hold all gradients until the end of backward; set "
            f"parallelism.data_parallel_replicate_degree to 1"
        )
    if t.enable_cpu_offload:
        yield f"{where} with training.enable_cpu_offload gradients are on the host anyway; set one of them to false"
    if config.fault_tolerance.nonfinite == "skip":
        yield f"{where} a finished update cannot be skipped; set fault_tolerance.nonfinite to stop"
