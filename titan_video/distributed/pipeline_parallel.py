"""Pipeline parallel: the blocks dealt out in depth, a step's micro-batches sent through them by
torch.distributed.pipelining.

    rank 0   embed, blocks 0-9      blocks 20-29          two stages on each rank (interleaved schedules), or one
    rank 1          blocks 10-19    blocks 30-39, head

A rank keeps ONE module, the model without what its stages do not run, so names are the full model's and optimizer,
clipping, averages and checkpoints see nothing new. A stage is a call of that module (FSDP's hooks are there) whose
`embed` gives what arrived, whose block arrived, whose block containers hold the stage's own, and whose `head` passes
the state on:

    forward(...) = head(*trunk(*embed(...), ...))      embed -> state, trunk: state -> state, head: state -> velocity

A state is a tuple of floating-point tensors, which `trunk` returns in the shapes and types in which it took them.
Everything else that a stage needs (positions, masks, conditions) it reads from the step's inputs, which every rank of
the axis has.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.utils._pytree import tree_flatten, tree_map

from titan_video.config.job_config import JobConfig, Parallelism
from titan_video.config.values import divisors
from titan_video.distributed.parallel_dims import stages_per_rank
from titan_video.distributed.utils import reduce_over
from titan_video.models.spec import ParallelPlan

_SCHEDULES = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
}


def split_blocks(num_blocks: int, num_stages: int, first_cost: float = 0.0, last_cost: float = 0.0) -> list[range]:
    """Blocks of each stage, in order: at least one each, and the costliest stage as cheap as can be.

    first_cost, last_cost: what the first and the last stage do beside blocks, in units of a block. Of equal splits, the
        one that gives
    more to later stages: earlier ones keep the activations of more micro-batches.
    """
    assert 1 <= num_stages <= num_blocks
    costs, counts = [1.0] * num_stages, [1] * num_stages
    costs[0] += first_cost
    costs[-1] += last_cost
    for _ in range(num_blocks - num_stages):
        cheapest = min(range(num_stages), key=lambda s: (costs[s], -s))
        costs[cheapest] += 1
        counts[cheapest] += 1
    starts = [sum(counts[:s]) for s in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts)]


def check_microbatches(section: Parallelism, num_microbatches: int) -> None:
    """ValueError unless the schedule can run a step of so many micro-batches; it names the nearest numbers that it can."""
    if _legal(section, num_microbatches):
        return
    below = next((n for n in range(num_microbatches, 0, -1) if _legal(section, n)), None)
    above = next(
        n
        for n in range(num_microbatches, num_microbatches + 2 * section.pipeline_parallel_degree)
        if _legal(section, n)
    )
    nearest = f"{above}" if below is None else f"{below} or {above}"
    ranks, schedule = section.pipeline_parallel_degree, section.pipeline_parallel_schedule
    rule = (
        f"{ranks} or more"
        if schedule == "1F1B"
        else f"a multiple of {ranks} always, other numbers where they make equal rounds"
    )
    raise ValueError(
        f"training.global_batch_size: each data-parallel rank has {num_microbatches} micro-batches of "
        f"parallelism.pipeline_parallel_microbatch_size "
        f"{section.pipeline_parallel_microbatch_size} in a step, which pipeline_parallel_schedule {schedule} on "
        f"{ranks} ranks cannot run; "
        f"legal: {rule}; nearest: {nearest}. Change one of the two sizes"
    )


def _legal(section: Parallelism, num_microbatches: int) -> bool:
    ranks = section.pipeline_parallel_degree
    if section.pipeline_parallel_schedule == "GPipe":
        return True
    if section.pipeline_parallel_schedule == "1F1B":
        return num_microbatches >= ranks
    return num_microbatches % max(1, num_microbatches // ranks) == 0


def state_bytes(state: Sequence[Tensor]) -> int:
    """Bytes that one micro-batch sends over each boundary between stages on different ranks; its gradients send the
    same back.
    """
    return sum(t.numel() * t.element_size() for t in state)


@dataclass(frozen=True)
class Stages:
    """What `keep_stages` has left on this rank.

    blocks: for each of this rank's stages, by its global index, the (container, key) of its blocks. ends: the model
    without blocks, on the meta device, from which every rank can tell what is sent.
    """

    num_stages: int
    blocks: dict[int, list[tuple[str, str]]]
    ends: nn.Module


def keep_stages(
    model: nn.Module, plan: ParallelPlan, pp_mesh: DeviceMesh, section: Parallelism, args: Any, num_tokens: int
) -> Stages:
    """Remove from a model on the meta device, before `parallelize`, what this rank's stages do not run. In place.

    The split is balanced by FLOPs for clips of num_tokens tokens; args: the model's arguments (see ModelSpec).
    """
    ranks, rank = pp_mesh.size(), pp_mesh.get_local_rank()
    num_stages = ranks * stages_per_rank(section)
    containers = {path: model.get_submodule(path) for path in plan.blocks}
    assert not plan.tables or len(containers) == 1, "the keys of tables would be ambiguous"
    rest = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    rest -= {name.split(".")[0] for name in (*plan.blocks, *plan.tables, *plan.first, *plan.last)}
    assert not rest, f"the plan does not say which stage has {sorted(rest)}"

    ends = copy.deepcopy(model)
    for path in plan.blocks:
        ends.get_submodule(path).clear()
    names = [(path, key) for path in plan.blocks for key in containers[path]]
    per_block = args.block_flops(num_tokens) / len(names)
    end = (args.flops(num_tokens) - args.block_flops(num_tokens)) / per_block / 2
    blocks = {
        s: [names[i] for i in r]
        for s, r in enumerate(split_blocks(len(names), num_stages, end, end))
        if s % ranks == rank
    }

    kept = {name for stage in blocks.values() for name in stage}
    for path, key in names:
        if (path, key) not in kept:
            del containers[path][key]
            for table in plan.tables:
                del model.get_submodule(table)[key]
    for stage, modules in ((0, plan.first), (num_stages - 1, plan.last)):
        if stage not in blocks:
            for name in modules:
                setattr(model, name, None)
    return Stages(num_stages, blocks, ends)


class Pipeline:
    """This rank's part of the pipeline, after `parallelize`.

    `step` runs an optimizer step's micro-batches forward and backward. Called like the model, it runs one forward
    without gradients and gives the velocity on every rank of the axis. All ranks of the axis call either together, with
    the same inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Stages,
        plan: ParallelPlan,
        pp_mesh: DeviceMesh,
        section: Parallelism,
        param_dtype: torch.dtype,
        device: torch.device,
    ):
        """param_dtype: in which the model computes (training.mixed_precision_param).

        ValueError for compiled blocks under zero bubble.
        """
        if section.pipeline_parallel_schedule == "InterleavedZeroBubble" and any(
            m._compiled_call_impl is not None for m in model.modules()
        ):
            raise ValueError(
                "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble computes the gradients of inputs "
                "and of weights apart, and a "
                "compiled block gives them together; set compile.enable to false, or choose Interleaved1F1B"
            )
        self.model, self.mesh, self.section, self.device = model, pp_mesh, section, device
        self.num_stages, self.rank, self.size, self.group = (
            stages.num_stages,
            pp_mesh.get_local_rank(),
            pp_mesh.size(),
            pp_mesh.get_group(),
        )
        self.upcast = torch.promote_types(param_dtype, torch.float32)
        self.blocks = {
            stage: {
                path: nn.ModuleDict({key: model.get_submodule(path)[key] for p, key in names if p == path})
                for path in plan.blocks
            }
            for stage, names in stages.blocks.items()
        }
        self.ends = stages.ends.to(param_dtype)
        for name in plan.fp32:
            part = getattr(self.ends, name)
            setattr(
                self.ends,
                name,
                nn.Parameter(part.to(self.upcast)) if isinstance(part, nn.Parameter) else part.to(self.upcast),
            )

        self._shapes: dict[Any, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._built: tuple[Any, list[PipelineStage], Any] = (None, [], None)
        self._state: tuple[Tensor, ...] = ()  # the state's shapes now, on the meta device
        self._inputs, self._loss_fn, self._loss = [], None, None
        self._whole_forward = model.forward
        model.forward = self._run_stage
        self._end_prefetch_with_stage(plan)

    def step(self, inputs: Sequence[Any], loss_fn: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Forward and backward of a step's micro-batches, which have one shape. Gradients are summed into the
        parameters.

        inputs: objects with the model's arguments (components/objective.ModelInputs). loss_fn(v_BLP, i): a scalar, the
        loss of micro-batch i divided by the global count; called where the last stage is. Returns the sum of the
        losses, detached, on every rank.
        """
        check_microbatches(self.section, len(inputs))
        shapes = [self._infer_shapes(*_arguments(i)) for i in inputs]
        assert all(s is shapes[0] for s in shapes), "the micro-batches of a step have one shape"
        schedule = self._schedule(shapes[0], len(inputs))
        self._inputs, self._loss_fn = inputs, loss_fn
        self._loss = torch.zeros((), dtype=self.upcast, device=self.device)
        # torch chunks what it is given: numbers of micro-batches, by which a stage finds its inputs and the last one
        # its loss.
        indices = torch.arange(len(inputs))
        schedule.step(i=indices, target=indices, return_outputs=False)
        self._inputs, self._loss_fn = [], None
        return reduce_over(self.mesh, self._loss, "sum")

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The velocity, on every rank of the axis; arguments as the model's. No gradient."""
        metas, velocity = self._infer_shapes(args, kwargs)
        out: Any = ()
        for stage in range(self.num_stages):
            if stage % self.size != self.rank:
                continue
            state = (
                tuple(torch.empty_like(m, device=self.device, requires_grad=False) for m in metas) if stage > 0 else ()
            )
            for t in state:
                dist.recv(t, self._global_rank(stage - 1), self.group)
            out = self.model(*args, **kwargs, stage=stage, state=state)
            for t in out if stage < self.num_stages - 1 else ():
                dist.send(t, self._global_rank(stage + 1), self.group)
        if self.num_stages - 1 not in self.blocks:
            out = torch.empty_like(velocity, device=self.device, requires_grad=False)
        dist.broadcast(out, self._global_rank(self.num_stages - 1), self.group)
        return out

    def state(self, inputs: Any) -> tuple[Tensor, ...]:
        """What a stage sends to the next for a micro-batch, on the meta device: see `state_bytes`."""
        return self._infer_shapes(*_arguments(inputs))[0]

    def _global_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.group, stage % self.size)

    # ---- one stage ----

    def _run_stage(self, *args: Any, stage: int, state: tuple[Tensor, ...], **kwargs: Any) -> Any:
        """The model's forward: the part of it that is `stage`, which received `state`."""
        is_last = stage == self.num_stages - 1
        with self._only(stage):
            if stage > 0:
                self.model.embed = lambda *args, **kwargs: state
            if not is_last:
                self.model.head = lambda *args, **kwargs: args[: len(self._state)]  # conditions may follow the state
            out = self._whole_forward(*args, **kwargs)
        if is_last:
            return _packed(out)
        # What a stage only passes on is cloned: torch detaches, in place, what it has sent, and would cut off what was
        # received.
        out = tuple(t.clone() if any(t is s for s in state) else _packed(t) for t in out)
        sent, expected = ([(t.shape, t.dtype) for t in tensors] for tensors in (out, self._state))
        assert sent == expected, (
            f"the model's trunk must keep the shapes and types of its state: {sent} instead of {expected}"
        )
        return out

    @contextmanager
    def _only(self, stage: int) -> Iterator[None]:
        """Within, the containers hold the blocks of one stage; after it, the model is as it was."""
        whole = {path: self.model.get_submodule(path) for path in self.blocks[stage]}
        try:
            for path, own in self.blocks[stage].items():
                self.model.set_submodule(path, own)
            yield
        finally:
            for path, container in whole.items():
                self.model.set_submodule(path, container)
            for name in ("embed", "head"):
                self.model.__dict__.pop(name, None)

    def fsdp_modules(self, stage: int) -> list[FSDPModule]:
        """The units that `stage` computes with, the root first."""
        with self._only(stage):
            return [m for m in self.model.modules() if isinstance(m, FSDPModule)]

    def _end_prefetch_with_stage(self, plan: ParallelPlan) -> None:
        """Blocks of different stages do not follow each other, so one does not fetch the other's weights."""
        local = [
            [b for container in self.blocks[stage].values() for b in container.values()]
            for stage in sorted(self.blocks)
        ]
        for this, following in zip(local, local[1:]):
            if isinstance(this[-1], FSDPModule):
                this[-1].set_modules_to_forward_prefetch([])
                following[0].set_modules_to_backward_prefetch([])

    # ---- shapes and schedules ----

    def _infer_shapes(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensor]:
        """State and velocity for these arguments of the model, on the meta device:

        every rank knows them without asking.
        """
        leaves, _ = tree_flatten((args, kwargs))
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key not in self._shapes:
            with torch.no_grad():
                seen = []
                embed = type(self.ends).embed
                self.ends.embed = lambda *a, **k: seen.extend(embed(self.ends, *a, **k)) or tuple(seen)
                self.ends.trunk = lambda *a, **k: tuple(seen)
                args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
                velocity = self.ends(*args, **kwargs)
            self._shapes[key] = (
                tuple(torch.empty_like(t, memory_format=torch.contiguous_format, requires_grad=True) for t in seen),
                torch.empty_like(velocity, memory_format=torch.contiguous_format, requires_grad=True),
            )
        self._state = self._shapes[key][0]
        return self._shapes[key]

    def _schedule(self, shapes: tuple[tuple[Tensor, ...], Tensor], num_microbatches: int) -> Any:
        """torch's schedule, made anew when shapes change:

        its stages hold receive buffers for all micro-batches of one shape.
        """
        key, stages, schedule = self._built
        if key == (id(shapes), num_microbatches):
            return schedule
        for stage in stages:
            stage.args_recv_info.clear()
            stage.grad_recv_info.clear()
        state, velocity = shapes
        last = self.num_stages - 1
        stages = [
            _ReducingStage(
                _Stage(self, s),
                s,
                self.num_stages,
                self.device,
                input_args=state if s > 0 else (),
                output_args=state if s < last else (velocity,),
                group=self.group,
            )
            for s in sorted(self.blocks)
        ]
        single = self.section.pipeline_parallel_schedule in ("GPipe", "1F1B")
        build = _SCHEDULES[self.section.pipeline_parallel_schedule]
        schedule = build(stages[0] if single else stages, num_microbatches, loss_fn=self._add_loss, scale_grads=False)
        self._built = ((id(shapes), num_microbatches), stages, schedule)
        return schedule

    def _add_loss(self, v_BLP: Tensor, i: Tensor) -> Tensor:
        loss = self._loss_fn(v_BLP, i.item())
        self._loss += loss.detach()
        return loss


class _Stage(nn.Module):
    """What torch takes for a stage's module. The model is no submodule of it: of an FSDP module torch would put off the
    gradients' reduction to the end of the step, with a whole float32 gradient on each rank until then."""

    def __init__(self, pipeline: Pipeline, stage: int):
        super().__init__()
        self.pipeline, self.stage = pipeline, stage

    def forward(self, *state: Tensor, i: Tensor) -> Any:
        args, kwargs = _arguments(self.pipeline._inputs[i.item()])
        return self.pipeline.model(*args, **kwargs, stage=self.stage, state=state)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """For zero bubble, the weights that autograd knows, which with FSDP are the gathered ones."""
        modules = self.pipeline.fsdp_modules(self.stage)
        groups = [group for m in modules if (group := m._get_fsdp_state()._fsdp_param_group) is not None]
        return (
            iter([p.unsharded_param for group in groups for p in group.fsdp_params])
            if modules
            else self.pipeline.model.parameters()
        )


class _ReducingStage(PipelineStage):
    """A stage whose backward zero bubble may run in two parts. FSDP reduces the weights' gradients in hooks of the
    first, to the inputs, when they are not there yet; here it does so after the second."""

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        # The first part gives gradients as autograd has them, views among them; what is sent must be contiguous.
        self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in self.bwd_cache[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        # The first stage has no inputs to give gradients to: its whole backward runs here, with the hooks.
        modules = [] if self.is_first else self.submod.pipeline.fsdp_modules(self.stage_index)
        for module in modules:
            module.unshard()  # for what is recomputed
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if modules:
            # reduces, then frees what was gathered
            self.submod.pipeline.model._get_fsdp_state()._root_post_backward_final_callback()


def _packed(x: Tensor) -> Tensor:
    """x with the strides of a new tensor, which torch 2.11 insists on for dimensions of one element too."""
    return (
        x
        if x.stride() == torch.empty(x.shape, device="meta").stride()
        else x.clone(memory_format=torch.contiguous_format)
    )


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """The model's arguments."""
    i = inputs
    return (i.x_BLP, i.pos_BL3, i.t_B, i.text_BSD, i.text_mask_BS, i.seq_len), i.cond


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about pipelines, one line per mistake."""
    p, local = config.parallelism, config.training.local_batch_size
    if p.pipeline_parallel_degree == 1:
        return
    if p.pipeline_parallel_schedule == "InterleavedZeroBubble" and config.compile.enable:
        yield (
            "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble, but the backward of a compiled block "
            "cannot be split; leave compile.enable false, or choose another schedule, such as Interleaved1F1B"
        )
    if not config.data.tokens_per_microbatch and local % p.pipeline_parallel_microbatch_size:
        yield (
            f"parallelism.pipeline_parallel_microbatch_size: given {p.pipeline_parallel_microbatch_size}; it must "
            f"divide training.local_batch_size {local}; legal: {divisors(local)}"
        )
