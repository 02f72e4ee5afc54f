"""The planner's memory against dry runs, on random candidates of its own search space: all families and layouts.

    python benchmarks/planner_memory.py [--cases 60] [--seed 0] [--blocks 4]

A case is a flavor, a number of ranks, a bucket, a candidate, a checkpointing of its blocks, and one of its pipeline
stages. Both sides then say what a rank of that stage needs at the peak of a step. Models have their real widths and
`--blocks` blocks of each type (0: all of them), as blocks add up equally and a whole model's dry run takes a minute.
With pipelines there are at least two blocks a stage. Nothing here was measured on a GPU.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown
from titan_video.config.job_config import JobConfig
from titan_video.models import FAMILIES, get_spec
from titan_video.planner.candidate import FULL, NONE, Candidate, Checkpointing, Range
from titan_video.planner.cluster import Cluster, load
from titan_video.planner.cost.model import CostModel
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.dry_run.run import dry_run
from titan_video.planner.plan_file import to_tables
from titan_video.planner.search.space import Space, StepClips
from titan_video.planner.trace.selection import SAVES

FLAVOR = "planner-memory"  # the flavor whose number of blocks is changed
RANKS = (1, 2, 4, 8, 16, 32, 64)
BUCKETS = ((17, 256, 256), (33, 480, 832), (81, 480, 832), (81, 704, 1280), (1, 480, 832))
MOST_TOKENS = 40_000  # of a micro-batch on a rank
LIMIT = 0.05


@dataclass(frozen=True)
class Case:
    """flavor: of the family. stage: the pipeline stage whose first rank is compared. load: of its experts / mean."""

    family: str
    flavor: str
    config: JobConfig
    candidate: Candidate
    stage: int
    load: float = 1.0

    @property
    def layout(self) -> str:
        c = self.candidate
        names = {"pp": c.pp, "rep": c.dp_replicate, "shard": c.dp_shard, "ring": c.ring, "ul": c.ulysses}
        names |= {"tp": c.tp, "ep": c.ep}
        return " ".join(f"{name}{n}" for name, n in names.items() if n > 1) or "1 rank"

    @property
    def modes(self) -> str:
        return ", ".join(str(r.checkpointing) for r in self.candidate.ranges)


def few_blocks(args: Any, number: int) -> Any:
    """`number` blocks of each type; 0: all."""
    counts = {
        f.name: number for f in fields(args) if f.name in ("num_layers", "num_double_layers", "num_single_layers")
    }
    return replace(args, **counts) if number else args


def configure(config: JobConfig, candidate: Candidate, num_blocks: int) -> JobConfig:
    """The job with the candidate's values."""
    for section, values in to_tables(candidate, num_blocks).items():
        known = {f.name for f in fields(getattr(config, section))}
        frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        config = replace(config, **{section: replace(getattr(config, section), **frozen)})
    return config


def cases(number: int, seed: int, blocks: int) -> Iterator[Case]:
    """The same ones for the same seed."""
    draw = random.Random(seed)
    families = [name for name in FAMILIES if name in ("wan", "hunyuan_video")]
    found = 0
    while found < number:
        family = draw.choice(families)
        spec = get_spec(family)
        flavor = draw.choice([name for name in spec.flavors if "debug" not in name and name != FLAVOR])
        case = _draw_case(draw, family, flavor, few_blocks(spec.flavors[flavor], blocks))
        if case is not None:
            found += 1
            yield case


def _draw_case(draw: random.Random, family: str, flavor: str, args: Any) -> Case | None:
    bucket, ranks = draw.choice(BUCKETS), draw.choice(RANKS)
    spec = get_spec(family)
    spec.flavors[FLAVOR] = args
    config = JobConfig()
    text = 512 if family == "wan" else 256
    config = replace(
        config,
        model=replace(config.model, name=family, flavor=FLAVOR, kernels=draw.choice(("auto", "auto", "torch"))),
        encoder=replace(config.encoder, max_text_length=text),
        data=replace(config.data, buckets=(bucket,)),
        ema=replace(config.ema, enable=draw.random() < 0.2),
    )
    model = CostModel(config, cluster())
    tokens = model.workload[0].tokens
    clips = StepClips(ranks * draw.choice((1, 1, 2, 4)))
    sizes = args.num_heads, args.ffn_dim, len(model.layers)
    space = Space(ranks, 8, *sizes, clips, tokens, model.experts.num_experts if model.experts else 1)
    legal = [
        c
        for c in space
        if c.local_batch_size * tokens / (c.cp * c.tp) < MOST_TOKENS
        and c.microbatches <= 8
        and _spread(c, model.layers)
    ]
    if not legal:
        return None
    # Layouts first, then what they are used with: most candidates of a space have pipelines.
    layout = draw.choice(sorted(set(map(_axes, legal))))
    candidate = draw.choice([c for c in legal if _axes(c) == layout])
    candidate = replace(
        candidate,
        optimizer=draw.choice(("AdamW", "AdamW", "AdamW8bit")),
        ranges=_draw_ranges(draw, candidate, len(model.layers), tokens),
    )
    config = configure(config, candidate, len(model.layers))
    load = draw.choice((1.0, 1.5)) if candidate.ep > 1 else 1.0
    return Case(family, flavor, config, candidate, draw.randrange(candidate.pp), load)


def _axes(c: Candidate) -> tuple:
    return c.pp, c.dp_replicate > 1, c.ring > 1, c.ulysses > 1, c.tp > 1, c.ep > 1


def _spread(c: Candidate, layers: tuple[str, ...]) -> bool:
    return c.pp * (2 if c.schedule != "1F1B" else 1) * 2 <= len(layers)


def _draw_ranges(draw: random.Random, c: Candidate, num_blocks: int, tokens: int) -> tuple[Range, ...]:
    has_exchange = c.ulysses * c.ep > 1
    saves = [s for s in SAVES if (has_exchange or "exchange" not in s) and (tokens >= 1024 or "attention" not in s)]
    modes = [NONE, FULL, *(Checkpointing("selective", s) for s in saves)]
    modes += [Checkpointing(m.mode, m.save, offload=True) for m in modes[1:2]] if c.pp == 1 else []
    return (Range(0, num_blocks, draw.choice(modes)),)


def cluster() -> Cluster:
    """Any: memory is counted, not limited."""
    return load("h100x64")


@dataclass(frozen=True)
class Row:
    case: Case
    predicted: int
    counted: int
    by_kind: dict[str, tuple[int, int]]

    @property
    def error(self) -> float:
        return self.predicted / self.counted - 1


def compare(case: Case) -> Row:
    """Bytes at the peak, by the planner and by a dry run."""
    c = case.candidate
    report = dry_run(case.config, c.num_training_ranks, case.stage * c.num_training_ranks // c.pp, case.load)
    memory = CostModel(case.config, cluster(), load=case.load).memory(c)[case.stage]
    kinds = {kind: (memory.by_kind.get(kind, 0), n) for kind, n in report.at_peak.items()}
    return Row(case, memory.total, report.total, kinds)


def run(number: int, seed: int, blocks: int) -> list[Row]:
    rows = []
    for case in cases(number, seed, blocks):
        get_spec(case.family).flavors[FLAVOR] = few_blocks(get_spec(case.family).flavors[case.flavor], blocks)
        rows.append(compare(case))
        row = rows[-1]
        print(f"{row.error:+7.1%}  {case.flavor} {case.layout} {case.modes}", file=sys.stderr, flush=True)
        if abs(row.error) > LIMIT:
            print({k: tuple(round(n / GIB, 3) for n in v) for k, v in row.by_kind.items()}, file=sys.stderr)
    return rows


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        c = row.case.candidate
        step = f"{c.microbatches} x {c.local_batch_size}" + (f", {c.schedule}" if c.pp > 1 else "")
        lines.append(
            [
                row.case.flavor,
                "x".join(map(str, row.case.config.data.buckets[0])),
                row.case.layout,
                step,
                row.case.modes,
                f"{row.predicted / GIB:.2f}",
                f"{row.counted / GIB:.2f}",
                f"{row.error:+.1%}",
            ]
        )
    header = ["model", "bucket", "layout", "micro-batches", "checkpointing", "planner", "dry run", "error"]
    return markdown(header, lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=4)
    cli = parser.parse_args(argv)
    rows = run(cli.cases, cli.seed, cli.blocks)
    print(table(rows))
    errors = [abs(row.error) for row in rows]
    within = sum(error <= LIMIT for error in errors)
    print(f"\n{within} of {len(rows)} within {LIMIT:.0%}; mean {sum(errors) / len(rows):.1%}, most {max(errors):.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
