"""Public formats of weights: which tensor of which file holds which of our parameters. A model states this in one table
of names, `spec.hf_names`.

    format        names and tensors                                      files
    diffusers     diffusers' names; one tensor per parameter             folder: config.json, shards, index
    original      the public code's names; a tensor may hold the rows    folder: shards, index, config.json if that
                  of several parameters                                  code has one
    single_file   as original                                            one file
    comfyui       as original, with the prefix `model.diffusion_model.`  one file
    stacked       as diffusers; a mixture's experts stacked in one       as diffusers
                  tensor, under our names, which only we read

The names in a file identify its layout. Everything that is not diffusers' layout is in original.py, an optional part.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_video.models.spec import ModelSpec, NameRule
from titan_video.tools.bounded import read_index, read_json, short
from titan_video.tools.parts import resolve
from titan_video.weights.safetensors_io import DTYPES, SUFFIXES, Shape, read_header

STEM = "diffusion_pytorch_model"
CONFIG = "config.json"
INDEX = f"{STEM}.safetensors.index.json"
ORIGINAL_FOLDER = "transformers"  # subfolder of the weights of HunyuanVideo as published


@dataclass(frozen=True)
class Format:
    layout: str  # "diffusers" or "original"
    prefix: str = ""
    one_file: bool = False


OPTIONAL = {
    "original": "titan_video.weights.original:ORIGINAL",
    "single_file": "titan_video.weights.original:SINGLE_FILE",
    "comfyui": "titan_video.weights.original:COMFYUI",
    "tensors": "titan_video.weights.original:public_tensors",
    "detection": "titan_video.weights.original:detect_layout",
}
FORMAT_NAMES = ("diffusers", "original", "single_file", "comfyui", "stacked")


def get_format(name: str) -> Format:
    """ValueError: the format needs an optional part that is not installed."""
    if name in ("diffusers", "stacked"):
        return Format("diffusers")
    return resolve(OPTIONAL[name], asked_by=f"weights in the format {name}")


def preview(names: Sequence[str]) -> str:
    """The first five names, for a message."""
    return ", ".join(short(name, 200) for name in names[:5]) + (", ..." if len(names) > 5 else "")


# --- names and layouts ---


@dataclass(frozen=True)
class TensorSlice:
    """The part of a public tensor that is one of our parameters: all of it (rows None), or rows start to stop."""

    ours: str
    rule: NameRule
    rows: tuple[int, int] | None = None

    @property
    def changes_layout(self) -> bool:
        """Whether the values are permuted or reshaped between the two."""
        return self.rule.to_ours is not None

    def to_public(self, tensor: Tensor, args: Any) -> Tensor:
        return self.rule.to_public(tensor, args) if self.rule.to_public else tensor

    def to_ours(self, tensor: Tensor, args: Any) -> Tensor:
        return self.rule.to_ours(tensor, args) if self.rule.to_ours else tensor


@dataclass
class PublicTensor:
    shape: Shape
    slices: list[TensorSlice] = field(default_factory=list)


def public_names(
    rules: Sequence[NameRule], our_names: Iterable[str], layout: str = "diffusers"
) -> dict[str, tuple[str, NameRule]]:
    """Our name -> (public name, rule).

    ValueError: a name has no rule or two, a rule has no name, or two parameters have one name in diffusers' layout.
    """
    patterns = [(name_pattern(rule.ours), rule) for rule in rules]
    table, used = {}, set()
    for name in our_names:
        hits = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(name))]
        if len(hits) != 1:
            raise ValueError(f"parameter {name} has {len(hits)} rules in the table of public names, not one")
        match, rule = hits[0]
        table[name] = (public_name(rule, layout).format(*match.groups()), rule)
        used.add(rule.ours)
    unused = [rule.ours for rule in rules if rule.ours not in used and not rule.optional]
    if unused:
        raise ValueError(f"rules of the table of public names that fit no parameter: {preview(unused)}")
    if layout == "diffusers" and len({public for public, _ in table.values()}) < len(table):
        raise ValueError("the table of public names gives two parameters one public name")
    return table


def public_tensors(spec: ModelSpec, layout: str, shapes: dict[str, torch.Size], args: Any) -> dict[str, PublicTensor]:
    """Public name -> tensor, for our parameters of these names and shapes, in their order."""
    if layout != "diffusers":
        return resolve(OPTIONAL["tensors"], asked_by=f"weights in the {layout} layout")(spec, shapes, args)
    tensors = {}
    for ours, (public, rule) in public_names(spec.hf_names, shapes).items():
        tensor_slice = TensorSlice(ours, rule)
        shape = tensor_slice.to_public(torch.empty(shapes[ours], device="meta"), args).shape
        tensors[public] = PublicTensor(tuple(shape), [tensor_slice])
    return tensors


def is_diffusers(names: Iterable[str], spec: ModelSpec) -> bool:
    """Whether there are names, and all are of the model in diffusers' layout."""
    names = list(names)
    known = [rule.public for rule in spec.hf_names] + list(spec.hf_ignored)
    pattern = re.compile("|".join(name_pattern(name).pattern for name in known))
    return bool(names) and all(pattern.fullmatch(name) for name in names)


def public_name(rule: NameRule, layout: str) -> str:
    return rule.public if layout == "diffusers" else rule.original


def name_pattern(name: str) -> re.Pattern:
    """`{}` in a name of the table stands for the index of a block."""
    return re.compile(re.escape(name).replace(r"\{\}", "([0-9]+)"))


# --- files ---


def find_weights(path: Path, subfolder: str) -> tuple[Path, dict[Path, set[str] | None]]:
    """(the folder or file with the weights of `path`, {file: the names that an index lists for it, or None}).

    ValueError: there are no weights, or it is ambiguous which they are.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is no file of weights: its name should end in one of {', '.join(SUFFIXES)}")
        return path, {path: None}
    for folder in (path / subfolder, path / ORIGINAL_FOLDER, path):
        if files := _weight_files(folder):
            return folder, files
    raise ValueError(
        f"{path} holds no weights. Looked there, in its {subfolder}/ and in its {ORIGINAL_FOLDER}/ for {INDEX}, "
        f"{STEM}.safetensors, another single .safetensors file or index, and a single .pt file"
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if (folder / f"{STEM}.safetensors").is_file():
        return {folder / f"{STEM}.safetensors": None}
    for pattern in ("*.safetensors.index*.json", "*.safetensors", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds {len(found)} files {pattern} and no {INDEX}: give the right one of them, or add the "
                f"missing index"
            )
        if found:
            return _indexed_files(found[0]) if pattern.endswith("json") else {found[0]: None}
    return {}


def _indexed_files(index: Path) -> dict[Path, set[str] | None]:
    files: dict[Path, set[str] | None] = {}
    for name, file_name in read_index(index).items():
        files.setdefault(index.parent / file_name, set()).add(name)
    return files


@dataclass(frozen=True)
class TensorLocation:
    """Where one of our parameters is stored."""

    file: Path
    name: str
    slice: TensorSlice
    dtype: torch.dtype


class StoredWeights:
    """Weights on disk, in any public format. Headers, names and config.json are read; tensors are not.

    ValueError: there are none, or a file is damaged.
    """

    def __init__(self, path: Path, subfolder: str):
        self.root, files = find_weights(path, subfolder)
        self.found: dict[str, tuple[Shape, str]] = {}
        self.files: dict[str, Path] = {}
        for file, listed in files.items():
            header = read_header(file)
            if listed is not None and listed != header.keys():
                different = sorted(listed ^ header.keys())
                raise ValueError(f"{file} and its index disagree about its tensors: {preview(different)}")
            self.found.update(header)
            self.files.update(dict.fromkeys(header, file))

    def layout(self, spec: ModelSpec) -> tuple[str, str]:
        """(layout, prefix of all names). ValueError: no name is the model's."""
        if is_diffusers(self.found, spec):
            return "diffusers", ""
        asked_by = f"{self.root}: not all names of its tensors are those of {spec.name} in diffusers' layout"
        return resolve(OPTIONAL["detection"], asked_by)(self.found, spec, self.root)

    def config(self) -> dict | None:
        """config.json beside the weights; None for a single file. ValueError: it cannot be read."""
        if self.root.is_file():
            return None
        config = read_json(self.root / CONFIG)
        if not isinstance(config, dict):
            raise ValueError(f"{self.root / CONFIG} holds no table of settings")
        return config

    def locate(self, spec: ModelSpec, args: Any, shapes: dict[str, torch.Size]) -> dict[str, TensorLocation]:
        """Our name -> location of every parameter.

        ValueError: names what is missing, unknown, of another shape, or of another architecture than `args`.
        """
        layout, prefix = self.layout(spec)
        self._check_config(spec, args, layout)
        tensors = {prefix + name: tensor for name, tensor in public_tensors(spec, layout, shapes, args).items()}
        ignored = [prefix + name for name in spec.hf_ignored] if layout == "diffusers" else []
        self._check_tensors({name: tensor.shape for name, tensor in tensors.items()}, ignored)
        locations = {}
        for name, tensor in tensors.items():
            for tensor_slice in tensor.slices:
                dtype = DTYPES[self.found[name][1]]
                locations[tensor_slice.ours] = TensorLocation(self.files[name], name, tensor_slice, dtype)
        return locations

    def _check_config(self, spec: ModelSpec, args: Any, layout: str) -> None:
        """Shapes do not distinguish 8 heads of 64 from 4 heads of 128; config.json does."""
        to_config = spec.args_to_hf if layout == "diffusers" else spec.args_to_original
        stored = self.config() if to_config else None
        if stored is None:
            return
        expected = json.loads(json.dumps(to_config(args)))
        expected.pop("model_type", None)  # implied by the names of the tensors
        expected.pop("text_len", None)  # chosen by the run; the weights do not depend on it
        differs = [
            f"{key} = {stored[key]!r} (the model has {value!r})"
            for key, value in expected.items()
            if key in stored and stored[key] != value
        ]
        if differs:
            raise ValueError(
                f"{self.root / CONFIG} is of another architecture than the model: {preview(differs)}; set "
                f"model.flavor to fit, or to `hf`"
            )

    def _check_tensors(self, expected: dict[str, Shape], ignored: Sequence[str]) -> None:
        found = self.found
        patterns = [name_pattern(name) for name in ignored]
        unknown = [n for n in found if n not in expected and not any(pattern.fullmatch(n) for pattern in patterns)]
        misshapen = [n for n in sorted(expected.keys() & found.keys()) if found[n][0] != expected[n]]
        problems = {
            "missing": sorted(expected.keys() - found.keys()),
            "extra": sorted(unknown),
            "of another shape": [f"{n} {found[n][0]} instead of {expected[n]}" for n in misshapen],
            "of a type that is no plain floating point": [f"{n} {t}" for n, (_, t) in found.items() if t not in DTYPES],
        }
        text = "; ".join(f"{len(names)} {kind}: {preview(names)}" for kind, names in problems.items() if names)
        if text:
            raise ValueError(f"the tensors in {self.root} are not the model's: {text}")


def read_slice(file: Any, location: TensorLocation, box: tuple[slice, ...], args: Any) -> Tensor:
    """The box of one of our parameters, from an open file (`safetensors_io.opened`).

    If the layout changes, the full parameter is read; else only the box.
    """
    name, rows = location.name, location.slice.rows
    if location.slice.changes_layout:
        full = file.get_slice(name)[slice(*rows)] if rows else file.get_tensor(name)
        return location.slice.to_ours(full, args)[box]
    if not box:
        return file.get_tensor(name)
    first = box[0]
    if rows:
        start, stop = rows
        first = slice(start + (first.start or 0), start + (stop - start if first.stop is None else first.stop))
    return file.get_slice(name)[(first, *box[1:])]
