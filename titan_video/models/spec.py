"""What a model family declares about itself. Everything here is data; the code that applies it is elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class TokenShape:
    """The token grid of one clip: latent frames, height and width, each divided by the patch."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class LatentGeometry:
    """The latent space of a model's causal video VAE: channels, and pixels per latent in time and in space.

    The first latent frame stands for one pixel frame, each later one for `temporal_stride` of them.
    """

    channels: int
    temporal_stride: int
    spatial_stride: int

    def latent_shape(self, bucket: tuple[int, ...]) -> tuple[int, int, int, int]:
        """[C, F, H, W] of the latents of a clip of [frames, height, width] pixels."""
        frames, height, width = bucket
        latent_frames = (frames - 1) // self.temporal_stride + 1
        return self.channels, latent_frames, height // self.spatial_stride, width // self.spatial_stride

    def pixel_shape(self, latent_FHW: tuple[int, ...]) -> tuple[int, int, int]:
        """[frames, height, width] in pixels; the inverse of `latent_shape`."""
        frames, height, width = latent_FHW
        return (frames - 1) * self.temporal_stride + 1, height * self.spatial_stride, width * self.spatial_stride


@dataclass(frozen=True)
class RankGroup:
    """A process group as plain data, so that it can be an argument of a compiled or recomputed block."""

    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class StepLayout:
    """How the tokens of one micro-batch are split over ranks. It is one of the inputs of each block.

    A block that is recomputed, or run later in a pipeline, so has its own layout and not the last one that was set.
    seq_len: tokens of the whole clip; a rank has a slice of them, which may end in padding.
    ring, ulysses: groups of context parallel; None: those with which the model was built.
    sequence: all ranks that share the clip, in the order of their slices.
    """

    seq_len: int
    ring: RankGroup | None = None
    ulysses: RankGroup | None = None
    sequence: RankGroup | None = None


@dataclass(frozen=True)
class ExpertArgs:
    """A mixture of experts in place of the feed-forward of some blocks (models/experts.py, optional).

    top_k: experts of a token; under expert choice the mean number. expert_dim, shared_dim: width of each routed expert
    and of the one that all tokens pass, 0 for none. first_dense, last_dense: blocks that keep a dense feed-forward.
    expert_choice: experts choose tokens. route_scale: factor of the routed experts' weights, whose sum is 1.
    """

    num_experts: int
    top_k: int
    expert_dim: int
    shared_dim: int = 0
    first_dense: int = 0
    last_dense: int = 0
    expert_choice: bool = False
    route_scale: float = 1.0

    def num_rows(self, num_tokens: int) -> int:
        """Tokens of all routed experts together, for a clip. Under expert choice each has the same number."""
        rows = self.top_k * num_tokens
        return rows + -rows % self.num_experts if self.expert_choice else rows

    def blocks(self, num_layers: int) -> range:
        """The blocks that have experts."""
        return range(self.first_dense, num_layers - self.last_dense)


@dataclass(frozen=True)
class ParallelPlan:
    """How a model is split over ranks. Names are dotted module paths; `*` stands for one path element.

    blocks: containers (ModuleDict) of transformer blocks, in order. Each is a unit of checkpointing and compile.
    fp32: root modules or parameters that stay in float32 under mixed precision. They belong to the root's FSDP unit.
    units: FSDP units and the mesh over which each is sharded (a field of distributed.parallel_dims.Meshes), inner units
        first; "" is the root and comes last.
    inner_attention: in each block, the attention over the video tokens, which context parallel replaces.
    tensor: in each block, the tensor-parallel style of a module or parameter (distributed/tensor_parallel.py):
        "colwise" and "rowwise" split a Linear over its outputs or inputs, "all_gather_input" gathers a module's tokens,
        "shard_vector" splits a vector with the heads, "rms_stats" replaces a module. Others are replicated.
    experts: in each block, the module of stacked experts: parameters [E, ...], divided over ranks by E alone.
    first, last: root modules and parameters of the first and the last pipeline stage.
    per_block_params: root containers keyed like the blocks; an entry goes with its block's stage.
    """

    blocks: tuple[str, ...]
    fp32: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)
    inner_attention: tuple[str, ...] = ()
    tensor: dict[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    per_block_params: tuple[str, ...] = ()


@dataclass(frozen=True)
class NameRule:
    """One line of a state-dict table: our parameter's name, its name in diffusers' layout and the transform, if any.

    `{}` stands for a block index, the same on both sides. `to_public(t, args)` and `to_ours(t, args)` are inverse and
    only permute or reshape.
    optional: only some flavors have the parameter.
    original: the name in the layout of the model's own public code, with the same transform. Lines that share an
    original name are the rows of one tensor, in the order of the table.
    scale_shift_swapped: in the original layout the second half of the rows comes first.
    """

    ours: str
    public: str
    to_public: Callable[[Any, Any], Any] | None = None
    to_ours: Callable[[Any, Any], Any] | None = None
    optional: bool = False
    original: str = ""
    scale_shift_swapped: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A model family.

    flavors: architecture arguments by name: a frozen dataclass with `in_channels`, `out_channels`, `patch`, `text_dim`,
        `text_len`, `num_heads`, `head_dim`, `ffn_dim`, `num_layers`, `conditioning` (models/conditioning.py),
        `boundary` between two experts or 0, `flops(num_tokens, batch)` of a forward and `block_flops(num_tokens,
        batch)` of its blocks, which full activation checkpointing runs again.
    build: arguments -> module; the trainer builds it on the meta device.
    init_parameter: (name, full tensor, generator, shape=None) fills one parameter in place, so every layout has the
        same weights. shape: the scale is that of a tensor of this shape; None: of the tensor itself. Only muP gives it.
    geometry: arguments -> the latent space of the family's VAE. ValueError for arguments that no known VAE fits.
    hf_names: names of the parameters in diffusers' layout, and in the original one where every line says it.
    hf_ignored: diffusers' names of tensors that some published files hold and no model uses.
    args_from_hf, args_to_hf: diffusers `transformer/config.json` <-> arguments.
    args_to_original: arguments -> config.json of the original layout; None where it has no such file.
    lora_targets: suffixes of the names of those Linears in blocks that get an adapter by default.
    masks_text: whether the blocks' attention leaves out the padding of the text.
    adjust_group: as in `optim.optimizer.build_optimizer`; with muP set together with `init_parameter`.
    """

    name: str
    flavors: dict[str, Any]
    build: Callable[[Any], nn.Module]
    init_parameter: Callable[..., None]
    geometry: Callable[[Any], LatentGeometry]
    plan: ParallelPlan
    hf_names: tuple[NameRule, ...]
    args_from_hf: Callable[[dict], Any]
    args_to_hf: Callable[[Any], dict]
    hf_folder: str = field(default="transformer")
    hf_ignored: tuple[str, ...] = ()
    args_to_original: Callable[[Any], dict] | None = None
    lora_targets: tuple[str, ...] = ()
    masks_text: bool = False
    adjust_group: Callable[[str, dict], dict] | None = None
