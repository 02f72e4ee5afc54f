"""Launches and bytes of an optimizer step, counted without a GPU, and the kernels' registers on Hopper.

    python benchmarks/optimizer.py [--model t2v-14B] [--ranks 1 8 64] [--plain] [--builds] [--json FILE]

One rank's optimizer of a Wan model under FSDP takes its second step on the meta device, as on a GPU. Rules:

    launches   each operator on the device that is no view and no empty allocation; a kernel of ours; a copy of its
               table; a batch of sends and receives. baddbmm is two: it first copies what it adds to. Foreach operators
               by torch's limits: 320 blocks of 65,536 elements, and at most 64 pairs of tensors.
    bytes      of the kernels of ours: weights, moments, codes and scales are read and written, gradients read. Muon's
               products are not among them.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, markdown, options, write_json
from benchmarks.kernel_builds import compile_kernel, resources
from titan_video import kernels
from titan_video.config.job_config import ActivationCheckpoint, Compile, Optimizer, Parallelism, Training
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.kernels.triton import launch, optimizer_kernels
from titan_video.kernels.triton import optimizer as fused_updates
from titan_video.models.wan import SPEC
from titan_video.optim import mixed, muon
from titan_video.optim.optimizer import build_optimizer
from titan_video.planner.dry_run.fake import fake_ranks

NAMES = ("AdamW8bit", "Muon")
BAR_LAUNCHES, BAR_BYTES = 200, 17.0  # of a step of 14B; of 8-bit AdamW, an element
KERNELS = ("adamw", "muon_momentum", "muon_apply")
MAX_BLOCKS, CHUNK, MAX_PAIRS = 320, 65536, 64  # of torch's foreach kernels (multi_tensor_apply)


class Launches(TorchDispatchMode):
    """Counts launches by operator, by the rules at the top of the file."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        on_device = any(t.is_meta for t in tensors)
        if not on_device or func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "alias")):
            return result
        if name.startswith("_foreach"):
            self.counts[name] += foreach_launches([t.numel() for t in args[0]])
        else:
            self.counts[name] += 2 if name == "baddbmm" else 1
        return result


def foreach_launches(sizes: list[int]) -> int:
    """Kernels of a foreach operator on pairs of tensors of these sizes."""
    launches = blocks = pairs = 0
    for size in sizes:
        pairs += 1
        for _ in range(-(-size // CHUNK)):
            blocks += 1
            if blocks == MAX_BLOCKS:
                launches, blocks, pairs = launches + 1, 0, 1
        if pairs == MAX_PAIRS:
            launches, blocks, pairs = launches + 1, 0, 0
    return launches + (blocks > 0)


def sharded_model(flavor: str) -> torch.nn.Module:
    """On the meta device, under FSDP over all ranks, with gradients."""
    meshes = ParallelDims(dp_shard=dist.get_world_size()).build_mesh("cpu")
    with torch.device("meta"):
        model = SPEC.build(SPEC.flavors[flavor])
    sections = Parallelism(), Training(), ActivationCheckpoint(mode="none"), Compile(enable=False)
    parallelism, training, checkpointing, compilation = sections
    parallelize(model, SPEC.plan, meshes, parallelism, training, checkpointing, compilation)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


@contextmanager
def as_on_gpu(counter: Launches, found: dict[str, Any]) -> Iterator[None]:
    """Kernels and exchanges are counted, not run. found: bytes and elements by kernel; launches of kernels."""

    def recorder(name: str) -> Any:
        def record(*args: Any, **constants: Any) -> None:
            counter.counts[f"kernel {name}"] += 1
            found["builds"].setdefault((name, str(constants)), (args, constants))

        return defaultdict(lambda: record)

    def measured(name: str) -> Any:
        original = getattr(fused_updates, name)

        def run(parts: list, *args: Any) -> None:
            kind = args[0]["kind"] if name == "adamw" else name
            for part in parts:
                found["bytes"][kind] += moved(name, part)
                found["elements"][kind] += part.weight.numel()
            original(parts, *args)

        return run

    def slices_of_all_ranks(own: dict[str, muon.Slices]) -> list[dict[str, muon.Slices]]:
        ranks = range(dist.get_world_size())
        return [{name: (rows(heights[name], r, len(ranks)), s[1]) for name, s in own.items()} for r in ranks]

    heights: dict[str, int] = found["heights"]
    exchange = lambda sent, received: counter.counts.update({"exchange": 1}) if sent or received else None  # noqa: E731
    with (
        mock.patch.object(launch, "interpreted", lambda: True),
        mock.patch.object(muon, "gather_objects", slices_of_all_ranks),
        mock.patch.object(muon, "_exchange", exchange),
        mock.patch.object(mixed, "working_dtype", lambda p: torch.bfloat16),
        mock.patch.multiple(optimizer_kernels, **{name: recorder(name) for name in KERNELS}),
        mock.patch.multiple(fused_updates, **{name: measured(name) for name in KERNELS}),
    ):
        yield


def moved(kernel: str, part: fused_updates.Part) -> int:
    """Bytes that a kernel reads and writes of one part."""
    if kernel == "adamw":
        return 2 * part.weight.nbytes + part.grad.nbytes + 2 * sum(t.nbytes for t in part.state if t is not None)
    momentum, update, *_ = part.state
    if kernel == "muon_momentum":
        return part.grad.nbytes + 2 * momentum.nbytes + update.nbytes
    return 2 * part.weight.nbytes + update.nbytes


def rows(height: int, rank: int, ranks: int) -> slice:
    """The rows of a matrix that FSDP gives a rank."""
    chunk = -(-height // ranks)
    return slice(min(rank * chunk, height), min((rank + 1) * chunk, height))


def count(flavor: str, name: str, ranks: int, plain: bool = False) -> dict[str, Any]:
    """Launches of rank 0's step by operator, bytes an element by kernel, and the kernels that were launched."""
    found = {"bytes": Counter(), "elements": Counter(), "builds": {}, "heights": {}}
    counter = Launches()
    with fake_ranks(ranks, rank=0):
        model = sharded_model(flavor)
        found["heights"] |= {name: p.shape[0] for name, p in model.named_parameters()}
        with as_on_gpu(counter, found):
            optimizer = build_optimizer(model, Optimizer(name=name), SPEC.plan.blocks)
            kernels.set_backend("torch" if plain else "triton")
            try:
                optimizer.step()
                for tallied in (counter.counts, found["bytes"], found["elements"]):
                    tallied.clear()
                with counter:
                    optimizer.step()
            finally:
                kernels.set_backend("torch")
    per_element = {kind: found["bytes"][kind] / n for kind, n in found["elements"].items()}
    return {
        "model": flavor,
        "optimizer": name,
        "ranks": ranks,
        "plain": plain,
        "launches": counter.counts.total(),
        "by operator": dict(counter.counts.most_common()),
        "bytes per element": per_element,
        "builds": found["builds"],
    }


def build_table(results: list[dict[str, Any]]) -> str:
    """Registers and spilled bytes a thread of each kernel, compiled for Hopper."""
    builds = {key: build for result in results for key, build in result["builds"].items()}
    table = []
    for (name, _), (args, constants) in builds.items():
        compiled = compile_kernel(getattr(optimizer_kernels, name), args, dict(constants))
        shown = ", ".join(f"{k}={v}" for k, v in constants.items() if k != "num_warps")
        table.append([name, shown, *resources(compiled), compiled.metadata.shared])
    return markdown(["kernel", "constants", "registers", "spilled", "shared, B"], table)


def main(argv: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", choices=list(SPEC.flavors), default="t2v-14B")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--plain", action="store_true", help="also without the kernels (model.kernels = torch)")
    parser.add_argument("--builds", action="store_true", help="also compile the kernels for sm_90")
    cli = parser.parse_args(argv)
    results = []
    for name in NAMES:
        for ranks in cli.ranks:
            results += [count(cli.model, name, ranks, plain) for plain in ((True, False) if cli.plain else (False,))]
    table = []
    for r in results:
        moved = ", ".join(f"{kind} {n:.2f}" for kind, n in r["bytes per element"].items()) or "not counted"
        table.append([r["optimizer"], r["ranks"], "torch" if r["plain"] else "triton", f"{r['launches']:,}", moved])
    print(markdown(["optimizer", "ranks", "kernels", "launches a step", "bytes an element"], table))
    if cli.builds:
        print(f"\n{build_table(results)}")
    if cli.json:
        shown = [{key: value for key, value in r.items() if key != "builds"} for r in results]
        write_json(cli.json, "optimizer", cli, environment(torch.device("cpu")), shown)


if __name__ == "__main__":
    main(sys.argv[1:])
