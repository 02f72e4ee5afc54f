"""Weights in public formats (formats.py), streamed into and out of sharded parameters.

    load   headers of all files -> format, names, shapes and config.json checked -> each rank copies its own slice of each tensor
    save   parameter by parameter: the ranks that have it gather it, rank 0 writes it -> ... -> every byte read back -> all renamed,
           config.json last

No rank ever holds a whole model: loading needs no memory beside the parameters (a tensor that changes form is read
whole, one at a time), saving needs one gathered parameter per rank. Under pipeline parallel a rank has some of the
parameters; what the others what the others are is known from the architecture.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.checkpoint.files import fsync_path, write_text
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name, gather_objects
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ModelSpec
from titan_video.weights.formats import (
    CONFIG,
    FORMATS,
    INDEX,
    STEM,
    Place,
    PublicTensor,
    StoredWeights,
    public_tensors,
    read_part,
    some,
)
from titan_video.weights.safetensors_io import DTYPE_NAMES, SafetensorsFile, opened

GIB = 1 << 30


@torch.no_grad()
def load_hf(model: nn.Module, path: Path | str, spec: ModelSpec, args: Any, subfolder: str = "") -> None:
    """Fill the parameters (plain or DTensor, any placements) from `path`, a folder or file of any public format, cast
    to each parameter's type.

    subfolder: where a pipeline folder has the weights, if not in spec.hf_folder.
    Each rank reads what it has, on its own, without collectives. ValueError names the folder or file and what is
    missing, extra, misshapen, damaged, or of another architecture than `args`; nothing is loaded then.
    """
    params, shapes = _parameters(model), global_shapes(spec, args)
    _check_parameters(params, shapes, args)
    places = StoredWeights(Path(path), subfolder or spec.hf_folder).places(spec, args, shapes)
    by_file: dict[Path, list[str]] = {}
    for ours in params:
        by_file.setdefault(places[ours].file, []).append(ours)
    for file, names in by_file.items():
        with opened(file) as stored:
            for ours in names:
                _fill(params[ours], stored, places[ours], args)


def save_hf(
    model: nn.Module,
    path: Path | str,
    spec: ModelSpec,
    args: Any,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * GIB,
    weights: dict[str, Tensor] | None = None,
    format_name: str = "diffusers",
) -> None:
    """Write the parameters, or `weights` by the same names (averaged ones, say), to `path`, a folder or a file as the
    format is, as `dtype`.
    Collective: every rank calls it, with the parameters that it has.

    A complete earlier export is replaced only when the new one is written and verified. When this returns, on any
    rank, the export is on disk; if rank 0 could not write it, RuntimeError says why on all ranks.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"weights cannot be exported as {dtype}; use one of {', '.join(str(d) for d in DTYPE_NAMES)}")
    params, shapes = _parameters(model), global_shapes(spec, args)
    _check_parameters(params, shapes, args)
    if weights is not None and weights.keys() != params.keys():
        raise ValueError(
            f"weights to export differ in name from the model's parameters: "
            f"{some(sorted(weights.keys() ^ params.keys()))}"
        )
    tensors = params if weights is None else weights
    owners = get_owners(shapes, tensors)
    plan = WritePlan(Path(path), spec, args, shapes, dict.fromkeys(shapes, dtype), format_name, max_shard_bytes)
    writer = Writer(plan) if _rank() == 0 else None
    pending = 0
    for part in plan.parts():
        whole = gather_full_tensor(tensors[part.ours], dtype) if part.ours in tensors else None
        whole = send_to_rank0(whole, owners[part.ours], shapes[part.ours], dtype)
        if writer is not None:
            writer.write(part.to_public(whole, args))
        del whole
        # Now and then, so that no rank runs ahead and waits for rank 0 for longer than a collective may take.
        pending += shapes[part.ours].numel() * dtype.itemsize
        if pending >= GIB:
            _raise_on_all(writer, path)
            pending = 0
    if writer is not None:
        writer.commit()
    _raise_on_all(writer, path)


def plan_shards(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File name -> names in it, in the given order, each file within max_bytes unless a single tensor is larger."""
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {f"{STEM}.safetensors": shards[0]}
    return {f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def global_shapes(spec: ModelSpec, args: Any) -> dict[str, torch.Size]:
    """Our name -> shape of all parameters of the architecture, in its order."""
    with torch.device("meta"):
        return {name: p.shape for name, p in spec.build(args).named_parameters()}


class WritePlan:
    """Which files a format gets, what is in each, and in which order our parameters are needed to write them front to
    back.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        args: Any,
        shapes: dict[str, torch.Size],
        dtypes: dict[str, torch.dtype],
        format_name: str,
        max_shard_bytes: int,
    ):
        """shapes, dtypes: of all parameters, by our names; a tensor made of several has a type that holds them all."""
        kind = FORMATS[format_name]
        tensors: dict[str, PublicTensor] = {
            kind.prefix + n: t for n, t in public_tensors(spec, kind.layout, shapes, args).items()
        }
        types = {
            name: reduce(torch.promote_types, (dtypes[part.ours] for part in t.parts)) for name, t in tensors.items()
        }
        sizes = {name: torch.Size(t.shape).numel() * types[name].itemsize for name, t in tensors.items()}
        self.folder, self.one_file = (path.parent, True) if kind.one_file else (path, False)
        files = {path.name: list(sizes)} if kind.one_file else plan_shards(sizes, max_shard_bytes)
        # In a file, wider types first, as each tensor must lie at a multiple of its type's size.
        self.files = {file: sorted(names, key=lambda name: -types[name].itemsize) for file, names in files.items()}
        self.tensors, self.types, self.total_size = tensors, types, sum(sizes.values())
        to_config = None if kind.one_file else spec.args_to_hf if kind.layout == "diffusers" else spec.args_to_original
        self.config = to_config(args) if to_config else None

    def parts(self) -> Iterator[Any]:
        for names in self.files.values():
            for name in names:
                yield from self.tensors[name].parts


class Writer:
    """Writes what a plan says, part by part. A failure is kept in `error`, not raised:

    other ranks may be waiting in the next gather.
    """

    def __init__(self, plan: WritePlan):
        self.plan, self.error = plan, None
        self.steps = self._steps()
        with self._guarded():
            plan.folder.mkdir(parents=True, exist_ok=True)
            for name in [*plan.files] if plan.one_file else [f"{STEM}*", CONFIG]:
                for leftover in plan.folder.glob(f"{name}.tmp"):
                    leftover.unlink()

    def _steps(self) -> Iterator[tuple[SafetensorsFile, torch.dtype, bool]]:
        """For each part: its file, the type it is stored in, and whether the file ends with it."""
        for file_name, names in self.plan.files.items():
            entries = {name: (self.plan.tensors[name].shape, self.plan.types[name]) for name in names}
            file = SafetensorsFile(self.plan.folder / f"{file_name}.tmp", entries)
            parts = [name for name in names for _ in self.plan.tensors[name].parts]
            for i, name in enumerate(parts, 1):
                yield file, self.plan.types[name], i == len(parts)

    def write(self, tensor: Tensor) -> None:
        """The next part of the plan, in its public form."""
        if self.error is not None:
            return
        with self._guarded():
            file, dtype, last = next(self.steps)
            file.write(tensor.to(dtype))
            if last:
                file.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # whatever it is, the other ranks must hear of it
            self.error = f"{type(e).__name__}: {e}"

    def commit(self) -> None:
        """Put the written files into place.

        A folder without its config.json, or index, is no export, so these go first and come last.
        """
        if self.error is not None:
            return
        folder, plan = self.plan.folder, self.plan
        with self._guarded():
            assert next(self.steps, None) is None, "not all parts were written"
            if not plan.one_file:
                (folder / CONFIG).unlink(missing_ok=True)
                fsync_path(folder)
                for old in [folder / INDEX, *folder.glob(f"{STEM}*.safetensors")]:
                    old.unlink(missing_ok=True)
            for name in plan.files:
                os.replace(folder / f"{name}.tmp", folder / name)
            fsync_path(folder)
            if len(plan.files) > 1:
                weight_map = {name: file for file, names in plan.files.items() for name in names}
                self._write_json(INDEX, {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map})
            if plan.config is not None:
                self._write_json(CONFIG, plan.config)
            fsync_path(folder)

    def _write_json(self, name: str, content: dict) -> None:
        write_text(self.plan.folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by clean name, without adapters (lora.py), which these formats do not know."""
    # A forward without backward leaves FSDP's root gathered, in the type of the arithmetic.
    reshard(model)
    return {clean_name(name): p for name, p in model.named_parameters() if not is_adapter(clean_name(name))}


def _check_parameters(params: dict[str, Tensor], shapes: dict[str, torch.Size], args: Any) -> None:
    """Those on this rank are among those of the architecture."""
    odd = [name for name, p in params.items() if shapes.get(name) != p.shape]
    if odd:
        raise ValueError(f"parameters that are not those of the architecture {args}: {some(odd)}")


def gather_full_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor, cast before it is sent."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_owners(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name -> lowest rank that has the tensor or a part of it. ValueError, on all ranks, for a name that none has."""
    held = bytes(name in tensors for name in names)
    by_rank = gather_objects(held) if dist.is_available() and dist.is_initialized() else [held]
    owners = {name: flags.index(1) if any(flags) else None for name, *flags in zip(names, *by_rank, strict=True)}
    missing = [name for name, owner in owners.items() if owner is None]
    if missing:
        raise ValueError(f"parameters of the architecture that no rank has: {some(missing)}")
    return owners


def send_to_rank0(whole: Tensor | None, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """The tensor on rank 0, sent through host memory by its owner where rank 0 does not have it."""
    if owner != 0 and _rank() == owner:
        dist.send(whole.cpu().contiguous(), 0)
    elif owner != 0 and _rank() == 0:
        whole = torch.empty(shape, dtype=dtype)
        dist.recv(whole, owner)
    return whole


def _raise_on_all(writer: Writer | None, folder: Path | str) -> None:
    """RuntimeError on every rank if rank 0's writer has failed."""
    outcome = [writer.error if writer is not None else None]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise RuntimeError(f"the weights could not be exported to {folder}: {outcome[0]}")


def _fill(param: Tensor, stored: Any, place: Place, args: Any) -> None:
    """Copy this rank's part of one stored tensor into the parameter.

    Each part is one box, also where FSDP splits the rows that tensor parallel has split: that degree divides the rows
        (`check_layout`).
    """
    local, box = param, (slice(None),) * param.ndim
    if isinstance(param, DTensor):
        local = param.to_local()
        if local.numel() == 0:
            return
        sizes, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        assert tuple(sizes) == tuple(local.shape), f"{place.name}: shard {tuple(local.shape)}, computed {tuple(sizes)}"
        box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    values = read_part(stored, place.name, place.part, box, args)
    assert values.shape == local.shape, f"{place.name}: {tuple(values.shape)} for {tuple(local.shape)}"
    local.copy_(values)
