"""HunyuanVideo, text-to-video and both forms of image-to-video: flavors, parallel plan, and the public configuration.

Names of parameters: names.py.
"""

from titan_video.models.hunyuan_video.args import HunyuanVideoArgs
from titan_video.models.hunyuan_video.model import HunyuanVideoModel, init_parameter
from titan_video.models.hunyuan_video.names import HF_NAMES
from titan_video.models.spec import LatentGeometry, ModelSpec, ParallelPlan

_13B = {"dim": 3072, "num_heads": 24, "num_double_layers": 20, "num_single_layers": 40, "ffn_dim": 12288}
_DEBUG = {
    "dim": 128,
    "num_heads": 4,
    "num_double_layers": 2,
    "num_single_layers": 2,
    "ffn_dim": 512,
    "num_refiner_layers": 1,
    "text_dim": 64,
    "text_len": 16,
    "pooled_dim": 64,
    "axes_dim": (8, 12, 12),
}
_LATENT_CONCAT = {"image_condition": "latent_concat", "in_channels": 33, "guidance": False}
_TOKEN_REPLACE = {"image_condition": "token_replace"}

# The text of the image-to-video models begins with image tokens: every second of 576, or every fourth.
FLAVORS = {
    "debug": HunyuanVideoArgs(**_DEBUG),
    "debug-i2v-latent-concat": HunyuanVideoArgs(**_DEBUG, **_LATENT_CONCAT),
    "debug-i2v-token-replace": HunyuanVideoArgs(**_DEBUG, **_TOKEN_REPLACE),
    "proxy-debug": HunyuanVideoArgs(**_DEBUG | {"dim": 32, "num_heads": 1, "ffn_dim": 128}),
    "t2v-13B": HunyuanVideoArgs(**_13B),
    "i2v-13B-latent-concat": HunyuanVideoArgs(**_13B, **_LATENT_CONCAT, text_len=288 + 256),
    "i2v-13B-token-replace": HunyuanVideoArgs(**_13B, **_TOKEN_REPLACE, text_len=144 + 256),
    # A narrow form, for optimizer.base_flavor: the same depth and head width. It is not published.
    "proxy-t2v-13B": HunyuanVideoArgs(**_13B | {"dim": 384, "num_heads": 3, "ffn_dim": 1536}),
}


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
    """Arguments from diffusers' `transformer/config.json`.

    ValueError for a class or a feature that this model does not have.
    """
    name = config.get("_class_name", "HunyuanVideoTransformer3DModel")
    if name != "HunyuanVideoTransformer3DModel":
        raise ValueError(
            f'transformer/config.json holds a {name}; model.name = "hunyuan_video" needs a '
            f"HunyuanVideoTransformer3DModel"
        )
    image_condition = config.get("image_condition_type")  # the first text-to-video folders do not have it
    for key, value, legal in (
        ("qk_norm", config.get("qk_norm", "rms_norm"), ["rms_norm"]),
        ("image_condition_type", image_condition, [None, "latent_concat", "token_replace"]),
    ):
        if value not in legal:
            raise ValueError(f"transformer/config.json: {key} = {value!r} is not supported; it must be one of {legal}")
    names = {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "num_double_layers": "num_layers",
        "num_single_layers": "num_single_layers",
        "num_refiner_layers": "num_refiner_layers",
        "guidance": "guidance_embeds",
        "text_dim": "text_embed_dim",
        "pooled_dim": "pooled_projection_dim",
        "rope_theta": "rope_theta",
    }
    try:
        sizes = {ours: config[theirs] for ours, theirs in names.items()}
        heads, dim = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
        patch = config["patch_size_t"], config["patch_size"], config["patch_size"]
        axes_dim = tuple(config["rope_axes_dim"])
        ffn_dim = int(dim * config["mlp_ratio"])
    except KeyError as e:
        raise ValueError(
            f"transformer/config.json has no key {e}; it should be the file that diffusers' save_pretrained writes"
        ) from e
    return HunyuanVideoArgs(
        dim, heads, ffn_dim=ffn_dim, patch=patch, axes_dim=axes_dim, image_condition=image_condition or "", **sizes
    )


SPEC = ModelSpec(
    name="hunyuan_video",
    flavors=FLAVORS,
    build=HunyuanVideoModel,
    init_parameter=init_parameter,
    geometry=lambda args: LatentGeometry(args.out_channels, temporal_stride=4, spatial_stride=8),
    plan=ParallelPlan(
        blocks=("double_blocks", "single_blocks"),
        fp32=("condition", "text_condition", "head_modulation"),
        units={
            "double_blocks.*": "fsdp",
            "single_blocks.*": "fsdp",
            "patch_embedding": "fsdp_root",
            "text_refiner": "fsdp_root",
            "proj_out": "fsdp_root",
            "": "fsdp_root",
        },
        inner_attention=("attn.inner_attention",),
        tensor={
            # Video tokens are sharded over the group and gathered. Text is replicated, so its partial sums are
            # all-reduced.
            "attn": "all_gather_input",
            "ffn": "all_gather_input",
            **{f"attn.{name}": "colwise" for name in ("q", "k", "v", "up", "text_q", "text_k", "text_v")},
            "attn.o": "rowwise",
            "attn.text_o": "rowwise_replicated",
            "attn.out": "rowwise_joint",
            "ffn.up": "colwise",
            "ffn.down": "rowwise",
            "text_ffn.up": "colwise",
            "text_ffn.down": "rowwise_replicated",
            "modulation.linear": "colwise_gathered",
            "text_modulation.linear": "colwise_gathered",
        },
        first=("patch_embedding", "condition", "text_condition", "text_refiner"),
        last=("head_modulation", "proj_out"),
    ),
    hf_names=HF_NAMES,
    args_from_hf=args_from_hf,
    args_to_hf=args_to_hf,
    lora_targets=(
        *(f"attn.{part}" for part in ("q", "k", "v", "o", "text_q", "text_k", "text_v", "text_o", "up", "out")),
        *(f"{ffn}.{part}" for ffn in ("ffn", "text_ffn") for part in ("up", "down")),
    ),
    masks_text=True,
)

__all__ = ["SPEC", "HunyuanVideoArgs", "HunyuanVideoModel"]
