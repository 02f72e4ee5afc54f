"""The candidates of a search: every layout that the trainer runs, without its checkpointing and its split into stages.

The order of the mesh is ParallelDims': tensor parallel on neighbours, then Ulysses, ring and data parallel, pipeline
stages outermost. Tensor parallel stays inside a node, where its links are. Experts are divided over ranks that share
a stage's weights, neighbours first.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from titan_video.config.job_config import JobConfig
from titan_video.config.values import nearest_word
from titan_video.data.batching import gradient_accumulation, num_data_ranks
from titan_video.distributed import fsdp
from titan_video.planner.candidate import Candidate

DEGREES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")  # they multiply to the ranks
SCHEDULES = ("1F1B", "Interleaved1F1B")
FIXABLE = (*DEGREES, "ep", "cp", "local_batch_size", "tokens_per_microbatch", "reshard", "schedule", "encoder_ranks")
MAX_ENCODER_SHARE = 4  # at most a quarter of the ranks encode


@dataclass(frozen=True)
class StepClips:
    """What a step trains on, whatever the layout.

    clips: of a step, without a token budget. budget_tokens: of all micro-batches of a step, with one; 0: none.
    groups: data.groups_per_step, which divides the micro-batches of a rank.
    """

    clips: int
    budget_tokens: int = 0
    groups: int = 1

    @classmethod
    def of(cls, config: JobConfig, world_size: int) -> "StepClips":
        """Of a configuration whose own layout counts where it leaves the size of a step open (-1).

        ConfigError: its batch size does not fit its own layout on so many ranks.
        """
        t, d = config.training, config.data
        dp = num_data_ranks(config, world_size)
        if d.tokens_per_microbatch:
            total = d.global_micro_batches
            total = dp * gradient_accumulation(config, dp) if total == -1 else total
            return cls(0, d.tokens_per_microbatch * total, d.groups_per_step)
        clips = t.global_batch_size
        return cls(t.local_batch_size * dp if clips == -1 else clips, groups=d.groups_per_step)


@dataclass(frozen=True)
class Space:
    """Where to look. heads, hidden, layers: the model's numbers of heads, feed-forward width, and blocks.

    longest: tokens of the longest clip. experts: of a block, which expert parallel may divide; 1: it may not.
    placement: where the job encodes; if during training, both ways to do so are tried. encoder_ranks: numbers of ranks
    that encode; 0: those that train. fixed: values that every candidate has, by a name of FIXABLE. refusals: why the
    trainer does not run a candidate with the options that the job keeps, a line each; None: it runs all of them.
    """

    world_size: int
    gpus_per_node: int
    heads: int
    hidden: int
    layers: int
    step: StepClips
    longest: int
    experts: int = 1
    placement: str = "cached"
    encoder_ranks: tuple[int, ...] = (0,)
    schedules: tuple[str, ...] = SCHEDULES
    optimizer: str = "AdamW"
    enable_cpu_offload: bool = False
    fixed: Mapping[str, Any] | None = None
    refusals: Callable[[Candidate], Iterator[str]] | None = None

    def __iter__(self) -> Iterator[Candidate]:
        refusals = self.refusals or (lambda _: iter(()))
        return (c for c in self.every() if next(refusals(c), None) is None)

    def every(self) -> Iterator[Candidate]:
        """Those that `refusals` excludes, too."""
        for extra in filter(lambda n: self._allows("encoder_ranks", n), self.encoder_ranks):
            for degrees in self._degrees(self.world_size - extra):
                yield from self._sized(degrees, extra)

    def _allows(self, name: str, value: Any) -> bool:
        return not self.fixed or name not in self.fixed or self.fixed[name] == value

    def _degrees(self, ranks: int) -> Iterator[dict[str, int]]:
        for pp in divisors(ranks):
            if pp > self.layers or not self._allows("pp", pp):
                continue
            for tp in divisors(ranks // pp):
                in_model = self.heads % tp == 0 and self.hidden % tp == 0
                if not in_model or self.gpus_per_node % tp or not self._allows("tp", tp):
                    continue
                for ulysses in divisors(ranks // pp // tp):
                    if self.heads // tp % ulysses or not self._allows("ulysses", ulysses):
                        continue
                    yield from self._data_degrees(ranks // pp // tp // ulysses, pp, tp, ulysses)

    def _data_degrees(self, rest: int, pp: int, tp: int, ulysses: int) -> Iterator[dict[str, int]]:
        for ring in divisors(rest):
            # A rank without a token of the longest clip would only wait.
            if ring * ulysses * tp > self.longest or not self._allows("ring", ring):
                continue
            if not self._allows("cp", ring * ulysses):
                continue
            for dp_shard in divisors(rest // ring):
                dp_replicate = rest // ring // dp_shard
                if not self._allows("dp_shard", dp_shard) or not self._allows("dp_replicate", dp_replicate):
                    continue
                for ep in divisors(math.gcd(self.experts, dp_shard * ring * ulysses * tp)):
                    if self._allows("ep", ep):
                        yield {
                            "pp": pp,
                            "dp_replicate": dp_replicate,
                            "dp_shard": dp_shard,
                            "ring": ring,
                            "ulysses": ulysses,
                            "tp": tp,
                            "ep": ep,
                        }

    def _sized(self, degrees: dict[str, int], encoder_ranks: int) -> Iterator[Candidate]:
        """With each micro-batch, schedule and resharding."""
        dp, pp = degrees["dp_replicate"] * degrees["dp_shard"], degrees["pp"]
        for local, budget, microbatches in self._batches(dp):
            for schedule in self.schedules if pp > 1 else ("1F1B",):
                stages = pp * (2 if schedule.startswith("Interleaved") and pp > 1 else 1)
                if stages > self.layers or not _is_legal(schedule, pp, microbatches):
                    continue
                if not self._allows("schedule", schedule):
                    continue
                sharded = degrees["dp_shard"] * degrees["ring"] * degrees["ulysses"] > 1
                for reshard in (True, False) if sharded else (False,):
                    if self._allows("reshard", reshard):
                        yield Candidate(
                            **degrees,
                            local_batch_size=local,
                            microbatches=microbatches,
                            tokens_per_microbatch=budget,
                            reshard=reshard,
                            schedule=schedule,
                            optimizer=self.optimizer,
                            enable_cpu_offload=self.enable_cpu_offload,
                            placement=self._placement(encoder_ranks),
                            encoder_ranks=encoder_ranks,
                        )

    def _placement(self, encoder_ranks: int) -> str:
        """Clips are encoded before training, or during it: on ranks of their own, or on those that train."""
        if self.placement == "cached":
            return "cached"
        return "separate" if encoder_ranks else "colocated"

    def _batches(self, dp: int) -> Iterator[tuple[int, int, int]]:
        """(clips of a micro-batch, token budget, micro-batches of a rank)."""
        step = self.step
        if step.budget_tokens:
            most = step.budget_tokens // (self.longest * dp)
            for clips in range(1, most + 1):
                budget = clips * self.longest
                if step.budget_tokens % budget == 0:
                    total = step.budget_tokens // budget
                    if (
                        total % dp == 0
                        and total // dp % step.groups == 0
                        and self._allows("tokens_per_microbatch", budget)
                    ):
                        yield clips, budget, total // dp
            return
        if step.clips % dp:
            return
        for local in divisors(step.clips // dp):
            microbatches = step.clips // dp // local
            if microbatches % step.groups == 0 and self._allows("local_batch_size", local):
                yield local, 0, microbatches


@cache
def divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _is_legal(schedule: str, pp: int, microbatches: int) -> bool:
    """As the trainer's `check_microbatches`."""
    if pp == 1:
        return True
    if schedule == "1F1B":
        return microbatches >= pp
    return microbatches % max(1, microbatches // pp) == 0


def refusals(config: JobConfig, c: Candidate) -> Iterator[str]:
    """Why a run's options that no plan changes exclude the layout: rules of the trainer about both."""
    p, t = config.parallelism, config.training
    if c.num_training_ranks <= c.pp:
        alone = "but a stage of one rank exchanges neither weights nor gradients"
        if p.enable_fsdp_symm_mem:
            yield f"parallelism.enable_fsdp_symm_mem: true, {alone}"
        if t.mixed_precision_reduce == "bfloat16":
            yield f"training.mixed_precision_reduce: bfloat16, {alone}"
    if config.model.attention == "flex" and c.ring > 1:
        yield "model.attention: flex, which no ring runs"
    if config.data.groups_per_step > 1 and c.pp > 1:
        yield "data.groups_per_step: micro-batches of several sizes do not pass one pipeline (pp)"
    if config.compile.enable and c.ep > 1:
        yield "compile.enable: true, but the rows of divided experts (ep) are known at run time only"
    if config.optimizer.in_backward and (c.microbatches > 1 or c.pp > 1):
        yield "optimizer.in_backward: true, but gradients of several micro-batches are summed before an update"
    if config.optimizer.in_backward and (c.dp_replicate > 1 or c.enable_cpu_offload):
        yield "optimizer.in_backward: true, which goes neither with dp_replicate nor with state on the host"
    if c.enable_cpu_offload and c.dp_replicate > 1 and not fsdp.CAN_OFFLOAD_REPLICAS:
        yield "training.enable_cpu_offload: true, which goes with dp_replicate from torch 2.13 on"


def violations(space: Space, degrees: Mapping[str, int]) -> Iterator[str]:
    """Why no candidate has these degrees; those of DEGREES that are not given are free. One line per broken rule."""
    pp, tp, ulysses = (degrees.get(name, 1) for name in ("pp", "tp", "ulysses"))
    product = 1
    for name in (*DEGREES, "cp"):
        product *= degrees.get(name, 1) if name != "cp" or not {"ring", "ulysses"} & set(degrees) else 1
    worlds = [space.world_size - extra for extra in space.encoder_ranks]
    if not any(ranks % product == 0 for ranks in worlds):
        yield f"the degrees multiply to {product}, which does not divide the {worlds[0]} ranks"
    if space.heads % tp or space.hidden % tp:
        yield f"tp = {tp} does not divide the model's {space.heads} heads and feed-forward width {space.hidden}"
    elif space.heads // tp % ulysses:
        yield f"ulysses = {ulysses} does not divide the {space.heads // tp} heads of a tensor-parallel rank"
    if (ep := degrees.get("ep", 1)) > 1 and space.experts % ep:
        num = space.experts
        yield f"ep = {ep} does not divide the model's {num} experts" if num > 1 else "ep: the model has no experts"
    elif ranks := _ranks_of_experts(space, degrees):
        yield f"ep = {ep} does not divide the {ranks} ranks of a model's copy (dp_shard x cp x tp)"
    if space.gpus_per_node % tp:
        yield f"tp = {tp} crosses nodes of {space.gpus_per_node} GPUs: its collectives need a node's links"
    if pp > space.layers:
        yield f"pp = {pp} has more stages than the model's {space.layers} blocks"
    dp = degrees.get("dp_replicate", 1) * degrees.get("dp_shard", 1)
    step = space.step
    if step.clips and step.clips % dp:
        yield f"dp = {dp} does not divide the {step.clips} clips of a step"
    most = max((m for d in divisors(max(worlds)) if d % dp == 0 for _, _, m in space._batches(d)), default=0)
    if most < pp:
        yield f"pp = {pp} needs as many micro-batches, but a data-parallel rank has {most} at most"


def _ranks_of_experts(space: Space, degrees: Mapping[str, int]) -> int:
    """dp_shard x cp x tp, if `ep` divides it for no number of ranks that train; else 0."""
    outer, ep = degrees.get("pp", 1) * degrees.get("dp_replicate", 1), degrees.get("ep", 1)
    worlds = [space.world_size - extra for extra in space.encoder_ranks]
    return 0 if any(ranks // outer % ep == 0 for ranks in worlds) else worlds[0] // outer


def parse_fixed(text: str, option: str) -> dict[str, Any]:
    """{name of FIXABLE: value} of "tp=8,pp=2". ValueError: an unknown name or a value that it cannot have.

    option: of the command line that has the text, for messages.
    """
    fixed: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if name not in FIXABLE or not equals:
            raise ValueError(
                f"{option}: {part!r}: not NAME=VALUE with a known name; legal: {', '.join(FIXABLE)}; nearest: "
                f"{nearest_word(name, FIXABLE)}"
            )
        if name == "schedule":
            legal, known = value in SCHEDULES, ", ".join(SCHEDULES)
            fixed[name] = value
        elif name == "reshard":
            legal, known = value in ("true", "false"), "true or false"
            fixed[name] = value == "true"
        else:
            least = 0 if name == "encoder_ranks" else 1
            legal, known = value.isdecimal() and int(value) >= least, f"a whole number, at least {least}"
            fixed[name] = int(value) if legal else value
        if not legal:
            raise ValueError(f"{option}: {name}={value}: legal: {known}")
    return fixed
