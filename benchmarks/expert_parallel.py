"""What each degree of expert parallel gathers and sends for the experts of one block, as a table.

    python benchmarks/expert_parallel.py [--flavor moe-14B-shared] [--tokens 75600] [--ranks 64] [--cp 8]
                                         [--write docs/expert_parallel.md]

The formulas are those of `titan_video/planner/dry_run/traffic.py`; tests compare them with a dry run. Nothing here was
measured on a network.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.traffic import BF16, FP32, MARKER, megabytes, table
from titan_video.models.experts import Experts
from titan_video.models.wan import SPEC
from titan_video.planner.dry_run.traffic import expert_traffic


def rows(args, tokens: int, ranks: int, cp: int) -> list[tuple[str, ...]]:
    """(degree, experts of a rank, GB of gathered weights, MB that FSDP sends, forward and backward, MB of tokens)."""
    experts, found = args.experts, []
    with torch.device("meta"):
        weights = sum(p.numel() for p in Experts(args.dim, experts).parameters())
    for ep in (n for n in range(1, min(experts.num_experts, ranks) + 1) if ranks % n == experts.num_experts % n == 0):
        own, others = weights // ep, ranks // ep - 1
        gather, scatter = (own * size * others // (others + 1) for size in (BF16, FP32))
        exchange = expert_traffic(experts.num_rows(tokens) // cp, args.dim, ep, BF16).sent
        found.append(
            (
                str(ep),
                str(experts.num_experts // ep),
                f"{own * BF16 / 1e9:.2f}",
                *(megabytes(n) for n in (gather, gather + scatter, exchange)),
            )
        )
    return found


def page(flavor: str, tokens: int, ranks: int, cp: int) -> str:
    head = (
        "`expert_parallel_degree`",
        "experts of a rank",
        "GB of their weights, gathered",
        "MB that FSDP sends for them, forward",
        "backward",
        "MB that tokens send, forward, and as much backward",
    )
    return (
        f"One block of Wan {flavor}, {ranks} ranks, clips of {tokens:,} tokens over {cp} of them, bfloat16, gradients\n"
        f"reduced in float32.\n\n{table(head, rows(SPEC.flavors[flavor], tokens, ranks, cp))}"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flavors = [name for name, args in SPEC.flavors.items() if args.experts]
    parser.add_argument("--flavor", default="moe-14B-shared", choices=flavors)
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--cp", type=int, default=8)
    parser.add_argument("--write", type=Path, help=f"Markdown file; the part between two {MARKER} lines is replaced")
    options = parser.parse_args(argv)
    text = page(options.flavor, options.tokens, options.ranks, options.cp)
    print(text)
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{text}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
