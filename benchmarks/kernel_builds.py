"""The Triton kernels compiled for Hopper (sm_90) ahead of time, which needs no GPU: registers, spills, shared memory.

    python benchmarks/kernel_builds.py [--widths 1536 5120] [--names "gated residual" ...] [--write docs/kernels.md]

It compiles what the operators would launch, with the same constants and alignments, for bfloat16 activations, float32
modulation and bfloat16 weights. An SM has 65,536 registers and 227 KB of shared memory. Spilled registers, in bytes per
thread, cost time.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.kernels.triton import launch, layer_norm_launch, rms_norm

TOKENS = {1536: 32760, 3072: 118800, 5120: 75600, 8192: 75600}
WIDTHS = (128, 1536, 3072, 5120)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
MARKER = "<!-- builds -->"


@dataclass(frozen=True)
class Build:
    """One compiled kernel. registers, spilled (bytes): per thread. shared: bytes per program."""

    name: str
    direction: str
    width: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int


def operators(D: int) -> dict[str, Callable[[str], Any]]:
    """{name: a function of "forward" or "backward" that launches the kernel on meta tensors}."""
    L = TOKENS.get(D, 32760)
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    x, w, mean, K = empty(1, L, D), empty(1, 1, D), empty(1, L, dtype=torch.float32), min(128, D)
    row, pair = (empty(1, n, 6, D, dtype=torch.float32)[:, :, 0] for n in (1, 2))
    cond_mask = empty(1, L, dtype=torch.bool)
    heads, freqs_cis = x.unflatten(-1, (-1, K)), empty(1, L, K // 2, dtype=torch.complex64)

    def layer_norm(y: Any, gate: Any, scale: Any, affine: bool, cond_mask: Any = None) -> Callable[[str], Any]:
        total, normed = None if y is None else x, None if scale is None else x
        return lambda direction: (
            layer_norm_launch.forward(x, y, gate, scale, scale, cond_mask, affine, 1e-6)
            if direction == "forward"
            else layer_norm_launch.backward(
                total, normed, normed, y, gate, scale, cond_mask, mean, mean, affine, gate is not None, True
            )
        )

    def rms_norm_rope(x: Any, weight: Any, freqs_cis: Any) -> Callable[[str], Any]:
        rstd = rms_norm.empty_rstd(x, weight)
        return lambda direction: (
            rms_norm.launch_forward(x, weight, freqs_cis, None, 1e-6)
            if direction == "forward"
            else rms_norm.launch_backward(x, x, weight, freqs_cis, rstd, False, True)
        )

    return {
        "AdaLN": layer_norm(None, None, row, False),
        "AdaLN, mask": layer_norm(None, None, pair, False, cond_mask),
        "LayerNorm": layer_norm(None, None, w, True),
        "gated residual": layer_norm(x, row, None, False),
        "gated residual, LayerNorm": layer_norm(x, row, w, True),
        "gated residual, LayerNorm, mask": layer_norm(x, pair, w, True, cond_mask),
        "residual, AdaLN": layer_norm(x, None, row, False),
        "gated residual, AdaLN": layer_norm(x, row, row, False),
        "gated residual, AdaLN, mask": layer_norm(x, pair, pair, False, cond_mask),
        "RMSNorm": rms_norm_rope(x.unsqueeze(2), empty(D), None),
        "RMSNorm, RoPE": rms_norm_rope(heads, empty(D), freqs_cis),
        "RMSNorm per head": rms_norm_rope(heads, empty(K), None),
        "RMSNorm per head, RoPE": rms_norm_rope(heads, empty(K), freqs_cis),
    }


@contextmanager
def recorded_launches() -> Iterator[list]:
    """Record (kernel, arguments, constants) of each launch instead of launching it."""
    from titan_video.kernels.triton import layer_norm_kernels, rms_norm_kernels

    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **constants: recorded.append((self.kernel, args, constants))

    with mock.patch.object(launch, "interpreted", lambda: True):
        patches = [
            mock.patch.object(module, name, Recorder(getattr(module, name)))
            for module in (layer_norm_kernels, rms_norm_kernels)
            for name in vars(module)
            if name.endswith(("_forward", "_backward"))
        ]
        for patch in patches:
            patch.start()
        try:
            yield recorded
        finally:
            for patch in patches:
                patch.stop()


def compile_kernel(kernel: Any, args: tuple, constants: dict[str, Any]) -> Any:
    """Compile as Triton does at the first launch with these arguments, for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    num_warps = constants.pop("num_warps")
    signature, constexprs, attributes = {}, {}, {}
    for name, value in (dict(zip(kernel.arg_names, args, strict=False)) | constants).items():
        place = (kernel.arg_names.index(name),)
        if name in constants or value is None or isinstance(value, int) and value == 1:
            signature[name], constexprs[place] = "constexpr", value
            continue
        signature[name] = (
            TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        )
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=constexprs,
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes per thread, which cuobjdump reads from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", listing)[1]) for word in ("REG", "STACK"))


def build(name: str, direction: str, D: int) -> Build:
    with recorded_launches() as recorded:
        operators(D)[name](direction)
    [(kernel, args, constants)] = recorded
    warps = constants["num_warps"]
    compiled = compile_kernel(kernel, args, dict(constants))
    return Build(name, direction, D, warps, constants["STAGES"], *resources(compiled), compiled.metadata.shared)


def table(builds: list[Build]) -> str:
    rows = [
        "| kernel | | width | warps | stages | registers | spilled | shared, KB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {b.name} | {b.direction} | {b.width} | {b.warps} | {b.stages} | {b.registers} | {b.spilled} | "
        f"{b.shared / 1024:.1f} |"
        for b in builds
    ]
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--names", nargs="+", default=list(operators(128)))
    parser.add_argument("--write", type=Path, help=f"Markdown file; the table goes between two lines {MARKER}")
    options = parser.parse_args(argv)
    cases = itertools.product(options.widths, options.names, ("forward", "backward"))
    builds = [build(name, direction, width) for width, name, direction in cases]
    print(table(builds))
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{table(builds)}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
