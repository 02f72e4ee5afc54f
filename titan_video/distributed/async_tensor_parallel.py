"""Tensor parallel whose communication the compiler overlaps with matmuls. Not yet run on GPUs."""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_video.config.job_config import JobConfig
from titan_video.distributed.collectives import all_gather, rank_group
from titan_video.distributed.tensor_parallel import STYLES, UnfusedLinear, colwise


def async_styles(mesh: DeviceMesh) -> dict[str, Callable[[nn.Module, str, DeviceMesh], None]]:
    """The styles of tensor_parallel.py in a form that the compiler's pass takes; the pass is enabled.

    ValueError: see `enable_async`.
    """
    enable_async(mesh)
    return {**STYLES, "all_gather_input": all_gather_input_in_chunks, "colwise": colwise_unfused}


def enable_async(mesh: DeviceMesh) -> None:
    """Let the compiler split each gather and scatter into parts, sent while the matmul of another part is computed.

    ValueError where that cannot work. Not yet run on GPUs. torch 2.13's pass
    (torch/_inductor/fx_passes/micro_pipeline_tp.py) takes an all-gather along any dim whose result goes into one or,
    for q, k and v, several matmuls, and a matmul whose result is reduce-scattered. A bias inside the matmul (`addmm`)
    hides the first, hence `colwise_unfused`. In a compiled Wan block it finds, forward, all 3 gathers and 3 scatters;
    backward, all 3 gathers and 2 of the scatters: the gradient that q, k and v send back is a sum of matmuls.
    """
    if mesh.device_type != "cuda":
        raise ValueError(
            f"parallelism.enable_async_tensor_parallel: true, but it needs GPUs that see each other's memory, and this "
            f"run is on {mesh.device_type}; leave it false"
        )
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():  # deprecated in 2.13, yet its pass skips groups without it
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


def all_gather_input_in_chunks(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """`all_gather_input`, always with the concatenation that the compiler's pass looks for."""
    group = rank_group(mesh)

    def hook(module: nn.Module, args: tuple) -> tuple:
        return torch.cat(all_gather(args[0], 0, group).chunk(group.size), dim=1), *args[1:]

    parent.get_submodule(name).register_forward_pre_hook(hook)


def colwise_unfused(parent: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """`colwise` with a matmul that the compiler's pass sees: the bias is added after it."""
    colwise(parent, name, mesh)
    parent.register_module(name, UnfusedLinear(parent.get_submodule(name), (lambda x: x,)))


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about asynchronous tensor parallel, one line per mistake."""
    p = config.parallelism
    if p.enable_async_tensor_parallel and not config.compile.enable:
        yield (
            "parallelism.enable_async_tensor_parallel: true, but the compiler does the overlap; set compile.enable, or "
            "leave it false"
        )
    if p.enable_async_tensor_parallel and p.tensor_parallel_degree == 1:
        yield (
            "parallelism.enable_async_tensor_parallel: true, but parallelism.tensor_parallel_degree is 1; raise that, "
            "or leave it false"
        )
