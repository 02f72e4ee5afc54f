"""Makes a mixture of experts from dense weights (Komatsuzaki et al. 2023, "Sparse upcycling"):

    python -m titan_video.upcycle SRC DST --flavor moe-14B-shared --method shared

    method   experts                                     expert of all tokens      what the model computes at first
    copies   each is the dense feed-forward, its first   if any: drawn, down 0     with --noise 0 what SRC computes, as
             matrix times 1 + noise x N(0, 1)                                      weights of experts sum to 1
    shared   columns of the dense one with that noise,   the dense feed-forward    what SRC computes
             down 0

Routers are drawn as at the start of a run; their biases are 0. SRC is as for titan_video.convert. A run starts from DST
with checkpoint.initial_load_path = DST and the same flavor.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from titan_video.checkpoint.files import is_checkpoint
from titan_video.convert import GIB, PublicSource, StepSource, convert
from titan_video.distributed.utils import derive_seed
from titan_video.models import get_spec
from titan_video.tools.logging import init_logger, logger
from titan_video.weights.hf_storage import global_shapes

METHODS = ("copies", "shared")
EXPERTS = ".moe.experts."
SHARED = ".moe.shared."


class Upcycled:
    """The weights of a mixture, made from those of a dense model one tensor at a time; a source of `convert`.

    noise: relative, of the experts' first matrices. ValueError: the widths do not fit the method.
    """

    def __init__(self, dense: StepSource | PublicSource, flavor: str, method: str, noise: float, seed: int):
        self.dense, self.spec, self.method, self.noise, self.seed = dense, dense.spec, method, noise, seed
        self.args = self.spec.flavors[flavor]
        self.experts = e = self.args.experts
        width = self.args.ffn_dim
        if method == "copies" and e.expert_dim != width:
            raise ValueError(
                f"--method copies: each expert is a dense feed-forward of width {width}, but those of --flavor "
                f"{flavor} have {e.expert_dim}; choose shared, or another flavor"
            )
        if method == "shared" and e.shared_dim != width:
            raise ValueError(
                f"--method shared: the expert of all tokens is the dense feed-forward of width {width}, but that of "
                f"--flavor {flavor} has {e.shared_dim}; choose copies, or another flavor"
            )
        self.shapes = global_shapes(self.spec, self.args)
        dense_names = {name: self._dense_name(name) for name in self.shapes}
        odd = [n for n, of in dense_names.items() if of and EXPERTS not in n and dense.shapes.get(of) != self.shapes[n]]
        if odd:
            raise ValueError(
                f"SRC is not the dense model of --flavor {flavor}: {odd[0]} has another shape or no weights"
            )
        kinds = {name: dense.dtypes[of or "proj_out.weight"] for name, of in dense_names.items()}
        self.dtypes = {n: torch.float32 if n.startswith("routers.") else kind for n, kind in kinds.items()}

    def _dense_name(self, name: str) -> str:
        """The dense parameter from which one of the mixture is made; "": none."""
        if name.startswith("routers.") or (SHARED in name and self.method == "copies"):
            return ""
        if EXPERTS in name:
            block, part = name.split(EXPERTS)
            return f"{block}.ffn.{part.removesuffix('_bias')}.{'bias' if part.endswith('_bias') else 'weight'}"
        return name.replace(SHARED, ".ffn.")

    def read(self, name: str) -> Tensor:
        if EXPERTS not in name and (of := self._dense_name(name)):
            return self.dense.read(of)
        generator = torch.Generator().manual_seed(derive_seed(name, self.seed))
        full = torch.zeros(self.shapes[name])
        if EXPERTS in name:
            return self._experts(name, full, generator)
        if ".down." not in name:
            self.spec.init_parameter(name, full, generator)
        return full

    def _experts(self, name: str, full: Tensor, generator: torch.Generator) -> Tensor:
        """The stacked experts' parameter, of which `full` has the shape."""
        part = name.split(EXPERTS)[1]
        if self.method == "shared" and part.startswith("down"):
            return full
        values = self.dense.read(self._dense_name(name))
        values = values.to(torch.promote_types(values.dtype, torch.float32)) if self.noise else values
        full = full.to(values.dtype)
        values = values.t() if values.ndim == 2 else values
        for i, expert in enumerate(full):
            if part.startswith("down"):
                expert.copy_(values)
                continue
            columns = (i * self.experts.expert_dim + torch.arange(self.experts.expert_dim)) % self.args.ffn_dim
            expert.copy_(values[..., columns])
            if part == "up" and self.noise:
                expert.mul_(1 + self.noise * torch.randn(expert.shape, generator=generator))
        return full


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Make a mixture of experts from dense weights; it computes what they compute, and trains on from there."
    parser = argparse.ArgumentParser(prog="python -m titan_video.upcycle", description=about, allow_abbrev=False)
    parser.add_argument("source", type=Path, metavar="SRC", help="dense weights: as SRC of titan_video.convert")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to make")
    parser.add_argument("--flavor", required=True, help="of the mixture")
    parser.add_argument("--method", choices=METHODS, required=True, help="see the table in docs/experts.md")
    parser.add_argument("--noise", type=float, default=1e-2, help="relative, of the experts' first matrices")
    parser.add_argument("--seed", type=int, default=0, help="of that noise, and of the routers")
    parser.add_argument("--model", default="wan", help="model family")
    parser.add_argument("--dense", default="", help="flavor of SRC (else config.json, or the flavor with these shapes)")
    parser.add_argument("--subfolder", default="", help="folder of the weights in SRC")
    parser.add_argument("--weights", choices=("model", "ema"), default="model", help="which weights of a step-N folder")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> Path:
    """Convert; return the folder with the result. ValueError: the source or an option is not valid."""
    flavors = get_spec(options.model).flavors
    mixtures = [name for name, args in flavors.items() if getattr(args, "experts", None)]
    if options.flavor not in mixtures:
        raise ValueError(f"--flavor {options.flavor} is no mixture of experts; legal: {', '.join(mixtures)}")
    if not options.source.exists():
        raise ValueError(f"SRC {options.source} does not exist")
    if options.target.exists():
        raise ValueError(f"DST {options.target} exists; give a new path")
    if not 0 <= options.noise < math.inf:
        raise ValueError(f"--noise: given {options.noise}; legal: 0 or more")
    flavor, options.flavor, options.config = options.flavor, options.dense, None
    source = options.source
    dense = StepSource(source, options.weights) if is_checkpoint(source) else PublicSource(source, options)
    upcycled = Upcycled(dense, flavor, options.method, options.noise, options.seed)
    path = options.target / (options.subfolder or upcycled.spec.hf_folder)
    convert(upcycled, path, "stacked", None, 5 * GIB)
    return path


def main(argv: list[str]) -> None:
    options = parse(argv)
    init_logger()
    try:
        path = run(options)
    except (OSError, ValueError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    logger.info(f"written to {path}, and read back")


if __name__ == "__main__":
    main(sys.argv[1:])
