"""Files of adapters (lora/adapters.py) in two public formats, and weights with the adapters merged in.

    format      names                                                     loaded by
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight             pipeline.load_lora_weights
                transformer.blocks.0.attn1.to_q.lora_B.weight
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight     ComfyUI, diffusers (Wan)
                diffusion_model.blocks.0.self_attn.q.lora_up.weight
                diffusion_model.blocks.0.self_attn.q.alpha

An adapter is scaled by alpha / rank. The comfyui format stores alpha. The diffusers format has no name for it, and not
every reader knows it from the metadata, so the scale is multiplied into lora_B, which is right for all readers.

Names come from the model's table of names (weights/formats.py). If several of our matrices are the rows of one matrix
in the public layout (HunyuanVideo's q, k, v), their adapters are joined into one, of the sum of their ranks:

    down = [down_q; down_k; down_v]      up = diag(up_q, up_k, up_v)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_video.config.job_config import Lora
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import broadcast_from_rank0, clean_name
from titan_video.kernels import upcast
from titan_video.lora.adapters import NAME, Adapter, add_adapters
from titan_video.lora.quantized_base import dequantized, is_added, quantized_linears
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ModelSpec
from titan_video.tools.bounded import parse_json, short
from titan_video.tools.files import atomic_path
from titan_video.tools.logging import logger
from titan_video.weights.formats import TensorSlice, preview, public_tensors
from titan_video.weights.hf_storage import gather_full_tensor, get_owners, global_shapes, send_to_rank0
from titan_video.weights.safetensors_io import DTYPES, SafetensorsFile, opened


@dataclass(frozen=True)
class AdapterFormat:
    file: str
    layout: str
    prefix: str
    down: str
    up: str


ADAPTER_FORMATS = {
    "diffusers": AdapterFormat(
        "pytorch_lora_weights.safetensors", "diffusers", "transformer.", "lora_A.weight", "lora_B.weight"
    ),
    "comfyui": AdapterFormat(
        "comfyui.safetensors", "original", "diffusion_model.", "lora_down.weight", "lora_up.weight"
    ),
}


def lora_path(folder: Path, format_name: str) -> Path:
    """Path of a run's exported adapters."""
    return folder / "lora" / ADAPTER_FORMATS[format_name].file


def are_exported(folder: Path, section: Lora) -> bool:
    """Whether all adapter files that `section` asks for exist."""
    return all(lora_path(folder, format_name).is_file() for format_name in section.forms)


# --- names and shapes ---


@dataclass(frozen=True)
class PublicAdapter:
    """The adapter of one matrix in a public layout.

    name: of the matrix. height: its rows. parts: (module name, slice of the matrix) of our adapters, in row order.
    """

    name: str
    height: int
    parts: tuple[tuple[str, TensorSlice], ...]

    def join(self, adapters: dict[str, Tensor], args: Any) -> tuple[Tensor, Tensor]:
        """(down, up) of the public matrix."""
        downs = [adapters[f"{module}.{NAME}.down"] for module, _ in self.parts]
        ups = [adapters[f"{module}.{NAME}.up"] for module, _ in self.parts]
        rank = downs[0].shape[0]
        joined_up = ups[0].new_zeros(self.height, rank * len(ups))
        for i, ((_, part), up) in enumerate(zip(self.parts, ups, strict=True)):
            joined_up[_rows(part), i * rank : (i + 1) * rank] = up
        downs = [part.to_public(down, args) for (_, part), down in zip(self.parts, downs, strict=True)]
        return torch.cat(downs), joined_up

    def split_adapter(self, down: Tensor, up: Tensor, args: Any) -> dict[str, Tensor]:
        """The inverse of `join`. ValueError: `join` cannot have made this adapter."""
        rank, rest = down.shape[0] // len(self.parts), up.clone()
        adapters = {}
        for i, (module, part) in enumerate(self.parts):
            columns = slice(i * rank, (i + 1) * rank)
            adapters[f"{module}.{NAME}.down"] = part.to_ours(down[columns], args)
            adapters[f"{module}.{NAME}.up"] = up[_rows(part), columns]
            rest[_rows(part), columns] = 0
        if len(self.parts) > 1 and (down.shape[0] % len(self.parts) or rest.any()):
            raise ValueError(
                f"{self.name} is one adapter of {len(self.parts)} matrices that each have their own here; "
                "use the file in diffusers' format"
            )
        return adapters


def _rows(part: TensorSlice) -> slice:
    return slice(*part.rows) if part.rows else slice(None)


def adapter_shapes(spec: ModelSpec, args: Any, section: Lora) -> dict[str, torch.Size]:
    """Name -> shape of all parameters of adapters, in the order of the model."""
    with torch.device("meta"):
        model = spec.build(args)
    add_adapters(model, spec, section, torch.float32)
    return {name: p.shape for name, p in model.named_parameters() if is_adapter(name)}


def public_adapters(spec: ModelSpec, args: Any, layout: str, names: Mapping[str, Any]) -> list[PublicAdapter]:
    """The adapters of the public layout that consist of ours. names: contains the names of our adapters' parameters.

    ValueError: the model has no such layout, or the optional part of the layout is not installed.
    """
    adapters = []
    for public, tensor in public_tensors(spec, layout, global_shapes(spec, args), args).items():
        modules = [(part.ours.removesuffix(".weight"), part) for part in tensor.slices]
        ours = tuple((module, part) for module, part in modules if f"{module}.{NAME}.up" in names)
        if ours:
            adapters.append(PublicAdapter(public.removesuffix(".weight"), tensor.shape[0], ours))
    return adapters


# --- export ---


@torch.no_grad()
def save_lora(
    model: nn.Module,
    path: Path,
    spec: ModelSpec,
    args: Any,
    section: Lora,
    format_name: str,
    dtype: torch.dtype,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapters, or `weights` by the same names (EMA weights, for example), to the file `path` in type
    `dtype`, and read the file back.

    Collective: every rank calls it, with the adapters that it has.
    """
    reshard(model)
    tensors = weights or {clean_name(name): p for name, p in model.named_parameters()}
    shapes = adapter_shapes(spec, args, section)
    owners, adapters = get_owners(shapes, tensors), {}
    for name, shape in shapes.items():
        full = gather_full_tensor(tensors[name], torch.float32) if name in tensors else None
        full = send_to_rank0(full, owners[name], shape, torch.float32)
        if full is not None:
            adapters[name] = full.cpu()

    def write() -> None:
        public = _to_public(adapters, spec, args, section, ADAPTER_FORMATS[format_name])
        _write(path, {name: t if name.endswith(".alpha") else t.to(dtype) for name, t in public.items()})

    run_on_rank0(write)
    logger.info(f"adapters exported to {path}")


def _to_public(
    adapters: dict[str, Tensor], spec: ModelSpec, args: Any, section: Lora, kind: AdapterFormat
) -> dict[str, Tensor]:
    scale, tensors = section.alpha / section.rank, {}
    for public in public_adapters(spec, args, kind.layout, adapters):
        down, up = public.join(adapters, args)
        stem = f"{kind.prefix}{public.name}"
        if kind.layout == "diffusers":
            up = up * scale
        else:
            tensors[f"{stem}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float32)
        tensors[f"{stem}.{kind.down}"] = down
        tensors[f"{stem}.{kind.up}"] = up
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path, "exported adapters", sum(t.nbytes for t in tensors.values())) as temporary:
        file = SafetensorsFile(temporary, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        for name in file.entries:
            file.write(tensors[name])
        file.close()


def run_on_rank0(function: Callable[[], None]) -> None:
    """Call `function` on rank 0. If it raises, all ranks raise."""
    broadcast_from_rank0(function) if dist.is_initialized() else function()


class MergedWeights(Mapping[str, Tensor]):
    """The frozen weights that this rank has, by name, with their adapters merged in, in float32: for `save_hf`.
    Quantized weights are those that they were trained on: what their codes stand for.

    A weight is computed when it is asked for, by all ranks that have a shard of it.
    adapters: used instead of the model's own, by the same names (their EMA, for example).
    """

    def __init__(self, model: nn.Module, adapters: dict[str, Tensor] | None = None):
        reshard(model)
        params = {clean_name(name): p.detach() for name, p in model.named_parameters()}
        self.frozen = {name: p for name, p in params.items() if not is_added(name)}
        self.quantized = quantized_linears(model)
        self.adapters = adapters or {name: p for name, p in params.items() if is_adapter(name)}
        self.scales = {
            clean_name(name): module.scale for name, module in model.named_modules() if isinstance(module, Adapter)
        }

    def __getitem__(self, name: str) -> Tensor:
        full = _full_tensor(self.frozen[name])
        full = upcast(dequantized(full, self.quantized[name]) if name in self.quantized else full)
        adapter = f"{name.removesuffix('.weight')}.{NAME}"
        if adapter not in self.scales or not name.endswith(".weight"):
            return full
        down = _full_tensor(self.adapters[f"{adapter}.down"]).detach()
        up = _full_tensor(self.adapters[f"{adapter}.up"]).detach()
        return full + self.scales[adapter] * (up @ down)

    def __contains__(self, name: object) -> bool:
        return name in self.frozen

    def __iter__(self) -> Iterator[str]:
        return iter(self.frozen)

    def __len__(self) -> int:
        return len(self.frozen)


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- load ---


@torch.no_grad()
def load_lora(model: nn.Module, path: Path, spec: ModelSpec, args: Any, section: Lora) -> None:
    """Fill the adapters from a file in either format. The model then computes what the file says, whatever alpha is
    here and there.

    Each rank reads the file on its own. ValueError: the file is in neither format, has adapters of other matrices or of
    another rank, or has tensors that belong to none.
    """
    tensors, default_scale = _read(path)
    formats = list(ADAPTER_FORMATS.values())
    kind = next((kind for kind in formats if all(name.startswith(kind.prefix) for name in tensors)), None)
    if kind is None or not tensors:
        raise ValueError(
            f"{path} holds no adapters: all names should begin with {' or with '.join(f.prefix for f in formats)}; "
            f"found {preview(sorted(tensors))}"
        )
    shapes, found = adapter_shapes(spec, args, section), {}
    for public in public_adapters(spec, args, kind.layout, shapes):
        stem = f"{kind.prefix}{public.name}"
        down = _pop(tensors, stem, ("lora_A.weight", "lora_down.weight"))
        up = _pop(tensors, stem, ("lora_B.weight", "lora_up.weight"))
        if down is None or up is None:
            raise ValueError(
                f"{path} has no adapter of {public.name}, which lora.target_modules asks for: give the targets "
                f"it was trained with"
            )
        alpha = tensors.pop(f"{stem}.alpha", None)
        if min(down.ndim, up.ndim) < 2 or not len(down) or (alpha is not None and alpha.numel() != 1):
            raise ValueError(f"{path}: the adapter of {public.name} is none: its tensors have impossible shapes")
        scale = alpha.item() / len(down) if alpha is not None else default_scale
        found |= public.split_adapter(down, up * (scale * section.rank / section.alpha), args)
    if tensors:
        unused = preview(sorted(tensors))
        raise ValueError(f"{path} has adapters that lora.target_modules does not ask for, or other tensors: {unused}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {list(found[name].shape)}, in this run {list(shape)}: "
                "set lora.rank and model.flavor to fit"
            )
    for name, p in model.named_parameters():
        if (name := clean_name(name)) in found:
            full = found[name].to(p.device, p.dtype)
            if isinstance(p, DTensor):
                full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(full)


def _read(path: Path) -> tuple[dict[str, Tensor], float]:
    """(tensors in float32, scale of the adapters that have no alpha of their own)."""
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() if hasattr(file, "metadata") else None
    odd = [name for name, t in tensors.items() if t.dtype not in DTYPES.values()]
    if odd:
        raise ValueError(f"{path}: {preview(odd)} of a type that is no plain floating point")
    # diffusers writes alpha and rank into the metadata of its files.
    where = f"{path}: its lora_adapter_metadata"
    note = parse_json((metadata or {}).get("lora_adapter_metadata", "{}"), where)
    if not isinstance(note, dict):
        raise ValueError(f"{where} is no table")
    settings = {key.removeprefix("transformer."): value for key, value in note.items()}
    alpha, rank = settings.get("lora_alpha", 1), settings.get("r", 1)
    if not all(isinstance(x, int | float) and 0 < x < 1e6 for x in (alpha, rank)):
        raise ValueError(f"{where} has lora_alpha = {short(alpha)} and r = {short(rank)}; legal: positive numbers")
    if settings.get("alpha_pattern") or settings.get("use_rslora"):
        raise ValueError(f"{path}: alpha_pattern and use_rslora are not supported; save the adapters with one alpha")
    return {name: t.float() for name, t in tensors.items()}, alpha / rank


def _pop(tensors: dict[str, Tensor], stem: str, ends: tuple[str, ...]) -> Tensor | None:
    return next((tensors.pop(f"{stem}.{end}") for end in ends if f"{stem}.{end}" in tensors), None)
