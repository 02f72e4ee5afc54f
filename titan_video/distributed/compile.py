"""torch.compile, block by block: one graph serves all blocks, and a change of model costs one block's compilation."""

from torch import nn

from titan_video.distributed.fsdp import blocks_of
from titan_video.models.spec import ParallelPlan


def apply_compile(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Compile each block in place, as a full graph. Parameter names do not change."""
    for container, key in blocks_of(model, plan):
        container[key].compile(backend=backend, fullgraph=True)
