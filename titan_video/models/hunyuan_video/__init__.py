"""HunyuanVideo, text-to-video and both forms of image-to-video: flavors, parallel plan, and the names its parameters have in public checkpoints."""

import torch

from titan_video.models.hunyuan_video.model import HunyuanVideoArgs, HunyuanVideoModel, init_parameter
from titan_video.models.spec import ModelSpec, NameRule, ParallelPlan

_13B = {"dim": 3072, "num_heads": 24, "num_double_layers": 20, "num_single_layers": 40, "ffn_dim": 12288}
_DEBUG = {"dim": 128, "num_heads": 4, "num_double_layers": 2, "num_single_layers": 2, "ffn_dim": 512, "num_refiner_layers": 1, "text_dim": 64,
          "text_len": 16, "pooled_dim": 64, "axes_dim": (8, 12, 12)}  # fmt: skip
_LATENT_CONCAT = {"image_condition": "latent_concat", "in_channels": 33, "guidance": False}
_TOKEN_REPLACE = {"image_condition": "token_replace"}

# The text of the image-to-video models begins with image tokens: every second of 576, or every fourth.
FLAVORS = {
    "debug": HunyuanVideoArgs(**_DEBUG),
    "debug-i2v-latent-concat": HunyuanVideoArgs(**_DEBUG, **_LATENT_CONCAT),
    "debug-i2v-token-replace": HunyuanVideoArgs(**_DEBUG, **_TOKEN_REPLACE),
    "t2v-13B": HunyuanVideoArgs(**_13B),
    "i2v-13B-latent-concat": HunyuanVideoArgs(**_13B, **_LATENT_CONCAT, text_len=288 + 256),
    "i2v-13B-token-replace": HunyuanVideoArgs(**_13B, **_TOKEN_REPLACE, text_len=144 + 256),
}


def _conv_kernel(weight, args: HunyuanVideoArgs):
    return weight.reshape(args.dim, args.in_channels, *args.patch)


def _flat_kernel(weight, args: HunyuanVideoArgs):
    return weight.reshape(args.dim, -1)


def _by_kind(weight, args: HunyuanVideoArgs):
    """Our inputs run over (head, its attention and its feed-forward), theirs over attention, then feed-forward."""
    attention, hidden = weight.unflatten(1, (args.num_heads, -1)).split([args.head_dim, args.ffn_dim // args.num_heads], dim=2)
    return torch.cat([attention.flatten(1), hidden.flatten(1)], dim=1)


def _by_head(weight, args: HunyuanVideoArgs):
    attention, hidden = weight.split([args.dim, args.ffn_dim], dim=1)
    return torch.cat([part.unflatten(1, (args.num_heads, -1)) for part in (attention, hidden)], dim=2).flatten(1)


def _linear(ours: str, public: str, optional: bool = False) -> list[NameRule]:
    return [NameRule(f"{ours}.{part}", f"{public}.{part}", optional=optional) for part in ("weight", "bias")]


def _linears(ours: str, public: str, names: dict[str, str]) -> list[NameRule]:
    return [rule for a, b in names.items() for rule in _linear(f"{ours}.{a}", f"{public}.{b}")]


_QKV = {"q": "to_q", "k": "to_k", "v": "to_v"}
_MLP = {"up": "linear_1", "down": "linear_2"}
_FFN = {"up": "net.0.proj", "down": "net.2"}
_DOUBLE, _SINGLE, _REFINER = "double_blocks.{}", "single_blocks.{}", "text_refiner.blocks.{}"
_HF_DOUBLE, _HF_SINGLE, _HF_REFINER = "transformer_blocks.{}", "single_transformer_blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}"

HF_NAMES = (
    NameRule("patch_embedding.weight", "x_embedder.proj.weight", _conv_kernel, _flat_kernel),
    NameRule("patch_embedding.bias", "x_embedder.proj.bias"),
    *_linears("condition.time", "time_text_embed.timestep_embedder", _MLP),
    *_linears("condition.text", "time_text_embed.text_embedder", _MLP),
    *_linear("condition.guidance.up", "time_text_embed.guidance_embedder.linear_1", optional=True),
    *_linear("condition.guidance.down", "time_text_embed.guidance_embedder.linear_2", optional=True),
    *_linears("text_condition.time", "context_embedder.time_text_embed.timestep_embedder", _MLP),
    *_linears("text_condition.text", "context_embedder.time_text_embed.text_embedder", _MLP),
    *_linear("text_refiner.proj_in", "context_embedder.proj_in"),
    *_linears(_REFINER, f"{_HF_REFINER}.attn", {**_QKV, "o": "to_out.0"}),
    *_linears(_REFINER, f"{_HF_REFINER}.ff", _FFN),
    *_linear(f"{_REFINER}.modulation.linear", f"{_HF_REFINER}.norm_out.linear"),
    *(NameRule(f"{_REFINER}.norm{i}_{part}", f"{_HF_REFINER}.norm{i}.{part}") for i in (1, 2) for part in ("weight", "bias")),
    *_linear(f"{_DOUBLE}.modulation.linear", f"{_HF_DOUBLE}.norm1.linear"),
    *_linear(f"{_DOUBLE}.text_modulation.linear", f"{_HF_DOUBLE}.norm1_context.linear"),
    *_linears(f"{_DOUBLE}.attn", f"{_HF_DOUBLE}.attn", {**_QKV, "o": "to_out.0", "text_o": "to_add_out"}),
    *_linears(f"{_DOUBLE}.attn", f"{_HF_DOUBLE}.attn", {f"text_{x}": f"add_{x}_proj" for x in "qkv"}),
    *(NameRule(f"{_DOUBLE}.attn.norm.{x}", f"{_HF_DOUBLE}.attn.norm_{x}.weight") for x in "qk"),
    *(NameRule(f"{_DOUBLE}.attn.text_norm.{x}", f"{_HF_DOUBLE}.attn.norm_added_{x}.weight") for x in "qk"),
    *_linears(f"{_DOUBLE}.ffn", f"{_HF_DOUBLE}.ff", _FFN),
    *_linears(f"{_DOUBLE}.text_ffn", f"{_HF_DOUBLE}.ff_context", _FFN),
    *_linear(f"{_SINGLE}.modulation.linear", f"{_HF_SINGLE}.norm.linear"),
    *_linears(f"{_SINGLE}.attn", f"{_HF_SINGLE}.attn", _QKV),
    *(NameRule(f"{_SINGLE}.attn.norm.{x}", f"{_HF_SINGLE}.attn.norm_{x}.weight") for x in "qk"),
    *_linear(f"{_SINGLE}.attn.up", f"{_HF_SINGLE}.proj_mlp"),
    NameRule(f"{_SINGLE}.attn.out.weight", f"{_HF_SINGLE}.proj_out.weight", _by_kind, _by_head),
    NameRule(f"{_SINGLE}.attn.out.bias", f"{_HF_SINGLE}.proj_out.bias"),
    *_linear("head_modulation", "norm_out.linear"),
    *_linear("proj_out", "proj_out"),
)


def args_to_hf(args: HunyuanVideoArgs) -> dict:
    """diffusers' `transformer/config.json` for these arguments."""
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": args.in_channels,
        "out_channels": args.out_channels,
        "num_attention_heads": args.num_heads,
        "attention_head_dim": args.head_dim,
        "num_layers": args.num_double_layers,
        "num_single_layers": args.num_single_layers,
        "num_refiner_layers": args.num_refiner_layers,
        "mlp_ratio": args.ffn_dim / args.dim,
        "patch_size": args.patch[1],
        "patch_size_t": args.patch[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": args.guidance,
        "text_embed_dim": args.text_dim,
        "pooled_projection_dim": args.pooled_dim,
        "rope_theta": args.rope_theta,
        "rope_axes_dim": list(args.axes_dim),
        "image_condition_type": args.image_condition or None,
    }


def args_from_hf(config: dict) -> HunyuanVideoArgs:
    """Arguments from diffusers' `transformer/config.json`. ValueError for a class or a feature that this model does not have."""
    name = config.get("_class_name", "HunyuanVideoTransformer3DModel")
    if name != "HunyuanVideoTransformer3DModel":
        raise ValueError(f'transformer/config.json holds a {name}; model.name = "hunyuan_video" needs a HunyuanVideoTransformer3DModel')
    image_condition = config.get("image_condition_type")  # the first text-to-video folders do not have it
    for key, value, legal in (("qk_norm", config.get("qk_norm", "rms_norm"), ["rms_norm"]),
                              ("image_condition_type", image_condition, [None, "latent_concat", "token_replace"])):  # fmt: skip
        if value not in legal:
            raise ValueError(f"transformer/config.json: {key} = {value!r} is not supported; it must be one of {legal}")
    names = {"in_channels": "in_channels", "out_channels": "out_channels", "num_double_layers": "num_layers", "num_single_layers": "num_single_layers",
             "num_refiner_layers": "num_refiner_layers", "guidance": "guidance_embeds", "text_dim": "text_embed_dim",
             "pooled_dim": "pooled_projection_dim", "rope_theta": "rope_theta"}  # fmt: skip
    try:
        sizes = {ours: config[theirs] for ours, theirs in names.items()}
        heads, dim = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
        patch, axes_dim = (config["patch_size_t"], config["patch_size"], config["patch_size"]), tuple(config["rope_axes_dim"])
        ffn_dim = int(dim * config["mlp_ratio"])
    except KeyError as e:
        raise ValueError(f"transformer/config.json has no key {e}; it should be the file that diffusers' save_pretrained writes") from e
    return HunyuanVideoArgs(dim, heads, ffn_dim=ffn_dim, patch=patch, axes_dim=axes_dim, image_condition=image_condition or "", **sizes)


SPEC = ModelSpec(
    name="hunyuan_video",
    flavors=FLAVORS,
    build=HunyuanVideoModel,
    init_parameter=init_parameter,
    plan=ParallelPlan(
        blocks=("double_blocks", "single_blocks"),
        fp32=("condition", "text_condition", "head_modulation"),
        cores=("attn.core",),
        tensor={
            # Video tokens are spread over the group and gathered; text is whole on each rank, so its sums are completed and not dealt out.
            "attn": "gather",
            "ffn": "gather",
            **{f"attn.{name}": "column" for name in ("q", "k", "v", "up", "text_q", "text_k", "text_v")},
            "attn.o": "row",
            "attn.text_o": "row_replicated",
            "attn.out": "row_joint",
            "ffn.up": "column",
            "ffn.down": "row",
            "text_ffn.up": "column",
            "text_ffn.down": "row_replicated",
            "modulation.linear": "column_gathered",
            "text_modulation.linear": "column_gathered",
        },
        first=("patch_embedding", "condition", "text_condition", "text_refiner"),
        last=("head_modulation", "proj_out"),
    ),
    hf_names=HF_NAMES,
    args_from_hf=args_from_hf,
    args_to_hf=args_to_hf,
)

__all__ = ["SPEC", "HunyuanVideoArgs", "HunyuanVideoModel"]
