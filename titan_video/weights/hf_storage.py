"""Weights in public formats (formats.py), streamed into and out of sharded parameters.

    load   check format, names, shapes and config.json by the headers of all files
           each rank copies its own slice of each tensor
    save   one parameter at a time: its ranks gather it, rank 0 writes it
           read every byte back; rename all files; write config.json last

No rank ever holds a full model. Loading needs no memory beside the parameters, except for a tensor whose layout
changes: it is read in full, one at a time. Saving needs one gathered parameter per rank. Under pipeline parallel a rank
holds some of the parameters; the shapes of the others follow from the architecture.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name, gather_objects, to_local
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ModelSpec
from titan_video.tools.files import StorageError, atomic_write, sync, writing
from titan_video.weights.formats import (
    CONFIG,
    INDEX,
    STEM,
    PublicTensor,
    StoredWeights,
    TensorLocation,
    TensorSlice,
    get_format,
    preview,
    public_tensors,
    read_slice,
)
from titan_video.weights.safetensors_io import DTYPE_NAMES, SafetensorsFile, opened

GIB = 1 << 30


@torch.no_grad()
def load_hf(model: nn.Module, path: Path | str, spec: ModelSpec, args: Any, subfolder: str = "", which=None) -> None:
    """Fill the parameters (plain or DTensor, any placements) from `path`, a folder or file in any public format. Values
    are cast to the parameters' types.

    subfolder: where a pipeline folder has the weights; default spec.hf_folder. which: those to fill, by name.
    Each rank reads its own slices, without collectives.
    ValueError: names the folder or file, and the tensors that are missing, unknown, of another shape, damaged, or of
    another architecture than `args`. Nothing is loaded then.
    """
    params, shapes = _parameters(model), global_shapes(spec, args)
    _check_parameters(params, shapes, args)
    locations = StoredWeights(Path(path), subfolder or spec.hf_folder).locate(spec, args, shapes)
    by_file: dict[Path, list[str]] = {}
    for ours in filter(which, params):
        by_file.setdefault(locations[ours].file, []).append(ours)
    for path, names in by_file.items():
        with opened(path) as file:
            for ours in names:
                _fill(params[ours], file, locations[ours], args)


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
    """Write the parameters, or `weights` by the same names (EMA weights, for example), to `path` in type `dtype`. The
    format decides whether `path` is a folder or a file.

    Collective: all ranks call it, each with the parameters that it has.
    A complete earlier export is replaced only after the new one is written and verified. When this returns, on any
    rank, the export is on disk. StorageError or RuntimeError, on all ranks: rank 0 could not write it.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"weights cannot be exported as {dtype}; use one of {', '.join(str(d) for d in DTYPE_NAMES)}")
    params, shapes = _parameters(model), global_shapes(spec, args)
    _check_parameters(params, shapes, args)
    if weights is not None and weights.keys() != params.keys():
        raise ValueError(
            f"weights to export differ in name from the model's parameters: "
            f"{preview(sorted(weights.keys() ^ params.keys()))}"
        )
    tensors = params if weights is None else weights
    owners = get_owners(shapes, tensors)
    plan = WritePlan(Path(path), spec, args, shapes, dict.fromkeys(shapes, dtype), format_name, max_shard_bytes)
    writer = Writer(plan) if _rank() == 0 else None
    pending_bytes = 0
    for tensor_slice in plan.slices():
        ours = tensor_slice.ours
        full = gather_full_tensor(tensors[ours], dtype) if ours in tensors else None
        full = send_to_rank0(full, owners[ours], shapes[ours], dtype)
        if writer is not None:
            writer.write(tensor_slice.to_public(full, args))
        del full
        # Synchronize once in a while: a rank that runs ahead would wait for rank 0 until its collective times out.
        pending_bytes += shapes[ours].numel() * dtype.itemsize
        if pending_bytes >= GIB:
            _raise_on_all(writer, path)
            pending_bytes = 0
    if writer is not None:
        writer.commit()
    _raise_on_all(writer, path)


def plan_shards(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the order of `sizes`. A file has at most max_bytes, or a single tensor."""
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
    """Our name -> shape, for all parameters of the architecture in its order."""
    with torch.device("meta"):
        return {name: p.shape for name, p in spec.build(args).named_parameters()}


class WritePlan:
    """The files of an export, their tensors, and the order in which our parameters are written into them."""

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
        """shapes, dtypes: of all parameters, by our names. A tensor made of several gets a type that holds them all."""
        kind = get_format(format_name)
        self.tensors: dict[str, PublicTensor] = {
            kind.prefix + name: tensor for name, tensor in public_tensors(spec, kind.layout, shapes, args).items()
        }
        self.types = {
            name: reduce(torch.promote_types, [dtypes[part.ours] for part in tensor.slices])
            for name, tensor in self.tensors.items()
        }
        sizes = {name: torch.Size(t.shape).numel() * self.types[name].itemsize for name, t in self.tensors.items()}
        self.total_size = sum(sizes.values())
        self.one_file = kind.one_file
        self.folder = path.parent if kind.one_file else path
        files = {path.name: list(sizes)} if kind.one_file else plan_shards(sizes, max_shard_bytes)
        # In a file, wider types come first: each tensor must start at a multiple of its type's size.
        self.files = {file: sorted(names, key=lambda n: -self.types[n].itemsize) for file, names in files.items()}
        to_config = spec.args_to_hf if kind.layout == "diffusers" else spec.args_to_original
        self.config = to_config(args) if to_config and not kind.one_file else None

    def slices(self) -> Iterator[TensorSlice]:
        for names in self.files.values():
            for name in names:
                yield from self.tensors[name].slices


class Writer:
    """Writes the slices of a plan in its order. A failure is stored in `error` and not raised, because other ranks may
    be waiting in the next gather.
    """

    def __init__(self, plan: WritePlan):
        self.plan = plan
        self.error: StorageError | RuntimeError | None = None
        self.steps = self._steps()
        with self._store_error():
            plan.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        unfinished = self.plan.files if self.plan.one_file else [f"{STEM}*", f".{STEM}*", f".{CONFIG}*"]
        for name in unfinished:
            for path in self.plan.folder.glob(f"{name}.tmp"):
                path.unlink()

    def _steps(self) -> Iterator[tuple[SafetensorsFile, torch.dtype, bool]]:
        """For each slice: its file, the type in the file, and whether it is the last of the file."""
        for file_name, names in self.plan.files.items():
            entries = {name: (self.plan.tensors[name].shape, self.plan.types[name]) for name in names}
            file = SafetensorsFile(self.plan.folder / f"{file_name}.tmp", entries)
            name_of_each = [name for name in names for _ in self.plan.tensors[name].slices]
            for i, name in enumerate(name_of_each, 1):
                yield file, self.plan.types[name], i == len(name_of_each)

    def write(self, tensor: Tensor) -> None:
        """The next slice of the plan, in the public layout."""
        if self.error is not None:
            return
        with self._store_error():
            file, dtype, last = next(self.steps)
            file.write(tensor.to(dtype))
            if last:
                file.close()

    @contextmanager
    def _store_error(self) -> Iterator[None]:
        try:
            with writing("export", self.plan.folder, self.plan.total_size):
                yield
        except Exception as e:  # of any kind: the other ranks must learn of it
            self.error = e if isinstance(e, StorageError) else RuntimeError(f"{type(e).__name__}: {e}")
            with suppress(OSError):
                self._remove_unfinished()

    def commit(self) -> None:
        """Rename the written files. A folder without config.json or index is no export, so the old ones are removed
        first and the new ones written last.
        """
        if self.error is not None:
            return
        folder, plan = self.plan.folder, self.plan
        with self._store_error():
            assert next(self.steps, None) is None, "not all slices were written"
            if not plan.one_file:
                (folder / CONFIG).unlink(missing_ok=True)
                sync(folder)
                for old in [folder / INDEX, *folder.glob(f"{STEM}*.safetensors")]:
                    old.unlink(missing_ok=True)
            for name in plan.files:
                os.replace(folder / f"{name}.tmp", folder / name)
            sync(folder)
            if len(plan.files) > 1:
                weight_map = {name: file for file, names in plan.files.items() for name in names}
                self._write_json(INDEX, {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map})
            if plan.config is not None:
                self._write_json(CONFIG, plan.config)

    def _write_json(self, name: str, content: dict) -> None:
        atomic_write(self.plan.folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by clean name, without adapters and scales of quantized weights, which these formats do not have."""
    # A forward without backward leaves FSDP's root gathered, in the compute dtype.
    reshard(model)
    params = {clean_name(name): p for name, p in model.named_parameters()}
    return {name: p for name, p in params.items() if not (is_adapter(name) or name.endswith(".linear_fn.scale"))}


def _check_parameters(params: dict[str, Tensor], shapes: dict[str, torch.Size], args: Any) -> None:
    """ValueError unless this rank's parameters have names and shapes of the architecture."""
    odd = [name for name, p in params.items() if shapes.get(name) != p.shape]
    if odd:
        raise ValueError(f"parameters that are not those of the architecture {args}: {preview(odd)}")


def gather_full_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The full tensor in type `dtype`; the shards are cast before they are gathered."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_owners(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name -> lowest rank that has the tensor or a shard of it. ValueError, on all ranks: no rank has one of them."""
    held = bytes(name in tensors for name in names)
    by_rank = gather_objects(held) if dist.is_available() and dist.is_initialized() else [held]
    owners = {name: flags.index(1) if any(flags) else None for name, *flags in zip(names, *by_rank, strict=True)}
    missing = [name for name, owner in owners.items() if owner is None]
    if missing:
        raise ValueError(f"parameters of the architecture that no rank has: {preview(missing)}")
    return owners


def send_to_rank0(full: Tensor | None, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """The tensor on rank 0; its owner sends it through host memory if rank 0 does not have it."""
    if owner != 0 and _rank() == owner:
        dist.send(full.cpu().contiguous(), 0)
    elif owner != 0 and _rank() == 0:
        full = torch.empty(shape, dtype=dtype)
        dist.recv(full, owner)
    return full


def _raise_on_all(writer: Writer | None, folder: Path | str) -> None:
    """The error of rank 0's writer, on every rank."""
    outcome = [writer.error if writer is not None else None]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise type(outcome[0])(f"the weights could not be exported to {folder}: {outcome[0]}")


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
