"""The lower bound of a step's time: what its parts would take at the rates that this machine reaches in the same run.

    T_roof = matmuls / their rates + attention / its rates + bytes / copy bandwidth

Bytes are the least that the block's other operators must move: each input read once and each output written once (see
`block_bytes`). The optimizer reads weight, gradient and two moments and writes three of them, clipping reads the
gradient, and the master weights are cast once in each direction.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import attention_tensors, copy_bandwidth, gemm_rate, halves, interleaved, markdown
from titan_video.models.layers import attention_flops

BACKWARD_RATIO = 2.5  # attention: backward has five matmuls, forward two
PARTS = ("attention", "matmuls", "norms and element-wise", "optimizer")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OPTIMIZER_BYTES = 7 * 4 + 4 + 2 * 6  # per parameter


@dataclass(frozen=True)
class Ceilings:
    """Rates that the machine reaches.

    copy: bytes/s, read and written. gemm: {(m, n, k): FLOP/s}. attention: the fastest backend; attention_forward and
    attention_backward: its FLOP/s.
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
            [f"matmul {m:,} x {n:,} x {k:,}", f"{rate / 1e12:,.0f} TFLOP/s"] for (m, n, k), rate in self.gemm.items()
        ]
        rows += [[f"attention forward ({self.attention})", f"{self.attention_forward / 1e12:,.0f} TFLOP/s"]]
        rows += [[f"attention backward ({self.attention})", f"{self.attention_backward / 1e12:,.0f} TFLOP/s"]]
        return markdown(["ceiling", "measured"], rows)


def gemm_shapes(args: Any, tokens: int) -> dict[str, tuple[int, int, int]]:
    """(m, n, k) of a block's matmuls with all tokens: forward (and input gradients), and weight gradients."""
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
        copied, {s: gemm_rate(*s, device) for s in gemm_shapes(args, tokens).values()}, attention, forward, backward
    )


def best_attention(args: Any, tokens: int, device: torch.device) -> tuple[str, tuple[float, float]]:
    """(backend, (FLOP/s of forward, FLOP/s of backward)) of torch's fastest self-attention of the tokens."""
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
        except RuntimeError:  # this machine does not have it
            continue
        rates[name] = flops / times["forward"].median, BACKWARD_RATIO * flops / times["backward"].median
    best = min(rates, key=lambda name: 1 / rates[name][0] + BACKWARD_RATIO / rates[name][1])
    return best, rates[best]


def block_bytes(args: Any, tokens: int) -> tuple[float, float]:
    """The least bytes that norms, gates, RoPE and GELU of a block move in (forward, backward), in bfloat16."""
    ratio = args.ffn_dim / args.dim
    return (36 + 4 * ratio) * tokens * args.dim, (54 + 6 * ratio) * tokens * args.dim


def roof(args: Any, tokens: int, batch: int, checkpoint: str, num_parameters: int, c: Ceilings) -> dict[str, float]:
    """Seconds of each of PARTS. checkpoint: mode none, selective (attention is saved) or full."""
    tokens_all, layers = batch * tokens, args.num_layers
    flops = {name: 2 * m * n * k * batch for name, (m, n, k) in gemm_shapes(args, tokens).items()}
    seconds = {name: flops[name] / c.gemm[shape] for name, shape in gemm_shapes(args, tokens).items()}
    activations = 6 * seconds["square"] + seconds["up"] + seconds["down"]
    weights = 6 * seconds["square weight"] + seconds["up weight"] + seconds["down weight"]
    short = attention_flops(batch, tokens, args.text_len, args.dim)
    attention = attention_flops(batch, tokens, tokens, args.dim)
    # Keys and values of the text, embedders and head, at the rate of the square matmuls.
    rest = args.flops(tokens, batch) - layers * (6 * flops["square"] + flops["up"] + flops["down"] + attention + short)
    forward, backward = block_bytes(args, tokens_all)
    again = {"none": 0, "selective": 1, "full": 1}[checkpoint]
    return {
        "attention": layers
        * (
            (attention * (1 + (checkpoint == "full")) + short * (1 + again)) / c.attention_forward
            + BACKWARD_RATIO * (attention + short) / c.attention_backward
        ),
        "matmuls": layers * ((2 + again) * activations + weights)
        + 3 * rest / c.gemm[gemm_shapes(args, tokens)["square"]],
        "norms and element-wise": layers * (forward * (1 + again) + backward) / c.copy,
        "optimizer": OPTIMIZER_BYTES * num_parameters / c.copy,
    }
