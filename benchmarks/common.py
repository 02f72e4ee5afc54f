"""What the benchmarks share: random data, timing, rates that the machine reaches, and results as tables and JSON."""

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from titan_video.tools.device import get_device, synchronize

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "triton",
    "diffusers",
    "torchao",
    "liger-kernel",
    "flash-attn",
    "flash-attn-4",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


# ---- options and results ----


def options(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--toy",
        action="store_true",
        help="small shapes and few rounds, to try the script out; the figures mean nothing",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="file to write the figures to; those in benchmarks/results make docs/performance.md (report.py)",
    )
    return parser


def get_tensor_device(cli: argparse.Namespace) -> torch.device:
    return torch.device("cpu") if cli.device == "cpu" else get_device(0)


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, hardware and versions of packages."""
    found = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "device": p.name,
            "memory GiB": round(p.total_memory / 2**30, 1),
            "capability": f"{p.major}.{p.minor}",
            "CUDA": torch.version.cuda,
        }
        found |= {"cuDNN": torch.backends.cudnn.version()}
    else:
        found |= {"device": "CPU", "threads": torch.get_num_threads()}
    return found


def failure(error: Exception) -> str:
    """One line that describes the error, for the results; the other measurements go on."""
    return (
        "out of memory"
        if isinstance(error, torch.OutOfMemoryError)
        else f"{type(error).__name__}: {error}".splitlines()[0][:200]
    )


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, benchmark: str, cli: argparse.Namespace, env: dict[str, Any], results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = {k: v for k, v in vars(cli).items() if k != "json"}
    content = {"benchmark": benchmark, "arguments": arguments, "environment": env, "results": results}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    cells = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


# ---- data ----


def rand(
    *shape: int, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, grad: bool = False, scale: float = 1.0
) -> Tensor:
    """Normal random numbers. Kernels on zeros would be faster than on real data."""
    return (scale * torch.randn(*shape, device=device, dtype=torch.float32)).to(dtype).requires_grad_(grad)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|, in float64."""
    return (
        torch.linalg.vector_norm(x.double() - reference.double()) / torch.linalg.vector_norm(reference.double())
    ).item()


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """Cosine of two lists of tensors, each taken as one vector."""
    dot = norm_a = norm_b = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double().flatten(), y.double().flatten().to(x.device)
        dot, norm_a, norm_b = dot + x.dot(y).item(), norm_a + x.dot(x).item(), norm_b + y.dot(y).item()
    return dot / math.sqrt(norm_a * norm_b) if norm_a * norm_b else float(norm_a == norm_b)


# ---- timing ----


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Spread between the quartiles; between minimum and maximum for fewer than three rounds."""
        if len(self.seconds) < 3:
            return max(self.seconds) - min(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low

    def ties(self, other: "Times") -> bool:
        """Whether the medians differ by less than twice the larger spread; then neither counts as faster."""
        return abs(self.median - other.median) < 2 * max(self.iqr, other.iqr)

    def speedup(self, over: "Times") -> str:
        """How many times as fast as `over`: the median of the ratios of each round."""
        ratio = statistics.median(b / a for a, b in zip(self.seconds, over.seconds, strict=True))
        return f"{ratio:.2f}" + (" (tie)" if self.ties(over) else "")

    def as_dict(self) -> dict[str, Any]:
        return {"median": self.median, "iqr": self.iqr, "seconds": self.seconds}


def get_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 1, queued: bool = False) -> float:
    """Seconds of one call, by the GPU's clock on a GPU.

    queued: the GPU waits until the calls are queued, so that the time of a short kernel is not the host's launch time.
    """
    synchronize(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(20_000_000)  # clock cycles, about 10 ms
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begun) / repeats


def interleaved(
    functions: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    budget: float = 0.01,
    queued: bool = False,
) -> dict[str, Times]:
    """Time each function once per round, in alternating order, so that a drift of the clock rate affects all equally.

    budget: seconds for which a function is repeated in a round, at most 50 times; 0: once. queued: see `get_seconds`.
    The caller has warmed the functions up.
    """
    repeats = {
        name: max(1, min(50, int(budget / max(get_seconds(f, device), 1e-6)))) if budget else 1
        for name, f in functions.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in functions if i % 2 == 0 else reversed(functions):
            seconds[name].append(get_seconds(functions[name], device, repeats[name], queued))
    return {name: Times(tuple(s)) for name, s in seconds.items()}


# ---- ceilings: rates that this machine reaches, measured in the same run ----


def copy_bandwidth(device: torch.device, num_bytes: int = 2**30, rounds: int = 10) -> float:
    """Bytes per second of a plain copy, reads and writes counted."""
    source = rand(num_bytes // 2, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, rounds)
    return 2 * source.nbytes / times["copy"].median


def gemm_rate(m: int, n: int, k: int, device: torch.device, rounds: int = 5) -> float:
    """FLOP/s of [m, k] x [n, k]^T in bfloat16, on random data."""
    a, b = rand(m, k, device=device), rand(n, k, device=device)
    for _ in range(2):
        F.linear(a, b)
    return 2 * m * n * k / interleaved({"gemm": lambda: F.linear(a, b)}, device, rounds)["gemm"].median


def attention_tensors(
    tokens: int, keys: int, heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v with requires_grad, and a gradient of the output; all [1, tokens or keys, H, K]."""
    q, grad = (rand(1, tokens, heads, head_dim, device=device, grad=wanted) for wanted in (True, False))
    k, v = (rand(1, keys, heads, head_dim, device=device, grad=True) for _ in range(2))
    return q, k, v, grad


def leaves(values: Any) -> tuple[Tensor, ...]:
    """The tensors among `values` that require gradients."""
    return tuple(
        v
        for v in (values if isinstance(values, (tuple, list)) else (values,))
        if isinstance(v, Tensor) and v.requires_grad
    )


def halves(
    forward: Callable[[], Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward without autograd, backward alone) as functions for timing, warmed up. grads: of the outputs."""
    torch._functorch.config.donated_buffer = False  # because the compiled backward runs more than once
    out = leaves(forward())

    def backward() -> None:
        torch.autograd.grad(out, inputs, grads, retain_graph=True)

    def plain() -> None:
        with torch.no_grad():
            forward()

    for _ in range(2):
        plain()
        backward()
    return plain, backward
