"""Weights in public formats (formats.py), streamed into sharded parameters.

Format, names, shapes and config.json are checked by the headers of all files. Then each rank copies its own slice of
each tensor. No memory is needed beside the parameters, except for a tensor whose layout changes: it is read in full,
one at a time. export/save.py, an optional part, writes these formats.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name, to_local
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ModelSpec
from titan_video.weights.formats import StoredWeights, TensorLocation, preview, read_slice
from titan_video.weights.safetensors_io import opened


@torch.no_grad()
def load_hf(model: nn.Module, path: Path | str, spec: ModelSpec, args: Any, subfolder: str = "", which=None) -> None:
    """Fill the parameters (plain or DTensor, any placements) from `path`, a folder or file in any public format. Values
    are cast to the parameters' types.

    subfolder: where a pipeline folder has the weights; default spec.hf_folder. which: those to fill, by name.
    Each rank reads its own slices, without collectives.
    ValueError: names the folder or file, and the tensors that are missing, unknown, of another shape, damaged, or of
    another architecture than `args`. Nothing is loaded then.
    """
    params, shapes = public_parameters(model), global_shapes(spec, args)
    check_parameters(params, shapes, args)
    locations = StoredWeights(Path(path), subfolder or spec.hf_folder).locate(spec, args, shapes)
    by_file: dict[Path, list[str]] = {}
    for ours in filter(which, params):
        by_file.setdefault(locations[ours].file, []).append(ours)
    for path, names in by_file.items():
        with opened(path) as file:
            for ours in names:
                _fill(params[ours], file, locations[ours], args)


def global_shapes(spec: ModelSpec, args: Any) -> dict[str, torch.Size]:
    """Our name -> shape, for all parameters of the architecture in its order."""
    with torch.device("meta"):
        return {name: p.shape for name, p in spec.build(args).named_parameters()}


def public_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by clean name, without adapters and scales of quantized weights, which these formats do not have."""
    # A forward without backward leaves FSDP's root gathered, in the compute dtype.
    reshard(model)
    params = {clean_name(name): p for name, p in model.named_parameters()}
    return {name: p for name, p in params.items() if not (is_adapter(name) or name.endswith(".linear_fn.scale"))}


def check_parameters(params: dict[str, Tensor], shapes: dict[str, torch.Size], args: Any) -> None:
    """ValueError unless this rank's parameters have names and shapes of the architecture."""
    odd = [name for name, p in params.items() if shapes.get(name) != p.shape]
    if odd:
        raise ValueError(f"parameters that are not those of the architecture {args}: {preview(odd)}")


def _fill(param: Tensor, file: Any, location: TensorLocation, args: Any) -> None:
    """Copy this rank's slice of a stored tensor into the parameter.

    A shard is always one box, also where FSDP splits rows that tensor parallel has split: `check_layout` makes sure
    that the tensor-parallel degree divides the rows.
    """
    shard = to_local(param)
    if shard.numel() == 0:
        return
    box = (slice(None),) * param.ndim
    if isinstance(param, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    values = read_slice(file, location, box, args)
    assert values.shape == shard.shape, f"{location.name}: {tuple(values.shape)} for {tuple(shard.shape)}"
    shard.copy_(values)
