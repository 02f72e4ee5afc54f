"""What a plan means for training: sizes, micro-batches, the balance between ranks, the cache on disk. And training
clips as files, to look at.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from titan_video.data.batching import Batching, Bucket, Work
from titan_video.data.sampler import CostClass, GlobalSampler
from titan_video.ingest.bucketing import share_kept
from titan_video.ingest.decode.video import UnusableClip
from titan_video.ingest.decode.worker import map_in_workers
from titan_video.ingest.files.media import DecodeLimits
from titan_video.ingest.plan.entries import Plan, PlanEntry, read_frames
from titan_video.tools.video import write_mp4

STEPS_SEEN = 200
COLUMNS = (
    "bucket",
    "clips",
    "from",
    "pixels kept",
    "latent",
    "tokens",
    "clips/micro-batch",
    "tokens/micro-batch",
    "TFLOPs/micro-batch",
    "of budget",
)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def report(
    plan: Plan,
    batching: Batching,
    ranks: int,
    work: Callable[[Bucket], Work],
    latent: Callable[[Bucket], tuple[int, ...]],
    text_bytes: int,
    seed: int = 0,
) -> str:
    """The report as text.

    ranks: data-parallel ranks. work, latent: cost and latent shape of one clip of a bucket. text_bytes: of the longest
    caption's embedding. FLOPs are of forward and backward. `of budget`: tokens of a micro-batch as a share of
    data.tokens_per_microbatch.
    """
    clips: dict[Bucket, _OfBucket] = {}
    captions = array("q")  # hashes
    for e in plan.entries:
        if e.kept:
            clips.setdefault(e.bucket, _OfBucket()).add(e)
            captions.extend(map(hash, e.captions))
    sizes = sorted(clips)
    draws, works = [clips[b].draws for b in sizes], [work(b) for b in sizes]
    classes = batching.classes(draws, works)
    clips_per_batch = {b: c.clips for c in classes for b in c.buckets}
    rows = [COLUMNS]
    for i, b in enumerate(sizes):
        count, tokens = clips_per_batch[i], works[i].tokens
        share = f"{count * tokens / batching.token_budget:.0%}" if batching.token_budget else "-"
        rows.append(
            (
                "x".join(map(str, b)),
                str(draws[i]),
                *clips[b].origin(),
                "x".join(map(str, latent(b)[1:])),
                str(tokens),
                str(count),
                str(count * tokens),
                f"{3 * count * works[i].flops / 1e12:.3g}",
                share,
            )
        )
    per_step = batching.micro_batches
    epoch = sum(draws[i] / clips_per_batch[i] for i in range(len(sizes)))
    lines = table(rows)
    lines.append(
        f"  epoch: {sum(draws)} samples, about {epoch / per_step:.1f} steps of {per_step} micro-batches; what is "
        f"left over begins the next"
    )
    lines += _balance(draws, works, classes, batching, ranks, seed)
    latents = sum(int(np.prod(latent(b))) * 4 * clips[b].num_contents for b in sizes)
    lines.append(
        f"  cache: {_size(latents)} of latents, at most {_size(_num_different(captions) * text_bytes)} of captions"
    )
    return "\n".join(lines)


class _OfBucket:
    """What is counted of the clips of a bucket, in one pass. Of each eight bytes are kept."""

    def __init__(self):
        self.draws, self.share_kept = 0, 0.0
        self.sources: Counter[tuple[int, int]] = Counter()
        self.contents = array("q")

    def add(self, e: PlanEntry) -> None:
        self.draws += e.repeats
        self.sources[e.width, e.height] += 1
        self.share_kept += share_kept(e.width, e.height, e.bucket)
        self.contents.append(hash(e.content))

    @property
    def num_contents(self) -> int:
        """Copies of a file are encoded once."""
        return _num_different(self.contents)

    def origin(self) -> tuple[str, str]:
        """(the most frequent source size, the share of its pixels that the crop keeps)."""
        (width, height), _ = self.sources.most_common(1)[0]
        others = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return f"{height}x{width}{others}", f"{self.share_kept / len(self.contents):.0%}"


def _num_different(hashes: array) -> int:
    return len(np.unique(np.array(hashes, np.int64)))


def _balance(
    draws: Sequence[int], works: Sequence[Work], classes: Sequence[CostClass], batching: Batching, ranks: int, seed: int
) -> list[str]:
    """How long ranks wait for the slowest: with micro-batches of equal cost, and if each rank drew its own buckets."""
    sampler = GlobalSampler(
        draws,
        classes,
        batching.micro_batches // batching.groups_per_step,
        batching.groups_per_step,
        seed,
        shuffle=False,
    )
    shared, each = [], [0.0] * len(draws)
    for _ in range(STEPS_SEEN):
        step = next(sampler)
        costs = [len(m.positions) * works[m.bucket].flops for m in step]
        shared += [costs[i : i + ranks] for i in range(0, len(costs), ranks)]
        for m in step:
            each[m.bucket] += 1
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    clips_per_batch = {b: c.clips for c in classes for b in c.buckets}
    chosen = rng.choice(len(draws), size=(len(shared), ranks), p=np.array(each) / sum(each))
    alone = [[clips_per_batch[int(b)] * works[int(b)].flops for b in row] for row in chosen]
    lines = [f"  {ranks} data-parallel ranks, {STEPS_SEEN} steps:"]
    for name, costs in (("assigned by equal cost", shared), ("if each rank drew its own", alone)):
        spread = sum(max(c) / min(c) - 1 for c in costs) / len(costs)
        idle = 1 - sum(sum(c) for c in costs) / sum(ranks * max(c) for c in costs)
        lines.append(f"    {name}: cost differs by {spread:.1%} on average, ranks idle {idle:.1%} of the time")
    return lines


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def export(plan: Plan, count: int, folder: Path) -> list[Path]:
    """Write `count` training clips as mp4, as the encoder receives them, from all buckets in turn.

    Raises UnusableClip.
    """
    by_bucket: dict[Bucket, list[PlanEntry]] = {}
    for e in plan.entries if count else ():
        if e.kept and len(some := by_bucket.setdefault(e.bucket, [])) < count:
            some.append(e)
    turns = [e for i in range(count) for b in sorted(by_bucket) for e in by_bucket[b][i : i + 1]][:count]
    written = []
    for number, e in enumerate(turns):
        name = re.sub(r"[^A-Za-z0-9]+", "_", Path(e.path.partition("@")[0]).stem).strip("_")[-40:]
        path = folder / f"{number:03d}_{'x'.join(map(str, e.bucket))}_{name}_{e.start}.mp4"
        write_mp4(path, read_frames(e).permute(1, 2, 3, 0).numpy(), e.fps)
        written.append(path)
    return written


class _Decoded:
    """A data set for `map_in_workers`: the reason why an entry does not decode, or ""."""

    def __init__(self, entries: Sequence[PlanEntry]):
        self.entries = entries

    def __getitem__(self, index: int) -> str:
        try:
            read_frames(self.entries[index])
        except UnusableClip as e:
            return str(e)
        return ""

    def limits(self, index: int) -> DecodeLimits:
        return self.entries[index].limits

    def name(self, index: int) -> str:
        return self.entries[index].path

    def failed(self, index: int, reason: str) -> str:
        return reason


def decode_all(plan: Plan, num_workers: int) -> Plan:
    """The plan without the clips that decoding every frame finds to be damaged, as encoding would find them."""
    kept = array("q", (row for row, e in enumerate(plan.entries) if e.kept))
    reasons = map_in_workers(_Decoded(plan.entries), kept, min(num_workers, len(kept)))
    return plan.drop({plan.entries[row].path: reason for row, reason in zip(kept, reasons, strict=True) if reason})
