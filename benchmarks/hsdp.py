"""When HSDP is due: how long FSDP's ring takes over all ranks, beside the block's compute that must hide it.

    python benchmarks/hsdp.py [--flavor t2v-14B] [--tokens 75600] [--ranks-per-clip 16] [--write docs/parallelism.md]

A ring over n ranks on m machines sends a unit of S bytes in n - 1 hops, one after another; m - 1 cross machines:

    t(n, S) = S (n - 1) / n / bandwidth + (n - m) hop + (m - 1) hop between machines

HSDP shards over the n ranks of a machine and keeps r replicas: besides, the replicas' shards of gradients are
all-reduced, 2 (r - 1) hops between machines and 2 S (r - 1) / (n r) bytes. FSDP hides the gather of the next block's
weights (bfloat16) behind a block's forward, and one gather and the reduction of gradients behind its backward, twice
the forward's compute. A model: nothing was measured on a network.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown
from titan_video.models.wan import SPEC, WanModel
from titan_video.models.wan.model import Block

MARKER = "<!-- hsdp -->"
RANKS = (8, 64, 128, 256, 512, 1024)
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Network:
    """gpus: of a machine. bandwidth: bytes a second that a ring moves past each rank, between machines and inside one.
    hop: seconds of a hop between machines and inside one.
    """

    gpus: int = 8
    bandwidth: tuple[float, float] = (45e9, 350e9)
    hop: tuple[float, float] = (10e-6, 2e-6)

    def ring(self, ranks: int, size: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes over `ranks`."""
        is_inside = ranks <= self.gpus
        return size * (ranks - 1) / ranks / self.bandwidth[is_inside] + self.hops(ranks)

    def hops(self, ranks: int) -> float:
        machines = -(-ranks // self.gpus)
        return (machines - 1) * self.hop[0] + (ranks - machines) * self.hop[1]

    def all_reduce(self, replicas: int, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes over one rank of each of so many machines."""
        return 2 * (replicas - 1) * (size / replicas / self.bandwidth[0] + self.hop[0])


def rows(weights: int, network: Network) -> list[list[str]]:
    """One line for each number of ranks, in milliseconds of a block of so many weights."""
    found = []
    for ranks in RANKS:
        gather = network.ring(ranks, weights * BF16)
        backward = [gather + network.ring(ranks, weights * size) for size in (FP32, BF16)]
        inside, replicas = network.ring(network.gpus, weights * BF16), ranks // network.gpus
        scatter = network.ring(network.gpus, weights * FP32)
        hsdp = inside + scatter + network.all_reduce(replicas, weights * FP32 / network.gpus)
        numbers = (network.hops(ranks), gather, *backward, inside, hsdp)
        found.append([f"{ranks:,}", *(f"{1e3 * x:.1f}" for x in numbers)])
    return found


def page(flavor: str, tokens: int, ranks_per_clip: int, flops_a_second: float, network: Network) -> str:
    args = SPEC.flavors[flavor]
    with torch.device("meta"):
        weights = sum(p.numel() for p in Block(args).parameters())
    forward = args.flops(tokens) / args.num_layers / ranks_per_clip / flops_a_second
    header = ["ranks", "hops alone", "FSDP forward", "FSDP backward", "same, reduced in bfloat16"]
    header += [f"HSDP, {network.gpus} x replicas, forward", "HSDP backward"]
    between, inside = network.bandwidth
    return (
        f"Milliseconds of communication of one block of Wan {flavor}. A clip of {tokens:,} tokens over "
        f"{ranks_per_clip} ranks, each at\n{flops_a_second / 1e12:.0f} TFLOP/s, hides {1e3 * forward:.1f} in forward "
        f"and {2e3 * forward:.1f} in backward. {network.gpus} GPUs a machine; {between / 1e9:.0f} GB/s a GPU\nbetween "
        f"machines and {inside / 1e9:.0f} inside one; {network.hop[0] * 1e6:.0f} us a hop between and "
        f"{network.hop[1] * 1e6:.0f} inside.\n\n{markdown(header, rows(weights, network))}"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flavors = [name for name, args in SPEC.flavors.items() if SPEC.build is WanModel]
    parser.add_argument("--flavor", default="t2v-14B", choices=flavors)
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--ranks-per-clip", type=int, default=16, help="context parallel degree")
    parser.add_argument("--tflops", type=float, default=500.0, help="that a rank reaches")
    parser.add_argument("--write", type=Path, help=f"Markdown file; the part between two {MARKER} lines is replaced")
    cli = parser.parse_args(argv)
    text = page(cli.flavor, cli.tokens, cli.ranks_per_clip, 1e12 * cli.tflops, Network())
    print(text)
    if cli.write:
        before, _, after = cli.write.read_text().split(MARKER)
        cli.write.write_text(f"{before}{MARKER}\n{text}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
