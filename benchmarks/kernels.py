"""Each memory-bound operator of a block, forward and backward: ours, torch, compiled torch, and Liger if installed.

    python benchmarks/kernels.py [--ops ada_layer_norm ...] [--json FILE]

All are timed in turns in one process, on the same random bfloat16 tensors. Bytes are what the operator must move: each
input read once and each output written once, in bfloat16, with float32 freqs_cis; statistics and modulation, a few
bytes per row, are left out. The fraction is of the bandwidth of a plain copy, read and write, measured in the same run.
Errors are against float64: the largest ratio of our error to compiled torch's, over results and gradients. Bitwise:
whether two runs give the same bits.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.common import (
    copy_bandwidth,
    failure,
    get_tensor_device,
    halves,
    interleaved,
    leaves,
    markdown,
    rand,
    relative_error,
)
from titan_video import kernels
from titan_video.kernels import reference
from titan_video.models.layers import rope_freqs_cis

SHAPES = ((32760, 1536), (75600, 5120), (118800, 3072))
EPS, HEAD_DIM = 1e-6, 128


@dataclass(frozen=True)
class Op:
    """One operator.

    arguments: (rows, width, device) -> the arguments of `name` in titan_video.kernels. forward, backward: bytes per
    element; row: additional bytes per row. liger: the class of liger_kernel.transformers that computes the same.
    """

    name: str
    arguments: Callable[[int, int, torch.device], tuple]
    forward: int
    backward: int
    row: int = 0
    liger: str = ""


def _token(rows: int, D: int, device: torch.device) -> Tensor:
    return rand(1, rows, D, device=device, grad=True)


def _row(D: int, device: torch.device) -> Tensor:
    return rand(1, 1, D, device=device, dtype=torch.float32, grad=True)


def _vector(D: int, device: torch.device) -> Tensor:
    return rand(D, device=device, grad=True)


def _freqs_cis(rows: int, D: int, device: torch.device) -> Tensor:
    index = torch.arange(rows, device=device)
    head = min(HEAD_DIM, D)
    side = 2 * (head // 6)
    return rope_freqs_cis(
        torch.stack([index // 1560, index % 1560 // 52, index % 52], dim=-1).unsqueeze(0),
        (head - 2 * side, side, side),
        10000.0,
    )


OPS = {
    "AdaLN": Op("ada_layer_norm", lambda n, D, d: (_token(n, D, d), _row(D, d), _row(D, d), EPS), 4, 6),
    "residual": Op("gated_residual", lambda n, D, d: (_token(n, D, d), _token(n, D, d), _row(D, d)), 6, 6),
    "residual, LayerNorm": Op(
        "residual_layer_norm",
        lambda n, D, d: (_token(n, D, d), _token(n, D, d), _row(D, d), _vector(D, d), _vector(D, d), EPS),
        8,
        12,
    ),
    "residual, AdaLN": Op(
        "residual_ada_layer_norm",
        lambda n, D, d: (_token(n, D, d), _token(n, D, d), None, _row(D, d), _row(D, d), EPS),
        8,
        8,
    ),
    "LayerNorm": Op(
        "layer_norm", lambda n, D, d: (_token(n, D, d), _vector(D, d), _vector(D, d), EPS), 4, 6, liger="LigerLayerNorm"
    ),
    "RMSNorm": Op("rms_norm", lambda n, D, d: (_token(n, D, d), _vector(D, d), EPS), 4, 6, liger="LigerRMSNorm"),
    "RMSNorm, RoPE": Op(
        "rms_norm_rope",
        lambda n, D, d: (_token(n, D, d), _vector(D, d), _freqs_cis(n, D, d), EPS),
        4,
        6,
        row=4 * HEAD_DIM,
    ),
}


def implementations(op: Op, arguments: tuple, device: torch.device, backend: str) -> dict[str, Callable[[], Any]]:
    """{implementation: the operator on these arguments}."""
    plain, best = getattr(reference, op.name), kernels.resolve_backend("auto", device)

    def ours() -> Any:
        kernels.set_backend(best)
        return getattr(kernels, op.name)(*arguments)

    compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)
    found = {"ours": ours, "eager": lambda: plain(*arguments), "compiled": lambda: compiled(*arguments)}
    if op.liger and device.type == "cuda":
        try:
            import liger_kernel.transformers as liger
        except ImportError:
            return found
        x, weight = arguments[:2]
        module = getattr(liger, op.liger)(weight.numel(), eps=EPS).to(device=device, dtype=weight.dtype)
        module.weight = torch.nn.Parameter(weight.detach())
        found["Liger"] = lambda: module(x)
    return found


def get_results(run: Callable[[], Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients."""
    out = leaves(run())
    return [
        t.detach()
        for t in (*out, *torch.autograd.grad(out, inputs, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]))
    ]


def errors(op: Op, arguments: tuple, grads: tuple[Tensor, ...], runs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Relative errors of results and gradients, ours and compiled torch's; their largest ratio; "bitwise"."""
    inputs = leaves(arguments)
    exact = tuple(_to_float64(a) for a in arguments)
    reference_results = get_results(lambda: getattr(reference, op.name)(*exact), leaves(exact), grads)
    found = {
        name: [
            relative_error(a, b) for a, b in zip(get_results(runs[name], inputs, grads), reference_results, strict=True)
        ]
        for name in ("ours", "compiled")
    }
    ours, again = get_results(runs["ours"], inputs, grads), get_results(runs["ours"], inputs, grads)
    found["ratio"] = max((a + 1e-12) / (b + 1e-12) for a, b in zip(found["ours"], found["compiled"], strict=True))
    return found | {"bitwise": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))}


def _to_float64(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    exact = argument.detach().to(torch.complex128 if argument.is_complex() else torch.float64)
    return exact.requires_grad_(argument.requires_grad)


def run_op(
    name: str, rows: int, width: int, device: torch.device, rounds: int, copy: float, backend: str
) -> dict[str, Any]:
    op = OPS[name]
    arguments = op.arguments(rows, width, device)
    inputs, functions, failed, error = leaves(arguments), {}, {}, {"ratio": None, "bitwise": None}
    runs = implementations(op, arguments, device, backend)
    grads = tuple(torch.randn_like(out) for out in leaves(runs["eager"]()))
    for who, run in runs.items():
        try:
            wanted = inputs[:1] if who == "Liger" else inputs
            functions[who, "forward"], functions[who, "backward"] = halves(run, wanted, grads)
        except Exception as e:
            failed[who] = failure(e)
    times = interleaved(functions, device, rounds, queued=True)
    try:
        error = errors(op, arguments, grads, runs)
    except Exception as e:
        failed["errors"] = failure(e)
    result: dict[str, Any] = {"op": name, "rows": rows, "width": width, "failed": failed, "errors": error}
    for half, per_element in (("forward", op.forward), ("backward", op.backward)):
        moved = per_element * rows * width + op.row * rows
        found = {who: times[who, half] for who in runs if who not in failed}
        result[half] = {"bytes": moved, "times": {who: t.as_dict() for who, t in found.items()}}
        if "ours" in found:
            result[half]["fraction"] = moved / found["ours"].median / copy
            result[half]["ties"] = [who for who, t in found.items() if who != "ours" and t.ties(found["ours"])]
    return result


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for half in ("forward", "backward"):
            times = {who: t["median"] for who, t in r[half]["times"].items()}
            if "ours" not in times:
                rows.append([r["op"], f"{r['rows']:,} x {r['width']:,}", half, r["failed"]["ours"], *[None] * 7])
                continue
            others = [
                f"{times['ours'] / times[who]:.2f}" + (" (tie)" if who in r[half]["ties"] else "")
                if who in times
                else None
                for who in ("eager", "compiled", "Liger")
            ]
            micro, spread = 1e6 * times["ours"], 1e6 * r[half]["times"]["ours"]["iqr"]
            share = [f"{r[half]['bytes'] / 2**20:,.0f}", f"{micro:,.1f}", f"{spread:.1f}", f"{r[half]['fraction']:.2f}"]
            equal = [r["errors"]["ratio"], {True: "yes", False: "NO", None: None}[r["errors"]["bitwise"]]]
            rows.append([r["op"], f"{r['rows']:,} x {r['width']:,}", half, *share, *others, *equal])
    header = [
        "op",
        "rows x width",
        "half",
        "MiB",
        "ours, us",
        "IQR, us",
        "of copy",
        "time / eager's",
        "/ compiled's",
        "/ Liger's",
    ]
    header += ["error / compiled's", "bitwise"]
    return markdown(header, rows)


def main(argv: list[str]) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    cli = parser.parse_args(argv)
    device, backend = get_tensor_device(cli), "eager" if cli.toy else "inductor"
    copy = copy_bandwidth(device, 2**22 if cli.toy else 2**30)
    print(f"copy {copy / 1e12:.2f} TB/s; ours is {kernels.resolve_backend('auto', device)}\n", flush=True)
    results, env = [], common.environment(device)
    for shape in ((33, 96),) if cli.toy else SHAPES:
        for name in cli.ops:
            results.append(run_op(name, *shape, device, cli.rounds, copy, backend))
            torch._dynamo.reset()
        print(table(results[-len(cli.ops) :]) + "\n", flush=True)
        if cli.json:
            common.write_json(cli.json, "kernels", cli, env, {"copy": copy, "ops": results})


if __name__ == "__main__":
    main(sys.argv[1:])
