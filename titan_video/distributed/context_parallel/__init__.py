"""Context parallel: the tokens of a clip over several ranks."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.models.spec import ParallelPlan


def apply_context_parallel(model: nn.Module, plan: ParallelPlan, ring: DeviceMesh, ulysses: DeviceMesh, rotate: str) -> None:
    raise ValueError("parallelism.context_parallel_degree: not built yet; set it to 1")
