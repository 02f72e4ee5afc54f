"""Weights in the public layout: a folder of config.json and safetensors as diffusers writes it, streamed into and out of sharded parameters.

    load   headers of all files -> names, shapes and config.json checked -> each rank copies its own slice of each tensor
    save   parameter by parameter: the ranks that have it gather it, rank 0 keeps it -> a full shard is written -> ... -> all renamed,
           config.json last

No rank ever holds a whole model: loading needs no memory beside the parameters (a tensor that changes form is read whole, one
at a time), saving needs one gathered parameter per rank and one shard in rank 0's host memory. Under pipeline parallel a rank has
some of the parameters; what the others are is known from the architecture.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_video.components.checkpoint_io import fsync_path
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import clean_name, gather_objects
from titan_video.models.spec import ModelSpec, NameRule

STEM = "diffusion_pytorch_model"
CONFIG = "config.json"
INDEX = f"{STEM}.safetensors.index.json"
GIB = 1 << 30
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def public_names(rules: Sequence[NameRule], our_names: Iterable[str]) -> dict[str, tuple[str, NameRule]]:
    """Our name -> (public name, rule). ValueError naming the name without a rule or with two, and the rule without a name."""
    patterns = [(_pattern(rule.ours), rule) for rule in rules]
    table, used = {}, set()
    for name in our_names:
        hits = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(name))]
        if len(hits) != 1:
            raise ValueError(f"parameter {name} has {len(hits)} rules in the table of public names, not one")
        match, rule = hits[0]
        table[name] = (rule.public.format(*match.groups()), rule)
        used.add(rule.ours)
    unused = [rule.ours for rule in rules if rule.ours not in used and not rule.optional]
    if unused:
        raise ValueError(f"rules of the table of public names that fit no parameter: {_some(unused)}")
    if len({public for public, _ in table.values()}) < len(table):
        raise ValueError("the table of public names gives two parameters one public name")
    return table


@torch.no_grad()
def load_hf(model: nn.Module, folder: Path | str, spec: ModelSpec, args: Any) -> None:
    """Fill the parameters (plain or DTensor, any placements) from `folder`, cast to each parameter's type.

    Each rank reads what it has, on its own, without collectives. ValueError names the folder or file and what is missing, extra, misshapen,
    damaged, or of another architecture than `args`; nothing is loaded then.
    """
    folder = Path(folder)
    _check_config(folder, spec, args)
    params = _parameters(model)
    shapes = _whole_shapes(params, spec, args)
    table = public_names(spec.hf_names, shapes)
    wanted = {table[ours][0]: _public_shape(shape, table[ours][1], args) for ours, shape in shapes.items()}
    files = _check_stored(folder, wanted, spec.hf_ignored)
    by_file: dict[Path, list[str]] = {}
    for ours in params:
        by_file.setdefault(files[table[ours][0]], []).append(ours)
    for path, names in by_file.items():
        with _opened(path) as stored:
            for ours in names:
                _fill(params[ours], stored, *table[ours], args)


def save_hf(
    model: nn.Module,
    folder: Path | str,
    spec: ModelSpec,
    args: Any,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * GIB,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the parameters, or `weights` by the same names (averaged ones, say), to `folder` as `dtype`. Collective: every rank calls it,
    with the parameters that it has.

    A complete earlier export in the folder is replaced only when the new one is written and verified. When this returns, on any
    rank, the export is on disk; if rank 0 could not write it, RuntimeError says why on all ranks.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"weights cannot be exported as {dtype}; use one of {', '.join(str(d) for d in DTYPE_NAMES)}")
    params = _parameters(model)
    shapes = _whole_shapes(params, spec, args)
    table = public_names(spec.hf_names, shapes)
    if weights is not None and weights.keys() != params.keys():
        raise ValueError(f"weights to export differ in name from the model's parameters: {_some(sorted(weights.keys() ^ params.keys()))}")
    tensors = params if weights is None else weights
    owners = _owners(shapes, tensors)
    writer = _Writer(Path(folder)) if _rank() == 0 else None
    for file_name, names in plan_shards({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}, max_shard_bytes).items():
        shard = {}
        for ours in names:
            whole = _gather(tensors[ours], dtype) if ours in tensors else None
            whole = _bring_to_zero(whole, owners[ours], shapes[ours], dtype)
            if writer is not None and writer.error is None:
                public, rule = table[ours]
                shard[public] = (rule.to_public(whole, args) if rule.to_public else whole).cpu().contiguous()
            del whole
        if writer is not None:
            writer.write(file_name, shard)
        # File by file, so that no rank runs ahead and waits for rank 0 for longer than a collective may take.
        _raise_on_all(writer, folder)
    if writer is not None:
        writer.commit(spec.args_to_hf(args), sum(shape.numel() for shape in shapes.values()) * dtype.itemsize)
    _raise_on_all(writer, folder)


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


class _Writer:
    """Rank 0's side of a save. A failure is kept in `error`, not raised: the other ranks are waiting in the next gather."""

    def __init__(self, folder: Path):
        self.folder, self.error = folder, None
        self.weight_map: dict[str, str] = {}
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*folder.glob(f"{STEM}*.tmp"), *folder.glob(f"{CONFIG}.tmp")]:
                leftover.unlink()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # whatever it is, the other ranks must hear of it
            self.error = f"{type(e).__name__}: {e}"

    def write(self, file_name: str, shard: dict[str, Tensor]) -> None:
        if self.error is not None:
            return
        with self._guarded():
            path = self.folder / f"{file_name}.tmp"
            save_file(shard, path, metadata={"format": "pt"})
            fsync_path(path)
            expected = {name: (tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in shard.items()}
            if _header(path) != expected:
                raise ValueError(f"{path} does not hold what was written to it")
            self.weight_map.update(dict.fromkeys(shard, file_name))

    def commit(self, config: dict, total_size: int) -> None:
        """Put the written files into place. Without config.json the folder is no export, so it goes first and comes last."""
        if self.error is not None:
            return
        with self._guarded():
            (self.folder / CONFIG).unlink(missing_ok=True)
            fsync_path(self.folder)
            for old in [*self.folder.glob(f"{STEM}*.safetensors"), self.folder / INDEX]:
                old.unlink(missing_ok=True)
            file_names = sorted(set(self.weight_map.values()))
            for name in file_names:
                os.replace(self.folder / f"{name}.tmp", self.folder / name)
            if len(file_names) > 1:
                self._write_json(INDEX, {"metadata": {"total_size": total_size}, "weight_map": self.weight_map})
            fsync_path(self.folder)
            self._write_json(CONFIG, config)
            fsync_path(self.folder)

    def _write_json(self, name: str, content: dict) -> None:
        path = self.folder / f"{name}.tmp"
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        fsync_path(path)
        os.replace(path, self.folder / name)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by clean name. A forward without backward leaves FSDP's root gathered, in the type of the arithmetic: shard it again first."""
    reshard(model)
    return {clean_name(name): p for name, p in model.named_parameters()}


def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor, cast before it is sent."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _owners(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name -> lowest rank that has the tensor or a part of it. ValueError, on all ranks, for a name that none has."""
    held = bytes(name in tensors for name in names)
    by_rank = gather_objects(held) if dist.is_available() and dist.is_initialized() else [held]
    owners = {name: flags.index(1) if any(flags) else None for name, *flags in zip(names, *by_rank, strict=True)}
    missing = [name for name, owner in owners.items() if owner is None]
    if missing:
        raise ValueError(f"parameters of the architecture that no rank has: {_some(missing)}")
    return owners


def _bring_to_zero(whole: Tensor | None, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """The tensor on rank 0, sent through host memory by its owner where rank 0 does not have it."""
    if owner != 0 and _rank() == owner:
        dist.send(whole.cpu().contiguous(), 0)
    elif owner != 0 and _rank() == 0:
        whole = torch.empty(shape, dtype=dtype)
        dist.recv(whole, owner)
    return whole


def _raise_on_all(writer: _Writer | None, folder: Path | str) -> None:
    """RuntimeError on every rank if rank 0's writer has failed."""
    outcome = [writer.error if writer is not None else None]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise RuntimeError(f"the weights could not be exported to {folder}: {outcome[0]}")


def _whole_shapes(params: dict[str, Tensor], spec: ModelSpec, args: Any) -> dict[str, torch.Size]:
    """Our name -> shape of all parameters of the architecture, in its order; `params`, those on this rank, are among them."""
    with torch.device("meta"):
        shapes = {clean_name(name): p.shape for name, p in spec.build(args).named_parameters()}
    odd = [name for name, p in params.items() if shapes.get(name) != p.shape]
    if odd:
        raise ValueError(f"parameters that are not those of the architecture {args}: {_some(odd)}")
    return shapes


def _public_shape(shape: torch.Size, rule: NameRule, args: Any) -> tuple[int, ...]:
    return tuple(rule.to_public(torch.empty(shape, device="meta"), args).shape if rule.to_public else shape)


def _fill(param: Tensor, stored: Any, public: str, rule: NameRule, args: Any) -> None:
    """Copy this rank's part of one stored tensor into the parameter.

    Each part is one box, also where FSDP splits the rows that tensor parallel has split: that degree divides the rows (`check_layout`).
    """
    local, box = param, (slice(None),) * param.ndim
    if isinstance(param, DTensor):
        local = param.to_local()
        if local.numel() == 0:
            return
        sizes, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        assert tuple(sizes) == tuple(local.shape), f"{public}: shard {tuple(local.shape)}, computed {tuple(sizes)}"
        box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    if rule.to_ours is not None:
        part = rule.to_ours(stored.get_tensor(public), args)[box]
    else:
        part = stored.get_slice(public)[box] if param.ndim else stored.get_tensor(public)
    assert part.shape == local.shape, f"{public}: {tuple(part.shape)} for {tuple(local.shape)}"
    local.copy_(part)


def _check_config(folder: Path, spec: ModelSpec, args: Any) -> None:
    """Shapes do not tell 8 heads of 64 from 4 of 128; config.json does."""
    path = folder / CONFIG
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e}); the folder should be `{spec.hf_folder}/` of a diffusers model") from e
    wanted = json.loads(json.dumps(spec.args_to_hf(args)))
    differs = [f"{key} = {stored[key]!r} (the model has {value!r})" for key, value in wanted.items() if key in stored and stored[key] != value]
    if differs:
        raise ValueError(f"{path} is of another architecture than the model: {_some(differs)}; set model.flavor to fit, or to `hf`")


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{\}", "([0-9]+)"))


def _check_stored(folder: Path, wanted: dict[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> dict[str, Path]:
    """Public name -> file, when the folder holds exactly the wanted names in the wanted shapes, and none beside but ignored ones."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    files: dict[str, Path] = {}
    for path, listed in _weight_files(folder).items():
        header = _header(path)
        if listed is not None and listed != header.keys():
            raise ValueError(f"{path} and {INDEX} disagree about its tensors: {_some(sorted(listed ^ header.keys()))}")
        found.update(header)
        files.update(dict.fromkeys(header, path))
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "extra": sorted(n for n in found.keys() - wanted.keys() if not any(_pattern(name).fullmatch(n) for name in ignored)),
        "of another shape": [f"{n} {found[n][0]} instead of {wanted[n]}" for n in sorted(wanted.keys() & found.keys()) if found[n][0] != wanted[n]],
        "of a type that is no plain floating point": [f"{n} {kind}" for n, (_, kind) in found.items() if kind not in DTYPE_NAMES.values()],
    }
    text = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
    if text:
        raise ValueError(f"the tensors in {folder} are not the model's: {text}")
    return files


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Each weights file of the folder with the names that the index gives it (None without an index)."""
    index, single = folder / INDEX, folder / f"{STEM}.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"{folder} holds neither {single.name} nor {INDEX}")
        return {single: None}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[Path, set[str] | None] = {folder / file_name: set() for file_name in weight_map.values()}
        for name, file_name in weight_map.items():
            files[folder / file_name].add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is no index of safetensors files") from e
    if any(path.parent != folder for path in files):
        raise ValueError(f"{index} names files outside its folder")
    return files


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, type) of every tensor in a file; no tensor is read."""
    with _opened(path) as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} is missing, incomplete or damaged: {e}") from e


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
