"""Files of adapters (lora/adapters.py), in the two forms that others read, and weights with the adapters added.

    form        names                                                                          loaded by
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, .lora_B.weight                  pipeline.load_lora_weights
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight, .lora_up.weight, .alpha ComfyUI, diffusers (Wan)

An adapter counts alpha / rank. In the second form `.alpha` says so. The first has no name for it, and not every reader
there it is multiplied into lora_B, which is right for all. Names come from the model's one table (formats.py). Where
several of our matrices are the rows of one in the model's public code (HunyuanVideo's q, k, v), so are the adapters,
with ranks added up:

    down = [down_q; down_k; down_v]      up = diag(up_q, up_k, up_v)
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_video.checkpoint.files import fsync_path
from titan_video.config.job_config import Lora
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.utils import broadcast_from_rank0, clean_name
from titan_video.kernels import upcast
from titan_video.lora.adapters import NAME, Adapter, add_adapters
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ModelSpec
from titan_video.tools.logging import logger
from titan_video.weights.formats import Part, public_tensors, some
from titan_video.weights.hf_storage import gather_full_tensor, get_owners, global_shapes, send_to_rank0
from titan_video.weights.safetensors_io import DTYPES, SafetensorsFile, opened


@dataclass(frozen=True)
class Form:
    file: str
    layout: str
    prefix: str
    down: str
    up: str


FORMS = {
    "diffusers": Form(
        "pytorch_lora_weights.safetensors", "diffusers", "transformer.", "lora_A.weight", "lora_B.weight"
    ),
    "comfyui": Form("comfyui.safetensors", "original", "diffusion_model.", "lora_down.weight", "lora_up.weight"),
}


def lora_path(folder: Path, form: str) -> Path:
    """Where a run's adapters lie in its folder."""
    return folder / "lora" / FORMS[form].file


def are_exported(folder: Path, section: Lora) -> bool:
    """Whether all the files of adapters that a run exports are in its folder."""
    return all(lora_path(folder, form).is_file() for form in section.forms)


# --- which matrices ---


@dataclass(frozen=True)
class PublicAdapter:
    """An adapter of one matrix as others know it:

    the matrix's rows, and our adapters of it, in the order of their rows, by module name.
    """

    name: str
    height: int
    parts: tuple[tuple[str, Part], ...]

    def join(self, adapters: dict[str, Tensor], args: Any) -> tuple[Tensor, Tensor]:
        """(down, up) of the whole matrix."""
        downs, ups = ([adapters[f"{module}.{NAME}.{end}"] for module, _ in self.parts] for end in ("down", "up"))
        rank = downs[0].shape[0]
        up = ups[0].new_zeros(self.height, rank * len(ups))
        for i, ((_, part), values) in enumerate(zip(self.parts, ups, strict=True)):
            up[slice(*part.rows) if part.rows else slice(None), i * rank : (i + 1) * rank] = values
        return torch.cat([part.to_public(down, args) for (_, part), down in zip(self.parts, downs, strict=True)]), up

    def split_adapter(self, down: Tensor, up: Tensor, args: Any) -> dict[str, Tensor]:
        """The inverse of `join`. ValueError for an adapter that was not joined from ours."""
        rank, left = down.shape[0] // len(self.parts), up.clone()
        adapters = {}
        for i, (module, part) in enumerate(self.parts):
            rows, columns = slice(*part.rows) if part.rows else slice(None), slice(i * rank, (i + 1) * rank)
            adapters[f"{module}.{NAME}.down"] = part.to_ours(down[columns], args)
            adapters[f"{module}.{NAME}.up"] = up[rows, columns]
            left[rows, columns] = 0
        if len(self.parts) > 1 and (down.shape[0] % len(self.parts) or left.any()):
            raise ValueError(
                f"{self.name} is one adapter of {len(self.parts)} matrices that each have their own here; "
                "use the file in diffusers' form"
            )
        return adapters


def adapter_shapes(spec: ModelSpec, args: Any, section: Lora) -> dict[str, torch.Size]:
    """Name -> shape of all parameters of adapters, in the order of the model."""
    with torch.device("meta"):
        model = spec.build(args)
    add_adapters(model, spec, section, torch.float32)
    return {name: p.shape for name, p in model.named_parameters() if is_adapter(name)}


def public_adapters(spec: ModelSpec, args: Any, layout: str, names: Mapping[str, Any]) -> list[PublicAdapter]:
    """The public matrices of those that have adapters. ValueError if the model has no such layout."""
    adapters = []
    for public, tensor in public_tensors(spec, layout, global_shapes(spec, args), args).items():
        modules = [(part.ours.removesuffix(".weight"), part) for part in tensor.parts]
        ours = tuple((module, part) for module, part in modules if f"{module}.{NAME}.up" in names)
        if ours:
            adapters.append(PublicAdapter(public.removesuffix(".weight"), tensor.shape[0], ours))
    return adapters


# --- out ---


@torch.no_grad()
def save_lora(
    model: nn.Module,
    path: Path,
    spec: ModelSpec,
    args: Any,
    section: Lora,
    form: str,
    dtype: torch.dtype,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapters, or `weights` by the same names (averaged ones, say), to the file `path`, as `dtype`, and read
    it back.

    Collective: every rank calls it, with the adapters that it has.
    """
    reshard(model)
    tensors = weights or {clean_name(name): p for name, p in model.named_parameters()}
    shapes = adapter_shapes(spec, args, section)
    owners, adapters = get_owners(shapes, tensors), {}
    for name, shape in shapes.items():
        whole = gather_full_tensor(tensors[name], torch.float32) if name in tensors else None
        whole = send_to_rank0(whole, owners[name], shape, torch.float32)
        if whole is not None:
            adapters[name] = whole.cpu()

    def write() -> None:
        _write(path, _public(adapters, spec, args, section, FORMS[form], dtype))

    run_on_rank0(write)
    logger.info(f"adapters exported to {path}")


def _public(
    adapters: dict[str, Tensor], spec: ModelSpec, args: Any, section: Lora, form: Form, dtype: torch.dtype
) -> dict[str, Tensor]:
    scale, tensors = section.alpha / section.rank, {}
    for public in public_adapters(spec, args, form.layout, adapters):
        down, up = public.join(adapters, args)
        stem = f"{form.prefix}{public.name}"
        if form.layout == "diffusers":
            up = up * scale
        else:
            tensors[f"{stem}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float32)
        tensors |= {f"{stem}.{form.down}": down.to(dtype), f"{stem}.{form.up}": up.to(dtype)}
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    file = SafetensorsFile(partial, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    for name in file.entries:
        file.write(tensors[name])
    file.close()
    os.replace(partial, path)
    fsync_path(path.parent)


def run_on_rank0(function: Callable[[], None]) -> None:
    """Call it on rank 0; where it fails, all ranks do."""
    broadcast_from_rank0(function) if dist.is_initialized() else function()


class MergedWeights(Mapping[str, Tensor]):
    """The frozen weights that this rank has, by name, with their adapters added, in float32: for `save_hf`.

    Each is made when it is asked for, by all ranks that have a part of it. adapters: others than the model's own, by
    the same names.
    """

    def __init__(self, model: nn.Module, adapters: dict[str, Tensor] | None = None):
        reshard(model)
        params = {clean_name(name): p.detach() for name, p in model.named_parameters()}
        self.frozen = {name: p for name, p in params.items() if not is_adapter(name)}
        self.adapters = adapters or {name: p for name, p in params.items() if is_adapter(name)}
        self.scales = {
            clean_name(name): module.scale for name, module in model.named_modules() if isinstance(module, Adapter)
        }

    def __getitem__(self, name: str) -> Tensor:
        whole = upcast(_whole(self.frozen[name]))
        adapter = f"{name.removesuffix('.weight')}.{NAME}"
        if adapter not in self.scales or not name.endswith(".weight"):
            return whole
        down, up = (_whole(self.adapters[f"{adapter}.{end}"]).detach() for end in ("down", "up"))
        return whole + self.scales[adapter] * (up @ down)

    def __contains__(self, name: object) -> bool:
        return name in self.frozen

    def __iter__(self) -> Iterator[str]:
        return iter(self.frozen)

    def __len__(self) -> int:
        return len(self.frozen)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- in ---


@torch.no_grad()
def load_lora(model: nn.Module, path: Path, spec: ModelSpec, args: Any, section: Lora) -> None:
    """Fill the adapters from a file in either form; they then change the model as the file says, whatever alpha is here
    and there.

    Each rank reads the file on its own. ValueError for a form that is neither, for adapters of other matrices or
    another rank, and for tensors that belong to none.
    """
    tensors, scale = _read(path)
    form = next((form for form in FORMS.values() if all(name.startswith(form.prefix) for name in tensors)), None)
    if form is None or not tensors:
        raise ValueError(
            f"{path} holds no adapters: all names should begin with "
            f"{' or with '.join(f.prefix for f in FORMS.values())}; "
            f"found {some(sorted(tensors))}"
        )
    shapes, found = adapter_shapes(spec, args, section), {}
    for public in public_adapters(spec, args, form.layout, shapes):
        stem = f"{form.prefix}{public.name}"
        down, up = (
            _pop(tensors, stem, ends)
            for ends in (("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight"))
        )
        if down is None or up is None:
            raise ValueError(
                f"{path} has no adapter of {public.name}, which lora.target_modules asks for: give the targets "
                f"it was trained with"
            )
        alpha = tensors.pop(f"{stem}.alpha", None)
        factor = alpha.item() / len(down) if alpha is not None else scale
        found |= public.split_adapter(down, up * (factor * section.rank / section.alpha), args)
    if tensors:
        raise ValueError(
            f"{path} has adapters that lora.target_modules does not ask for, or other tensors: {some(sorted(tensors))}"
        )
    odd = [name for name, shape in shapes.items() if found[name].shape != shape]
    if odd:
        raise ValueError(
            f"{path}: {odd[0]} has shape {list(found[odd[0]].shape)}, in this run {list(shapes[odd[0]])}: "
            "set lora.rank and model.flavor to fit"
        )
    for name, p in model.named_parameters():
        if (name := clean_name(name)) in found:
            whole = found[name].to(p.device, p.dtype)
            p.copy_(
                distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
                if isinstance(p, DTensor)
                else whole
            )


def _read(path: Path) -> tuple[dict[str, Tensor], float]:
    """(tensors in float32, how much an adapter counts that does not say so itself)."""
    with opened(path) as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        note = (stored.metadata() or {}).get("lora_adapter_metadata", "{}") if hasattr(stored, "metadata") else "{}"
    odd = [name for name, t in tensors.items() if t.dtype not in DTYPES.values()]
    if odd:
        raise ValueError(f"{path}: {some(odd)} of a type that is no plain floating point")
    # diffusers' own files say it in a note.
    told = {key.removeprefix("transformer."): value for key, value in json.loads(note).items()}
    if told.get("alpha_pattern") or told.get("use_rslora"):
        raise ValueError(f"{path}: alpha_pattern and use_rslora are not supported; save the adapters with one alpha")
    return {name: t.float() for name, t in tensors.items()}, told.get("lora_alpha", 1) / told.get("r", 1)


def _pop(tensors: dict[str, Tensor], stem: str, ends: tuple[str, ...]) -> Tensor | None:
    return next((tensors.pop(f"{stem}.{end}") for end in ends if f"{stem}.{end}" in tensors), None)
