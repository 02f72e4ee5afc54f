"""Each backend of model.attention, forward and backward, at the lengths of real clips, and the kernels that ran.

    python benchmarks/attention.py [--json FILE]

The backends are timed in turns in one process. Forward counts two matmuls, backward five. A backend that this machine
does not have is listed with the reason. Errors are those of output and gradients against float64, on fewer tokens.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.common import (
    attention_tensors,
    failure,
    get_tensor_device,
    halves,
    interleaved,
    markdown,
    relative_error,
)
from benchmarks.roof import BACKWARD_RATIO
from titan_video.kernels import attention
from titan_video.models.layers import attention_flops

HEAD_DIM = 128
SHAPES = ((32760, 12), (75600, 12), (32760, 40), (75600, 40))  # tokens, heads: Wan 1.3B and 14B
SKIPPED = ("math", "auto")  # math stores all scores; auto is one of the others
ERROR_TOKENS = 2048


def backend(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention with this backend. ValueError: this machine does not have it."""
    choose = partial(attention.set_backend, name, device, torch.bfloat16, HEAD_DIM)
    choose()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        choose()
        return attention.attention(q, k, v)

    return run


def backends(device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """(the available backends by name, why each other one is unavailable)"""
    found, missing = {}, {}
    for name in attention.NAMES:
        if name in SKIPPED:
            continue
        try:
            found[name] = backend(name, device)
        except ValueError as e:
            missing[name] = str(e)
    return found, missing


def errors(run: Callable, heads: int, device: torch.device, tokens: int) -> float:
    """The largest relative error of output and gradients."""
    *qkv, grad = attention_tensors(tokens, tokens, heads, HEAD_DIM, device)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    attention.set_backend("math", device, torch.float64, HEAD_DIM)
    reference = attention.attention(*exact)
    reference = [reference, *torch.autograd.grad(reference, exact, grad.double())]
    out = run(*qkv)
    return max(
        relative_error(a, b) for a, b in zip([out, *torch.autograd.grad(out, qkv, grad)], reference, strict=True)
    )


def get_kernels(run: Callable, heads: int, device: torch.device, tokens: int) -> list[str]:
    """Names of the three kernels (on a CPU, operators) with the most time in a forward and backward."""
    *qkv, grad = attention_tensors(tokens, tokens, heads, HEAD_DIM, device)
    torch.autograd.grad(run(*qkv), qkv, grad)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as p:
        torch.autograd.grad(run(*qkv), qkv, grad)
    events = sorted(p.key_averages(), key=lambda e: -(e.self_device_time_total if gpu else e.self_cpu_time_total))
    return [e.key for e in events if not gpu or e.device_type == torch.autograd.DeviceType.CUDA][:3]


def run_shape(tokens: int, heads: int, runs: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, Any]:
    flops = attention_flops(1, tokens, tokens, heads * HEAD_DIM)
    functions, failed = {}, {}
    for name, run in runs.items():
        *qkv, grad = attention_tensors(tokens, tokens, heads, HEAD_DIM, device)
        try:
            functions[f"{name} forward"], functions[f"{name} backward"] = halves(
                partial(run, *qkv), tuple(qkv), (grad,)
            )
        except Exception as e:
            failed[name] = failure(e)
    times = interleaved(functions, device, rounds)
    results = {name: {"failed": reason} for name, reason in failed.items()}
    for name in runs:
        if name not in failed:
            forward, backward = times[f"{name} forward"], times[f"{name} backward"]
            rates = {
                "forward TFLOP/s": flops / forward.median / 1e12,
                "backward TFLOP/s": BACKWARD_RATIO * flops / backward.median / 1e12,
            }
            results[name] = {"forward": forward.as_dict(), "backward": backward.as_dict(), **rates}
    return {"tokens": tokens, "heads": heads, "backends": results}


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for name, b in r["backends"].items():
            if "failed" in b:
                rows.append([f"{r['tokens']:,}", r["heads"], name, b["failed"], None, None, None])
                continue
            spreads = [f"{1000 * b[half]['iqr']:.2f}" for half in ("forward", "backward")]
            rows.append([f"{r['tokens']:,}", r["heads"], name, b["forward TFLOP/s"], b["backward TFLOP/s"], *spreads])
    return markdown(
        ["tokens", "heads", "backend", "forward, TFLOP/s", "backward, TFLOP/s", "IQR forward, ms", "IQR backward, ms"],
        rows,
    )


def kernels_table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, r.get("failed") or f"{r['error']:.1e}", ", ".join(f"`{k[:90]}`" for k in r.get("kernels", []))]
        for name, r in found.items()
    ]
    return markdown(["backend", "error against float64", "kernels that ran"], rows)


def main(argv: list[str]) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    cli = parser.parse_args(argv)
    device = get_tensor_device(cli)
    runs, missing = backends(device)
    tokens = 64 if cli.toy else ERROR_TOKENS
    ran: dict[str, dict[str, Any]] = {name: {"failed": reason} for name, reason in missing.items()}
    for name, run in runs.items():
        try:
            ran[name] = {"error": errors(run, 2, device, tokens), "kernels": get_kernels(run, 2, device, tokens)}
        except Exception as e:  # measure the others all the same
            ran[name] = {"failed": failure(e)}
    auto = attention.set_backend("auto", device, torch.bfloat16, HEAD_DIM)
    print(f"auto is {auto} here\n\n{kernels_table(ran)}\n", flush=True)
    working = {name: run for name, run in runs.items() if "failed" not in ran[name]}
    results = [run_shape(*shape, working, device, cli.rounds) for shape in (((64, 2),) if cli.toy else SHAPES)]
    print(table(results))
    if cli.json:
        common.write_json(
            cli.json, "attention", cli, common.environment(device), {"auto": auto, "shapes": results, "kernels": ran}
        )


if __name__ == "__main__":
    main(sys.argv[1:])
