"""Wan 2.1 text-to-video: flavors, parallel plan, and the names its parameters have in public checkpoints."""

from titan_video.models.spec import ModelSpec, NameRule, ParallelPlan
from titan_video.models.wan.model import WanArgs, WanModel, init_parameter

FLAVORS = {
    "debug": WanArgs(dim=128, num_heads=4, num_layers=4, ffn_dim=512, text_dim=64, text_len=16, freq_dim=64),
    "t2v-1.3B": WanArgs(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960),
    "t2v-14B": WanArgs(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824),
}


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


def _linear(ours: str, public: str) -> list[NameRule]:
    return [NameRule(f"{ours}.{part}", f"{public}.{part}") for part in ("weight", "bias")]


HF_NAMES = (
    NameRule("patch_embedding.weight", "patch_embedding.weight", _conv_kernel, _flat_kernel),
    NameRule("patch_embedding.bias", "patch_embedding.bias"),
    *_linear("text_embedder.up", "condition_embedder.text_embedder.linear_1"),
    *_linear("text_embedder.down", "condition_embedder.text_embedder.linear_2"),
    *_linear("time_embedder.up", "condition_embedder.time_embedder.linear_1"),
    *_linear("time_embedder.down", "condition_embedder.time_embedder.linear_2"),
    *_linear("time_proj", "condition_embedder.time_proj"),
    NameRule("modulation.{}", "blocks.{}.scale_shift_table", _add_batch, _drop_batch),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    NameRule("blocks.{}.norm_weight", "blocks.{}.norm2.weight"),
    NameRule("blocks.{}.norm_bias", "blocks.{}.norm2.bias"),
    *_linear("blocks.{}.ffn.up", "blocks.{}.ffn.net.0.proj"),
    *_linear("blocks.{}.ffn.down", "blocks.{}.ffn.net.2"),
    NameRule("head_modulation", "scale_shift_table", _add_batch, _drop_batch),
    NameRule("proj_out.weight", "proj_out.weight", _channels_last, _channels_first),
    NameRule("proj_out.bias", "proj_out.bias", _channels_last, _channels_first),
)


def args_to_hf(args: WanArgs) -> dict:
    """diffusers' `transformer/config.json` for these arguments."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(args.patch),
        "num_attention_heads": args.num_heads,
        "attention_head_dim": args.head_dim,
        "in_channels": args.in_channels,
        "out_channels": args.out_channels,
        "text_dim": args.text_dim,
        "freq_dim": args.freq_dim,
        "ffn_dim": args.ffn_dim,
        "num_layers": args.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": args.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def args_from_hf(config: dict) -> WanArgs:
    """Arguments from diffusers' `transformer/config.json`. ValueError for a class or a feature that this model does not have."""
    fixed = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
    if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
        raise ValueError(f"transformer/config.json holds a {config['_class_name']}; model.name = \"wan\" needs a WanTransformer3DModel")
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"transformer/config.json: {key} = {config[key]!r} is not supported yet, only {value!r} (Wan 2.1 text-to-video)")
    names = {"num_layers": "num_layers", "ffn_dim": "ffn_dim", "in_channels": "in_channels", "out_channels": "out_channels", "text_dim": "text_dim",
             "freq_dim": "freq_dim", "eps": "eps"}  # fmt: skip
    try:
        sizes = {ours: config[theirs] for ours, theirs in names.items()}
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        return WanArgs(dim=heads * width, num_heads=heads, patch=tuple(config["patch_size"]), **sizes)
    except KeyError as e:
        raise ValueError(f"transformer/config.json has no key {e}; it should be the file that diffusers' save_pretrained writes") from e


_ATTENTION_STYLES = {"q": "column", "k": "column", "v": "column", "o": "row", "norm_q": "heads", "norm_k": "heads", "mean_squares": "mean_squares"}

SPEC = ModelSpec(
    name="wan",
    flavors=FLAVORS,
    build=WanModel,
    init_parameter=init_parameter,
    plan=ParallelPlan(
        blocks=("blocks",),
        fp32=("time_embedder", "time_proj", "modulation", "head_modulation"),
        cores=("self_attn.core",),
        tensor={
            "self_attn": "gather",
            "cross_attn": "gather",
            "ffn": "gather",
            **{f"{a}.{part}": style for a in ("self_attn", "cross_attn") for part, style in _ATTENTION_STYLES.items()},
            "ffn.up": "column",
            "ffn.down": "row",
        },
        first=("patch_embedding", "text_embedder", "time_embedder", "time_proj"),
        last=("head_modulation", "proj_out"),
        tables=("modulation",),
    ),
    hf_names=HF_NAMES,
    args_from_hf=args_from_hf,
    args_to_hf=args_to_hf,
)

__all__ = ["SPEC", "WanArgs", "WanModel"]
