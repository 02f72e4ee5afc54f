"""Wan 2.1 and 2.2, text-to-video and image-to-video: flavors, parallel plan, and the public configuration.

Names of parameters: names.py.
"""

from dataclasses import asdict, replace

from titan_video.models.spec import ExpertArgs, LatentGeometry, ModelSpec, ParallelPlan
from titan_video.models.wan.args import WanArgs
from titan_video.models.wan.model import WanModel, init_parameter
from titan_video.models.wan.names import HF_NAMES
from titan_video.tools.parts import resolve

CLASS, EXPERTS_CLASS = "WanTransformer3DModel", "TitanVideoWanExperts"  # of config.json; diffusers has the first
CLIP_TOKENS, CLIP_WIDTH = 257, 1280  # of one image: 16 x 16 patches and the class token of CLIP's ViT-H/14

_DEBUG = WanArgs(dim=128, num_heads=4, num_layers=4, ffn_dim=512, text_dim=64, text_len=16, freq_dim=64)
_14B = WanArgs(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
_5B = WanArgs(
    dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48, clean_first_frame=True
)
_CHANNELS = {"in_channels": 36}  # 16 noised latents, 4 of the cond mask, 16 conditioning latents
_IMAGE = {**_CHANNELS, "image_dim": CLIP_WIDTH, "image_len": CLIP_TOKENS}
_TWO_IMAGES = {**_IMAGE, "image_len": 2 * CLIP_TOKENS, "image_positions": True}
_DEBUG_EXPERTS = ExpertArgs(num_experts=8, top_k=2, expert_dim=128, shared_dim=256, first_dense=1)
_1_3B_EXPERTS = ExpertArgs(num_experts=32, top_k=2, expert_dim=2240, shared_dim=4480, first_dense=2, last_dense=1)

FLAVORS = {
    # To try things out, with the debug encoders: one of each kind.
    "debug": _DEBUG,
    "debug-i2v": replace(_DEBUG, **_IMAGE | {"image_dim": 64}),
    "debug-flf2v": replace(_DEBUG, **_TWO_IMAGES | {"image_dim": 64}),
    "debug-i2v-A14B": replace(_DEBUG, **_CHANNELS, boundary=0.9),
    "debug-ti2v": replace(_DEBUG, clean_first_frame=True),
    "proxy-debug": replace(_DEBUG, dim=32, num_heads=1, ffn_dim=128),
    "moe-debug": replace(_DEBUG, experts=_DEBUG_EXPERTS),
    "moe-debug-expert-choice": replace(_DEBUG, experts=replace(_DEBUG_EXPERTS, expert_choice=True)),
    # Wan 2.1. The 480p and 720p models of i2v-14B differ in their weights only.
    "t2v-1.3B": WanArgs(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960),
    "t2v-14B": _14B,
    # Mixtures of experts. Of moe-1.3B what is active has the size of t2v-1.3B. The others start from t2v-14B
    # (titan_video/upcycle.py): its feed-forward becomes the expert of all tokens, or each routed one.
    "moe-1.3B": WanArgs(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, experts=_1_3B_EXPERTS),
    "moe-14B-shared": replace(_14B, experts=ExpertArgs(num_experts=16, top_k=2, expert_dim=3456, shared_dim=13824)),
    "moe-14B-copies": replace(_14B, experts=ExpertArgs(num_experts=8, top_k=2, expert_dim=13824)),
    "i2v-14B": replace(_14B, **_IMAGE),
    "flf2v-14B": replace(_14B, **_TWO_IMAGES),
    # Wan 2.2. An A14B is two models of this architecture: one for the high noise levels, one for the low.
    "t2v-A14B": replace(_14B, boundary=0.875),
    "i2v-A14B": replace(_14B, **_CHANNELS, boundary=0.9),
    # TI2V-5B is one model for both tasks: trained from a first frame, or, as t2v-5B, from the text alone.
    "ti2v-5B": _5B,
    "t2v-5B": replace(_5B, clean_first_frame=False),
    # Narrow forms, for optimizer.base_flavor: the same depth and head width. None is published.
    "proxy-t2v-1.3B": WanArgs(dim=384, num_heads=3, num_layers=30, ffn_dim=2240),
    "proxy-t2v-14B": replace(_14B, dim=640, num_heads=5, ffn_dim=1728),
    "proxy-ti2v-5B": replace(_5B, dim=384, num_heads=3, ffn_dim=1792),
    "proxy-t2v-5B": replace(_5B, dim=384, num_heads=3, ffn_dim=1792, clean_first_frame=False),
}


def args_to_hf(args: WanArgs) -> dict:
    """diffusers' `transformer/config.json` for these arguments; with experts, which diffusers lacks, one of our own."""
    return {
        **({"_class_name": EXPERTS_CLASS, "experts": asdict(args.experts)} if args.experts else {"_class_name": CLASS}),
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
        "image_dim": args.image_dim or None,
        "added_kv_proj_dim": args.dim if args.image_dim else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": args.image_len if args.image_positions else None,
    }


def args_from_hf(config: dict) -> WanArgs:
    """Arguments from diffusers' `transformer/config.json`. ValueError: a class or feature that this model lacks.

    The file does not mention the first frame: 48 latent channels mean TI2V-5B, where it may be clean. The key
    boundary_ratio comes from model_index.json.
    """
    if config.get("_class_name", CLASS) != (EXPERTS_CLASS if config.get("experts") else CLASS):
        raise ValueError(
            f'transformer/config.json holds a {config.get("_class_name", CLASS)}; model.name = "wan" needs a '
            f"{CLASS}, or with experts a {EXPERTS_CLASS}"
        )
    for key, value in {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}.items():
        if config.get(key, value) != value:
            raise ValueError(f"transformer/config.json: {key} = {config[key]!r} is not supported, only {value!r}")
    names = "num_layers", "ffn_dim", "in_channels", "out_channels", "text_dim", "freq_dim", "eps"
    try:
        sizes = {name: config[name] for name in names}
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        args = WanArgs(dim=heads * width, num_heads=heads, patch=tuple(config["patch_size"]), **sizes)
    except KeyError as e:
        raise ValueError(
            f"transformer/config.json has no key {e}; it should be the file that diffusers' save_pretrained writes"
        ) from e
    image_dim, positions = config.get("image_dim"), config.get("pos_embed_seq_len")
    if config.get("added_kv_proj_dim") != (args.dim if image_dim else None):
        added = config.get("added_kv_proj_dim")
        raise ValueError(
            f"transformer/config.json: added_kv_proj_dim = {added!r} does not go with image_dim = {image_dim!r}; "
            f"image tokens need a projection from the model's width {args.dim}, other models none"
        )
    if positions and not image_dim:
        raise ValueError(
            f"transformer/config.json: pos_embed_seq_len = {positions!r} needs image tokens, but there is no image_dim"
        )
    if image_dim:
        args = replace(args, image_dim=image_dim, image_len=positions or CLIP_TOKENS, image_positions=bool(positions))
    if (experts := ExpertArgs(**config["experts"]) if config.get("experts") else None) is not None:
        resolve("titan_video.models.experts:check", asked_by="model.flavor")(experts, args.num_layers)
    first_frame, boundary = args.in_channels == 48, config.get("boundary_ratio") or 0.0
    return replace(args, clean_first_frame=first_frame, boundary=boundary, experts=experts)


def args_to_original(args: WanArgs) -> dict:
    """The public code's config.json for these arguments."""
    kind = "i2v" if args.in_channels > args.out_channels else "t2v"
    kind = "flf2v" if args.image_positions else "ti2v" if args.in_channels == 48 else kind
    return {
        "_class_name": "WanModel",
        "model_type": kind,
        "dim": args.dim,
        "eps": args.eps,
        "ffn_dim": args.ffn_dim,
        "freq_dim": args.freq_dim,
        "in_dim": args.in_channels,
        "num_heads": args.num_heads,
        "num_layers": args.num_layers,
        "out_dim": args.out_channels,
        "text_len": 512,
    }


def geometry(args: WanArgs) -> LatentGeometry:
    """Of the Wan 2.1 VAE, 16 channels, or the Wan 2.2 VAE, 48 channels."""
    spatial_strides = {16: 8, 48: 16}
    if args.out_channels not in spatial_strides:
        raise ValueError(
            f"model.flavor: the model has {args.out_channels} latent channels; Wan VAEs have {sorted(spatial_strides)}"
        )
    return LatentGeometry(args.out_channels, temporal_stride=4, spatial_stride=spatial_strides[args.out_channels])


_ATTENTION_STYLES = {
    "q": "colwise",
    "k": "colwise",
    "v": "colwise",
    "o": "rowwise",
    "norm_q": "shard_vector",
    "norm_k": "shard_vector",
    "rms_stats": "rms_stats",
}

SPEC = ModelSpec(
    name="wan",
    flavors=FLAVORS,
    build=WanModel,
    init_parameter=init_parameter,
    geometry=geometry,
    plan=ParallelPlan(
        blocks=("blocks",),
        fp32=("time_embedder", "time_proj", "modulation", "head_modulation", "routers"),
        units={
            "blocks.*.moe.experts": "expert_fsdp",
            "blocks.*": "fsdp",
            "patch_embedding": "fsdp_root",
            "text_embedder": "fsdp_root",
            "image_embedder": "fsdp_root",
            "proj_out": "fsdp_root",
            "": "fsdp_root",
        },
        inner_attention=("self_attn.inner_attention",),
        tensor={
            "self_attn": "all_gather_input",
            "cross_attn": "all_gather_input",
            "ffn": "all_gather_input",
            **{f"{a}.{part}": style for a in ("self_attn", "cross_attn") for part, style in _ATTENTION_STYLES.items()},
            "cross_attn.k_image": "colwise",
            "cross_attn.v_image": "colwise",
            "cross_attn.norm_k_image": "shard_vector",
            "ffn.up": "colwise",
            "ffn.down": "rowwise",
            "moe.shared": "all_gather_input",
            "moe.shared.up": "colwise",
            "moe.shared.down": "rowwise",
        },
        experts=("moe.experts",),
        first=("patch_embedding", "text_embedder", "image_embedder", "time_embedder", "time_proj"),
        last=("head_modulation", "proj_out"),
        per_block_params=("modulation", "routers"),
    ),
    hf_names=HF_NAMES,
    # In the published image-to-video folders, and unused; diffusers ignores it too.
    hf_ignored=("blocks.{}.attn2.norm_added_q.weight",),
    args_from_hf=args_from_hf,
    args_to_hf=args_to_hf,
    args_to_original=args_to_original,
    lora_targets=(*(f"{a}.{part}" for a in ("self_attn", "cross_attn") for part in "qkvo"), "ffn.up", "ffn.down"),
)

__all__ = ["SPEC", "WanArgs", "WanModel"]
