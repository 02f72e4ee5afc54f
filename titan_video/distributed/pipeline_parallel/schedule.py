"""Pipeline parallel: the blocks are partitioned across stages; a step's micro-batches pass them by
torch.distributed.pipelining.

    rank 0   embed, blocks 0-9      blocks 20-29          two stages per rank (interleaved schedules), or one
    rank 1          blocks 10-19    blocks 30-39, head

A rank keeps ONE module, the model without what its stages do not run, so names are the full model's and the optimizer,
clipping, EMA and checkpoints need no change. A stage is a call of that module (FSDP's hooks stay active) whose `embed`
returns what was received, whose block containers hold the stage's own blocks, and whose `head` passes the state on:

    forward(...) = head(*trunk(*embed(...), ...))      embed -> state, trunk: state -> state, head: state -> velocity

A state is a tuple of floating-point tensors; `trunk` returns them in the shapes and types in which it received them.
All else that a stage needs (positions, masks, conditioning, the micro-batch's StepLayout) comes from the step's inputs,
which every rank of the axis has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
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
from torch.utils._pytree import tree_flatten, tree_map_only

from titan_video.config.job_config import Parallelism
from titan_video.distributed.pipeline_parallel.stages import Stages, check_microbatches
from titan_video.distributed.utils import reduce_over
from titan_video.models.spec import ParallelPlan

_SCHEDULES = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """This rank's part of the pipeline, after `parallelize`.

    `step` runs an optimizer step's micro-batches forward and backward. A call, with the model's arguments, runs one
    forward without gradients and returns the velocity on every rank of the axis. All ranks of the axis call either
    together, with the same inputs.
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
        """param_dtype: compute type (training.mixed_precision_param). ValueError: compiled blocks under zero bubble."""
        is_compiled = any(m._compiled_call_impl is not None for m in model.modules())
        if section.pipeline_parallel_schedule == "InterleavedZeroBubble" and is_compiled:
            raise ValueError(
                "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble computes the gradients of inputs and of "
                "weights separately, and a compiled block computes them together; set compile.enable to "
                "false, or choose Interleaved1F1B"
            )
        self.model, self.mesh, self.section, self.device = model, pp_mesh, section, device
        self.num_stages, self.rank, self.size = stages.num_stages, pp_mesh.get_local_rank(), pp_mesh.size()
        self.group = pp_mesh.get_group()
        self.loss_dtype = torch.promote_types(param_dtype, torch.float32)
        self.blocks: dict[int, dict[str, nn.ModuleDict]] = {}
        for stage, names in stages.blocks.items():
            self.blocks[stage] = {path: nn.ModuleDict() for path in plan.blocks}
            for path, key in names:
                self.blocks[stage][path][key] = model.get_submodule(path)[key]
        self.ends = stages.ends.to(param_dtype)
        for name in plan.fp32:
            part = getattr(self.ends, name)
            cast = part.to(self.loss_dtype)
            setattr(self.ends, name, nn.Parameter(cast) if isinstance(part, nn.Parameter) else cast)

        self._shapes: dict[Any, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._built: tuple[Any, list[PipelineStage], Any] = (None, [], None)
        self._state: tuple[Tensor, ...] = ()  # shapes of the current state, on the meta device
        self._inputs: Sequence[Any] = []
        self._loss_fn: Callable[[Tensor, int], Tensor] | None = None
        self._loss: Tensor | None = None
        self._full_forward = model.forward
        model.forward = self._run_stage
        self._end_prefetch_with_stage()

    def step(self, inputs: Sequence[Any], loss_fn: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Forward and backward of a step's micro-batches, which have one shape per rank. Gradients are accumulated.

        inputs: of each micro-batch; `kwargs` holds the model's arguments (tasks/task.ModelInputs).
        loss_fn(v_BLP, i): the loss of micro-batch i divided by the global count, a scalar; called on the last stage.
        Returns the sum of the losses, detached, on every rank.
        """
        check_microbatches(self.section, len(inputs))
        shapes = [self._infer_shapes(i.kwargs) for i in inputs]
        assert len({_signature(s) for s in shapes}) == 1, "the micro-batches of a step have one shape"
        schedule = self._schedule(shapes[0], len(inputs))
        self._inputs, self._loss_fn = inputs, loss_fn
        self._loss = torch.zeros((), dtype=self.loss_dtype, device=self.device)
        # torch chunks its arguments: numbers of micro-batches, by which a stage finds its inputs and the last its loss.
        indices = torch.arange(len(inputs))
        schedule.step(i=indices, target=indices, return_outputs=False)
        self._inputs, self._loss_fn = [], None
        return reduce_over(self.mesh, self._loss, "sum")

    @torch.no_grad()
    def __call__(self, **kwargs: Any) -> Tensor:
        """The velocity, on every rank of the axis; arguments as the model's. No gradient."""
        state_shapes, velocity = self._infer_shapes(kwargs)
        out: Any = ()
        for stage in range(self.num_stages):
            if stage % self.size != self.rank:
                continue
            state = tuple(self._receive_buffer(t) for t in state_shapes) if stage > 0 else ()
            for t in state:
                dist.recv(t, self._global_rank(stage - 1), self.group)
            out = self.model(**kwargs, stage=stage, state=state)
            for t in out if stage < self.num_stages - 1 else ():
                dist.send(t, self._global_rank(stage + 1), self.group)
        if self.num_stages - 1 not in self.blocks:
            out = self._receive_buffer(velocity)
        dist.broadcast(out, self._global_rank(self.num_stages - 1), self.group)
        return out

    def state(self, inputs: Any) -> tuple[Tensor, ...]:
        """What a stage sends on for a micro-batch, on the meta device: see planner/dry_run/traffic.state_bytes."""
        return self._infer_shapes(inputs.kwargs)[0]

    def _receive_buffer(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=self.device, requires_grad=False)

    def _global_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.group, stage % self.size)

    # ---- one stage ----

    def _run_stage(self, *, stage: int, state: tuple[Tensor, ...], **kwargs: Any) -> Any:
        """The model's forward, limited to `stage`, which received `state`."""
        is_last = stage == self.num_stages - 1
        with self._only(stage):
            if stage > 0:
                self.model.embed = lambda *args, **kwargs: state
            if not is_last:
                self.model.head = lambda *args, **kwargs: args[: len(self._state)]
            out = self._full_forward(**kwargs)
        if is_last:
            return _packed(out)
        # What a stage only passes on is cloned: torch detaches, in place, what it has sent, and would cut the graph of
        # what was received.
        out = tuple(t.clone() if any(t is s for s in state) else _packed(t) for t in out)
        sent, expected = ([(t.shape, t.dtype) for t in tensors] for tensors in (out, self._state))
        assert sent == expected, (
            f"the model's trunk must keep the shapes and types of its state: {sent}, not {expected}"
        )
        return out

    @contextmanager
    def _only(self, stage: int) -> Iterator[None]:
        """Inside, the containers hold the blocks of one stage; afterwards the model is as it was."""
        full = {path: self.model.get_submodule(path) for path in self.blocks[stage]}
        try:
            for path, own in self.blocks[stage].items():
                self.model.set_submodule(path, own)
            yield
        finally:
            for path, container in full.items():
                self.model.set_submodule(path, container)
            for name in ("embed", "head"):
                self.model.__dict__.pop(name, None)

    def fsdp_modules(self, stage: int) -> list[FSDPModule]:
        """The FSDP units that `stage` computes with, the root first."""
        with self._only(stage):
            return [m for m in self.model.modules() if isinstance(m, FSDPModule)]

    def _end_prefetch_with_stage(self) -> None:
        """Blocks of different stages do not run one after the other, so one does not prefetch the other's weights."""
        by_stage = []
        for stage in sorted(self.blocks):
            by_stage.append([block for container in self.blocks[stage].values() for block in container.values()])
        for this, following in pairwise(by_stage):
            if isinstance(this[-1], FSDPModule):
                this[-1].set_modules_to_forward_prefetch([])
                following[0].set_modules_to_backward_prefetch([])

    # ---- shapes and schedules ----

    def _infer_shapes(self, kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensor]:
        """State and velocity for these arguments of the model, on the meta device: no rank needs to ask another."""
        leaves, _ = tree_flatten(kwargs)
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key not in self._shapes:
            state: list[Tensor] = []
            embed = type(self.ends).embed
            self.ends.embed = lambda *a, **k: state.extend(embed(self.ends, *a, **k)) or tuple(state)
            self.ends.trunk = lambda *a, **k: tuple(state)
            with torch.no_grad():
                velocity = self.ends(**tree_map_only(Tensor, lambda x: x.to("meta"), kwargs))
            self._shapes[key] = tuple(_like(t) for t in state), _like(velocity)
        self._state = self._shapes[key][0]
        return self._shapes[key]

    def _schedule(self, shapes: tuple[tuple[Tensor, ...], Tensor], num_microbatches: int) -> Any:
        """torch's schedule, rebuilt when shapes change: its stages hold receive buffers of one shape."""
        key, stages, schedule = self._built
        if key == (_signature(shapes), num_microbatches):
            return schedule
        for stage in stages:
            stage.args_recv_info.clear()
            stage.grad_recv_info.clear()
        state, velocity = shapes
        stages = []
        for s in sorted(self.blocks):
            inputs, outputs = state if s > 0 else (), state if s < self.num_stages - 1 else (velocity,)
            module = _Stage(self, s)
            stages.append(
                _ReducingStage(
                    module, s, self.num_stages, self.device, input_args=inputs, output_args=outputs, group=self.group
                )
            )
        is_single = self.section.pipeline_parallel_schedule in ("GPipe", "1F1B")
        build = _SCHEDULES[self.section.pipeline_parallel_schedule]
        schedule = build(
            stages[0] if is_single else stages, num_microbatches, loss_fn=self._add_loss, scale_grads=False
        )
        self._built = ((_signature(shapes), num_microbatches), stages, schedule)
        return schedule

    def _add_loss(self, v_BLP: Tensor, i: Tensor) -> Tensor:
        loss = self._loss_fn(v_BLP, i.item())
        self._loss += loss.detach()
        return loss


class _Stage(nn.Module):
    """What torch takes for a stage's module.

    The model is no submodule of it: for an FSDP module torch would defer the reduction of gradients to the end of the
    step, with a full float32 gradient on each rank until then.
    """

    def __init__(self, pipeline: Pipeline, stage: int):
        super().__init__()
        self.pipeline, self.stage = pipeline, stage

    def forward(self, *state: Tensor, i: Tensor) -> Any:
        return self.pipeline.model(**self.pipeline._inputs[i.item()].kwargs, stage=self.stage, state=state)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """For zero bubble: the weights that autograd knows, which under FSDP are the gathered ones."""
        modules = self.pipeline.fsdp_modules(self.stage)
        groups = [group for m in modules if (group := m._get_fsdp_state()._fsdp_param_group) is not None]
        if not modules:
            return self.pipeline.model.parameters()
        return iter([p.unsharded_param for group in groups for p in group.fsdp_params])


class _ReducingStage(PipelineStage):
    """A stage whose backward zero bubble may run in two parts, first for inputs, then for weights.

    FSDP reduces the weights' gradients in hooks of the first part, when they do not exist yet; here after the second.
    """

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        # Autograd's gradients may be views; what is sent must be contiguous.
        self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in self.bwd_cache[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        # The first stage has no inputs that need gradients: its whole backward runs here, with FSDP's hooks.
        modules = [] if self.is_first else self.submod.pipeline.fsdp_modules(self.stage_index)
        for module in modules:
            module.unshard()  # for what is recomputed
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if modules:
            # Reduces the gradients, then frees the gathered weights.
            self.submod.pipeline.model._get_fsdp_state()._root_post_backward_final_callback()


def _packed(x: Tensor) -> Tensor:
    """x with the strides of a new tensor, which torch 2.11 requires for dimensions of one element too."""
    is_packed = x.stride() == torch.empty(x.shape, device="meta").stride()
    return x if is_packed else x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=True)


def _signature(shapes: tuple[tuple[Tensor, ...], Tensor]) -> tuple:
    state, velocity = shapes
    return tuple((t.shape, t.dtype) for t in (*state, velocity))
