"""Weights in the layouts of the models' own public code: folders, single files, and files of ComfyUI.

In these layouts one tensor may hold the rows of several of our parameters (a fused q, k, v), scale and shift of a
modulation may be in the other order, and HunyuanVideo is published as a pickled state dict.
"""

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_video.models.spec import ModelSpec
from titan_video.tools.bounded import open_regular, refusal
from titan_video.weights.formats import (
    Format,
    PublicTensor,
    TensorSlice,
    name_pattern,
    preview,
    public_name,
    public_names,
)
from titan_video.weights.safetensors_io import DTYPE_NAMES, Shape

PREFIX = "model.diffusion_model."  # of all names in files of ComfyUI
ORIGINAL = Format("original")
SINGLE_FILE = Format("original", one_file=True)
COMFYUI = Format("original", PREFIX, one_file=True)


@dataclass(frozen=True)
class SwappedSlice(TensorSlice):
    """The first and second half of the rows are exchanged: (shift, scale) instead of (scale, shift)."""

    @property
    def changes_layout(self) -> bool:
        return True

    def to_public(self, tensor: Tensor, args: Any) -> Tensor:
        tensor = super().to_public(tensor, args)
        return tensor.roll(len(tensor) // 2, 0)

    def to_ours(self, tensor: Tensor, args: Any) -> Tensor:
        return super().to_ours(tensor.roll(len(tensor) // 2, 0), args)


def public_tensors(spec: ModelSpec, shapes: dict[str, torch.Size], args: Any) -> dict[str, PublicTensor]:
    """Public name -> tensor of the original layout, for our parameters of these names and shapes, in their order."""
    table = public_names(spec.hf_names, shapes, "original")
    groups: dict[str, list[str]] = {}
    for ours, (public, _) in table.items():
        groups.setdefault(public, []).append(ours)
    # Parameters that share a tensor are its rows, in the order of the rules.
    order = {rule.ours: i for i, rule in enumerate(spec.hf_names)}
    tensors = {}
    for public, names in groups.items():
        slices = []
        for ours in sorted(names, key=lambda ours: order[table[ours][1].ours]):
            rule = table[ours][1]
            slices.append(SwappedSlice(ours, rule) if rule.scale_shift_swapped else TensorSlice(ours, rule))
        parts = [tuple(s.to_public(torch.empty(shapes[s.ours], device="meta"), args).shape) for s in slices]
        tensors[public] = PublicTensor(parts[0], slices) if len(slices) == 1 else _concatenate(public, slices, parts)
    return tensors


def _concatenate(public: str, slices: list[TensorSlice], shapes: list[Shape]) -> PublicTensor:
    assert len({shape[1:] for shape in shapes}) == 1, f"{public} cannot be made of {[s.ours for s in slices]}"
    stops = list(accumulate(shape[0] for shape in shapes))
    starts = [0, *stops[:-1]]
    rows = zip(starts, stops, strict=True)
    placed = [replace(part, rows=part_rows) for part, part_rows in zip(slices, rows, strict=True)]
    return PublicTensor((stops[-1], *shapes[0][1:]), placed)


def detect(names: Iterable[str], spec: ModelSpec) -> tuple[int, str, str]:
    """(number of names that are the model's, layout, prefix), of the layout that most names fit."""
    names = list(names)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    stripped = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    results = []
    for layout in _layouts(spec):
        pattern = re.compile("|".join({name_pattern(public_name(rule, layout)).pattern for rule in spec.hf_names}))
        results.append((sum(bool(pattern.fullmatch(name)) for name in stripped), layout, prefix))
    return max(results, key=lambda result: result[0])


def detect_layout(names: Iterable[str], spec: ModelSpec, root: Path) -> tuple[str, str]:
    """(layout, prefix) of the names in `root`. ValueError: no name is the model's."""
    count, layout, prefix = detect(names, spec)
    if count == 0:
        examples = " or ".join(f"{layout} ({public_name(spec.hf_names[-1], layout)})" for layout in _layouts(spec))
        raise ValueError(
            f"{root} holds no tensor of a {spec.name} model. Looked for the names of {examples}, with or without "
            f"`{PREFIX}`; found {preview(sorted(names))}"
        )
    return layout, prefix


def _layouts(spec: ModelSpec) -> tuple[str, ...]:
    return ("diffusers", "original") if all(rule.original for rule in spec.hf_names) else ("diffusers",)


class PickledFile:
    """A state dict in a pickle, as HunyuanVideo is published, with the interface of `safe_open`.

    The file is mapped into memory, and nothing but tensors is unpickled. ValueError: it is damaged, or something else.
    """

    def __init__(self, path: Path):
        try:
            open_regular(path).close()
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            content = content.get("module", content)
            self.tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
        except (OSError, RuntimeError, ValueError, AttributeError, TypeError, LookupError, EOFError) as e:
            raise ValueError(f"{path} is missing, damaged, or no state dict of tensors: {e}") from e
        except pickle.UnpicklingError as e:
            raise ValueError(f"{path} is no state dict of tensors: {refusal(e)}") from e

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> "PickledTensor":
        return PickledTensor(self.tensors[name])


class PickledTensor:
    """The interface of a slice of `safe_open`."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, box: Any) -> Tensor:
        return self.tensor[box]
