"""Closed forms of a training step's memory on one rank, from sizes, degrees and modes; a dry run measures the same.

Parameters, gradients and optimizer state hold for every model. Activations are written out for Wan's text-to-video
blocks without compile, with plain or fused kernels that save what they save on a GPU.

Letters: D width, F feed-forward width, H heads, S text tokens, L rows of one rank, B clips of a micro-batch,
t tensor-parallel degree, e bytes of an element.
"""

import math
from collections import Counter
from typing import Any

import torch

from titan_video.config.job_config import ActivationCheckpoint, JobConfig
from titan_video.distributed.activation_checkpoint import sections_by_block
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.spec import ModelSpec, ParallelPlan
from titan_video.optim.optimizer import updated_by
from titan_video.planner.dry_run.fake import gpu_backend
from titan_video.tools.parts import resolve
from titan_video.weights.trained import WeightsSettings, build_weights


def estimate(config: JobConfig, spec: ModelSpec, args: Any, dims: ParallelDims, num_tokens: int) -> dict[str, int]:
    """The maximum bytes of each category on the fullest rank: those of `state`, and activations.

    num_tokens: tokens of one clip.
    ValueError: there is no closed form for pipelines, for activations of models other than Wan's text-to-video, for
    offload and for memory budgets.
    """
    itemsize = getattr(torch, config.training.mixed_precision_param).itemsize
    if config.lora.enable:
        raise ValueError("lora.enable: no closed form of what adapters save; run a dry run")
    fused = gpu_backend(config.model.kernels) == "triton"
    batch, section = config.training.local_batch_size, config.activation_checkpoint
    activations = wan_activations(args, section, dims, num_tokens, batch, itemsize, fused)
    return state(config, spec, args, dims) | {"activations": activations}


def state(config: JobConfig, spec: ModelSpec, args: Any, dims: ParallelDims) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state and EMA weights on the fullest rank, for any model.

    ValueError: there is no closed form for pipelines, adapters under tensor parallel, and swapped blocks of two kinds.
    """
    if config.lora.enable and (dims.tp > 1 or (config.training.swap_blocks and len(spec.plan.blocks) > 1)):
        raise ValueError("lora.enable: no closed form for this layout; run a dry run")
    if dims.pp > 1:
        raise ValueError(
            "parallelism.pipeline_parallel_degree: the closed forms hold for one stage; set it to 1, or run a dry run"
        )
    with torch.device("meta"):
        model = spec.build(args)
    settings = WeightsSettings(config.model, config.checkpoint, config.training, config.lora, config.debug.seed)
    build_weights(settings, spec, args).prepare(model)
    shards = {name: shard_shape(name, tuple(p.shape), spec.plan, dims) for name, p in model.named_parameters()}
    nbytes = {name: math.prod(shards[name]) * p.itemsize for name, p in model.named_parameters()}
    parameters, frozen = sum(nbytes.values()), {name for name, p in model.named_parameters() if not p.requires_grad}
    if config.training.swap_blocks:
        block = sum(size for name, size in nbytes.items() if name in frozen and get_unit(name, spec.plan) == "blocks.0")
        parameters -= (config.training.swap_blocks - 2) * block  # two have their room on the device
    shards, nbytes = ({name: x for name, x in sizes.items() if name not in frozen} for sizes in (shards, nbytes))
    kinds = {
        name: updated_by(name, len(shape), config.optimizer.name, spec.plan.blocks) for name, shape in shards.items()
    }
    gradients = sum(nbytes.values())
    if config.optimizer.in_backward:
        # One FSDP unit has gradients at a time, or one parameter where there are no units (see `apply_fsdp`).
        is_float32 = config.training.mixed_precision_param == "float32"
        has_no_units = dims.dp * dims.sequence == 1 and (is_float32 or config.lora.enable)
        units = Counter()
        for name, size in nbytes.items():
            units[name if has_no_units else get_unit(name, spec.plan, dims.ep)] += size
        gradients = max(units.values())
    sizes = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": sum(state_bytes(kinds[name], shards[name]) for name in shards),
    }
    return sizes | ({"ema": 4 * sum(map(math.prod, shards.values()))} if config.ema.enable else {})


def get_unit(name: str, plan: ParallelPlan, ep: int = 1) -> str:
    """The FSDP unit of a parameter: a block, a root module, or "" for the root; under expert parallel of degree `ep`
    also the experts of a block.
    """
    path = next((p for p in plan.blocks if name.startswith(f"{p}.")), None)
    if path is not None:
        key, _, in_block = name[len(path) + 1 :].partition(".")
        experts = next((f".{e}" for e in plan.experts if ep > 1 and in_block.startswith(f"{e}.")), "")
        return f"{path}.{key}{experts}"
    root = name.partition(".")[0]
    return "" if root in plan.fp32 else root


def shard_shape(name: str, shape: tuple[int, ...], plan: ParallelPlan, dims: ParallelDims) -> tuple[int, ...]:
    """Shape of a parameter's shard on the fullest rank: tensor parallel splits as the plan says, FSDP the first dim."""
    path = next((p for p in plan.blocks if name.startswith(f"{p}.")), None)
    if path is None:
        ranks, size = dims.dp_shard * dims.cp * dims.tp, list(shape)
    else:
        ranks, size = dims.dp_shard * dims.cp, list(shape)
        in_block = name[len(path) + 1 :].partition(".")[2]
        if in_block.startswith(tuple(f"{experts}." for experts in plan.experts)):
            size[0] //= dims.ep
            ranks = ranks * dims.tp // dims.ep if dims.ep > 1 else ranks
            if size[0] % ranks and size[1] % ranks == 0:  # see `apply_fsdp`
                return size[0], size[1] // ranks, *size[2:]
        module, _, leaf = in_block.rpartition(".")
        style = plan.tensor.get(in_block) or plan.tensor.get(module) or ""
        if style.startswith(("colwise", "shard_vector")):
            size[0] //= dims.tp
        elif style.startswith("rowwise") and leaf == "weight":
            size[1] //= dims.tp
    return -(-size[0] // ranks), *size[1:]


def wan_activations(
    args: Any,
    section: ActivationCheckpoint,
    dims: ParallelDims,
    num_tokens: int,
    batch: int,
    itemsize: int,
    fused: bool = False,
) -> int:
    """The maximum of the bytes saved for backward, recomputed activations included. fused: with the Triton kernels.

    ValueError: see `estimate`.
    """
    if (
        type(args).__name__ != "WanArgs"
        or args.image_dim
        or args.clean_first_frame
        or args.in_channels != args.out_channels
        or args.experts
    ):
        raise ValueError(f"no closed form of the activations of {args}; run a dry run")
    sections = sections_by_block(section, args.num_layers)
    if any(s.mode == "memory_budget" or s.offload for s in sections):
        raise ValueError("activation_checkpoint: no closed form for memory_budget or offload; run a dry run")
    D, S, e, t, B = args.dim, args.text_len, itemsize, dims.tp, batch
    L = -(-num_tokens // dims.sequence)
    inputs = B * (e * D * L + 24 * D)  # the tokens; shifts, scales and gates of the time
    all_saved = (_fused_block if fused else _block)(args, L, B, e, t, dims.ulysses > 1)
    total = B * S * e * 3 * D + 4 * args.head_dim * L * t  # the text at three stages; RoPE
    # The patches, cast; in float32 only where a rank's slice of several clips is made contiguous.
    total += B * e * L * args.in_channels * args.patch_volume if e < 4 or dims.sequence > 1 < B else 0
    largest = total
    for s in sections:
        saved, shared = _checkpointed_block(args, s, L, B, e, t, fused)
        is_wrapped = s.mode != "none"
        # In its backward the later blocks are freed, and this one has all activations again.
        largest = max(largest, total + (inputs + saved + all_saved - shared if is_wrapped else all_saved))
        total += inputs + saved if is_wrapped else all_saved
    head = (
        B * L * ((2 * e if fused else 8 + e) * D + 8 + (4 + e) * args.out_channels * args.patch_volume)
    )  # the velocity, and the error in float32
    return max(largest, total + head)


def _block(args: Any, L: int, B: int, e: int, t: int, exchanged: bool) -> int:
    """Bytes that a block saves in mode none. exchanged: by Ulysses, which saves the output of attention twice."""
    D, F, H, S = args.dim, args.ffn_dim, args.num_heads, args.text_len
    # Input in float32 and output; under tensor parallel, where the mean square is computed apart, the input twice, the
    # normalised input and the output.
    norm = ((4 + 4 if e < 4 else 4) + 4 + e if t > 1 else 4 + e) * D
    adaptive = 8 * D + 8  # input and normalised input in float32, mean and deviation
    attention = e * D + 4 * H  # output, and its log-sum-exp
    self_attention = adaptive + e * D * t + 2 * (norm + 4 * t) + e * D + attention + (e * D if exchanged else 0) + 4 * D
    cross_attention = 4 * D + 8 + e * D * t + norm + 4 * t + attention
    text = (norm + e * D) // t + 4
    feed_forward = adaptive + e * D * t + 2 * e * F + 4 * D
    vectors = 32 * D * B + (24 * D if e < 4 else 0)  # modulation; norms' weights in float32
    return B * (L * (self_attention + cross_attention + feed_forward) + S * text) + vectors


def _fused_block(args: Any, L: int, B: int, e: int, t: int, exchanged: bool) -> int:
    """`_block` with fused kernels, which save their inputs in their own type, and one or two numbers a row."""
    D, F, H, S = args.dim, args.ffn_dim, args.num_heads, args.text_len
    seam = e * D + 8 + e * D * t  # input of the norm, mean and deviation, and the output, which a matmul saves
    norm = (
        4 if t > 1 and e < 4 else 0
    ) * D + 2 * e * D  # input and output; under tensor parallel the input in float32, for its mean square
    attention = e * D + 4 * H
    self_attention = (
        seam + 2 * (norm + 4 * t) + e * D + attention + (e * D if exchanged else 0) + e * D
    )  # the last one is for the gradient of the gate
    cross_attention = seam + norm + 4 * t + attention
    text = (norm + e * D) // t + 4
    feed_forward = seam + e * F * (1 if t == 1 else 2) + e * D
    return B * (L * (self_attention + cross_attention + feed_forward) + S * text + 24 * D)


def _checkpointed_block(
    args: Any, section: ActivationCheckpoint, L: int, B: int, e: int, t: int, fused: bool
) -> tuple[int, int]:
    """(bytes that a checkpointed block saves beside its inputs, bytes of both that its recomputation shares)."""
    D, H, S = args.dim, args.num_heads, args.text_len
    saved = shared = 0
    if e == 4 or fused:
        shared += B * L * e * D  # no float32 copy of the input is made
    if section.mode == "selective":
        if "attention" in section.save:
            saved += B * L * (e * D + 4 * H) * (2 if section.save_min_kv <= S else 1)
            shared += saved
        if "matmul" in section.save:
            # Every second matmul: k and o of both attentions, down.
            matmuls = B * e * D * (L * (1 + 3 * t) + S // t)
            saved += matmuls
            if e == 4 or fused:
                shared += B * e * D * (L * (1 if t > 1 else 3 if fused else 4) + S // t)
        elif "down" in section.save:
            saved += B * L * e * D * t
            shared += B * L * e * D * (t == 1 and (e == 4 or fused))
        if "exchange" in section.save:
            saved += B * L * e * D * 4  # what backward reads is a copy of it
    return saved, shared


def saved_bytes_per_token(dim: int, num_heads: int, section: ActivationCheckpoint, itemsize: int) -> int:
    """Bytes of device memory that a checkpointed block saves for each video token.

    These are its input, [D], and in selective mode the output of attention, [D], and its log-sum-exp, one float32 a
    head; then that of each feed-forward, [D], and of the exchanges around attention, [4 D], where `save` names them.
    With offload only the log-sum-exp stays on the device.
    ValueError: in other modes, and for matmul, it depends on the model's operators.
    """
    if section.mode not in ("full", "selective") or (section.mode == "selective" and "matmul" in section.save):
        raise ValueError(
            "saved_bytes_per_token: in mode none or memory_budget, and for matmul, it depends on the model's "
            "operators; run a dry run"
        )
    save = section.save if section.mode == "selective" else ()
    attention = "attention" in save
    on_device = 0 if section.offload else dim * itemsize * (1 + attention + ("down" in save) + 4 * ("exchange" in save))
    return on_device + 4 * num_heads * attention


def state_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of optimizer state, without the step count, for a shard of float32 or bfloat16 weights of this shape."""
    numel = math.prod(shape)
    if kind == "AdamW8bit":
        block = resolve("titan_video.optim.low_bit:BLOCK", asked_by="optimizer.name = AdamW8bit")
        return 2 * numel + 8 * math.prod(shape[:-1]) * -(-shape[-1] // block)
    return {"AdamW": 8, "Muon": 4}[kind] * numel
