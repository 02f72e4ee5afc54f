"""The matrices of a public layout that adapters of ours belong to, and which of them a file's adapters are of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from titan_video.lora.names import AdapterPair, StoredAdapters, flat, match_modules
from titan_video.models.spec import ModelSpec
from titan_video.weights.formats import TensorSlice, preview, public_tensors
from titan_video.weights.hf_storage import global_shapes


@dataclass(frozen=True)
class PublicMatrix:
    """A matrix in a public layout that adapters of ours belong to.

    height, width: its rows and columns. parts: (module name, slice of the matrix) of our Linears, in row order.
    """

    name: str
    height: int
    width: int
    parts: tuple[tuple[str, TensorSlice], ...]

    def join(self, adapters: Mapping[str, AdapterPair], args: Any) -> AdapterPair | None:
        """The adapter of the matrix; None if no part has one."""
        parts = [(part, adapters[module]) for module, part in self.parts if module in adapters]
        if not parts:
            return None
        scales = {pair.scale for _, pair in parts}
        ups = [pair.up if len(scales) == 1 else pair.scaled_up for _, pair in parts]
        downs = [part.to_public(pair.down, args) for part, pair in parts]
        is_shared = all(torch.equal(down, downs[0]) for down in downs[1:])
        widths = [0] * len(downs) if is_shared else [0, *accumulate(len(down) for down in downs[:-1])]
        joined = ups[0].new_zeros(self.height, len(downs[0]) if is_shared else sum(map(len, downs)))
        for (part, _), up, start in zip(parts, ups, widths, strict=True):
            joined[_rows(part), start : start + up.shape[1]] = up
        down = downs[0] if is_shared else torch.cat(downs)
        return AdapterPair(down, joined, scales.pop() if len(scales) == 1 else 1.0)

    def split(self, pair: AdapterPair, args: Any) -> dict[str, AdapterPair]:
        """Adapters of our modules, which together add the same to the matrix: the inverse of `join`.

        Of an adapter whose rows all use all of `down`, as other trainers make it, each module gets a copy of `down`.
        """
        used = [(module, part) for module, part in self.parts if pair.up[_rows(part)].any()]
        for parts in (list(self.parts), used):
            rank, rest = len(pair.down) // max(len(parts), 1), pair.up.clone()
            columns = [slice(i * rank, (i + 1) * rank) for i in range(len(parts))]
            for (_, part), mine in zip(parts, columns, strict=True):
                rest[_rows(part), mine] = 0
            if parts and len(pair.down) % len(parts) == 0 and not rest.any():
                break
        else:
            parts, columns = used, [slice(None)] * len(used)
        return {
            module: replace(pair, down=part.to_ours(pair.down[mine], args), up=pair.up[_rows(part), mine])
            for (module, part), mine in zip(parts, columns, strict=True)
        }


def _rows(part: TensorSlice) -> slice:
    return slice(*part.rows) if part.rows else slice(None)


def public_matrices(spec: ModelSpec, args: Any, layout: str) -> list[PublicMatrix]:
    """The matrices of the public layout whose rows are weights of our Linears, without those outside the blocks that
    the layouts order differently: an adapter applies a layout's transform to `down` alone.

    ValueError: the model has no such layout, or the optional part of the layout is not installed.
    """
    matrices = []
    for name, tensor in public_tensors(spec, layout, global_shapes(spec, args), args).items():
        fits = all(p.ours.split(".")[0] in spec.plan.blocks or not p.changes_layout for p in tensor.slices)
        if name.endswith(".weight") and len(tensor.shape) == 2 and fits:
            parts = tuple((part.ours.removesuffix(".weight"), part) for part in tensor.slices)
            height, width = tensor.shape
            matrices.append(PublicMatrix(name.removesuffix(".weight"), height, width, parts))
    return matrices


def find_modules(stored: StoredAdapters, spec: ModelSpec, args: Any) -> tuple[dict[str, AdapterPair], list[str]]:
    """({our module: its adapter}, modules of the file that the model does not have).

    ValueError: no module of the file is the model's.
    """
    best: tuple[dict[str, str], dict[str, PublicMatrix]] = {}, {}
    for layout in ("diffusers", "original") if all(rule.original for rule in spec.hf_names) else ("diffusers",):
        known = {flat(matrix.name): matrix for matrix in public_matrices(spec, args, layout)}
        table = match_modules(stored.pairs, known)
        best = (table, known) if len(table) > len(best[0]) else best
        if len(table) == len(stored.pairs):
            break
    table, known = best
    if not table:
        names = preview(sorted(stored.pairs))
        raise ValueError(f"{stored.path} holds adapters of another model than {spec.name}: {names}")
    adapters: dict[str, AdapterPair] = {}
    for module, name in table.items():
        pair, matrix = stored.pairs[module], known[name]
        if (len(pair.up), pair.down.shape[1]) != (matrix.height, matrix.width):
            raise ValueError(
                f"{stored.path}: the adapter of {module} has {pair.down.shape[1]} inputs and {len(pair.up)} outputs, "
                f"the matrix of {spec.name} {matrix.width} and {matrix.height}: set lora.rank and model.flavor to fit"
            )
        adapters |= matrix.split(pair, args)
    return adapters, sorted(stored.pairs.keys() - table.keys())
