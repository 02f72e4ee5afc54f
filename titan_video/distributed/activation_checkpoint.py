"""Activation checkpointing, block by block: what a forward keeps for backward, and what backward computes again.

    mode           kept, beside a block's inputs                         order of the wraps around a block
    none           everything that backward reads                        compile(block)
    full           nothing                                               offload(checkpoint(compile(block)))
    selective      attention and its lse; every second matrix product    offload(compile(checkpoint(block)))
    memory_budget  what the compiler chooses for a share of `none`       compile(block)

In full the checkpoint is outside: torch 2.13 does not compile one around tensor-parallel weights. In selective it is
inside, since the operators that it picks are not seen from outside a compiled block.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_video.config.job_config import ActivationCheckpoint, JobConfig
from titan_video.distributed.offload import HostOffload, OffloadedTensor
from titan_video.models.layers import attention_flops
from titan_video.models.spec import ParallelPlan

# Attention operators by name (kernels/attention.py), so that none need be there: the dim of argument 1, the keys, along
# which they are counted.
_KEY_DIM = {
    "titan_video::attention": -3,
    "aten::_scaled_dot_product_flash_attention": -2,
    "aten::_scaled_dot_product_flash_attention_for_cpu": -2,
    "aten::_scaled_dot_product_efficient_attention": -2,
    "aten::_scaled_dot_product_cudnn_attention": -2,
    "flex_attention": -2,  # seen in a compiled block only
}
_RING = "titan_video::ring_attention"  # its argument 3 is the number of keys on all ranks
_MATMULS = ("aten::mm", "aten::addmm")


def apply_activation_checkpoint(
    model: nn.Module,
    plan: ParallelPlan,
    section: ActivationCheckpoint,
    chosen: frozenset[tuple[str, str]] | None = None,
) -> None:
    """Wrap the blocks in place. chosen: `chosen_blocks` of the whole model, where `model` is only a pipeline stage of
    it.

    Later, after the first forward that keeps activations: ValueError if a kind of `section.save` met no operator that
        it could keep.
    """
    chosen = chosen_blocks(model, plan, section.layers) if chosen is None else chosen
    _set_memory_budget(section.memory_budget if section.mode == "memory_budget" else 1.0)
    if section.mode not in ("full", "selective"):
        return
    offload = HostOffload() if section.offload else None
    selection = SACPolicy(section.save, section.save_min_kv, offload) if section.mode == "selective" else None
    for path in plan.blocks:
        container = model.get_submodule(path)
        for key in container:
            if (path, key) in chosen:
                container[key] = CheckpointedBlock(container[key], selection, offload)


def check_save_min_kv(section: ActivationCheckpoint, longest: int) -> None:
    """ValueError if even the longest clip, of so many tokens, has too few keys for its attention to be kept:

    selective would be full, unsaid.
    """
    if section.mode == "selective" and "attention" in section.save and longest < section.save_min_kv:
        raise ValueError(
            f"activation_checkpoint.save_min_kv: given {section.save_min_kv}, but the longest clip of "
            f"data.buckets has {longest} "
            f"tokens, so no attention would be kept; set it to at most {longest}, or activation_checkpoint.mode to full"
        )


def chosen_blocks(model: nn.Module, plan: ParallelPlan, layers: tuple[int, ...]) -> frozenset[tuple[str, str]]:
    """(container, key) of the blocks numbered `layers`, counted in forward order; empty: of all.

    ValueError for a number that no block has.
    """
    names = [(path, key) for path in plan.blocks for key in model.get_submodule(path)]
    unknown = [number for number in layers if number >= len(names)]
    if unknown:
        raise ValueError(
            f"activation_checkpoint.layers: given {list(layers)}, but there is no block {unknown[0]}; legal: 0 "
            f"to {len(names) - 1}"
        )
    return frozenset(names[number] for number in layers or range(len(names)))


class CheckpointedBlock(ActivationWrapper):
    """A block that keeps its inputs, and what `selection` picks, and is otherwise run again in backward.

    selection None: full.
    """

    def __init__(self, block: nn.Module, selection: "SACPolicy | None", offload: HostOffload | None):
        super().__init__(block)
        self.selection, self.offload = selection, offload
        self.options = {} if selection is None else {"context_fn": selection.contexts}
        self.run = self._recomputed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.offload.of_block(self.parameters(), args[0]) if self.offload else nullcontext():
            out = self.run(*args, **kwargs)
        if self.selection is not None:
            self.selection.check()
        return out

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what can be of the forward: see the top of the file."""
        if self.selection is None:
            self._checkpoint_wrapped_module.compile(*args, **kwargs)
        else:
            self.options = {"context_fn": self.selection.traced_contexts}
            self.selection.beside_mesh = any(isinstance(p, DTensor) for p in self.parameters())
            self.run = torch.compile(self._recomputed, *args, **kwargs)

    def _recomputed(self, *args: Any, **kwargs: Any) -> Any:
        # The blocks draw no random numbers, so there is no generator state to keep.
        return checkpoint(
            self._checkpoint_wrapped_module,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            **self.options,
            **kwargs,
        )


class SACPolicy:
    """Which results are kept, and whether there were any. One for all blocks: equal blocks are compiled, and so asked
    about, once.

    contexts, traced_contexts: for `checkpoint`, the modes under which a block is run and run again; plain functions, as
        compile needs them.
    """

    def __init__(self, save: tuple[str, ...], save_min_kv: int, offload: HostOffload | None = None):
        self.save, self.save_min_kv = save, save_min_kv
        self.kept: set[str] = set()
        self.num_operators, self.longest, self.checked = 0, 0, False
        # Attention that is computed again makes the compiler keep a generator state, on a CPU as one more result of the
        # graph. torch 2.13 does
        # not find it if the graph holds a mesh too, as that of tensor-parallel weights does. There and on a CPU short
        # attention is kept as well.
        self.beside_mesh = False

        def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
            # Ours rather than torch's: they send what is kept to the host, allow backward to run a block again a second
            # time, as zero-bubble
            # schedules do, and are the same in every torch.
            kept: list[Any] = []
            return _CachingMode(self.policy_fn, kept, offload), _CachedMode(self.policy_fn, kept, offload)

        def traced_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
            # Torch's own mark the graph. Up to 2.11 they ask in recomputation too.
            pick = {is_recompute: self.policy_fn() for is_recompute in (False, True)}

            def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
                keep = (
                    pick[context.is_recompute](operator, args)
                    or self.beside_mesh
                    and operator.name() in _KEY_DIM
                    and args[0].device.type == "cpu"
                )
                return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

            return create_selective_checkpoint_contexts(policy)

        self.contexts, self.traced_contexts = contexts, traced_contexts

    def policy_fn(self) -> Callable[[Any, tuple], bool]:
        """(operator, arguments) -> whether its result is kept; for one run of one block, whose matrix products are
        counted.
        """
        num_matmuls = 0

        def pick(operator: Any, args: tuple) -> bool:
            nonlocal num_matmuls
            name = operator.name()
            self.num_operators += 1
            if name in _MATMULS and "matmul" in self.save:
                num_matmuls += 1
                # The second of each two, not the first: of a feed-forward that is the narrow one.
                return num_matmuls % 2 == 0 and self._keep("matmul")
            if (name in _KEY_DIM or name == _RING) and "attention" in self.save:
                num_keys = args[3] if name == _RING else args[1].shape[_KEY_DIM[name]]
                if num_keys >= self.save_min_kv:
                    return self._keep("attention")
                self.longest = max(self.longest, int(num_keys))
            return False

        return pick

    def check(self) -> None:
        """After a forward. ValueError if a kind was asked for of which there is no operator:

        that would silently be mode full.
        """
        if self.checked or not self.num_operators:
            # without gradients nothing is kept, and a graph from the compiler's cache was checked when it was made
            return
        self.checked = True
        if "attention" in self.save and "attention" not in self.kept:
            if self.longest:  # a short clip; longer ones will come, see `check_save_min_kv`
                self.checked = False
                return
            raise ValueError(
                "activation_checkpoint.save: attention, but a block ran no attention operator that has a result "
                "to keep; take it out"
            )
        if "matmul" in self.save and "matmul" not in self.kept:
            raise ValueError(
                "activation_checkpoint.save: matmul, but a block ran fewer than two matrix products (aten.mm, "
                "aten.addmm); take it out"
            )

    def _keep(self, kind: str) -> bool:
        self.kept.add(kind)
        return True


class _CachingMode(TorchDispatchMode):
    """Notes the results that are picked."""

    def __init__(self, policy_fn: Callable, kept: list[Any], offload: HostOffload | None):
        super().__init__()
        self.pick, self.kept, self.offload = policy_fn(), kept, offload

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.pick(func, args):
            # Detached: the result itself will hold the graph, which holds this list.
            self.kept.append(tree_map_only(Tensor, self.offload.pack if self.offload else Tensor.detach, out))
        return out


class _CachedMode(TorchDispatchMode):
    """Gives the noted results, in the same order, instead of computing them."""

    def __init__(self, policy_fn: Callable, kept: list[Any], offload: HostOffload | None):
        super().__init__()
        self.policy_fn, self.kept, self.offload = policy_fn, kept, offload

    def __enter__(self):
        self.pick, self.next = self.policy_fn(), iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.pick(func, args):
            return func(*args, **(kwargs or {}))
        return tree_map_only(
            (Tensor, OffloadedTensor),
            lambda x: x.detach() if isinstance(x, Tensor) else self.offload.fetch(x),
            next(self.next),
        )


def _set_memory_budget(budget: float) -> None:
    """For all that is compiled from here on."""
    config = torch._functorch.config
    config.activation_memory_budget = budget
    if hasattr(config, "unsafe_treat_script_objects_as_zero_size"):
        # Since torch 2.13 a mesh, which comes with tensor-parallel weights, would have no size.
        config.unsafe_treat_script_objects_as_zero_size = True


def saved_bytes_per_token(dim: int, num_heads: int, section: ActivationCheckpoint, itemsize: int) -> int:
    """Bytes of device memory that a checkpointed block keeps for each video token.

    Its input, [D], and for selective attention its output, [D], and its lse, one float32 a head. With offload only the
    lse stays.
    """
    if section.mode not in ("full", "selective") or "matmul" in section.save and section.mode == "selective":
        raise ValueError(
            "saved_bytes_per_token: in mode none or memory_budget, and for matmul, it depends on the model's "
            "operators; run a dry run"
        )
    attention = section.mode == "selective"
    on_device = 0 if section.offload else dim * itemsize * (1 + attention)
    return on_device + 4 * num_heads * attention


def recomputed_flops(section: ActivationCheckpoint, args: Any, num_tokens: int, batch: int) -> float:
    """FLOPs of blocks' forward that backward runs again; args: the model's (see ModelSpec).

    What a memory budget makes of it is not known: 0.
    """
    if section.mode not in ("full", "selective"):
        return 0.0
    again = args.block_flops(num_tokens, batch)
    if section.mode == "selective":
        attention = args.num_layers * attention_flops(batch, num_tokens, num_tokens, args.dim)
        products = again - attention
        again = attention * ("attention" not in section.save) + products * (0.5 if "matmul" in section.save else 1)
    return again * (len(section.layers) or args.num_layers) / args.num_layers


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
            "activation_checkpoint.save: empty, which is mode full; give at least one of attention, matmul, or choose "
            "full"
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
