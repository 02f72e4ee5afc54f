"""The optimizer step inside backward: the gradients of a model never exist all at once."""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.config.job_config import JobConfig
from titan_video.data.batching import batch_size_errors, gradient_accumulation, num_data_ranks
from titan_video.distributed.utils import get_mesh, to_local


class InBackward:
    """Steps `optimizer` for each parameter as soon as backward and the reduction over ranks have produced its gradient,
    and frees the gradient.

    Construct it before the first backward. After a backward every parameter is updated, and `optimizer.step()` does
    nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._squares: dict[torch.device, Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self._update, group))

    def _update(self, group: dict, p: Tensor) -> None:
        self._add_square(p)
        all_groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**group, "params": [p]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = all_groups
        p.grad = None

    def _add_square(self, p: Tensor) -> None:
        """Add the gradient's squared norm, divided by the number of ranks that have the same shard."""
        mesh = get_mesh(p)
        num_replicas = 1
        if mesh:
            num_replicas = math.prod(mesh.size(i) for i, place in enumerate(p.placements) if place.is_replicate())
        norm = torch.linalg.vector_norm(to_local(p.grad), dtype=torch.promote_types(p.dtype, torch.float32))
        self._squares[p.device] = self._squares.get(p.device, 0) + norm.square() / num_replicas

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients of the last backward, over all ranks. Collective."""
        (square,) = self._squares.values()
        self._squares.clear()
        if dist.is_initialized():
            dist.all_reduce(square)
        return square.sqrt()


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about updates in backward, one line per mistake."""
    t, dp = config.training, num_data_ranks(config, world_size)
    if not config.optimizer.in_backward:
        return
    where = "optimizer.in_backward: true, but"
    if t.read_late:
        yield f"{where} training.read_late judges a step after the backward of the next; set that to false"
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
        yield f"{where} a finished update cannot be skipped; set fault_tolerance.nonfinite to stop or rollback"
    if config.fault_tolerance.spike_deviations:
        yield f"{where} a finished update cannot be skipped; set fault_tolerance.spike_deviations to 0"
