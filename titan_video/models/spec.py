"""What a model family declares about itself; everything here is data, the appliers are elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class TokenShape:
    """The grid of tokens of one clip: latent frames, height and width, each divided by the patch."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class ParallelPlan:
    """How a model is taken apart. Names are dotted module paths; `*` stands for one path element.

    blocks: containers (ModuleDict) of transformer blocks, in forward order. Each block is one FSDP, checkpointing and
        compile unit.
    fp32: root modules or parameters whose arithmetic stays in float32 under mixed precision. They form the root's own
        FSDP unit.
    cores: in each block, the attention cores over the video tokens, which context parallel replaces.
    tensor: in each block, what tensor parallel does with a module or parameter, by name
        (distributed/tensor_parallel.py): "gather" a module that needs all tokens of its group, "column" and "row" a
        input, "heads" a vector split like the heads, "rms_stats" a module that is replaced. All other parameters are
        whole on each rank.
    first, last: root modules and parameters of the first and the last pipeline stage. `tables`: containers keyed like
        the blocks.
    """

    blocks: tuple[str, ...]
    fp32: tuple[str, ...] = ()
    inner_attention: tuple[str, ...] = ()
    tensor: dict[str, str] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class NameRule:
    """One line of a state-dict table: our parameter name, its name in diffusers' layout, and the change of form, if
    any.

    `{}` stands for a block index, the same on both sides. `to_public(t, args)` and `to_ours(t, args)` are inverse, and
    only permute or reshape.
    optional: only some flavors have such a parameter.
    original: the name in the layout of the model's own public code, in the same form. Lines with one original name are
    the rows of one tensor, in the order of the table. swapped: its rows are there with the second half first.
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
        `text_len`, `num_heads`, `head_dim`, `ffn_dim`, `num_layers`, `conditions` (models/conditioning.py), `boundary`
        between two experts or 0, `flops(num_tokens, batch)` of a `flops(num_tokens, batch)` of a forward and
        `block_flops(num_tokens, batch)`, the part of it that full activation checkpointing runs again.
    build: arguments -> module (built on the meta device by the trainer).
    init_parameter: (name, whole tensor, generator) fills one parameter in place, so every layout starts from the same
        weights.
    hf_names: names of the parameters in diffusers' layout, and in the original one where all lines say it.
    hf_ignored: diffusers' names of tensors that some published files hold and no model uses.
    args_from_hf / args_to_hf: diffusers `transformer/config.json` <-> arguments.
    args_to_original: arguments -> config.json of the original layout; None where it has no such file.
    lora_targets: ends of the names of those Linears of blocks that get an adapter where the run does not say which.
    masks_text: whether the blocks' attention leaves out the padding of the text.
    """

    name: str
    flavors: dict[str, Any]
    build: Callable[[Any], nn.Module]
    init_parameter: Callable[[str, Any, Any], None]
    plan: ParallelPlan
    hf_names: tuple[NameRule, ...]
    args_from_hf: Callable[[dict], Any]
    args_to_hf: Callable[[Any], dict]
    hf_folder: str = field(default="transformer")
    hf_ignored: tuple[str, ...] = ()
    args_to_original: Callable[[Any], dict] | None = None
    lora_targets: tuple[str, ...] = ()
    masks_text: bool = False
