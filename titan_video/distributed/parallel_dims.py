"""The device mesh: which ranks do what.

Axes, outermost first: dp_replicate (copies of the model), dp_shard (a copy's parameters are sharded over it). Every rank of
both reads different data: the `batch` view. The degrees are checked before start-up (config/check.py).
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    dp_replicate: int
    dp_shard: int

    @property
    def dp(self) -> int:
        """Data-parallel degree: ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    def build_mesh(self, device_type: str) -> "Meshes":
        world = init_device_mesh(device_type, (self.dp_replicate, self.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard"))
        batch = world._flatten("batch")
        return Meshes(world=world, batch=batch, fsdp=world if self.dp_replicate > 1 else world["dp_shard"])


@dataclass(frozen=True)
class Meshes:
    """Named views. batch: 1-D, ranks with different samples, over which the loss is summed. fsdp: 1-D (shard) or 2-D (replicate, shard)."""

    world: DeviceMesh
    batch: DeviceMesh
    fsdp: DeviceMesh
