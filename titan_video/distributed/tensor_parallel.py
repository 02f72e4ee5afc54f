"""Tensor parallel with sequence-parallel norms."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.models.spec import ParallelPlan


def apply_tensor_parallel(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh, async_mode: bool) -> None:
    raise ValueError("parallelism.tensor_parallel_degree: not built yet; set it to 1")
