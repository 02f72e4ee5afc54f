"""Finds a rank that computes wrongly (debug.verify_every): its forward and backward run twice and agree bit by bit.

    first run    hash each parameter's gradient of each micro-batch, where autograd has put it; discard the gradients
    second run   the same, and the step goes on with these gradients
    compare      each rank its own hashes; a rank that differs is named on all ranks, and the run stops

What is hashed is the rank's own gradient, before it is summed with those of others: under FSDP that of the gathered
weight, in a hook that runs before the reduction. A wrong bit so shows on the rank that made it. Ranks that share a clip
(tensor, context and pipeline parallel) send each other activations, and may be named together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from titan_video.config.job_config import JobConfig
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name, gather_objects, to_local
from titan_video.tools.logging import logger

CHUNK = 1 << 22  # elements hashed at a time, which bounds temporary memory
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAX_NAMED = 3


@torch.no_grad()
def digest(x: Tensor) -> Tensor:
    """A hash of the bits of x, int64, on its device: the sum of its words times odd numbers, modulo 2^64.

    A single flipped bit always changes it: an odd number times a power of two below 2^64 is not 0.
    """
    words = to_local(x).contiguous().view(-1).view(WORDS[x.element_size()])
    odd = 2 * torch.arange(min(CHUNK, words.numel()), device=words.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(CHUNK):
        total = 31 * total + (chunk * odd[: chunk.numel()]).sum()
    return total


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters whose `grad` autograd fills, by name: FSDP's gathered ones; before a forward, none."""
    reshard(model)
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        group = unit._get_fsdp_state()._fsdp_param_group
        for p in group.fsdp_params if group else ():
            if hasattr(p, "_unsharded_param"):
                found[names[id(p.sharded_param)]] = p.unsharded_param
    parameters = found if units else {names[id(p)]: p for p in model.parameters()}
    return {name: p for name, p in parameters.items() if p.requires_grad}


class GradientCheck:
    """Runs a step's forward and backward, every `every` steps twice.

    group: all ranks, on the host.
    """

    def __init__(self, every: int, model: nn.Module, group: dist.ProcessGroup):
        self.every, self.model, self.group = every, model, group

    def __call__(self, step: int, run: Callable[[], Tensor]) -> Tensor:
        """What `run` returns. FloatingPointError, on all ranks: the two runs of a rank have different gradients."""
        if step % self.every:
            return run()
        if not own_parameters(self.model):  # before the first forward
            run()
            self._discard()
        first, _ = self._hash(run)
        self._discard()
        second, loss = self._hash(run)
        wrong = [name for name in second if first.get(name) != second[name]]
        by_rank = gather_objects(wrong, self.group)
        if any(by_rank):
            raise FloatingPointError(f"step {step}: {describe(by_rank)}")
        logger.debug(f"step {step}: {len(second)} gradients are repeated bit by bit")
        return loss

    def _discard(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def _hash(self, run: Callable[[], Tensor]) -> tuple[dict[str, list[int]], Tensor]:
        """({parameter: hashes of its gradients, one for each backward}, what `run` returns)."""
        hashes: dict[str, list[Tensor]] = defaultdict(list)
        handles = []
        for name, p in own_parameters(self.model).items():
            add = hashes[name].append
            handles.append(p.register_post_accumulate_grad_hook(lambda p, add=add: add(digest(p.grad))))
        try:
            loss = run()
        finally:
            for handle in handles:
                handle.remove()
        names = [name for name, found in hashes.items() for _ in found]
        values = torch.stack([x for found in hashes.values() for x in found]).tolist()
        numbers: dict[str, list[int]] = defaultdict(list)
        for name, value in zip(names, values, strict=True):
            numbers[name].append(value)
        return numbers, loss


def describe(by_rank: list[list[str]]) -> str:
    """by_rank: of each rank, what differs between its two runs."""
    found = []
    for rank, names in enumerate(by_rank):
        if names:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            found.append(f"rank {rank} ({', '.join(names[:MAX_NAMED])}{more})")
    return (
        f"computed twice, the gradients of {', '.join(found)} differ; the update was not applied. Its device or memory "
        f"computes wrongly, or an operator is not deterministic: test that machine, and resume on another one"
    )


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the check of gradients, one line per mistake."""
    where = f"debug.verify_every: given {config.debug.verify_every}, but"
    if not config.debug.deterministic:
        yield f"{where} two runs agree only with debug.deterministic; set that to true"
    if config.optimizer.in_backward:
        yield f"{where} optimizer.in_backward updates the weights in the first of two runs; set that to false"
    p = config.parallelism
    if p.pipeline_parallel_degree > 1 and p.pipeline_parallel_schedule == "InterleavedZeroBubble":
        yield (
            f"{where} parallelism.pipeline_parallel_schedule InterleavedZeroBubble gives weights their gradients "
            f"without autograd's hooks; choose Interleaved1F1B"
        )
