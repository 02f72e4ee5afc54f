"""Products of the blocks' Linears in float8 through torchao (optional: imported only where it is asked for).

Weights, activations and gradients keep their types; a product and the two of its backward cast both factors to float8
spot. It takes the place of `F.linear` inside our Linears (`Linear.product`), so tensor parallel, adapters and FSDP see
nothing of it.
A scale is that of what a rank multiplies: of its micro-batch, its tokens and, under tensor parallel, its part of the
    weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from titan_video.config.job_config import Float8, JobConfig
from titan_video.models.layers import Linear
from titan_video.models.spec import ParallelPlan

MULTIPLE = 16  # of a weight's sides, for the hardware's float8 products


def apply_float8(model: nn.Module, plan: ParallelPlan, section: Float8, device: str, tensor_parallel: int = 1) -> None:
    """Convert the Linears of the blocks, but for those that `section.filter_fqns` names, in place. Before tensor
    parallel.

    device: type of the device that will compute. ValueError where that has no float8, torchao is missing, or sides do
        not fit.
    """
    if not section.emulate and (device != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        raise ValueError(
            f"float8.enable: true, but this {device} device does not multiply float8, which takes a GPU of "
            f"compute capability 8.9 "
            "(Ada, Hopper) or more; set it to false, or float8.emulate to true for a test"
        )
    product, kept = matmul_fn(section), []
    for path in plan.blocks:
        for name, linear in model.get_submodule(path).named_modules(prefix=path):
            if not isinstance(linear, Linear):
                continue
            if any(part in name for part in section.filter_fqns):
                kept.append(name)
                continue
            style = plan.tensor.get(name.split(".", 2)[-1], "")
            out, into = (
                size // (tensor_parallel if style.startswith(side) else 1)
                for size, side in zip(linear.weight.shape, ("column", "row"))
            )
            if (out % MULTIPLE or into % MULTIPLE) and not section.emulate:
                raise ValueError(
                    f"float8.enable: true, but each rank's part of {name} is {out} x {into}, and float8 products "
                    f"want multiples of "
                    f"{MULTIPLE}; add it to float8.filter_fqns, or change parallelism.tensor_parallel_degree"
                )
            linear.product = product
    for part in section.filter_fqns:
        known = Float8().filter_fqns
        if part not in known and not any(part in name for name in kept):
            raise ValueError(f"float8.filter_fqns: {part!r} is in the name of no Linear of a block; take it out")


def matmul_fn(section: Float8) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What F.linear does, in float8."""
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
    except ImportError as e:
        raise ValueError(
            f"float8.enable: true, but torchao cannot be imported ({e}); install it (requirements.txt), or set "
            f"this to false"
        ) from e
    # Padded: in the gradient of a weight it is the tokens that are summed over, any number of them.
    config = replace(
        Float8LinearConfig.from_recipe_name(section.recipe_name),
        emulate=section.emulate,
        pad_inner_dim=not section.emulate,
    )
    products = Float8Linear(MULTIPLE, MULTIPLE, bias=False, config=config, device="meta").linear_mm_config

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), products, config)
        return y if bias is None else y + bias

    return product


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
