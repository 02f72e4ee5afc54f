"""Communication volume of each layout for one Wan block, and what activation checkpointing saves, as tables.

    python benchmarks/traffic.py [--flavor t2v-14B] [--tokens 75600] [--ranks 8] [--write docs/parallelism.md]

The formulas are those of the layouts' own files. Tests compare them with the collectives of real ranks
(tests/distributed_tests: test_context_parallel.py, test_tensor_parallel.py, test_pipeline.py). Nothing here was
measured on a network.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.job_config import ActivationCheckpoint
from titan_video.models.wan import SPEC, WanModel
from titan_video.models.wan.model import Block
from titan_video.planner.dry_run.memory import saved_bytes_per_token
from titan_video.planner.dry_run.traffic import bytes_per_collective, ring_traffic, ulysses_traffic

MARKER = "<!-- traffic -->"
BF16, FP32 = 2, 4


def megabytes(n: float) -> str:
    return f"{n / 1e6:,.1f}"


def describe(calls: dict[str, int]) -> str:
    return ", ".join(f"{n} {name.replace('_', '-')}" for name, n in calls.items() if n) or "none"


def rows(args, tokens: int, g: int) -> list[tuple[str, ...]]:
    """(layout, collectives in forward, in backward, MB sent in forward, in backward) per rank, block and clip."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in Block(args).parameters())
    elements = tokens // g * args.dim
    sizes = SimpleNamespace(
        gather=weights * BF16 * (g - 1) // g,
        scatter=weights * FP32 * (g - 1) // g,
        tp=bytes_per_collective(1, tokens, args.dim, g, BF16),
    )
    found = [("FSDP", "1 all-gather", "1 all-gather, 1 reduce-scatter", sizes.gather, sizes.gather + sizes.scatter)]
    methods = {"Ulysses": ulysses_traffic(elements, g, BF16)}
    for rotate in ("alltoall", "allgather"):
        methods[f"ring, {rotate}"] = ring_traffic(elements, g, BF16, rotate)
    for name, directions in methods.items():
        found.append(
            (
                name,
                *(describe({t.collective: t.calls for t in d}) for d in directions),
                *(sum(t.sent for t in d) for d in directions),
            )
        )
    parts = ulysses_traffic(elements, g // 2, BF16), ring_traffic(elements, 2, BF16, "alltoall")
    unified = [[*u, *r] for u, r in zip(*parts, strict=True)]
    calls, sent = ([sum(getattr(t, field) for t in d) for d in unified] for field in ("calls", "sent"))
    found.append((f"unified 2 x {g // 2}", *(describe({"all_to_all": n}) for n in calls), *sent))
    found.append(
        (
            "tensor parallel",
            "3 all-gather, 3 reduce-scatter, 2 all-reduce",
            "3 all-gather, 3 reduce-scatter, 7 all-reduce",
            6 * sizes.tp,
            6 * sizes.tp,
        )
    )
    return [(name, forward, backward, megabytes(a), megabytes(b)) for name, forward, backward, a, b in found]


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines))


def saved(args, tokens: int) -> list[tuple[str, ...]]:
    """(mode, bytes per token and block, GiB of all blocks) that checkpointing saves, with all tokens on one rank."""
    sections = {
        "full": ActivationCheckpoint(mode="full"),
        "selective, save = [attention]": ActivationCheckpoint(mode="selective", save=("attention",)),
        "selective": ActivationCheckpoint(mode="selective"),
        "selective, save = [attention, exchange]": ActivationCheckpoint(
            mode="selective", save=("attention", "exchange")
        ),
        "full, offload": ActivationCheckpoint(mode="full", offload=True),
        "selective, offload": ActivationCheckpoint(mode="selective", offload=True),
    }
    found = {name: saved_bytes_per_token(args.dim, args.num_heads, section, BF16) for name, section in sections.items()}
    return [(name, f"{n:,}", f"{n * tokens * args.num_layers / 2**30:.1f}") for name, n in found.items()]


def page(flavor: str, tokens: int, g: int) -> str:
    args = SPEC.flavors[flavor]
    traffic = table(
        ("over " + str(g) + " ranks", "forward", "backward", "MB forward", "MB backward"), rows(args, tokens, g)
    )
    memory = table(("mode", "bytes per token and block", "GiB, all blocks"), saved(args, tokens))
    return (
        f"One block of Wan {flavor}, one clip of {tokens:,} tokens, bfloat16: what one rank sends to "
        f"the others.\n\n{traffic}\n\n"
        f"Activations that blocks save for backward, for the whole clip. Context and tensor parallel divide them by "
        f"their\ndegrees.\n\n{memory}"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--flavor", default="t2v-14B", choices=[name for name, args in SPEC.flavors.items() if SPEC.build is WanModel]
    )
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--write", type=Path, help=f"Markdown file; the part between two {MARKER} lines is replaced")
    options = parser.parse_args(argv)
    text = page(options.flavor, options.tokens, options.ranks)
    print(text)
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{text}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
