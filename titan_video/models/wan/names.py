"""Names and layout transforms of Wan's parameters in diffusers' layout and in the public code's (Wan-Video/Wan2.1)."""

from titan_video.models.spec import NameRule
from titan_video.models.wan.args import WanArgs


def _conv_kernel(weight, args: WanArgs):
    return weight.reshape(args.dim, args.in_channels, *args.patch)


def _flat_kernel(weight, args: WanArgs):
    return weight.reshape(args.dim, -1)


def _channels_last(rows, args: WanArgs):
    """Our output patch runs over (channel, patch), theirs over (patch, channel)."""
    return rows.unflatten(0, (args.out_channels, args.patch_volume)).transpose(0, 1).flatten(0, 1)


def _channels_first(rows, args: WanArgs):
    return rows.unflatten(0, (args.patch_volume, args.out_channels)).transpose(0, 1).flatten(0, 1)


def _add_batch(table, args: WanArgs):
    return table.unsqueeze(0)


def _drop_batch(table, args: WanArgs):
    return table.squeeze(0)


def _rule(ours: str, public: str, original: str, *forms, optional: bool = False) -> NameRule:
    return NameRule(ours, public, *forms, optional=optional, original=original)


def _linear(ours: str, public: str, original: str, optional: bool = False) -> list[NameRule]:
    return [
        _rule(f"{ours}.{part}", f"{public}.{part}", f"{original}.{part}", optional=optional)
        for part in ("weight", "bias")
    ]


def _norm(ours: str, public: str, original: str, optional: bool = False) -> list[NameRule]:
    return [
        _rule(f"{ours}_{part}", f"{public}.{part}", f"{original}.{part}", optional=optional)
        for part in ("weight", "bias")
    ]


def _attention(ours: str, public: str) -> list[NameRule]:
    """The public code's names are ours here, but for those of norms."""
    ours, public = f"blocks.{{}}.{ours}", f"blocks.{{}}.{public}"
    linears = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    rules = [rule for a, b in linears.items() for rule in _linear(f"{ours}.{a}", f"{public}.{b}", f"{ours}.{a}")]
    return rules + [_rule(f"{ours}.norm_{x}", f"{public}.norm_{x}.weight", f"{ours}.norm_{x}.weight") for x in "qk"]


_BLOCK, _EMBEDDER, _IMAGE = "blocks.{}", "condition_embedder", "condition_embedder.image_embedder"

_EXPERTS = (
    *(f"{_BLOCK}.moe.experts.{part}" for part in ("up", "up_bias", "down", "down_bias")),
    *(f"{_BLOCK}.moe.shared.{part}" for part in ("up.weight", "up.bias", "down.weight", "down.bias")),
    *(f"routers.{{}}.{part}" for part in ("weight", "bias")),
)

# The norm of cross-attention, the only one with weights, is the second here and in diffusers, and called the third in
# the public code.
HF_NAMES = (
    _rule("patch_embedding.weight", "patch_embedding.weight", "patch_embedding.weight", _conv_kernel, _flat_kernel),
    _rule("patch_embedding.bias", "patch_embedding.bias", "patch_embedding.bias"),
    *_linear("text_embedder.up", f"{_EMBEDDER}.text_embedder.linear_1", "text_embedding.0"),
    *_linear("text_embedder.down", f"{_EMBEDDER}.text_embedder.linear_2", "text_embedding.2"),
    _rule("image_embedder.positions", f"{_IMAGE}.pos_embed", "img_emb.emb_pos", _add_batch, _drop_batch, optional=True),
    *_norm("image_embedder.norm_in", f"{_IMAGE}.norm1", "img_emb.proj.0", optional=True),
    *_linear("image_embedder.up", f"{_IMAGE}.ff.net.0.proj", "img_emb.proj.1", optional=True),
    *_linear("image_embedder.down", f"{_IMAGE}.ff.net.2", "img_emb.proj.3", optional=True),
    *_norm("image_embedder.norm_out", f"{_IMAGE}.norm2", "img_emb.proj.4", optional=True),
    *_linear("time_embedder.up", f"{_EMBEDDER}.time_embedder.linear_1", "time_embedding.0"),
    *_linear("time_embedder.down", f"{_EMBEDDER}.time_embedder.linear_2", "time_embedding.2"),
    *_linear("time_proj", f"{_EMBEDDER}.time_proj", "time_projection.1"),
    _rule("modulation.{}", f"{_BLOCK}.scale_shift_table", f"{_BLOCK}.modulation", _add_batch, _drop_batch),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    *_linear(f"{_BLOCK}.cross_attn.k_image", f"{_BLOCK}.attn2.add_k_proj", f"{_BLOCK}.cross_attn.k_img", optional=True),
    *_linear(f"{_BLOCK}.cross_attn.v_image", f"{_BLOCK}.attn2.add_v_proj", f"{_BLOCK}.cross_attn.v_img", optional=True),
    _rule(
        f"{_BLOCK}.cross_attn.norm_k_image",
        f"{_BLOCK}.attn2.norm_added_k.weight",
        f"{_BLOCK}.cross_attn.norm_k_img.weight",
        optional=True,
    ),
    *_norm(f"{_BLOCK}.norm", f"{_BLOCK}.norm2", f"{_BLOCK}.norm3"),
    *_linear(f"{_BLOCK}.ffn.up", f"{_BLOCK}.ffn.net.0.proj", f"{_BLOCK}.ffn.0", optional=True),
    *_linear(f"{_BLOCK}.ffn.down", f"{_BLOCK}.ffn.net.2", f"{_BLOCK}.ffn.2", optional=True),
    # Of mixtures of experts, which no public code has: our own names.
    *(_rule(name, name, name, optional=True) for name in _EXPERTS),
    _rule("head_modulation", "scale_shift_table", "head.modulation", _add_batch, _drop_batch),
    _rule("proj_out.weight", "proj_out.weight", "head.head.weight", _channels_last, _channels_first),
    _rule("proj_out.bias", "proj_out.bias", "head.head.bias", _channels_last, _channels_first),
)
