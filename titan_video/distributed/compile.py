"""torch.compile, block by block: one graph serves all equal blocks.

Shapes: a graph is made for the first number of tokens; at the second, one for any number, which is the last. A batch of
one clip and batches of several have a graph each, and so have forwards with and without gradients; see `num_graphs`.
"""

import torch._dynamo
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters

from titan_video.distributed.fsdp import get_blocks
from titan_video.models.spec import ParallelPlan
from titan_video.tools.logging import logger

# Kinds of block x one or several clips x first and any length x with and without gradients, and as many again for
# padded lengths; for each way of checkpointing. More is an error of ours: some value is compiled in.
MAX_GRAPHS = 32


def apply_compile(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Compile each block in place, as a full graph, after checkpointing and before FSDP.

    Parameter names do not change.
    """
    # On a GPU it leaves gradients of a modulation's parts unwritten (torch 2.10 to 2.14, pytorch issue 193061).
    torch._inductor.config.triton.mix_order_reduction = False
    policies = {getattr(container[key], "policy", None) for container, key in get_blocks(model, plan)}
    limit = MAX_GRAPHS * len(policies)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for container, key in get_blocks(model, plan):
        container[key].compile(backend=backend, fullgraph=True)


class GraphLog:
    """Logs when a step has compiled: the first steps of each bucket may, later ones should not."""

    def __init__(self) -> None:
        self.logged = 0

    def step(self, step: int, bucket: str) -> None:
        total = num_graphs()
        if total > self.logged:
            logger.info(f"step {step} compiled {total - self.logged} graphs for {bucket}, {total} so far")
            self.logged = total


def num_graphs() -> int:
    """Graphs that this process has compiled so far."""
    return counters["stats"]["unique_graphs"]
