"""What one device computes: matrix products, attention, kernels that move memory, launches. For machine.py."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from titan_video.kernels import attention
from titan_video.planner.profile.stopwatch import Stopwatch, random_tensor

MAX_SCORES = 2**28  # elements of the attention matrix that the backend `math` may make
READ_BYTES = 2**24


# ---- matrix products ----


def product_shapes(block: nn.Module, rows: list[int], text_rows: int) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of a block's Linears: forward, gradient of the input, gradient of the weight.

    rows: tokens of a micro-batch on one rank, for each way to spread them. text_rows: of the text.
    """
    widths = sorted({tuple(m.weight.shape) for m in block.modules() if isinstance(m, nn.Linear)})
    shapes = []
    for outputs, inputs in widths:
        for n in (*rows, text_rows):
            shapes += [(n, inputs, outputs), (n, outputs, inputs), (outputs, n, inputs)]
    return list(dict.fromkeys(shapes))


def product_samples(watch: Stopwatch, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of [[product]]. A product that takes more than the budget is cut in its largest size, and keeps its name."""
    samples, per_second = [], product_rate(watch, (512, 512, 512), dtype)
    for shape in shapes:
        rate = product_rate(watch, bounded(shape, per_second * watch.budget), dtype)
        samples.append(dict(zip(("rows", "inner", "columns"), shape, strict=True)) | {"tflops": rate / 1e12})
    return samples


def product_rate(watch: Stopwatch, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    rows, inner, columns = shape
    a = random_tensor(rows, inner, dtype=dtype, device=watch.device)
    b = random_tensor(inner, columns, dtype=dtype, device=watch.device)
    return 2 * rows * inner * columns / watch.compute_seconds(lambda: a @ b)


def bounded(shape: tuple[int, int, int], flops: float) -> tuple[int, int, int]:
    """The shape with its largest size cut to keep the product below so many FLOPs."""
    rows, inner, columns = shape
    if (excess := 2 * rows * inner * columns / flops) <= 1:
        return shape
    sizes = list(shape)
    sizes[sizes.index(max(sizes))] = max(16, int(max(sizes) / excess))
    return tuple(sizes)


def measure_sharing(watch: Stopwatch, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """How many ranks share a core; later figures of `watch.compute_seconds` have it."""
    a = random_tensor(*shape[:2], dtype=dtype, device=watch.device)
    b = random_tensor(*shape[1:], dtype=dtype, device=watch.device)
    watch.measure_sharing(lambda: a @ b)


# ---- attention ----


def attention_samples(
    watch: Stopwatch, lengths: list[int], heads: tuple[int, int, int], dtype: torch.dtype, flops: float
) -> Iterator[dict[str, Any]]:
    """Rows of [[attention]] of every backend that runs here, with the kernel's 2.5 times the FLOPs in backward.

    heads: (clips, heads, width) of a micro-batch; fewer clips and heads where `flops` would be exceeded.
    """
    clips, num_heads, head_dim = heads
    for name in (n for n in attention.NAMES if n != "auto"):
        try:
            attention.set_backend(name, watch.device, dtype, head_dim)
        except ValueError:  # it does not run here
            continue
        for length in lengths:
            of_one_head = 4 * length * length * head_dim
            most = int(flops / (3.5 * of_one_head))
            # One head of the shortest is measured however slow the machine is.
            num, b = min(num_heads, max(most, int(length == min(lengths)))), max(1, min(clips, most // num_heads))
            if num < 1 or (name == "math" and b * num * length * length > MAX_SCORES):
                continue
            forward, both = _attention_seconds(watch, (b, length, num, head_dim), dtype)
            done = b * num * of_one_head
            rates = done / forward, 2.5 * done / max(both - forward, 0.1 * forward)
            yield {
                "backend": name,
                "tokens": length,
                "head_dim": head_dim,
                "forward_tflops": rates[0] / 1e12,
                "backward_tflops": rates[1] / 1e12,
            }


def _attention_seconds(watch: Stopwatch, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[float, float]:
    """(forward, forward and backward)"""
    q, k, v, grad = (random_tensor(*shape, dtype=dtype, device=watch.device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward_backward() -> None:
        torch.autograd.grad(attention.attention(q, k, v), leaves, grad)

    with torch.no_grad():
        forward = watch.compute_seconds(lambda: attention.attention(q, k, v))
    return forward, watch.compute_seconds(forward_backward)


# ---- memory ----


def copy_rate(watch: Stopwatch, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Bytes per second, read and written, of a copy."""
    x = random_tensor(*shape, dtype=dtype, device=watch.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / watch.compute_seconds(lambda: y.copy_(x))


def elementwise_rate(watch: Stopwatch, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Bytes per second, read and written, of what surrounds a block's products: a sum, a scaling, a norm and a GELU."""
    x, y = (random_tensor(*shape, dtype=dtype, device=watch.device) for _ in range(2))

    def run() -> None:
        torch.add(x, y)
        torch.mul(x, y)
        F.layer_norm(x, shape[1:])
        F.gelu(x, approximate="tanh")

    return (3 + 3 + 2 + 2) * x.nbytes / watch.compute_seconds(run)


def host_copy_rate(watch: Stopwatch, num_bytes: int) -> float:
    """Bytes per second between device and pinned host memory, in the slower direction; on a CPU of a copy."""
    on_gpu = watch.device.type == "cuda"
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    here = torch.empty(num_bytes, dtype=torch.uint8, device=watch.device)
    out = watch.seconds(lambda: host.copy_(here, non_blocking=on_gpu))
    back = watch.seconds(lambda: here.copy_(host, non_blocking=on_gpu))
    return num_bytes / max(out, back)


def host_memory_rate(watch: Stopwatch, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy in host memory."""
    x = torch.ones(num_bytes // 4)
    y = torch.empty_like(x)
    return 2 * x.nbytes / Stopwatch(torch.device("cpu"), watch.budget).seconds(lambda: y.copy_(x))


def read_rate(watch: Stopwatch) -> float:
    """Bytes per second of a file that was just written, so from the page cache if the disk has one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        path.write_bytes(bytes(READ_BYTES))
        return READ_BYTES / Stopwatch(torch.device("cpu"), watch.budget).seconds(path.read_bytes)


# ---- launches ----


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_operators += 1
        return func(*args, **(kwargs or {}))


class _SmallBlock(nn.Module):
    """So small that computing takes no time."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x) * 1.5 + x)))


def operator_seconds(watch: Stopwatch) -> float:
    """Host time of one operator of an eager block, forward and backward with autograd's share."""
    block, x = _SmallBlock().to(watch.device), torch.ones(4, 16, device=watch.device)

    def run() -> None:
        block(x).sum().backward()

    with _Counted() as counted:
        run()
    return watch.host_seconds(run) / counted.num_operators


def compiled_seconds(watch: Stopwatch) -> float:
    """Host time of one kernel of a compiled block, forward and backward."""
    from torch._inductor import metrics  # private, and the only count of the kernels that it generates

    block, x = torch.compile(_SmallBlock().to(watch.device), fullgraph=True), torch.ones(4, 16, device=watch.device)
    before = metrics.generated_kernel_count
    block(x).sum().backward()
    kernels = metrics.generated_kernel_count - before + 5  # and the products: two forward, three backward
    return watch.host_seconds(lambda: block(x).sum().backward()) / kernels


def fsdp_seconds(watch: Stopwatch) -> float:
    """Host time of one of FSDP's collectives, with its own work, but without what it waits for.

    Difference of a small module with and without FSDP: two gathers and a reduction.
    """
    plain, sharded = (nn.Linear(64, 64, device=watch.device) for _ in range(2))
    mesh = init_device_mesh(watch.device.type, (dist.get_world_size(),))
    fully_shard(sharded, mesh=mesh)
    x = torch.ones(4, 64, device=watch.device)
    alone = watch.host_seconds(lambda: plain(x).sum().backward())
    return max((watch.host_seconds(lambda: sharded(x).sum().backward()) - alone) / 3, 1e-6)
