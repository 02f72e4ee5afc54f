"""Closed forms of a training step's memory on one rank: what the dry run measures, from sizes, degrees and modes alone.

Parameters, gradients and optimizer state hold for every model. Activations are written out for Wan's text-to-video
blocks as they run without compile, with plain or fused kernels, which keep what a GPU's keep.
Letters: D width, F feed-forward width, H heads, K head width, S text tokens, L rows of one rank, t tensor-parallel
    degree, e bytes of an element.
"""

import math
from collections import Counter
from typing import Any

import torch

from titan_video.config.job_config import ActivationCheckpoint, JobConfig
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.layers import cast_params
from titan_video.models.spec import ModelSpec, ParallelPlan
from titan_video.optim.optimizer import state_bytes, updated_by


def estimate(config: JobConfig, spec: ModelSpec, args: Any, dims: ParallelDims, num_tokens: int) -> dict[str, int]:
    """Bytes on the fullest rank by kind of memory, the most that there ever is of each: `state`, and activations.
    num_tokens: of one clip.

    ValueError for what no closed form is written for: pipelines, activations of models but Wan's text-to-video,
        offload, memory budget.
    """
    itemsize = getattr(torch, config.training.mixed_precision_param).itemsize
    fused, batch = config.model.kernels == "triton", config.training.local_batch_size
    activations = wan_activations(args, config.activation_checkpoint, dims, num_tokens, batch, itemsize, fused)
    return state(config, spec, args, dims) | {"activations": activations}


def state(config: JobConfig, spec: ModelSpec, args: Any, dims: ParallelDims) -> dict[str, int]:
    """Bytes on the fullest rank of parameters, gradients, optimizer state and averaged weights, of any model.

    ValueError for pipelines.
    """
    if dims.pp > 1:
        raise ValueError(
            "parallelism.pipeline_parallel_degree: the closed forms are of one stage; set it to 1, or run a dry run"
        )
    with torch.device("meta"):
        model = spec.build(args)
    cast_params(model, spec.plan.fp32, getattr(torch, config.training.dtype))
    shards = {name: shard_shape(name, tuple(p.shape), spec.plan, dims) for name, p in model.named_parameters()}
    held = {name: math.prod(shards[name]) * p.itemsize for name, p in model.named_parameters()}
    kinds = {
        name: updated_by(name, len(shape), config.optimizer.name, spec.plan.blocks) for name, shape in shards.items()
    }
    gradients = sum(held.values())
    if config.optimizer.in_backward:
        # Those of one FSDP unit at a time, or of one parameter where there are no units (see `apply_fsdp`).
        whole = dims.dp * dims.sequence == 1 and config.training.mixed_precision_param == "float32"
        units = Counter()
        for name, size in held.items():
            units[name if whole else get_unit(name, spec.plan)] += size
        gradients = max(units.values())
    sizes = {
        "parameters": sum(held.values()),
        "gradients": gradients,
        "optimizer": sum(state_bytes(kinds[name], shards[name]) for name in shards),
    }
    return sizes | ({"ema": 4 * sum(map(math.prod, shards.values()))} if config.ema.enable else {})


def get_unit(name: str, plan: ParallelPlan) -> str:
    """The FSDP unit that a parameter is of: a block, a root module, or "", the root."""
    path = next((p for p in plan.blocks if name.startswith(f"{p}.")), None)
    if path is not None:
        return f"{path}.{name[len(path) + 1 :].partition('.')[0]}"
    root = name.partition(".")[0]
    return "" if root in plan.fp32 else root


def shard_shape(name: str, shape: tuple[int, ...], plan: ParallelPlan, dims: ParallelDims) -> tuple[int, ...]:
    """Shape of a parameter on the rank that has most of it:

    tensor parallel divides as the plan says, FSDP the first dim.
    """
    path = next((p for p in plan.blocks if name.startswith(f"{p}.")), None)
    if path is None:
        ranks, size = dims.dp_shard * dims.cp * dims.tp, list(shape)
    else:
        ranks, size = dims.dp_shard * dims.cp, list(shape)
        in_block = name[len(path) + 1 :].partition(".")[2]
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
    """Bytes kept for backward at their largest, recomputed ones included. fused: with the Triton kernels."""
    if (
        type(args).__name__ != "WanArgs"
        or args.image_dim
        or args.clean_first_frame
        or args.in_channels != args.out_channels
    ):
        raise ValueError(f"no closed form of the activations of {args}; run a dry run")
    if section.mode == "memory_budget" or section.offload:
        raise ValueError("activation_checkpoint: no closed form for memory_budget or offload; run a dry run")
    D, S, e, t, B = args.dim, args.text_len, itemsize, dims.tp, batch
    L = -(-num_tokens // dims.sequence)
    inputs = B * (e * D * L + 24 * D)  # the tokens; the time's shifts, scales and gates
    whole = (_fused_block if fused else _block)(args, L, B, e, t, dims.ulysses > 1)
    kept, shared = _kept(args, section, L, B, e, t, fused)

    wrapped = [section.mode != "none" and (not section.layers or i in section.layers) for i in range(args.num_layers)]
    total = B * S * e * 3 * D + 4 * args.head_dim * L * t  # the text on its three stages; rotations
    # The patches, cast; in float32 only where a rank's slice of several clips is made contiguous.
    total += B * e * L * args.in_channels * args.patch_volume if e < 4 or dims.sequence > 1 < B else 0
    most = total
    for is_wrapped in wrapped:
        # In backward the blocks after this one are gone, and it is there whole.
        most = max(most, total + (inputs + kept + whole - shared if is_wrapped else whole))
        total += inputs + kept if is_wrapped else whole
    head = (
        B * L * ((2 * e if fused else 8 + e) * D + 8 + (4 + e) * args.out_channels * args.patch_volume)
    )  # its velocity, and the error in float32
    return max(most, total + head)


def _block(args: Any, L: int, B: int, e: int, t: int, exchanged: bool) -> int:
    """What a block keeps in mode none. exchanged:

    by Ulysses, before and after which the output of attention is kept.
    """
    D, F, H, S = args.dim, args.ffn_dim, args.num_heads, args.text_len
    # Input as float32 and result; under tensor parallel the input twice (its mean square is taken apart), normed and
    # result.
    norm = ((4 + 4 if e < 4 else 4) + 4 + e if t > 1 else 4 + e) * D
    adaptive = 8 * D + 8  # input and normed, in float32, mean and deviation
    attention = e * D + 4 * H  # output, and its log-sum-exp
    self_attention = adaptive + e * D * t + 2 * (norm + 4 * t) + e * D + attention + (e * D if exchanged else 0) + 4 * D
    cross_attention = 4 * D + 8 + e * D * t + norm + 4 * t + attention
    text = (norm + e * D) // t + 4
    feed_forward = adaptive + e * D * t + 2 * e * F + 4 * D
    vectors = 32 * D * B + (24 * D if e < 4 else 0)  # modulation; norms' weights in float32
    return B * (L * (self_attention + cross_attention + feed_forward) + S * text) + vectors


def _fused_block(args: Any, L: int, B: int, e: int, t: int, exchanged: bool) -> int:
    """As `_block`. Kernels keep their inputs, as they are, and a number or two of each row."""
    D, F, H, S = args.dim, args.ffn_dim, args.num_heads, args.text_len
    seam = e * D + 8 + e * D * t  # what is normed, mean and deviation, and the result, which a product keeps
    norm = (
        4 if t > 1 and e < 4 else 0
    ) * D + 2 * e * D  # input and result; under tensor parallel the input in float32, for its mean square
    attention = e * D + 4 * H
    self_attention = (
        seam + 2 * (norm + 4 * t) + e * D + attention + (e * D if exchanged else 0) + e * D
    )  # the last for the gate's gradient
    cross_attention = seam + norm + 4 * t + attention
    text = (norm + e * D) // t + 4
    feed_forward = seam + e * F * (1 if t == 1 else 2) + e * D
    return B * (L * (self_attention + cross_attention + feed_forward) + S * text + 24 * D)


def _kept(args: Any, section: ActivationCheckpoint, L: int, B: int, e: int, t: int, fused: bool) -> tuple[int, int]:
    """(bytes that a checkpointed block keeps beside its inputs, bytes of these and its inputs that it has again when
    recomputed).
    """
    D, H, S = args.dim, args.num_heads, args.text_len
    kept = shared = 0
    if e == 4 or fused:
        shared += B * L * e * D  # no float32 copy of the input is made
    if section.mode == "selective":
        if "attention" in section.save:
            kept += B * L * (e * D + 4 * H) * (2 if section.save_min_kv <= S else 1)
            shared += kept
        if "matmul" in section.save:
            # Every second product: k and o of both attentions, down.
            products = B * e * D * (L * (1 + 3 * t) + S // t)
            kept += products
            if e == 4 or fused:
                shared += B * e * D * (L * (1 if t > 1 else 3 if fused else 4) + S // t)
    return kept, shared
