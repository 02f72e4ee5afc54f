"""Activation checkpointing, block by block: what a forward saves for backward, and what backward recomputes.

    mode           saved, beside a block's inputs                 order of the wrappers around a block
    none           everything that backward reads                 compile(block)
    full           nothing                                        offload(checkpoint(compile(block)))
    selective      what `save` names: see SACPolicy               offload(compile(checkpoint(block)))
    memory_budget  what the compiler chooses for a share of all   compile(block)

In full the checkpoint is outside: torch 2.13 does not compile one around tensor-parallel weights. In selective it is
inside: the operators that it selects are not visible from outside a compiled block. A block with experts is always
wrapped as in selective: what its router decides is saved.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_video.config.job_config import ActivationCheckpoint, JobConfig
from titan_video.distributed.parallel_dims import context_parallel_degrees
from titan_video.models.layers import attention_flops
from titan_video.models.spec import ParallelPlan
from titan_video.tools.parts import resolve

BlockSections = dict[tuple[str, str], ActivationCheckpoint]  # {(container, key): how the block is checkpointed}

OFFLOAD = "titan_video.distributed.offload:HostOffload"  # optional
RANGES = "titan_video.distributed.checkpoint_ranges:sections_by_block"  # optional

# Attention operators by name, so that none of them need exist, and the dim of argument 1 that counts the keys.
_KEY_DIM = {
    "titan_video::attention": -3,
    "aten::_scaled_dot_product_flash_attention": -2,
    "aten::_scaled_dot_product_flash_attention_for_cpu": -2,
    "aten::_scaled_dot_product_efficient_attention": -2,
    "aten::_scaled_dot_product_cudnn_attention": -2,
    "flex_attention": -2,  # visible in a compiled block only
}
_RING = "titan_video::ring_attention"  # its argument 3 is the number of keys on all ranks
_GELUS = ("aten::gelu", "titan_video::join_gelu")
_MATMULS = ("aten::mm", "aten::addmm", "titan_video::frozen_linear", "titan_video::grouped_linear")
_EXCHANGE = "_c10d_functional::all_to_all_single"
# Which rows go to which expert (models/experts.py): always saved, as a recomputed block must route the same.
_DECISIONS = ("titan_video::choose_experts", "titan_video::choose_tokens")
# Kinds of results that each selected block must have; an exchange depends on the micro-batch's layout.
_NO_OPERATOR = {
    "attention": "no attention operator that has a result to save",
    "down": "no matmul (aten.mm, aten.addmm) after a GELU",
    "matmul": "fewer than two matmuls (aten.mm, aten.addmm)",
}


def apply_activation_checkpoint(
    model: nn.Module, plan: ParallelPlan, checkpointing: ActivationCheckpoint | BlockSections
) -> None:
    """Wrap the blocks in place. checkpointing: the section, or the `block_sections` of the full model, where `model` is
    a pipeline stage of it.

    ValueError later, after the first forward with gradients, if a kind of a section's `save` met no operator to save.
    """
    is_section = isinstance(checkpointing, ActivationCheckpoint)
    sections = block_sections(model, plan, checkpointing) if is_section else checkpointing
    _set_memory_budget(min((s.memory_budget for s in sections.values() if s.mode == "memory_budget"), default=1.0))
    is_offloading = any(s.offload for s in sections.values())
    offload = resolve(OFFLOAD, asked_by="activation_checkpoint.offload = true")() if is_offloading else None

    @cache  # one for all blocks of a section
    def policy(s: ActivationCheckpoint) -> SACPolicy:
        save = s.save if s.mode == "selective" else ()
        return SACPolicy(save, s.save_min_kv, offload if s.offload else None)

    for path in plan.blocks:
        container = model.get_submodule(path)
        for key in container:
            s = sections[path, key]
            if s.mode in ("full", "selective"):
                has_router = any(getattr(m, "routes", False) for m in container[key].modules())
                is_selective = s.mode == "selective" or has_router
                of_block = offload if s.offload else None
                container[key] = CheckpointedBlock(container[key], policy(s) if is_selective else None, of_block)


def check_save_min_kv(section: ActivationCheckpoint, longest: int, num_blocks: int) -> None:
    """ValueError if even the longest clip, `longest` tokens, has too few keys for its attention to be saved.

    Selective would then silently be full. Also for what `sections_by_block` refuses.
    """
    saving = [s for s in sections_by_block(section, num_blocks) if s.mode == "selective" and "attention" in s.save]
    if saving and longest < section.save_min_kv:
        raise ValueError(
            f"activation_checkpoint.save_min_kv: given {section.save_min_kv}, but the longest clip of data.buckets has "
            f"{longest} tokens, so no attention would be saved; set it to at most {longest}, or "
            f"activation_checkpoint.mode to full"
        )


def sections_by_block(section: ActivationCheckpoint, num_blocks: int) -> list[ActivationCheckpoint]:
    """How each block is checkpointed, in forward order: with mode none where `layers` leaves it out.

    ValueError for a number that no block has.
    """
    if section.range:
        return resolve(RANGES, asked_by="activation_checkpoint.range")(section, num_blocks)
    unknown = [number for number in section.layers if number >= num_blocks]
    if unknown:
        raise ValueError(
            f"activation_checkpoint.layers: given {list(section.layers)}, but there is no block {unknown[0]}; legal: "
            f"0 to {num_blocks - 1}"
        )
    numbers = section.layers or range(num_blocks)
    return [section if n in numbers else replace(section, mode="none", offload=False) for n in range(num_blocks)]


def block_sections(model: nn.Module, plan: ParallelPlan, section: ActivationCheckpoint) -> BlockSections:
    """{(container, key): how the block is checkpointed}, in forward order; see `sections_by_block`."""
    names = [(path, key) for path in plan.blocks for key in model.get_submodule(path)]
    return dict(zip(names, sections_by_block(section, len(names)), strict=True))


class CheckpointedBlock(ActivationWrapper):
    """A block that saves its inputs and what `policy` selects, and is otherwise recomputed in backward.

    policy None: full. offload: moves what is saved to host memory, or None.
    """

    def __init__(self, block: nn.Module, policy: "SACPolicy | None", offload: Any):
        super().__init__(block)
        self.policy, self.offload = policy, offload
        self.options = {} if policy is None else {"context_fn": policy.contexts}
        self.run = self._checkpointed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.offload.block_context(self.parameters(), args[0]) if self.offload else nullcontext():
            out = self.run(*args, **kwargs)
        if self.policy is not None:
            self.policy.check()
        return out

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward as far as possible: see the top of the file."""
        if self.policy is None:
            self._checkpoint_wrapped_module.compile(*args, **kwargs)
        else:
            self.options = {"context_fn": self.policy.traced_contexts}
            self.policy.has_mesh = any(isinstance(p, DTensor) for p in self.parameters())
            self.run = torch.compile(self._checkpointed, *args, **kwargs)

    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        # The blocks draw no random numbers, so there is no generator state to preserve.
        return checkpoint(
            self._checkpoint_wrapped_module,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            **self.options,
            **kwargs,
        )


class SACPolicy:
    """Selective activation checkpointing: which results are saved, and whether there were any.

        attention   of each attention over at least `save_min_kv` keys: its output and log-sum-exp
        down        of the matmul after each GELU: the widest products of a block give its narrowest results
        exchange    of each all-to-all, of Ulysses and of expert parallel
        matmul      of every second matmul

    One for all blocks: equal blocks are compiled, and so traced, once.
    contexts, traced_contexts: `context_fn` of `checkpoint`, eager and compiled; plain functions, as compile needs them.
    """

    def __init__(self, save: tuple[str, ...], save_min_kv: int, offload: Any = None):
        self.save, self.save_min_kv = save, save_min_kv
        self.saved_kinds: set[str] = set()
        self.num_operators = 0
        self.longest = 0
        self.checked = False
        # Recomputed attention makes the compiler save a generator state, on a CPU as one more output of the graph.
        # Torch 2.13 does not find it if the graph also holds a mesh (that of tensor-parallel weights). In that case
        # short attention is saved too.
        self.has_mesh = False

        def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
            # Ours rather than torch's: they offload what is saved, allow backward to recompute a block twice, as
            # zero-bubble schedules do, and are the same in every torch.
            saved: list[Any] = []
            return _CachingMode(self.policy_fn(), saved, offload), _CachedMode(self.policy_fn, saved, offload)

        def traced_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
            # Torch's own modes mark the graph. Up to 2.11 they ask during recomputation too.
            must_save = {is_recompute: self.policy_fn() for is_recompute in (False, True)}

            def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
                save = must_save[context.is_recompute](operator, args)
                if self.has_mesh and operator.name() in _KEY_DIM and args[0].device.type == "cpu":
                    save = True
                return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

            return create_selective_checkpoint_contexts(policy)

        self.contexts, self.traced_contexts = contexts, traced_contexts

    def policy_fn(self) -> Callable[[Any, tuple], bool]:
        """(operator, arguments) -> whether its result is saved; for one run of one block, whose matmuls it counts."""
        num_matmuls = num_gelus = 0  # of GELUs, those whose matmul is still to come

        def must_save(operator: Any, args: tuple) -> bool:
            nonlocal num_matmuls, num_gelus
            name = operator.name()
            self.num_operators += 1
            num_gelus += name in _GELUS
            if name in _DECISIONS:
                return True
            if name in _MATMULS:
                num_matmuls += 1
                is_down, num_gelus = num_gelus > 0, max(num_gelus - 1, 0)
                # The second of each two, not the first: in a feed-forward its result is the narrow one.
                kinds = {"down": is_down, "matmul": num_matmuls % 2 == 0}
                return any([self._note(kind) for kind in self.save if kinds.get(kind)])
            if name == _EXCHANGE and "exchange" in self.save:
                return True
            if (name in _KEY_DIM or name == _RING) and "attention" in self.save:
                num_keys = args[3] if name == _RING else args[1].shape[_KEY_DIM[name]]
                if num_keys >= self.save_min_kv:
                    return self._note("attention")
                self.longest = max(self.longest, int(num_keys))
            return False

        return must_save

    def check(self) -> None:
        """After a forward. ValueError if a requested kind met no operator: the mode would silently be full."""
        if self.checked or not self.num_operators:
            return  # without gradients nothing is saved; a graph from the compiler's cache was checked when it was made
        self.checked = True
        for kind in self.save:
            if kind in self.saved_kinds or kind not in _NO_OPERATOR:
                continue
            if kind == "attention" and self.longest:  # a short clip; longer ones will come, see `check_save_min_kv`
                self.checked = False
                return
            raise ValueError(f"activation_checkpoint.save: {kind}, but a block ran {_NO_OPERATOR[kind]}; take it out")

    def _note(self, kind: str) -> bool:
        self.saved_kinds.add(kind)
        return True


class _CachingMode(TorchDispatchMode):
    """Saves the results that the policy selects."""

    def __init__(self, must_save: Callable[[Any, tuple], bool], saved: list[Any], offload: Any):
        super().__init__()
        self.must_save, self.saved = must_save, saved
        # Detached: the result itself will hold the graph, which holds this list.
        self.pack = offload.pack if offload else Tensor.detach

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.must_save(func, args):
            if func.name() == _EXCHANGE:
                torch.ops._c10d_functional.wait_tensor(out)  # it may be moved at once, and is waited for at once anyway
            self.saved.append(tree_map_only(Tensor, self.pack, out))
        return out


class _CachedMode(TorchDispatchMode):
    """Returns the saved results, in the same order, instead of recomputing them."""

    def __init__(self, policy_fn: Callable[[], Callable[[Any, tuple], bool]], saved: list[Any], offload: Any):
        super().__init__()
        self.policy_fn, self.saved, self.offload = policy_fn, saved, offload

    def __enter__(self):
        self.must_save, self.next = self.policy_fn(), iter(self.saved)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.must_save(func, args):
            return func(*args, **(kwargs or {}))
        return tree_map(self._unpack, next(self.next))

    def _unpack(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach()
        return self.offload.unpack(x) if self.offload else x


def _set_memory_budget(budget: float) -> None:
    """For everything that is compiled from here on."""
    config = torch._functorch.config
    config.activation_memory_budget = budget
    if hasattr(config, "unsafe_treat_script_objects_as_zero_size"):
        # Since torch 2.13 a mesh, which comes with tensor-parallel weights, would have no size.
        config.unsafe_treat_script_objects_as_zero_size = True


def recomputed_flops(section: ActivationCheckpoint, args: Any, num_tokens: int, batch: int) -> float:
    """FLOPs of the blocks' forward that backward recomputes. args: the model's (see ModelSpec).

    0 for a memory budget: what the compiler recomputes is not known.
    """
    if section.range:
        shares = Counter(sections_by_block(section, args.num_layers))
        parts = [(n, recomputed_flops(s, args, num_tokens, batch)) for s, n in shares.items()]
        return sum(n * flops for n, flops in parts) / args.num_layers
    if section.mode not in ("full", "selective"):
        return 0.0
    recomputed = args.block_flops(num_tokens, batch)
    if section.mode == "selective":
        attention = args.num_layers * attention_flops(batch, num_tokens, num_tokens, args.dim)
        matmuls = recomputed - attention
        if "matmul" in section.save:
            matmuls *= 0.5
        elif "down" in section.save:
            matmuls -= args.down_flops(num_tokens, batch)
        recomputed = attention * ("attention" not in section.save) + matmuls
    return recomputed * (len(section.layers) or args.num_layers) / args.num_layers


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about activation checkpointing, one line per mistake."""
    a = config.activation_checkpoint
    if a.mode == "memory_budget" and not config.compile.enable:
        yield (
            "activation_checkpoint.mode: memory_budget, but it is the compiler that keeps to the budget; set "
            "compile.enable, or choose another mode"
        )
    if a.mode == "memory_budget" and a.layers:
        yield (
            f"activation_checkpoint.layers: given {list(a.layers)}, but a memory budget applies to all blocks; leave "
            f"it empty"
        )
    if a.mode == "selective" and not a.save:
        yield (
            "activation_checkpoint.save: empty, which is mode full; give at least one of attention, down, matmul, or "
            "choose full"
        )
    p = config.parallelism
    has_exchange = context_parallel_degrees(p)[1] > 1 or p.expert_parallel_degree > 1
    if a.mode == "selective" and "exchange" in a.save and not has_exchange:
        yield (
            "activation_checkpoint.save: exchange, but there is none, as neither attention is divided by Ulysses nor "
            "experts over ranks; take it out, or set parallelism.context_parallel_degree"
        )
    for name in ("save", "layers"):
        values = getattr(a, name)
        if len(set(values)) < len(values):
            yield f"activation_checkpoint.{name}: given {list(values)}; remove what appears twice"
    if a.offload and a.mode in ("none", "memory_budget"):
        yield (
            f"activation_checkpoint.offload: true, but mode is {a.mode}; choose full or selective, which define what "
            f"is saved"
        )
