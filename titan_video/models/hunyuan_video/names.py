"""The names of HunyuanVideo's parameters in diffusers' layout and in that of the public code
form of some. Where several lines have one original name they are the rows of one tensor, in the order of the lines: q,
k, v, feed-forward.
"""

import torch

from titan_video.models.hunyuan_video.model import HunyuanVideoArgs
from titan_video.models.spec import NameRule


def _conv_kernel(weight, args: HunyuanVideoArgs):
    return weight.reshape(args.dim, args.in_channels, *args.patch)


def _flat_kernel(weight, args: HunyuanVideoArgs):
    return weight.reshape(args.dim, -1)


def _by_kind(weight, args: HunyuanVideoArgs):
    """Our inputs run over (head, its attention and its feed-forward), theirs over attention, then feed-forward."""
    attention, hidden = weight.unflatten(1, (args.num_heads, -1)).split(
        [args.head_dim, args.ffn_dim // args.num_heads], dim=2
    )
    return torch.cat([attention.flatten(1), hidden.flatten(1)], dim=1)


def _by_head(weight, args: HunyuanVideoArgs):
    attention, hidden = weight.split([args.dim, args.ffn_dim], dim=1)
    return torch.cat([part.unflatten(1, (args.num_heads, -1)) for part in (attention, hidden)], dim=2).flatten(1)


def _rule(ours: str, public: str, original: str, *forms, **kind: bool) -> NameRule:
    return NameRule(ours, public, *forms, original=original, **kind)


def _linear(ours: str, public: str, original: str, **kind: bool) -> list[NameRule]:
    return [_rule(f"{ours}.{part}", f"{public}.{part}", f"{original}.{part}", **kind) for part in ("weight", "bias")]


def _linears(ours: str, public: str, original: str, names: dict[str, tuple[str, str]]) -> list[NameRule]:
    """Linears named, under the three prefixes: ours -> (diffusers, original)."""
    return [
        rule for name, (a, b) in names.items() for rule in _linear(f"{ours}.{name}", f"{public}.{a}", f"{original}{b}")
    ]


_TIME_MLP = {"up": ("linear_1", ".mlp.0"), "down": ("linear_2", ".mlp.2")}
_TEXT_MLP = {"up": ("linear_1", ".linear_1"), "down": ("linear_2", ".linear_2")}
_POOLED_MLP = {"up": ("linear_1", ".in_layer"), "down": ("linear_2", ".out_layer")}
_FFN = {"up": ("net.0.proj", ".fc1"), "down": ("net.2", ".fc2")}
_CONDITION, _TEXT = "time_text_embed", "context_embedder"


def _double(ours: str, public: str, original: str) -> list[NameRule]:
    norms = {"norm": ("norm", "img"), "text_norm": ("norm_added", "txt")}
    return [
        *_linear(f"{ours}.modulation.linear", f"{public}.norm1.linear", f"{original}.img_mod.linear"),
        *_linear(f"{ours}.text_modulation.linear", f"{public}.norm1_context.linear", f"{original}.txt_mod.linear"),
        *(
            rule
            for x in "qkv"
            for rule in _linear(f"{ours}.attn.{x}", f"{public}.attn.to_{x}", f"{original}.img_attn_qkv")
        ),
        *(
            rule
            for x in "qkv"
            for rule in _linear(f"{ours}.attn.text_{x}", f"{public}.attn.add_{x}_proj", f"{original}.txt_attn_qkv")
        ),
        *_linear(f"{ours}.attn.o", f"{public}.attn.to_out.0", f"{original}.img_attn_proj"),
        *_linear(f"{ours}.attn.text_o", f"{public}.attn.to_add_out", f"{original}.txt_attn_proj"),
        *(
            _rule(f"{ours}.attn.{a}.{x}", f"{public}.attn.{b}_{x}.weight", f"{original}.{c}_attn_{x}_norm.weight")
            for a, (b, c) in norms.items()
            for x in "qk"
        ),
        *_linears(f"{ours}.ffn", f"{public}.ff", f"{original}.img_mlp", _FFN),
        *_linears(f"{ours}.text_ffn", f"{public}.ff_context", f"{original}.txt_mlp", _FFN),
    ]


def _single(ours: str, public: str, original: str) -> list[NameRule]:
    return [
        *_linear(f"{ours}.modulation.linear", f"{public}.norm.linear", f"{original}.modulation.linear"),
        *(rule for x in "qkv" for rule in _linear(f"{ours}.attn.{x}", f"{public}.attn.to_{x}", f"{original}.linear1")),
        *_linear(f"{ours}.attn.up", f"{public}.proj_mlp", f"{original}.linear1"),
        *(
            _rule(f"{ours}.attn.norm.{x}", f"{public}.attn.norm_{x}.weight", f"{original}.{x}_norm.weight")
            for x in "qk"
        ),
        _rule(f"{ours}.attn.out.weight", f"{public}.proj_out.weight", f"{original}.linear2.weight", _by_kind, _by_head),
        _rule(f"{ours}.attn.out.bias", f"{public}.proj_out.bias", f"{original}.linear2.bias"),
    ]


def _refiner(ours: str, public: str, original: str) -> list[NameRule]:
    norms = [(f"norm{i}", part) for i in (1, 2) for part in ("weight", "bias")]
    return [
        *(rule for x in "qkv" for rule in _linear(f"{ours}.{x}", f"{public}.attn.to_{x}", f"{original}.self_attn_qkv")),
        *_linear(f"{ours}.o", f"{public}.attn.to_out.0", f"{original}.self_attn_proj"),
        *_linears(ours, f"{public}.ff", f"{original}.mlp", _FFN),
        *_linear(f"{ours}.modulation.linear", f"{public}.norm_out.linear", f"{original}.adaLN_modulation.1"),
        *(
            _rule(f"{ours}.{norm}_{part}", f"{public}.{norm}.{part}", f"{original}.{norm}.{part}")
            for norm, part in norms
        ),
    ]


HF_NAMES = (
    _rule("patch_embedding.weight", "x_embedder.proj.weight", "img_in.proj.weight", _conv_kernel, _flat_kernel),
    _rule("patch_embedding.bias", "x_embedder.proj.bias", "img_in.proj.bias"),
    *_linears("condition.time", f"{_CONDITION}.timestep_embedder", "time_in", _TIME_MLP),
    *_linears("condition.text", f"{_CONDITION}.text_embedder", "vector_in", _POOLED_MLP),
    *_linear("condition.guidance.up", f"{_CONDITION}.guidance_embedder.linear_1", "guidance_in.mlp.0", optional=True),
    *_linear("condition.guidance.down", f"{_CONDITION}.guidance_embedder.linear_2", "guidance_in.mlp.2", optional=True),
    *_linears("text_condition.time", f"{_TEXT}.{_CONDITION}.timestep_embedder", "txt_in.t_embedder", _TIME_MLP),
    *_linears("text_condition.text", f"{_TEXT}.{_CONDITION}.text_embedder", "txt_in.c_embedder", _TEXT_MLP),
    *_linear("text_refiner.proj_in", f"{_TEXT}.proj_in", "txt_in.input_embedder"),
    *_refiner(
        "text_refiner.blocks.{}",
        f"{_TEXT}.token_refiner.refiner_blocks.{{}}",
        "txt_in.individual_token_refiner.blocks.{}",
    ),
    *_double("double_blocks.{}", "transformer_blocks.{}", "double_blocks.{}"),
    *_single("single_blocks.{}", "single_transformer_blocks.{}", "single_blocks.{}"),
    # Scale, then shift, here and in diffusers; shift, then scale, in the public code.
    *_linear("head_modulation", "norm_out.linear", "final_layer.adaLN_modulation.1", scale_shift_swapped=True),
    *_linear("proj_out", "proj_out", "final_layer.linear"),
)
