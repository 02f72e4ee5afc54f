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

EXPERT_PARALLEL = "titan_video.distributed.expert_parallel"  # optional
EP_ASKED = "parallelism.expert_parallel_degree"


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
            build_expert_meshes = resolve(f"{EXPERT_PARALLEL}:build_expert_meshes", EP_ASKED)
            expert_fsdp, ep = build_expert_meshes(self, device_type)
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
    errors = list(_layout_errors(ParallelDims.of(section, world_size), section, args))
    if errors:
        raise ValueError("\n".join(errors))


def _layout_errors(dims: ParallelDims, section: Parallelism, args: Any) -> Iterator[str]:
    heads, hidden = args.num_heads, args.ffn_dim
    if heads % dims.tp or hidden % dims.tp:
        yield (
            f"parallelism.tensor_parallel_degree: given {dims.tp}, which does not divide the model's {heads} "
            f"heads and feed-forward width {hidden}; legal: {divisors(heads, hidden)}"
        )
        return
    if (heads // dims.tp) % dims.ulysses:
        field = (
            "context_parallel_ulysses_degree"
            if section.context_parallel_method == "unified"
            else "context_parallel_degree"
        )
        per_rank = f"{heads} heads" if dims.tp == 1 else f"{heads // dims.tp} heads of each tensor-parallel rank"
        yield (
            f"parallelism.{field}: given {dims.ulysses}, but Ulysses divides the {per_rank}; legal: "
            f"{divisors(heads // dims.tp)}; context_parallel_method ring or unified takes other degrees"
        )
    stages = dims.pp * stages_per_rank(section)
    if stages > args.num_layers:
        most = args.num_layers // stages_per_rank(section)
        yield (
            f"parallelism.pipeline_parallel_degree: given {dims.pp}, which makes {stages} stages of "
            f"{args.num_layers} blocks with "
            f"pipeline_parallel_schedule {section.pipeline_parallel_schedule}; legal: at most {most}"
        )
    elif section.pipeline_parallel_split and section.pipeline_parallel_split[-1] >= args.num_layers:
        yield (
            f"parallelism.pipeline_parallel_split: given {list(section.pipeline_parallel_split)}, but the last of the "
            f"model's blocks is {args.num_layers - 1}; let the last stage begin there at the latest"
        )
    if dims.ep > 1:
        yield from resolve(f"{EXPERT_PARALLEL}:layout_errors", EP_ASKED)(dims, args)


def stages_per_rank(section: Parallelism) -> int:
    """Pipeline stages on each rank: two for the schedules that interleave them."""
    return 1 if section.pipeline_parallel_degree == 1 or section.pipeline_parallel_schedule in ("GPipe", "1F1B") else 2


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
    p = config.parallelism
    yield from _degree_errors(p, max(config.encoder.num_training_ranks(world_size), 1))
    cp, ulysses = p.context_parallel_degree, p.context_parallel_ulysses_degree
    if p.context_parallel_method == "unified" and cp % ulysses:
        yield (
            f"parallelism.context_parallel_ulysses_degree: given {ulysses}, which does not divide "
            f"parallelism.context_parallel_degree {cp}; legal: {divisors(cp)}"
        )
    if p.context_parallel_method != "unified" and ulysses != 1:
        yield (
            f"parallelism.context_parallel_ulysses_degree: given {ulysses}, but parallelism.context_parallel_method is "
            f"{p.context_parallel_method}; set that to unified, or leave this at 1"
        )


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
