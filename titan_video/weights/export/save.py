"""Weights in public formats (formats.py), streamed out of sharded parameters.

One parameter at a time: its ranks gather it, rank 0 writes it. Every byte is read back; then all files are renamed;
config.json is written last. No rank ever holds a full model, but one gathered parameter. Under pipeline parallel a rank
holds some of the parameters; the shapes of the others follow from the architecture.
"""

import json
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_video.distributed.utils import gather_objects
from titan_video.models.spec import ModelSpec
from titan_video.tools.files import StorageError, atomic_write, sync, writing
from titan_video.weights.export.safetensors_file import SafetensorsFile
from titan_video.weights.formats import (
    CONFIG,
    FORMAT_NAMES,
    INDEX,
    STEM,
    PublicTensor,
    TensorSlice,
    get_format,
    preview,
    public_tensors,
)
from titan_video.weights.hf_storage import check_parameters, global_shapes, public_parameters
from titan_video.weights.safetensors_io import DTYPE_NAMES

GIB = 1 << 30


def save_hf(
    model: nn.Module,
    path: Path | str,
    spec: ModelSpec,
    args: Any,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * GIB,
    weights: Mapping[str, Tensor] | None = None,
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
    params, shapes = public_parameters(model), global_shapes(spec, args)
    check_parameters(params, shapes, args)
    if weights is not None:  # averages lack what is not trained: biases of routers
        weights = ChainMap(weights, {name: p for name, p in params.items() if not p.requires_grad})
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


def format_problem(format_name: str, args: Any) -> str:
    """Why a format does not hold a model, and which do; "" where it does. args: the model's (see ModelSpec)."""
    has_experts = getattr(args, "experts", None) is not None
    if has_experts == (format_name == "stacked"):
        return ""
    if has_experts:
        return "the model is a mixture of experts, which no other program loads; choose stacked"
    others = ", ".join(name for name in FORMAT_NAMES if name != "stacked")
    return f"the model is no mixture of experts; choose one of {others}"


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
        if problem := format_problem(format_name, args):
            raise ValueError(f"format {format_name} (checkpoint.export_format): {problem}")
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


def gather_full_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The full tensor in type `dtype`; the shards are cast before they are gathered."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_owners(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, int]:
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
