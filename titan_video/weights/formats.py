"""Public formats of weights: which tensor of which file holds which of our parameters, from a model's one table of
names (`spec.hf_names`).

    format        names and tensors                                       files
    diffusers     diffusers', one tensor for each of our parameters       folder: config.json, shards, index
    original      the public code's; several of ours may be one's rows    folder: shards, index, config.json where that code has one
    single_file   as original                                             one file
    comfyui       as original, behind `model.diffusion_model.`            one file

What a file holds is seen from its names.
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
from titan_video.weights.safetensors_io import DTYPES, SUFFIXES, Shape, read_header

STEM = "diffusion_pytorch_model"
CONFIG = "config.json"
INDEX = f"{STEM}.safetensors.index.json"
PREFIX = "model.diffusion_model."
ORIGINAL_FOLDER = "transformers"  # of a published HunyuanVideo


@dataclass(frozen=True)
class Format:
    layout: str  # "diffusers" or "original"
    prefix: str = ""
    one_file: bool = False


FORMATS = {
    "diffusers": Format("diffusers"),
    "original": Format("original"),
    "single_file": Format("original", one_file=True),
    "comfyui": Format("original", PREFIX, one_file=True),
}


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# --- names and forms ---


@dataclass(frozen=True)
class Part:
    """One of our parameters: all of a public tensor (rows None), or its rows from start to stop."""

    ours: str
    rule: NameRule
    rows: tuple[int, int] | None
    scale_shift_swapped: bool

    @property
    def changes_form(self) -> bool:
        return self.rule.to_ours is not None or self.scale_shift_swapped

    def to_public(self, tensor: Tensor, args: Any) -> Tensor:
        tensor = self.rule.to_public(tensor, args) if self.rule.to_public else tensor
        return tensor.roll(len(tensor) // 2, 0) if self.scale_shift_swapped else tensor

    def to_ours(self, tensor: Tensor, args: Any) -> Tensor:
        tensor = tensor.roll(len(tensor) // 2, 0) if self.scale_shift_swapped else tensor
        return self.rule.to_ours(tensor, args) if self.rule.to_ours else tensor


@dataclass
class PublicTensor:
    shape: Shape
    parts: list[Part] = field(default_factory=list)


def public_names(
    rules: Sequence[NameRule], our_names: Iterable[str], layout: str = "diffusers"
) -> dict[str, tuple[str, NameRule]]:
    """Our name -> (public name, rule).

    ValueError naming the name without a rule or with two, and the rule without a name.
    """
    patterns = [(_pattern(rule.ours), rule) for rule in rules]
    table, used = {}, set()
    for name in our_names:
        hits = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(name))]
        if len(hits) != 1:
            raise ValueError(f"parameter {name} has {len(hits)} rules in the table of public names, not one")
        match, rule = hits[0]
        table[name] = (_public(rule, layout).format(*match.groups()), rule)
        used.add(rule.ours)
    unused = [rule.ours for rule in rules if rule.ours not in used and not rule.optional]
    if unused:
        raise ValueError(f"rules of the table of public names that fit no parameter: {some(unused)}")
    if layout == "diffusers" and len({public for public, _ in table.values()}) < len(table):
        raise ValueError("the table of public names gives two parameters one public name")
    return table


def public_tensors(spec: ModelSpec, layout: str, shapes: dict[str, torch.Size], args: Any) -> dict[str, PublicTensor]:
    """Public name -> what it is made of, for parameters of these names and shapes, in the order in which the model has
    them.
    """
    table = public_names(spec.hf_names, shapes, layout)
    groups: dict[str, list[str]] = {}
    for ours, (public, _) in table.items():
        groups.setdefault(public, []).append(ours)
    order = {rule.ours: i for i, rule in enumerate(spec.hf_names)}
    tensors, tail = {}, ()
    for public, names in groups.items():
        names = sorted(names, key=lambda ours: order[table[ours][1].ours])
        parts, heights = [], [0]
        for ours in names:
            rule = table[ours][1]
            part = Part(ours, rule, None, rule.scale_shift_swapped and layout == "original")
            shape = tuple(part.to_public(torch.empty(shapes[ours], device="meta"), args).shape)
            if len(names) > 1:
                assert not parts or shape[1:] == tail, f"{public} cannot be made of {names}"
                heights.append(heights[-1] + shape[0])
                part, tail = Part(ours, rule, (heights[-2], heights[-1]), part.scale_shift_swapped), shape[1:]
            parts.append(part)
        tensors[public] = PublicTensor(shape if len(parts) == 1 else (heights[-1], *tail), parts)
    return tensors


def layouts(spec: ModelSpec) -> tuple[str, ...]:
    return ("diffusers", "original") if all(rule.original for rule in spec.hf_names) else ("diffusers",)


def detect(names: Iterable[str], spec: ModelSpec) -> tuple[int, str, str]:
    """(how many of the names it explains, layout, prefix) of the layout that explains most."""
    names = list(names)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    known = []
    for layout in layouts(spec):
        pattern = re.compile("|".join({_pattern(_public(rule, layout)).pattern for rule in spec.hf_names}))
        known.append(
            (
                sum(bool(pattern.fullmatch(name[len(prefix) :])) for name in names if name.startswith(prefix)),
                layout,
                prefix,
            )
        )
    return max(known, key=lambda entry: entry[0])


def _public(rule: NameRule, layout: str) -> str:
    return rule.public if layout == "diffusers" else rule.original


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{\}", "([0-9]+)"))


# --- files ---


def find_weights(path: Path, subfolder: str) -> tuple[Path, dict[Path, set[str] | None]]:
    """The folder, or file, that holds the weights which `path` means, and each of its files with the names that an
    index gives it (else None).
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
        f"{STEM}.safetensors, "
        "another single .safetensors file or index, and a single .pt file"
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    index, single = folder / INDEX, folder / f"{STEM}.safetensors"
    if not index.is_file() and not single.is_file():
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pt"):
            found = sorted(folder.glob(pattern))
            if len(found) > 1:
                raise ValueError(
                    f"{folder} holds {len(found)} files {pattern} and no {INDEX}: give the one that is meant, or "
                    f"the missing index"
                )
            if found:
                index, single = (found[0], single) if pattern.endswith("json") else (index, found[0])
                break
        else:
            return {}
    if not index.is_file():
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


@dataclass(frozen=True)
class Place:
    """Where one of our parameters is stored."""

    file: Path
    name: str
    part: Part
    dtype: torch.dtype


class StoredWeights:
    """Public weights of any format on disk: files, headers and names are read and understood, no tensor is.

    ValueError if there are none.
    """

    def __init__(self, path: Path, subfolder: str):
        self.root, files = find_weights(path, subfolder)
        self.found: dict[str, tuple[Shape, str]] = {}
        self.files: dict[str, Path] = {}
        for file, listed in files.items():
            header = read_header(file)
            if listed is not None and listed != header.keys():
                raise ValueError(
                    f"{file} and its index disagree about its tensors: {some(sorted(listed ^ header.keys()))}"
                )
            self.found.update(header)
            self.files.update(dict.fromkeys(header, file))

    def layout(self, spec: ModelSpec) -> tuple[str, str]:
        """(layout, prefix); ValueError with what was looked for if no name is the model's."""
        count, layout, prefix = detect(self.found, spec)
        if count == 0:
            examples = " or ".join(f"{layout} ({_public(spec.hf_names[-1], layout)})" for layout in layouts(spec))
            raise ValueError(
                f"{self.root} holds no tensor of a {spec.name} model. Looked for the names of {examples}, with "
                f"or without `{PREFIX}`; "
                f"found {some(sorted(self.found))}"
            )
        return layout, prefix

    def config(self) -> dict | None:
        """config.json beside the weights; None for a single file. ValueError if it cannot be read."""
        if self.root.is_file():
            return None
        path = self.root / CONFIG
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"{path} cannot be read ({e}); it belongs to the weights beside it") from e

    def places(self, spec: ModelSpec, args: Any, shapes: dict[str, torch.Size]) -> dict[str, Place]:
        """Our name -> place of every parameter.

        ValueError naming what is missing, extra, misshapen or of another architecture than `args`.
        """
        layout, prefix = self.layout(spec)
        self._check_config(spec, args, layout)
        wanted = {prefix + name: tensor for name, tensor in public_tensors(spec, layout, shapes, args).items()}
        self._check_tensors(
            {name: tensor.shape for name, tensor in wanted.items()},
            spec.hf_ignored if layout == "diffusers" else (),
            prefix,
        )
        return {
            part.ours: Place(self.files[name], name, part, DTYPES[self.found[name][1]])
            for name, tensor in wanted.items()
            for part in tensor.parts
        }

    def _check_config(self, spec: ModelSpec, args: Any, layout: str) -> None:
        """Shapes do not tell 8 heads of 64 from 4 of 128; config.json does."""
        expected = spec.args_to_hf if layout == "diffusers" else spec.args_to_original
        stored = self.config() if expected else None
        if stored is None:
            return
        wanted = json.loads(json.dumps(expected(args)))
        wanted.pop("model_type", None)  # says nothing that the names of the tensors do not say
        wanted.pop("text_len", None)  # the run's choice, no part of the weights
        differs = [
            f"{key} = {stored[key]!r} (the model has {value!r})"
            for key, value in wanted.items()
            if key in stored and stored[key] != value
        ]
        if differs:
            raise ValueError(
                f"{self.root / CONFIG} is of another architecture than the model: {some(differs)}; set "
                f"model.flavor to fit, or to `hf`"
            )

    def _check_tensors(self, wanted: dict[str, Shape], ignored: Sequence[str], prefix: str) -> None:
        found = self.found
        extra = sorted(
            name
            for name in found.keys() - wanted.keys()
            if not any(_pattern(prefix + pattern).fullmatch(name) for pattern in ignored)
        )
        misshapen = [name for name in sorted(wanted.keys() & found.keys()) if found[name][0] != wanted[name]]
        problems = {
            "missing": sorted(wanted.keys() - found.keys()),
            "extra": extra,
            "of another shape": [f"{name} {found[name][0]} instead of {wanted[name]}" for name in misshapen],
            "of a type that is no plain floating point": [
                f"{n} {kind}" for n, (_, kind) in found.items() if kind not in DTYPES
            ],
        }
        text = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names)
        if text:
            raise ValueError(f"the tensors in {self.root} are not the model's: {text}")


def read_part(stored: Any, name: str, part: Part, box: tuple[slice, ...], args: Any) -> Tensor:
    """The box of one of our parameters from an open file.

    One that changes form is read whole, others only in the box.
    """
    start, stop = part.rows or (0, 0)
    if part.changes_form:
        whole = stored.get_slice(name)[start:stop] if part.rows else stored.get_tensor(name)
        return part.to_ours(whole, args)[box]
    if not box:
        return stored.get_tensor(name)
    first = slice((box[0].start or 0) + start, (box[0].stop or stop - start) + start) if part.rows else box[0]
    return stored.get_slice(name)[(first, *box[1:])]
