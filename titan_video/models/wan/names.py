"""The names of Wan's parameters in diffusers' layout, and the change of form of those that are stored in another one."""

from titan_video.models.spec import NameRule
from titan_video.models.wan.model import WanArgs


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


def _attention(ours: str, public: str) -> list[NameRule]:
    linear = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    rules = [NameRule(f"blocks.{{}}.{ours}.{a}.{part}", f"blocks.{{}}.{public}.{b}.{part}") for a, b in linear.items() for part in ("weight", "bias")]
    return rules + [NameRule(f"blocks.{{}}.{ours}.norm_{x}", f"blocks.{{}}.{public}.norm_{x}.weight") for x in "qk"]


def _linear(ours: str, public: str, optional: bool = False) -> list[NameRule]:
    return [NameRule(f"{ours}.{part}", f"{public}.{part}", optional=optional) for part in ("weight", "bias")]


def _norm(ours: str, public: str, optional: bool = False) -> list[NameRule]:
    return [NameRule(f"{ours}_{part}", f"{public}.{part}", optional=optional) for part in ("weight", "bias")]


HF_NAMES = (
    NameRule("patch_embedding.weight", "patch_embedding.weight", _conv_kernel, _flat_kernel),
    NameRule("patch_embedding.bias", "patch_embedding.bias"),
    *_linear("text_embedder.up", "condition_embedder.text_embedder.linear_1"),
    *_linear("text_embedder.down", "condition_embedder.text_embedder.linear_2"),
    NameRule("image_embedder.positions", "condition_embedder.image_embedder.pos_embed", _add_batch, _drop_batch, optional=True),
    *_norm("image_embedder.norm_in", "condition_embedder.image_embedder.norm1", optional=True),
    *_linear("image_embedder.up", "condition_embedder.image_embedder.ff.net.0.proj", optional=True),
    *_linear("image_embedder.down", "condition_embedder.image_embedder.ff.net.2", optional=True),
    *_norm("image_embedder.norm_out", "condition_embedder.image_embedder.norm2", optional=True),
    *_linear("time_embedder.up", "condition_embedder.time_embedder.linear_1"),
    *_linear("time_embedder.down", "condition_embedder.time_embedder.linear_2"),
    *_linear("time_proj", "condition_embedder.time_proj"),
    NameRule("modulation.{}", "blocks.{}.scale_shift_table", _add_batch, _drop_batch),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    *_linear("blocks.{}.cross_attn.k_image", "blocks.{}.attn2.add_k_proj", optional=True),
    *_linear("blocks.{}.cross_attn.v_image", "blocks.{}.attn2.add_v_proj", optional=True),
    NameRule("blocks.{}.cross_attn.norm_k_image", "blocks.{}.attn2.norm_added_k.weight", optional=True),
    *_norm("blocks.{}.norm", "blocks.{}.norm2"),
    *_linear("blocks.{}.ffn.up", "blocks.{}.ffn.net.0.proj"),
    *_linear("blocks.{}.ffn.down", "blocks.{}.ffn.net.2"),
    NameRule("head_modulation", "scale_shift_table", _add_batch, _drop_batch),
    NameRule("proj_out.weight", "proj_out.weight", _channels_last, _channels_first),
    NameRule("proj_out.bias", "proj_out.bias", _channels_last, _channels_first),
)
