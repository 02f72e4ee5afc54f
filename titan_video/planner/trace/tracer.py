"""What one block, and what is outside the blocks, allocates, computes, moves and sends: traced once for all shapes.

The real modules, tensor- and context-parallel as in a run, go forward and backward on fake tensors (recorder.py). FSDP
is not traced: what it does follows from the sizes of its units. Nor is checkpointing: which results a mode saves is
asked of its own policy (SACPolicy), operator by operator, and what backward runs again is the forward's log.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from titan_video.config.job_config import JobConfig
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import CONTEXT_PARALLEL, EXPERT_PARALLEL, TENSOR_PARALLEL
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import has
from titan_video.flow.matching import FlowMatching
from titan_video.models.layers import cast_params
from titan_video.models.spec import ModelSpec
from titan_video.planner.dry_run import fake
from titan_video.planner.search.space import divisors
from titan_video.planner.trace.recorder import CLIPS, LENGTH, LOAD, ZERO, Recorder, decode
from titan_video.planner.trace.selection import Selection
from titan_video.planner.trace.traces import BlockTrace, EndsTrace, Log
from titan_video.planner.trace.units import block_kinds
from titan_video.tasks.denoising import Denoising
from titan_video.tools.parts import resolve


class Tracer:
    """Traces of one model by layout.

    config: kernels, types and checkpointing of the job are read. spec, args: the model's.
    """

    def __init__(self, config: JobConfig, spec: ModelSpec, args: Any):
        self.config, self.spec, self.args = config, spec, args
        self.dtype = getattr(torch, config.training.mixed_precision_param)
        self._traces: dict[tuple[int, int, int, int], tuple[dict[str, BlockTrace], EndsTrace]] = {}

    @cached_property
    def model(self) -> nn.Module:
        """All of it, on the meta device, in the types of the stored weights."""
        with torch.device("meta"):
            return self.spec.build(self.args)

    @cached_property
    def kinds(self) -> dict[str, list[tuple[str, str]]]:
        """{type of block: (container, key) of its blocks}, in forward order."""
        return block_kinds(self.model, self.spec.plan)

    @cached_property
    def small(self) -> nn.Module:
        """The model with one block of each type."""
        model = copy.deepcopy(self.model)
        for blocks in self.kinds.values():
            for i, (path, key) in enumerate(blocks):
                if i > 0:
                    del model.get_submodule(path)[key]
                for params in map(model.get_submodule, self.spec.plan.per_block_params if i > 1 else ()):
                    if key in params:
                        del params[key]
        return model

    def degrees(self, ring: int, ulysses: int, tp: int, ep: int = 1) -> tuple[int, int, int, int]:
        """The degrees at which a layout is traced: the smallest of each axis that it has, from which others follow.

        A ring that gathers all chunks at once holds as many as it has ranks, and is traced as it is.
        """
        rotate = self.config.parallelism.context_parallel_rotate_method
        ulysses = min(ulysses, _smallest_divisor(self.args.num_heads // tp))
        experts = ep if ep == 1 else _smallest_divisor(self.args.experts.num_experts)
        return min(ring, 2) if rotate == "alltoall" else ring, ulysses, tp, experts

    def add(self, traces: tuple[dict[str, BlockTrace], EndsTrace]) -> None:
        """What another process has traced of one rank alone, where process groups exist here."""
        self._traces[1, 1, 1, 1] = traces

    def trace(self, ring: int, ulysses: int, tp: int, ep: int = 1) -> tuple[dict[str, BlockTrace], EndsTrace]:
        """({type of block: trace}, ends) of rank 0 at `degrees`; cached. No process group may exist."""
        key = ring, ulysses, tp, ep = self.degrees(ring, ulysses, tp, ep)
        if key not in self._traces:
            # Twice as many ranks as experts are divided over: groups of all ranks would be one and the same.
            dims = ParallelDims(dp_shard=2 * ep if ep > 1 else 1, ring=ring, ulysses=ulysses, tp=tp, ep=ep)
            with fake.fake_ranks(dims.dp * dims.sequence, 0):
                self._traces[key] = _LayoutTracer(self, dims).run()
        return self._traces[key]


class _LayoutTracer:
    def __init__(self, tracer: Tracer, dims: ParallelDims):
        self.config, self.spec, self.args, self.dims = tracer.config, tracer.spec, tracer.args, dims
        self.meshes, self._last_unit = dims.build_mesh("cpu"), ""
        self.recorder: Recorder | None = None
        self.model = copy.deepcopy(tracer.small)
        self.kinds = tracer.kinds
        cast_params(self.model, self.spec.plan.fp32, tracer.dtype)
        parallelism = self.config.parallelism
        if dims.ep > 1:
            apply = resolve(EXPERT_PARALLEL, asked_by="parallelism.expert_parallel_degree")
            apply(self.model, self.spec.plan, self.meshes.ep)
        if dims.tp > 1:
            apply = resolve(TENSOR_PARALLEL, asked_by="parallelism.tensor_parallel_degree")
            apply(self.model, self.spec.plan, self.meshes.tp, False)
        if dims.cp > 1:
            apply = resolve(CONTEXT_PARALLEL, asked_by="parallelism.context_parallel_degree")
            rotate = parallelism.context_parallel_rotate_method
            apply(self.model, self.spec.plan, self.meshes.ring, self.meshes.ulysses, rotate)
        t = self.config.training
        flow = FlowMatching(self.config.flow, t.loss, t.huber_c)
        shard = SequenceShard.from_meshes(self.meshes)
        self.task = Denoising(self.spec, self.args, flow, shard, torch.device("cpu"), guidance_scale=t.guidance)

    def run(self) -> tuple[dict[str, BlockTrace], EndsTrace]:
        operators = fake.gpu_operators(self.config.model.kernels)
        with FakeTensorMode(allow_non_fake_inputs=True), operators, fake.experts_get(self._host_numbers):
            self.model.to_empty(device="cpu")
            calls, shared = self._capture()
            blocks = {kind: self._trace_block(*call, shared) for kind, call in calls.items()}
            return blocks, self._trace_ends()

    def _host_numbers(self, sent: Tensor, received: Tensor, num_rows: int) -> Any:
        """All rows to the last expert of the last rank, and of it to this one: sizes of the sum are counted, not of
        parts. As LOAD times as many come as go, those of other ranks are known by their number.
        """
        if self.recorder is not None:
            self.recorder.wait()
        num_ranks, num_experts = received.shape
        others, of = [0] * (num_ranks - 1), LOAD * num_rows
        last = [0] * (num_experts - 1) + [of]
        return [*others, num_rows], [*others, of], [*([0] * num_experts for _ in others), last]

    def _recorder(self) -> Recorder:
        experts = getattr(self.args, "experts", None)
        received = LOAD * experts.num_rows(CLIPS * LENGTH) if self.dims.ep > 1 else 0
        recorder = Recorder(fake.get_axes(self.meshes), fake.operator_bodies(), received)
        for p in self.model.parameters():
            recorder.number(fake.shard_of(p))
        return recorder

    def _batch(self) -> Any:
        f, h, w = self.args.patch
        channels = self.spec.geometry(self.args).channels
        latent = channels, f, h, w * LENGTH * self.dims.sequence
        return fake.empty_batch(self.args, latent, CLIPS, getattr(torch, self.config.encoder.dtype))

    def _prepare(self, batch: Any) -> Any:
        noise = torch.empty_like(batch.streams["video"])
        return self.task.add_noise(batch, noise, sigma_B=torch.empty(CLIPS), weight_B=torch.empty(CLIPS))

    def _capture(self) -> tuple[dict[str, tuple[nn.Module, tuple, dict]], set[int]]:
        """({type: a block and its arguments}, storages of arguments that all blocks of a type share)."""
        seen: dict[str, list[tuple[nn.Module, tuple, dict]]] = {kind: [] for kind in self.kinds}
        handles = []
        for kind, calls in seen.items():
            path, key = self.kinds[kind][0]
            block = self.model.get_submodule(path)[key]
            for other, second in self.kinds[kind][1:2]:
                self.model.get_submodule(other)[second] = block  # twice: what both get is shared by all blocks

            def note(module: nn.Module, args: tuple, kwargs: dict, calls: list = calls) -> None:
                calls.append((module, args, kwargs))

            handles.append(block.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
        embed, state = self.model.embed, []
        self.model.embed = lambda *args, **kwargs: state.append(embed(*args, **kwargs)) or state[0]
        self.model(**self._prepare(self._batch()).kwargs)
        del self.model.embed
        for handle in handles:
            handle.remove()
        shared = set()
        for calls in seen.values():
            storages = [{_storage(t) for t in tree_leaves(call[1:]) if isinstance(t, Tensor)} for call in calls]
            shared |= set.intersection(*storages) if len(storages) > 1 else set()
        self._shared_state = [i for i, t in enumerate(state[0]) if _storage(t) in shared]
        self._seen = seen, state  # keeps the storages alive, so that no other gets the address of one
        return {kind: calls[-1] for kind, calls in seen.items()}, shared

    def _trace_block(self, block: nn.Module, args: tuple, kwargs: dict, shared: set[int]) -> BlockTrace:
        recorder = self.recorder = self._recorder()
        has_exchange = self.dims.ulysses * self.dims.ep > 1
        selection = Selection(self.config.activation_checkpoint.save_min_kv, has_exchange)
        last_pack, experts, ends = [0, 0], self._experts_of(block), [0]
        handles = [p.register_post_accumulate_grad_hook(lambda _: ends.append(len(recorder.log))) for p in experts]

        def pack(t: Tensor) -> Tensor:
            last_pack[:] = len(recorder.log), recorder.outer
            return t.detach()

        own = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)} - shared
        is_own = [_storage(t) in own for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        args, kwargs = tree_map_only(Tensor, _leaf_like, (args, kwargs))
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                recorder.number(t)
        with recorder:
            baseline, mine = recorder.num_storages, iter(is_own)
            # Copies are no leaves, so that autograd alone keeps them.
            args, kwargs = tree_map_only(Tensor, lambda t: t.clone() if next(mine) else t, (args, kwargs))
            inputs, start = frozenset(range(baseline, recorder.num_storages)), len(recorder.log)
            recorder.part, recorder.listeners = "forward", [selection.listen]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = block(*args, **kwargs)
            recorder.listeners = []
            del args, kwargs
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            del out
            results, middle = {recorder.number(t) for t in outputs}, len(recorder.log)
            kept = {n for n in recorder.live() - results if n >= baseline}
            recorder.part = recorder.phase = "backward"
            grads = [torch.empty_like(t) for t in outputs]
            torch.autograd.backward(outputs, grads)
            end = len(recorder.log)
            del outputs, grads
        expert_gradients = frozenset(recorder.number(fake.shard_of(p.grad)) for p in experts)
        for handle in handles:
            handle.remove()
        for p in block.parameters():
            p.grad = None
        log = Log(
            sizes=recorder.sizes(),
            forward=recorder.events(start, middle),
            backward=recorder.events(middle, end),
            inputs=inputs,
            kept=frozenset(kept),
            results=frozenset(results),
            outputs=recorder.outputs,
            allocated_by=recorder.allocated_by,
            last_pack=last_pack[0] - start,
            last_outer=last_pack[1],
            expert_gradients=expert_gradients,
            experts_end=ends[-1] - middle if experts else 0,
        )
        return BlockTrace(recorder.fuse(kept), log, selection.result())

    def _experts_of(self, block: nn.Module) -> list[nn.Parameter]:
        """Parameters of a unit of their own."""
        paths = [path for path in self.spec.plan.experts if self.dims.ep > 1 and has(block, path)]
        return [p for path in paths for p in block.get_submodule(path).parameters()]

    def _trace_ends(self) -> EndsTrace:
        for path in self.spec.plan.blocks:
            self.model.get_submodule(path).clear()
        self.task.shard._positions.clear()  # with them go the RoPE frequencies, which are traced with the trunk
        recorder, marks, times = self._recorder(), {}, {}

        def mark(name: str, following: str) -> None:
            marks[name] = {n for n in recorder.live() if n >= baseline}
            recorder.part, times[name] = following, len(recorder.log)

        with recorder:
            baseline = recorder.num_storages
            batch = self._batch()
            inputs = self._prepare(batch)
            recorder.part = "embed"
            marks["inputs"] = {n for n in recorder.live() if n >= baseline}
            start = len(recorder.log)
            state, loss = self._run_ends(batch, inputs, mark)
            middle = len(recorder.log)
            recorder.part, recorder.phase = "head backward", "backward"
            loss.backward()
            end = len(recorder.log)
        sizes = recorder.sizes()
        total = {name: sizes[sorted(found)].sum(0) for name, found in marks.items()}
        kept = marks["loss"] - marks["inputs"]
        log = Log(
            sizes=sizes,
            forward=recorder.events(start, middle),
            backward=recorder.events(middle, end),
            inputs=frozenset(marks["inputs"]),
            kept=frozenset(kept),
            results=frozenset(),
            outputs={},
            allocated_by={},
            last_pack=0,
            last_outer=0,
        )
        embed, trunk = marks["embed"] & marks["loss"], marks["trunk"] & marks["loss"]
        keeps = {"embed": embed - marks["inputs"], "trunk": trunk - embed - marks["inputs"]}
        keeps["head"] = kept - keeps["embed"] - keeps["trunk"]
        saved = {name: sizes[sorted(found)].sum(0) for name, found in keeps.items()}
        return EndsTrace(
            recorder.fuse(kept),
            inputs=total["inputs"],
            log=log,
            state=state,
            head_start=times["trunk"] - start,
            embed_start=times["embed backward"] - middle,
            last_unit=self._units_before,
            **saved,
        )

    def _run_ends(self, batch: Any, inputs: Any, mark: Callable[[str, str], None]) -> tuple[np.ndarray, Tensor]:
        """Forward of the model without blocks, as its own `forward` goes, and its loss."""
        model, kwargs = self.model, inputs.kwargs
        units = [name for name in self.spec.plan.units if name in dict(model.named_children())]
        for name in units:
            if (module := getattr(model, name)) is not None:
                module.register_forward_hook(lambda *_, name=name: setattr(self, "_last_unit", name))
        state_bytes = np.zeros(len(ZERO))
        parts = {name: getattr(model, name) for name in ("embed", "trunk", "head")}

        def begin_embed_backward() -> None:
            mark("embed backward", "embed backward")

        def watch(name: str, following: str) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                out = parts[name](*args, **kwargs)
                if name == "trunk":
                    out = _Blocks.apply(self._shared_state, begin_embed_backward, *out), *out[1:]
                if name == "embed":
                    state_bytes[:] = sum(np.array(decode(t.nbytes)) for t in out)
                mark(name, following)
                if name == "embed":
                    self._units_before = self._last_unit
                return out

            return run

        for name, following in (("embed", "trunk"), ("trunk", "head"), ("head", "loss")):
            setattr(model, name, watch(name, following))
        prediction = model(**kwargs)
        loss = self.task.loss(prediction, inputs).sum() / self.task.num_loss_elements(batch)
        del prediction
        mark("loss", "head backward")
        del model.embed, model.trunk, model.head
        return state_bytes, loss


class _Blocks(torch.autograd.Function):
    """In the place of the blocks: their tokens depend on the whole state, so that all of `embed` has a backward.

    shared: indices of the tensors that every block saves. begin: called in backward, when the gradients of the state
    are there.
    """

    @staticmethod
    def forward(ctx: Any, shared: list[int], begin: Callable[[], None], *state: Tensor) -> Tensor:
        ctx.save_for_backward(*(state[i] for i in shared))
        ctx.others, ctx.begin = [(t.shape, t.dtype, t.device) for t in state[1:]], begin
        return state[0].view_as(state[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others]
        ctx.begin()
        return None, None, grad, *others


def _smallest_divisor(number: int) -> int:
    """Above 1, if there is one."""
    return (*divisors(number), 1)[1]


def _leaf_like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).requires_grad_(t.requires_grad)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
