"""The floor of a training step: what its parts would take at the rates that this machine reaches, measured in the same
run.

    T_roof = matrix products / their rates + attention / its rates + bytes / copy bandwidth

Bytes are the least that the block's other operators must move: each input read once, each output written once (the sums
reads weight, gradient and two moments and writes three of them, clipping reads the gradient, and the master weights are
cast once each way.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import attention_tensors, copy_bandwidth, gemm_rate, halves, interleaved, markdown
from titan_video.models.layers import attention_flops

BACKWARD_PRODUCTS = 2.5  # of attention: five matrix products, where forward has two
PARTS = ("attention", "matrix products", "norms and element-wise", "optimizer")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OPTIMIZER_BYTES = 7 * 4 + 4 + 2 * 6  # of a parameter


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes/s, read and written. gemm: {(m, n, k): FLOP/s}. attention_forward, attention_backward:

    FLOP/s of the best backend, `attention`.
    """

    copy: float
    gemm: dict[tuple[int, int, int], float]
    attention: str
    attention_forward: float
    attention_backward: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gemm": {"x".join(map(str, shape)): rate for shape, rate in self.gemm.items()}}

    def table(self) -> str:
        rows = [["copy", f"{self.copy / 1e12:.2f} TB/s"]]
        rows += [
            [f"product {m:,} x {n:,} x {k:,}", f"{rate / 1e12:,.0f} TFLOP/s"] for (m, n, k), rate in self.gemm.items()
        ]
        rows += [[f"attention forward ({self.attention})", f"{self.attention_forward / 1e12:,.0f} TFLOP/s"]]
        rows += [[f"attention backward ({self.attention})", f"{self.attention_backward / 1e12:,.0f} TFLOP/s"]]
        return markdown(["ceiling", "measured"], rows)


def shapes(args: Any, tokens: int) -> dict[str, tuple[int, int, int]]:
    """The six matrix products of a block that matter:

    forward and gradient of the input, and gradients of the weights.
    """
    D, Fw = args.dim, args.ffn_dim
    return {
        "square": (tokens, D, D),
        "up": (tokens, Fw, D),
        "down": (tokens, D, Fw),
        "square weight": (D, D, tokens),
        "up weight": (Fw, D, tokens),
        "down weight": (D, Fw, tokens),
    }


def measure(args: Any, tokens: int, device: torch.device, toy: bool = False) -> Ceilings:
    attention, (forward, backward) = best_attention(args, tokens, device)
    copied = copy_bandwidth(device, 2**24 if toy else 2**30)
    return Ceilings(
        copied, {s: gemm_rate(*s, device) for s in shapes(args, tokens).values()}, attention, forward, backward
    )


def best_attention(args: Any, tokens: int, device: torch.device) -> tuple[str, tuple[float, float]]:
    """(backend, FLOP/s of forward and of backward) of torch's fastest attention of the tokens to each other."""
    flops, rates = attention_flops(1, tokens, tokens, args.dim), {}
    for name in BACKENDS if device.type == "cuda" else ("cpu",):
        q, k, v, grad = attention_tensors(tokens, tokens, args.num_heads, args.head_dim, device)

        def run() -> torch.Tensor:
            with sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext():
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        try:
            times = interleaved(
                dict(zip(("forward", "backward"), halves(run, (q, k, v), (grad,)), strict=True)), device, rounds=3
            )
        except RuntimeError:  # not there on this machine
            continue
        rates[name] = flops / times["forward"].median, BACKWARD_PRODUCTS * flops / times["backward"].median
    best = min(rates, key=lambda name: 1 / rates[name][0] + BACKWARD_PRODUCTS / rates[name][1])
    return best, rates[best]


def block_bytes(args: Any, tokens: int) -> tuple[float, float]:
    """Least bytes that a block's norms, gates, rotations and GELU move forward and backward, in bfloat16:

    ../docs/performance.md lists them.
    """
    ratio = args.ffn_dim / args.dim
    return (36 + 4 * ratio) * tokens * args.dim, (54 + 6 * ratio) * tokens * args.dim


def roof(args: Any, tokens: int, batch: int, checkpoint: str, num_parameters: int, c: Ceilings) -> dict[str, float]:
    """Seconds of each of PARTS. checkpoint: mode none, selective (attention is kept) or full."""
    tokens_all, layers = batch * tokens, args.num_layers
    flops = {name: 2 * m * n * k * batch for name, (m, n, k) in shapes(args, tokens).items()}
    seconds = {name: flops[name] / c.gemm[shape] for name, shape in shapes(args, tokens).items()}
    products = 6 * seconds["square"] + seconds["up"] + seconds["down"]
    weights = 6 * seconds["square weight"] + seconds["up weight"] + seconds["down weight"]
    short = attention_flops(batch, tokens, args.text_len, args.dim)
    attention = attention_flops(batch, tokens, tokens, args.dim)
    # Keys and values of the text, embedders and head, at the rate of the square products.
    rest = args.flops(tokens, batch) - layers * (6 * flops["square"] + flops["up"] + flops["down"] + attention + short)
    forward, backward = block_bytes(args, tokens_all)
    again = {"none": 0, "selective": 1, "full": 1}[checkpoint]
    return {
        "attention": layers
        * (
            (attention * (1 + (checkpoint == "full")) + short * (1 + again)) / c.attention_forward
            + BACKWARD_PRODUCTS * (attention + short) / c.attention_backward
        ),
        "matrix products": layers * ((2 + again) * products + weights)
        + 3 * rest / c.gemm[shapes(args, tokens)["square"]],
        "norms and element-wise": layers * (forward * (1 + again) + backward) / c.copy,
        "optimizer": OPTIMIZER_BYTES * num_parameters / c.copy,
    }
