"""Exact counts of the bytes that a block saves for backward, and moves through memory outside its matmuls.

    python benchmarks/block_bytes.py [--json FILE]

A Wan block of ours and one of diffusers run forward and backward on the meta device, in bfloat16, at the real shapes.
Both are counted by the same rules:

    saved    bytes of all storages that autograd saves, each once, including the block's input; without weights, text,
             modulation and freqs_cis, which all blocks share
    traffic  for each operator except matmuls and attention: its tensor arguments are read once and its results written
             once. Dims of stride 0 are read once. Views and empty allocations are free. An operator in place reads and
             writes its tensor, copy_ only writes it. A kernel of ours is one operator; so is RMSNorm, in both blocks,
             as on a GPU.
    launches kernels that a GPU is given: one for each of these operators, a matmul and an attention; of ours, LAUNCHES.

Figures per element are divided by tokens x width. The gradient of a bias, a sum over all tokens, is an operator of its
own and is counted too.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, markdown, options, write_json
from titan_video import kernels
from titan_video.models.wan import SPEC, WanArgs, WanModel

CASES = {"Wan 1.3B, 32,760 tokens": ("t2v-1.3B", 32760), "Wan 14B, 75,600 tokens": ("t2v-14B", 75600)}
BARS = {"saved": 0.75, "traffic": 0.235}  # of diffusers'
# Kernels of an operator of ours: in backward a second one adds the first one's sums; `tests/unit_tests/
# test_block_bytes.py` compares this with what the operators launch.
LAUNCHES = {
    "titan_video::gated_residual_backward": 2,
    "titan_video::gelu_backward": 2,
    "titan_video::norm_backward": 2,
    "titan_video::project_backward": 3,
    "titan_video::residual_norm_backward": 2,
    "titan_video::rms_norm_backward": 2,
}
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}


# ---- RMSNorm as one operator, as on a GPU; on the meta device only its shapes are needed ----


@torch.library.custom_op("benchmarks::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm.register_fake
def _(x, weight):
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("benchmarks::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm_backward.register_fake
def _(grad, x, weight, rstd):
    return torch.empty_like(x), torch.empty_like(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shape, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _rms_norm(x, weight)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = _rms_norm_backward(grad, *ctx.saved_tensors)
        return grad_x, None, grad_weight, None


def _attention(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """torch's RMSNorm and attention as one operator each, as on a GPU; the meta device would decompose them."""
    originals = F.rms_norm, F.scaled_dot_product_attention
    F.rms_norm, F.scaled_dot_product_attention = _RmsNorm.apply, _attention
    try:
        yield
    finally:
        F.rms_norm, F.scaled_dot_product_attention = originals


# ---- counting ----


def touched(t: Tensor) -> int:
    """Bytes of a tensor; broadcast dims count once."""
    numel = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        numel *= size if stride else min(size, 1)
    return numel * t.element_size()


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Traffic(TorchDispatchMode):
    """Counts bytes by operator, by the rules at the top of the file."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func, args, kwargs, result) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name in MATMULS or "attention" in name:
            self.launches[name] += 1
            return
        if name.startswith(("empty", "new_empty")):
            return
        arguments = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if (
            not func._schema.is_mutable
            and results
            and arguments
            and {_storage(t) for t in results} <= {_storage(t) for t in arguments}
        ):
            return  # a view
        self.launches[name] += LAUNCHES.get(name, 1)
        if name.endswith("_like") or name.startswith("new_"):
            arguments = []  # only the shape is read
        elif name in ("copy_", "fill_", "zero_"):
            arguments = arguments[1:]
        read = {(_storage(t), t.storage_offset(), t.shape, t.stride()): touched(t) for t in arguments}
        self.bytes[name] += sum(read.values()) + sum(touched(t) for t in results)


def count(block: nn.Module, inputs: tuple, x: Tensor) -> dict:
    """Bytes that `block(*inputs)` saves, and that its forward and backward move.

    x: the block's activations, the only one of the inputs that counts as saved.
    """
    shared = {_storage(t) for t in (*inputs, *block.parameters()) if isinstance(t, Tensor) and t is not x}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in shared:
            saved[_storage(t)] = t.untyped_storage().nbytes()
        alive.append(t)  # a freed storage could give its address to another
        return t

    alive: list[Tensor] = []
    with as_on_gpu(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with Traffic() as forward:
            out = block(*inputs)
        grad = torch.empty_like(out)
        with Traffic() as backward:
            out.backward(grad)
    return {
        "saved": sum(saved.values()),
        "forward": dict(forward.bytes),
        "backward": dict(backward.bytes),
        "launches": {"forward": dict(forward.launches), "backward": dict(backward.launches)},
    }


# ---- the two blocks ----


def our_block(args: WanArgs, num_tokens: int) -> dict:
    """Counts of our block, with the current backend of kernels."""
    with torch.device("meta"):
        model = WanModel(args)
        x = torch.empty(1, num_tokens, args.dim, dtype=torch.bfloat16, requires_grad=True)
        context = torch.empty(1, args.text_len, args.dim, dtype=torch.bfloat16, requires_grad=True)
        time_BTD, time_BTE = torch.empty(1, 1, args.dim), torch.empty(1, 1, 6 * args.dim, requires_grad=True)
        pos = torch.empty(1, num_tokens, 3, dtype=torch.int64)
    block, seen = model.blocks["0"].to(torch.bfloat16), []

    class BlockReached(Exception):
        pass

    def stop(module, inputs):
        seen.append(inputs)
        raise BlockReached

    # Record the block's inputs as the model computes them.
    handle = block.register_forward_pre_hook(stop)
    try:
        model.trunk(x, time_BTD, time_BTE, context, pos)
    except BlockReached:
        handle.remove()
    return count(block, seen[0], x)


def diffusers_block(args: WanArgs, num_tokens: int) -> dict:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with torch.device("meta"):
        block = WanTransformerBlock(args.dim, args.ffn_dim, args.num_heads, cross_attn_norm=True, eps=args.eps).to(
            torch.bfloat16
        )
        for name in (
            "norm1",
            "norm2",
            "norm3",
        ):  # as from_pretrained leaves them: WanTransformer3DModel._keep_in_fp32_modules
            block.get_submodule(name).float()
        block.scale_shift_table = nn.Parameter(block.scale_shift_table.float())
        x = torch.empty(1, num_tokens, args.dim, dtype=torch.bfloat16, requires_grad=True)
        context = torch.empty(1, args.text_len, args.dim, dtype=torch.bfloat16, requires_grad=True)
        temb = torch.empty(1, 6, args.dim, dtype=torch.bfloat16, requires_grad=True)
        rotary = tuple(torch.empty(1, num_tokens, 1, args.head_dim) for _ in range(2))
    return count(block, (x, context, temb, rotary), x)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use this backend of kernels inside the context."""
    before = kernels.current_backend()
    kernels.set_backend(name)
    try:
        yield
    finally:
        kernels.set_backend(before)


def count_blocks(flavor: str, num_tokens: int) -> dict[str, dict]:
    """{implementation: counts} of one case."""
    args = SPEC.flavors[flavor]
    results = {"diffusers": diffusers_block(args, num_tokens)}
    for name in ("torch", "triton"):
        with using(name):
            results[f"ours, {name} kernels"] = our_block(args, num_tokens)
    return results


def per_element(counts: dict, num_elements: int) -> dict[str, float]:
    """Bytes per element: saved, and moved in forward, in backward and in both; and launches of both."""
    launches = sum(sum(found.values()) for found in counts["launches"].values())
    moved = {phase: sum(counts[phase].values()) / num_elements for phase in ("forward", "backward")}
    return {"saved": counts["saved"] / num_elements} | moved | {"traffic": sum(moved.values()), "launches": launches}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """results: `per_element` by case and implementation."""
    rows = []
    for case, found in results.items():
        for who, r in found.items():
            ratios = [f"{r[what] / found['diffusers'][what]:.2f}" for what in BARS]
            rows.append(
                [case, who, *(f"{r[what]:.1f}" for what in ("saved", "forward", "backward")), *ratios, r["launches"]]
            )
    header = [
        "block",
        "implementation",
        "saved, B",
        "moved forward, B",
        "moved backward, B",
        "saved / diffusers'",
        "moved / diffusers'",
        "launches",
    ]
    return markdown(header, rows)


def main(argv: list[str]) -> None:
    parser = options(__doc__)
    cli = parser.parse_args(argv)
    cases = {"toy": ("debug", 64)} if cli.toy else CASES
    counts = {case: count_blocks(*which) for case, which in cases.items()}
    sizes = {case: SPEC.flavors[flavor].dim * tokens for case, (flavor, tokens) in cases.items()}
    results = {case: {who: per_element(c, sizes[case]) for who, c in found.items()} for case, found in counts.items()}
    print(table(results))
    if cli.json:
        write_json(
            cli.json,
            "block_bytes",
            cli,
            environment(torch.device("cpu")),
            {"per element": results, "by operator": counts},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
