"""From a job and a cluster to the plan: what may be asked of it, in which order, and what helps where nothing fits."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.distributed.parallel_dims import check_layout
from titan_video.models import get_args, get_spec
from titan_video.planner.candidate import Candidate
from titan_video.planner.cluster import Cluster
from titan_video.planner.cost.model import CostModel
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.plan_file import to_candidate
from titan_video.planner.search.explain import name_of
from titan_video.planner.search.fastest import MAX_SOLVED, Plan, Result, binding, search
from titan_video.planner.search.space import MAX_ENCODER_SHARE, SCHEDULES, Space, StepClips, divisors, refusals

ALLOWED = ("offload", "8bit", "host-state")  # what a plan may use beside layouts: asked for, or needed to fit
MORE_GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Job:
    """What is planned. shares: of micro-batches, by bucket; None: equal. allow: of ALLOWED. fixed: see `Space`."""

    config: JobConfig
    cluster: Cluster
    shares: dict[tuple[int, ...], float] | None = None
    allow: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] | None = None
    build: Callable[..., Any] = CostModel  # (config, cluster, shares) -> the cost model

    @property
    def args(self) -> Any:
        """The model's arguments."""
        m = self.config.model
        return get_args(get_spec(m.name), m.flavor, m.hf_assets_path, self.config.encoder.max_text_length)

    def space(self, model: Any) -> Space:
        """ConfigError: the job's batch size does not fit its own layout on the cluster."""
        c, gpus, args = self.config, self.cluster.gpus, self.args
        experts = getattr(args, "experts", None)
        schedules = SCHEDULES if c.parallelism.pipeline_parallel_degree > 1 or gpus > 1 else SCHEDULES[:1]
        return Space(
            world_size=gpus,
            gpus_per_node=self.cluster.gpus_per_node,
            heads=args.num_heads,
            hidden=math.gcd(args.ffn_dim, experts.shared_dim if experts else 0),
            layers=args.num_layers,
            step=StepClips.of(c, gpus),
            longest=max(work.tokens for work in model.workload),
            experts=experts.num_experts if experts else 1,
            placement=c.encoder.placement,
            encoder_ranks=(0,) if c.encoder.placement == "cached" else (0, *encoder_ranks(gpus)),
            schedules=schedules,
            optimizer="AdamW8bit" if "8bit" in self.allow and c.optimizer.name == "AdamW" else c.optimizer.name,
            enable_cpu_offload="host-state" in self.allow or c.training.enable_cpu_offload,
            fixed=self.fixed,
            refusals=partial(refusals, c),
        )


def encoder_ranks(gpus: int) -> tuple[int, ...]:
    """Numbers of ranks that may encode: up to a quarter; the others must be left with many divisors."""
    most = max(1, gpus // MAX_ENCODER_SHARE)
    few = sorted({n for n in range(1, most + 1) if len(divisors(gpus - n)) >= 4})
    return tuple(few) or (1,)


@dataclass(frozen=True)
class Planned:
    """job: as it was in the end, with what it needed to fit (`needed`, of ALLOWED)."""

    job: Job
    model: Any
    space: Space
    result: Result
    needed: tuple[str, ...] = ()


def make_plan(job: Job) -> Planned:
    """The plan; with offload, 8-bit moments and state on the host where they are needed, the least costly first.

    Where nothing fits, the result has no plan.
    """
    model = job.build(job.config, job.cluster, job.shares)
    first = make_own_plan(job, model)
    if first.result.plans:
        return first
    for extra in _extras(job):
        planned = make_own_plan(replace(job, allow=job.allow | set(extra)), model)
        if planned.result.plans:
            return replace(planned, needed=extra)
    return first


def make_own_plan(job: Job, model: Any, max_solved: int = MAX_SOLVED) -> Planned:
    """The plan with no more than what the job allows. max_solved: see `search`."""
    space = job.space(model)
    result = search(model, space, job.cluster.gpus_per_node, max_solved, "offload" in job.allow)
    return Planned(job, model, space, result)


def own_candidate(config: JobConfig, world_size: int, model: Any) -> Candidate:
    """The candidate that a configuration is. ValueError: see `to_candidate`."""
    longest, budget = max(work.tokens for work in model.workload), config.data.tokens_per_microbatch
    clips = max(1, budget // longest) if budget else 0
    return to_candidate(config, world_size, len(model.layers), clips)


def as_it_is(job: Job, model: Any) -> Plan | str:
    """The layout that the job's TOML has already, as a plan, or why it cannot run on the cluster."""
    gpus = job.cluster.gpus
    try:
        check(job.config, gpus, files=False)
        check_layout(job.config.parallelism, job.args, job.config.encoder.num_training_ranks(gpus))
        candidate = own_candidate(job.config, gpus, model)
        prediction = model.predict(candidate)
    except ValueError as e:
        return str(e)
    plan = Plan(candidate, prediction, binding(prediction))
    fullest = prediction.fullest
    if model.fits(candidate):
        return plan
    return (
        f"{name_of(candidate)} does not fit: it needs {fullest.needed:.1f} GiB of {job.cluster.gpu.memory_gib:.1f} "
        f"({plan.seconds:.3f} s a step if it did)"
    )


def _extras(job: Job) -> Iterator[tuple[str, ...]]:
    is_adamw = job.config.optimizer.name == "AdamW" and not job.config.optimizer.in_backward
    options = [name for name in ALLOWED if name not in job.allow and (name != "8bit" or is_adamw)]
    options = [name for name in options if name != "host-state" or not job.config.lora.enable]
    for i, name in enumerate(options):
        yield (name,)
        if i:
            yield tuple(options[: i + 1])


def smallest_change(planned: Planned) -> list[str]:
    """What would make a job fit that does not: the first change of each kind that helps, the smallest kinds first."""
    job = planned.job
    if not planned.result.rejected:
        return [f"no layout is legal on {job.cluster.name}: --explain NAME=VALUE says which rule a value breaks"]
    nearest = min(planned.result.rejected, key=lambda r: r.missing)
    lacks = f"lacks {nearest.missing / GIB:.2f} GiB on each GPU" if nearest.missing > 0 else "lacks little memory"
    lines = [f"no plan fits {job.cluster.name}: the nearest, {name_of(nearest.candidate)}, {lacks}"]
    tried: list[tuple[str, Callable[[], Job | None]]] = [
        ("fewer frames", lambda: _shorter(job)),
        ("more GPUs", lambda: _more_gpus(job)),
        ("more memory", lambda: _more_memory(job, nearest.missing)),
    ]
    for kind, change in tried:
        changed = change()
        if changed is None:
            continue
        lines.append(f"  {kind}: {_describe(job, changed)}")
    return lines


def _fits(job: Job) -> bool:
    try:
        model = job.build(job.config, job.cluster, job.shares)
        return bool(make_own_plan(job, model, max_solved=1).result.plans)
    except ValueError:
        return False


def _shorter(job: Job) -> Job | None:
    """With the longest clips cut to the most frames (4k + 1) with which the job fits, by bisection."""
    data = job.config.data

    def cut(k: int) -> Job:
        buckets = tuple(dict.fromkeys((min(b[0], 4 * k + 1), *b[1:]) for b in data.sizes))
        config = replace(job.config, data=replace(data, buckets=buckets, resolutions=()))
        return replace(job, shares=None, config=config)

    low, high = -1, (max(bucket[0] for bucket in data.sizes) - 1) // 4  # low fits, or is -1; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(cut(middle)) else (low, middle)
    return None if low < 0 else cut(low)


def _more_gpus(job: Job) -> Job | None:
    for factor in MORE_GPUS:
        c = job.cluster
        per_node = c.gpus_per_node * factor if c.gpus == c.gpus_per_node < 8 else c.gpus_per_node
        trial = replace(job, cluster=replace(c, gpus=c.gpus * factor, gpus_per_node=per_node))
        if _fits(trial):
            return trial
    return None


def _more_memory(job: Job, missing: float) -> Job | None:
    """On a GPU with the least memory that fits, to a GiB above what is missing; where that is not known, 2 %."""
    gib = job.cluster.gpu.memory_gib
    missing = max(missing, 0.02 * gib * GIB)
    for more in (1.08, 1.3, 1.7, 2.5):
        size = round(gib + missing / GIB * more + 0.5)
        trial = replace(job, cluster=replace(job.cluster, gpu=replace(job.cluster.gpu, memory_gib=float(size))))
        if _fits(trial):
            return trial
    return None


def _describe(job: Job, changed: Job) -> str:
    if changed.cluster.gpus != job.cluster.gpus:
        return f"{changed.cluster.gpus} GPUs instead of {job.cluster.gpus}"
    if changed.cluster.gpu != job.cluster.gpu:
        return f"a GPU with {changed.cluster.gpu.memory_gib:.0f} GiB instead of {job.cluster.gpu.memory_gib:.1f}"
    old, new = (max(bucket[0] for bucket in j.config.data.sizes) for j in (job, changed))
    return f"clips of {new} frames instead of {old}"
