"""The device mesh: which ranks do what.

Axes, outermost first; those that communicate most are on neighbouring ranks:

    pp           pipeline stages
    dp_replicate copies of the model
    dp_shard     the parameters of a copy are sharded over it
    ring         context parallel: keys and values pass every rank
    ulysses      context parallel: tokens are exchanged for heads
    tp           tensor parallel: each block's matrices are split

The experts of a mixture are laid out over the same ranks by themselves: see expert_parallel.py.

The degrees are checked before start-up; `check_layout` checks what depends on the model.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_video.config.job_config import JobConfig, Parallelism
from titan_video.config.manager import ConfigError
from titan_video.config.values import divisors
from titan_video.tools.parts import resolve

PARTS = {  # optional, by the axis that asks for them; their `layout_errors` say what a model does not allow
    "tp": "titan_video.distributed.tensor_parallel",
    "ulysses": "titan_video.distributed.context_parallel",
    "pp": "titan_video.distributed.pipeline_parallel",
    "ep": "titan_video.distributed.expert_parallel",
}


@dataclass(frozen=True)
class ParallelDims:
    """Degrees, in the order of the mesh. ep is the innermost axis of the experts' own mesh over the same ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, section: Parallelism, world_size: int) -> "ParallelDims":
        """The degrees of a run on `world_size` ranks. Raises ConfigError unless they multiply to it."""
        replicate, shard = data_parallel_degrees(section, world_size)
        ring, ulysses = context_parallel_degrees(section)
        tp, ep = section.tensor_parallel_degree, section.expert_parallel_degree
        return cls(section.pipeline_parallel_degree, replicate, shard, ring, ulysses, tp=tp, ep=ep)

    @property
    def dp(self) -> int:
        """Data-parallel degree: ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def cp(self) -> int:
        return self.ring * self.ulysses

    @property
    def sequence(self) -> int:
        """Ranks over which the tokens of a clip are spread."""
        return self.ring * self.ulysses * self.tp

    def sample_groups(self) -> list[list[int]]:
        """Ranks that have the same samples, by data-parallel rank."""
        ranks = torch.arange(self.pp * self.dp * self.sequence).view(self.pp, self.dp, self.sequence)
        return ranks.transpose(0, 1).flatten(1).tolist()

    def build_mesh(self, device_type: str) -> "Meshes":
        degrees = {axis: degree for axis, degree in asdict(self).items() if axis != "ep"}
        world = init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        fsdp = world["dp_shard", "ring", "ulysses"]._flatten("fsdp")
        fsdp_root = world["dp_shard", "ring", "ulysses", "tp"]._flatten("fsdp_tp")
        if self.dp_replicate > 1:
            fsdp, fsdp_root = (DeviceMesh._concatenate([world["dp_replicate"], mesh]) for mesh in (fsdp, fsdp_root))
        expert_fsdp = ep = None
        if self.ep > 1:
            build = resolve(f"{PARTS['ep']}:build_expert_meshes", asked_by="parallelism.expert_parallel_degree")
            expert_fsdp, ep = build(self, device_type)
        return Meshes(
            world=world,
            batch=world["dp_replicate", "dp_shard"]._flatten("batch"),
            sequence=world["ring", "ulysses", "tp"]._flatten("sequence"),
            fsdp=fsdp,
            fsdp_root=fsdp_root,
            ring=world["ring"],
            ulysses=world["ulysses"],
            tp=world["tp"],
            pp=world["pp"],
            expert_fsdp=expert_fsdp,
            ep=ep,
        )


@dataclass(frozen=True)
class Meshes:
    """Named views of the mesh.

    batch: 1-D; its ranks have different samples. sequence: 1-D; its ranks have different tokens of the same samples. A
    loss is summed over both.
    fsdp: 1-D (dp_shard x cp) or 2-D (dp_replicate, dp_shard x cp); the blocks are sharded over it. fsdp_root: the same
    with tp, for what is outside the blocks: tensor parallel does not split it, and its gradients too are sums over the
    tokens of all these ranks.
    ep: 1-D, over which experts are divided. expert_fsdp: the ranks that have the same ones, over which these are
    sharded, 1-D or 2-D like fsdp. None without expert parallel: experts are then parameters of their block like others.
    """

    world: DeviceMesh
    batch: DeviceMesh
    sequence: DeviceMesh
    fsdp: DeviceMesh
    fsdp_root: DeviceMesh
    ring: DeviceMesh
    ulysses: DeviceMesh
    tp: DeviceMesh
    pp: DeviceMesh
    expert_fsdp: DeviceMesh | None = None
    ep: DeviceMesh | None = None


def context_parallel_degrees(section: Parallelism) -> tuple[int, int]:
    """(ring, Ulysses) degrees."""
    cp, method = section.context_parallel_degree, section.context_parallel_method
    ulysses = {"ulysses": cp, "ring": 1, "unified": section.context_parallel_ulysses_degree}[method]
    return cp // ulysses, ulysses


def check_layout(section: Parallelism, args: Any, world_size: int) -> None:
    """Check a layout against a model's architecture. ValueError: one line per broken rule, with field and legal values.

    args: the model's arguments (see ModelSpec).
    """
    dims, errors = ParallelDims.of(section, world_size), []
    for axis, part in PARTS.items():
        if getattr(dims, axis) > 1:
            errors += resolve(f"{part}:layout_errors", asked_by="parallelism")(dims, section, args)
    if errors:
        raise ValueError("\n".join(errors))


def data_parallel_degrees(section: Parallelism, world_size: int) -> tuple[int, int]:
    """(replicate, shard) degrees on `world_size` ranks, with a shard degree of -1 resolved.

    ConfigError: the degrees do not multiply to world_size.
    """
    errors = list(_degree_errors(section, world_size))
    if errors:
        raise ConfigError("\n".join(errors))
    replicate = section.data_parallel_replicate_degree
    return replicate, world_size // section.model_parallel_degree // replicate


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the degrees, one line per mistake."""
    yield from _degree_errors(config.parallelism, max(config.encoder.num_training_ranks(world_size), 1))


def _degree_errors(section: Parallelism, world_size: int) -> Iterator[str]:
    left, larger = world_size, []
    for name in (
        "pipeline_parallel_degree",
        "tensor_parallel_degree",
        "context_parallel_degree",
        "data_parallel_replicate_degree",
    ):
        degree = getattr(section, name)
        if left % degree:
            rest = f" that {' and '.join(larger)} leave{'s' * (len(larger) == 1)}" if larger else ""
            yield (
                f"parallelism.{name}: given {degree}, which does not divide the {left} ranks{rest}; legal: "
                f"{divisors(left)}"
            )
            return
        left //= degree
        larger += [f"{name} {degree}"] * (degree > 1)
    if section.data_parallel_shard_degree not in (-1, left):
        rest = f" with {' and '.join(larger)}" if larger else ""
        yield (
            f"parallelism.data_parallel_shard_degree: given {section.data_parallel_shard_degree};{rest} on "
            f"{world_size} ranks legal: {left}, or -1 for the same"
        )
