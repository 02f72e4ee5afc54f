"""Matmuls of the blocks' Linears in float8, by torchao.

Weights, activations and gradients keep their types; a matmul and the two of its backward cast both factors to float8 on
the spot. It replaces `F.linear` inside our Linears (`Linear.linear_fn`), so tensor parallel, adapters and FSDP are not
affected. A scale belongs to what one rank multiplies: its micro-batch, its tokens and, under tensor parallel, its shard
of the weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from titan_video.config.job_config import Float8, JobConfig
from titan_video.models.layers import Linear
from titan_video.models.spec import ParallelPlan

MULTIPLE = 16  # of a weight's sides, for the hardware's float8 matmuls


def apply_float8(model: nn.Module, plan: ParallelPlan, section: Float8, device: str, tensor_parallel: int = 1) -> None:
    """Convert the Linears of the blocks in place, except those that `section.filter_fqns` names. Before tensor
    parallel.

    device: type of the device that computes. ValueError: it has no float8, torchao is missing, or a weight's sides do
    not fit.
    """
    if not section.emulate and (device != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        raise ValueError(
            f"float8.enable: true, but this {device} device does not multiply float8, which takes a GPU of compute "
            f"capability 8.9 (Ada, Hopper) or more; set it to false, or float8.emulate to true for a test"
        )
    linear_fn = float8_linear_fn(section)
    filtered = []
    for path in plan.blocks:
        for name, linear in model.get_submodule(path).named_modules(prefix=path):
            if not isinstance(linear, Linear):
                continue
            if any(part in name for part in section.filter_fqns):
                filtered.append(name)
                continue
            if not section.emulate:
                style = plan.tensor.get(name.split(".", 2)[-1], "")
                _check_sides(name, linear.weight.shape, style, tensor_parallel)
            linear.linear_fn = linear_fn
    for part in section.filter_fqns:
        if part not in Float8().filter_fqns and not any(part in name for name in filtered):
            raise ValueError(f"float8.filter_fqns: {part!r} is in the name of no Linear of a block; take it out")


def _check_sides(name: str, shape: torch.Size, style: str, tensor_parallel: int) -> None:
    rows = shape[0] // (tensor_parallel if style.startswith("colwise") else 1)
    columns = shape[1] // (tensor_parallel if style.startswith("rowwise") else 1)
    if rows % MULTIPLE or columns % MULTIPLE:
        raise ValueError(
            f"float8.enable: true, but each rank's shard of {name} is {rows} x {columns}, and float8 matmuls need "
            f"multiples of {MULTIPLE}; add it to float8.filter_fqns, or change parallelism.tensor_parallel_degree"
        )


def float8_linear_fn(section: Float8) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """F.linear in float8."""
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
    except ImportError as e:
        raise ValueError(
            f"float8.enable: true, but torchao cannot be imported ({e}); install it (requirements.txt), or set this to "
            f"false"
        ) from e
    # Padded: the gradient of a weight sums over tokens, and their number is arbitrary.
    config = replace(
        Float8LinearConfig.from_recipe_name(section.recipe_name),
        emulate=section.emulate,
        pad_inner_dim=not section.emulate,
    )
    matmul_config = Float8Linear(MULTIPLE, MULTIPLE, bias=False, config=config, device="meta").linear_mm_config

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), matmul_config, config)
        return y if bias is None else y + bias

    return linear


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about float8, one line per mistake."""
    param, p = config.training.mixed_precision_param, config.parallelism
    if not config.float8.enable:
        return
    if not config.float8.emulate and param != "bfloat16":
        yield (
            f"float8.enable: true, but training.mixed_precision_param is {param}; set that to bfloat16, or "
            f"float8.emulate"
        )
    if p.enable_async_tensor_parallel:
        yield (
            "float8.enable: true, but the compiler does not overlap float8 matmuls; leave "
            "parallelism.enable_async_tensor_parallel false"
        )
    if p.pipeline_parallel_degree > 1 and p.pipeline_parallel_schedule == "InterleavedZeroBubble":
        yield (
            "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble, but a float8 matmul computes both of its "
            "gradients at once; leave float8.enable false, or choose another schedule, such as Interleaved1F1B"
        )
