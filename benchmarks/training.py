"""Training steps to be timed: ours, built by the functions that train.py uses, and diffusers', as its users write it.

Both have the same random weights, latents, noise and text. A step is forward, loss, backward, clipping and update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import rand
from titan_video import kernels
from titan_video.config.job_config import JobConfig
from titan_video.data.batch import Batch
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import whole_sequence
from titan_video.distributed.utils import clean_name, clip_grad_norm, derive_seed, init_distributed, to_local
from titan_video.flow.matching import NUM_TRAIN_TIMESTEPS, FlowMatching, interpolate, velocity_target
from titan_video.kernels import attention
from titan_video.models.layers import cast_params, token_shape, unpatchify
from titan_video.models.wan import SPEC, WanArgs, args_to_hf
from titan_video.optim.optimizer import build_optimizer, step_in_backward
from titan_video.tasks.denoising import Denoising
from titan_video.weights.formats import public_names

MAX_NORM = JobConfig().training.max_norm


@dataclass(frozen=True)
class Ours:
    """A variant of our step."""

    checkpoint: str = "none"
    kernels: str = "auto"
    compile: bool = True
    float8: bool = False
    config: JobConfig = field(default=JobConfig(), repr=False)
    dtype: str = "bfloat16"

    def job(self) -> JobConfig:
        c = self.config
        return replace(
            c,
            model=replace(c.model, kernels=self.kernels),
            training=replace(c.training, mixed_precision_param=self.dtype),
            activation_checkpoint=replace(c.activation_checkpoint, mode=self.checkpoint),
            compile=replace(c.compile, enable=self.compile),
            float8=replace(c.float8, enable=self.float8, recipe_name="rowwise"),
        )


@dataclass(frozen=True)
class Diffusers:
    """A variant of diffusers' step.

    weights: "autocast" stores float32 and computes in bfloat16; "bfloat16" and "float32" store and compute in that
    type.
    """

    checkpoint: bool = True
    compile: bool = False
    cudnn: bool = False
    weights: str = "autocast"
    backend: str = "inductor"


@dataclass(frozen=True)
class Data:
    """Clips, their noise and their sigmas."""

    batch: Batch
    noise_BCFHW: Tensor
    sigma_B: Tensor


@dataclass
class Step:
    """One step in three parts.

    forward_backward: returns the loss, and the velocity as latents. update: clips, updates, and frees the gradients.
    gradients: {diffusers' name: gradient in diffusers' layout}.
    """

    model: nn.Module
    forward_backward: Callable[[Data], tuple[Tensor, Tensor]]
    update: Callable[[], None]
    gradients: Callable[[], dict[str, Tensor]]

    def run(self, data: Data) -> Tensor:
        """One optimizer step; returns the loss."""
        loss, _ = self.forward_backward(data)
        self.update()
        return loss


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A process group of one rank, unless there is a group."""
    if dist.is_initialized():
        yield
        return
    init_distributed(device, 600)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- data and weights ----


def make_data(
    args: WanArgs, grid: tuple[int, int, int], size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Data:
    """`size` clips of `grid` latent frames, rows and columns; the text is of type dtype."""
    torch.manual_seed(0)
    text = rand(size, args.text_len, args.text_dim, device=device, dtype=dtype)
    latents, noise = (rand(size, args.out_channels, *grid, device=device, dtype=torch.float32) for _ in range(2))
    batch = Batch(
        {"video": latents},
        text,
        torch.ones(text.shape[:2], dtype=torch.bool, device=device),
        torch.arange(size, device=device),
    )
    return Data(batch, noise, torch.linspace(0.2, 0.8, size, device=device))


def weight(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Values of our parameter of this name, the same in each model.

    No parameter is zero. A new model has an output layer of zeros, through which no gradient flows.
    """
    normal = torch.randn(shape, generator=torch.Generator(device).manual_seed(derive_seed(name, 0)), device=device)
    if "norm" in name and name.endswith(("weight", "norm_q", "norm_k")):
        return 1 + 0.1 * normal
    return normal * (0.02 if len(shape) == 1 else 0.5 * shape[-1] ** -0.5)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        shard = to_local(p)  # of one rank: the full parameter
        shard.copy_(weight(clean_name(name), tuple(p.shape), shard.device))


@torch.no_grad()
def fill_diffusers(model: nn.Module, args: WanArgs) -> None:
    theirs = dict(model.named_parameters())
    for ours, (public, to_public, shape) in names_in_diffusers(args).items():
        p = theirs.pop(public)
        p.copy_(to_public(weight(ours, shape, p.device)))
    assert not theirs, f"not filled: {list(theirs)}"


def names_in_diffusers(args: WanArgs) -> dict[str, tuple[str, Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """{our name: (diffusers' name, our layout -> diffusers', our shape)}."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in SPEC.build(args).named_parameters()}
    table = public_names(SPEC.hf_names, list(shapes))

    def transform(rule: Any) -> Callable[[Tensor], Tensor]:
        return (lambda t: rule.to_public(t, args)) if rule.to_public else (lambda t: t)

    return {ours: (public, transform(rule), shapes[ours]) for ours, (public, rule) in table.items()}


# ---- steps ----


def our_step(variant: Ours, args: WanArgs, device: torch.device) -> Step:
    """Our step. A process group must exist."""
    config = variant.job()
    backend = kernels.resolve_backend(config.model.kernels, device)

    def set_backends() -> None:  # before each step: they are global, and steps of other variants run in between
        kernels.set_backend(backend)
        attention.set_backend(config.model.attention, device, getattr(torch, variant.dtype), args.head_dim)

    set_backends()
    with torch.device("meta"):
        model = SPEC.build(args)
    cast_params(model, SPEC.plan.fp32, getattr(torch, config.training.dtype))
    meshes = ParallelDims.of(config.parallelism, 1).build_mesh(device.type)
    parallelize(
        model,
        SPEC.plan,
        meshes,
        config.parallelism,
        config.training,
        config.activation_checkpoint,
        config.compile,
        float8=config.float8,
    )
    model.to_empty(device=device)
    fill(model)
    optimizer = build_optimizer(model, config.optimizer, SPEC.plan.blocks)
    task = Denoising(SPEC, args, FlowMatching(config.flow), whole_sequence(), device)
    in_backward = step_in_backward(optimizer) if config.optimizer.in_backward else None

    def forward_backward(data: Data) -> tuple[Tensor, Tensor]:
        set_backends()
        latents = data.batch.streams["video"]
        inputs = task.add_noise(data.batch, data.noise_BCFHW, data.sigma_B)
        v_BLP = model(**inputs.kwargs)
        loss = task.loss(v_BLP, inputs).sum() / latents.numel()
        loss.backward()
        return loss.detach(), unpatchify(v_BLP.detach(), token_shape(latents.shape[2:], args.patch), args.patch)

    def update() -> None:
        if in_backward:
            in_backward.grad_norm()
        else:
            clip_grad_norm(model, config.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()

    def gradients() -> dict[str, Tensor]:
        table = names_in_diffusers(args)
        grads = {clean_name(name): p.grad for name, p in model.named_parameters()}
        return {table[name][0]: table[name][1](to_local(grad)) for name, grad in grads.items()}  # of one rank: full

    return Step(model, forward_backward, update, gradients)


def diffusers_step(variant: Diffusers, args: WanArgs, device: torch.device) -> Step:
    from diffusers import WanTransformer3DModel

    with device:
        model = WanTransformer3DModel(**{k: v for k, v in args_to_hf(args).items() if not k.startswith("_")})
    fill_diffusers(model, args)
    model.train()
    if variant.weights == "bfloat16":
        for name, p in model.named_parameters():
            if not any(kept in name.split(".") for kept in model._keep_in_fp32_modules):  # as from_pretrained does
                p.data = p.data.to(torch.bfloat16)
    if variant.checkpoint:
        model.enable_gradient_checkpointing()
    if variant.compile:
        torch._inductor.config.triton.mix_order_reduction = False  # as ours: gradients of Wan would be wrong
        model.compile_repeated_blocks(fullgraph=True, backend=variant.backend)
    matrices, vectors = [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim != 2]
    defaults = JobConfig().optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=defaults.lr,
        betas=(defaults.beta1, defaults.beta2),
        weight_decay=defaults.weight_decay,
        fused=True,
    )

    def forward_backward(data: Data) -> tuple[Tensor, Tensor]:
        latents, noise, sigma_B = data.batch.streams["video"], data.noise_BCFHW, data.sigma_B
        autocast = torch.autocast(device.type, torch.bfloat16) if variant.weights == "autocast" else nullcontext()
        # Around backward too: it runs forwards again.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if variant.cudnn else nullcontext():
            with autocast:
                x = interpolate(latents, noise, sigma_B).to(model.patch_embedding.weight.dtype)
                out = model(x, NUM_TRAIN_TIMESTEPS * sigma_B, data.batch.text_BLD, return_dict=False)[0]
            loss = (out.float() - velocity_target(latents, noise)).square().mean()
            loss.backward()
        return loss.detach(), out.detach()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Step(model, forward_backward, update, lambda: {name: p.grad for name, p in model.named_parameters()})
