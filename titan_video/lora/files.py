"""Files of adapters (lora/adapters.py) in public formats, and weights with the adapters merged in.

    format      names                                                     loaded by
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight             pipeline.load_lora_weights
                transformer.blocks.0.attn1.to_q.lora_B.weight
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight     ComfyUI, diffusers (Wan)
                diffusion_model.blocks.0.self_attn.q.lora_up.weight
                diffusion_model.blocks.0.self_attn.q.alpha

names.py has the others, and reads all. An adapter is scaled by alpha / rank. The comfyui format stores alpha. The
diffusers format has no name for it, and not every reader knows it from the metadata, so the scale is multiplied into
lora_B, which is right for all readers.

Names come from the model's table of names (weights/formats.py). If several of our matrices are the rows of one matrix
in the public layout (HunyuanVideo's q, k, v), their adapters are joined into one, of the sum of their ranks:

    down = [down_q; down_k; down_v]      up = diag(up_q, up_k, up_v)

or into one of their own rank if they share `down`, as in the files of trainers that adapt the public matrix.
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
from titan_video.distributed.utils import broadcast_from_rank0, clean_name, derive_seed
from titan_video.kernels import upcast
from titan_video.lora.adapters import NAME, Adapter, add_adapters, init_adapter
from titan_video.lora.matrices import find_modules, public_matrices
from titan_video.lora.names import DIFFUSERS_FILE, AdapterPair, flat, read_adapters
from titan_video.lora.quantized_base import dequantized, is_added, quantized_linears
from titan_video.models.layers import is_adapter
from titan_video.models.spec import ModelSpec
from titan_video.tools.files import atomic_path
from titan_video.tools.logging import logger
from titan_video.weights.export.safetensors_file import SafetensorsFile
from titan_video.weights.export.save import gather_full_tensor, get_owners, send_to_rank0
from titan_video.weights.formats import preview


@dataclass(frozen=True)
class AdapterFormat:
    """A form in which adapters are written.

    prefix, down, up: around a module's name. is_flat: `_` instead of `.` in it. has_alpha: the scale is stored as
    alpha; else it is multiplied into `up`. note: in the file's metadata, for people.
    """

    file: str
    layout: str
    prefix: str
    down: str
    up: str
    note: str
    has_alpha: bool = False
    is_flat: bool = False


FOR_COMFYUI = "ComfyUI wants the other form: python -m titan_video.convert THIS_FILE NEW.safetensors --format comfyui"
ADAPTER_FORMATS = {
    "diffusers": AdapterFormat(
        f"{DIFFUSERS_FILE}.safetensors",
        "diffusers",
        "transformer.",
        "lora_A.weight",
        "lora_B.weight",
        f"the form of diffusers (pipeline.load_lora_weights). {FOR_COMFYUI}",
    ),
    "comfyui": AdapterFormat(
        "comfyui.safetensors",
        "original",
        "diffusion_model.",
        "lora_down.weight",
        "lora_up.weight",
        "the form of ComfyUI. diffusers loads it for Wan, and the diffusers form for all models",
        has_alpha=True,
    ),
}


def lora_path(folder: Path, format_name: str) -> Path:
    """Path of a run's exported adapters."""
    return folder / "lora" / ADAPTER_FORMATS[format_name].file


def are_exported(folder: Path, section: Lora) -> bool:
    """Whether all adapter files that `section` asks for exist."""
    return all(lora_path(folder, form).is_file() for form in section.export if form != "merged")


# --- export ---


def adapter_shapes(spec: ModelSpec, args: Any, section: Lora) -> dict[str, torch.Size]:
    """Name -> shape of all parameters of adapters, in the order of the model."""
    with torch.device("meta"):
        model = spec.build(args)
    add_adapters(model, spec, section, torch.float32)
    return {name: p.shape for name, p in model.named_parameters() if is_adapter(name)}


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
    kind, scale = ADAPTER_FORMATS[format_name], section.alpha / section.rank
    run_on_rank0(lambda: write_adapters(path, pair_up(adapters, scale), spec, args, kind, dtype))
    logger.info(f"adapters exported to {path}")


def pair_up(parameters: Mapping[str, Tensor], scale: float) -> dict[str, AdapterPair]:
    """{module: adapter} of the parameters of adapters by name."""
    stems = {name.removesuffix(".up") for name in parameters if name.endswith(f".{NAME}.up")}
    return {
        stem.removesuffix(f".{NAME}"): AdapterPair(parameters[f"{stem}.down"], parameters[f"{stem}.up"], scale)
        for stem in sorted(stems)
    }


def write_adapters(
    path: Path,
    adapters: Mapping[str, AdapterPair],
    spec: ModelSpec,
    args: Any,
    kind: AdapterFormat,
    dtype: torch.dtype | None,
) -> None:
    """Write adapters of our modules to a file in a public form, and read it back. dtype: None keeps each type.

    ValueError: an adapter belongs to no matrix of the form's layout.
    """
    tensors, left = {}, set(adapters)
    for public in public_matrices(spec, args, kind.layout):
        pair = public.join(adapters, args)
        if pair is None:
            continue
        left -= {module for module, _ in public.parts}
        stem = f"{kind.prefix}{flat(public.name) if kind.is_flat else public.name}"
        if kind.has_alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(pair.scale * len(pair.down), dtype=torch.float32)
        up = pair.up if kind.has_alpha or pair.scale == 1 else pair.scaled_up
        tensors[f"{stem}.{kind.down}"] = pair.down.to(dtype or pair.down.dtype)
        tensors[f"{stem}.{kind.up}"] = up.to(dtype or pair.down.dtype)
    if left:
        raise ValueError(f"{path}: the form has no matrices of {preview(sorted(left))}")
    _write(path, tensors, {"format": "pt", "adapters": kind.note})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # each at a multiple of its size
    with atomic_path(path, "exported adapters", sum(t.nbytes for t in tensors.values())) as temporary:
        file = SafetensorsFile(temporary, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, metadata)
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
    """Fill the adapters from a file of a public trainer (names.py). The model then computes what the file says,
    whatever alpha is here and there. An adapter of a lower rank than lora.rank gets rows of `down` that are drawn as at
    the start of a run, and columns of zeros in `up`.

    Each rank reads the file on its own. ValueError: the file holds other kinds of adapters, adapters of other modules
    or of a higher rank, or tensors that belong to none.
    """
    stored, shapes = read_adapters(path), adapter_shapes(spec, args, section)
    adapters, unknown = find_modules(stored, spec, args)
    ours = {name.removesuffix(f".{NAME}.up") for name in shapes if name.endswith(f".{NAME}.up")}
    missing = [name for name in shapes if name.removesuffix(f".{NAME}.up") in ours - adapters.keys()]
    if missing:
        raise ValueError(
            f"{path} has no adapter of {missing[0].removesuffix(f'.{NAME}.up')}, which lora.target_modules asks for: "
            f"give the targets it was trained with{_targets(adapters, spec, args)}"
        )
    unused = [*stored.others, *unknown, *(pair.name for name, pair in adapters.items() if name not in ours)]
    if unused:
        targets = "" if unknown else _targets(adapters, spec, args)
        raise ValueError(
            f"{path} has adapters that lora.target_modules does not ask for, or other tensors: {preview(unused)}"
            f"; {f'it was trained with {targets[2:]}' if targets else 'only Linears of blocks have adapters here'}"
        )
    full: dict[str, Tensor] = {}
    for module, pair in adapters.items():
        if len(pair.down) > section.rank:
            highest = max(len(p.down) for p in adapters.values())
            raise ValueError(
                f"{path}: the adapter of {pair.name} has rank {len(pair.down)}, in this run {section.rank}: set "
                f"lora.rank and model.flavor to fit (the highest rank in the file is {highest})"
            )
        full |= _fill_up(module, pair, shapes, section)
    lower = [len(pair.down) for pair in adapters.values() if len(pair.down) < section.rank]
    if lower:
        logger.info(f"{path}: {len(lower)} adapters of a lower rank, from {min(lower)}, are filled up with zeros")
    for name, p in model.named_parameters():
        if (name := clean_name(name)) in full:
            values = full[name].to(p.device, p.dtype)
            if isinstance(p, DTensor):
                values = distribute_tensor(values, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(values)


def section_of(path: Path, spec: ModelSpec, args: Any) -> Lora:
    """[lora] with which a model takes all adapters of a file in blocks, and starts from them."""
    adapters, _ = find_modules(read_adapters(path), spec, args)
    rank = max(len(pair.down) for pair in adapters.values())
    targets = tuple(name for name in adapters if name.split(".")[0] in spec.plan.blocks)
    return Lora(enable=True, rank=rank, alpha=rank, target_modules=targets, initial_load_path=str(path))


def _fill_up(module: str, pair: AdapterPair, shapes: dict[str, torch.Size], section: Lora) -> dict[str, Tensor]:
    names, rank = [f"{module}.{NAME}.{end}" for end in ("down", "up")], len(pair.down)
    parameters = {name: torch.empty(shapes[name]) for name in names}
    for name, tensor in parameters.items():
        init_adapter(name, tensor, torch.Generator().manual_seed(derive_seed(name, 0)))
    full_down, full_up = parameters.values()
    full_down[:rank] = pair.down
    full_up[:, :rank] = pair.scaled_up * (section.rank / section.alpha)
    return parameters


def _targets(adapters: Mapping[str, AdapterPair], spec: ModelSpec, args: Any) -> str:
    """lora.target_modules of the adapters, for a message; "" if they are not those of all blocks."""
    ends = list(dict.fromkeys(name.split(".", 2)[-1] for name in adapters))
    if any(name.split(".")[0] not in spec.plan.blocks for name in adapters):
        return ""
    shapes = adapter_shapes(spec, args, Lora(enable=True, target_modules=tuple(ends)))
    return f", lora.target_modules = {','.join(ends)}" if len(shapes) == 2 * len(adapters) else ""
