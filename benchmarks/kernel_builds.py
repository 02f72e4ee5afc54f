"""The Triton kernels compiled for Hopper (sm_90) ahead of time, which needs no GPU: registers, spills, shared memory.

    python benchmarks/kernel_builds.py [--widths 1536 5120] [--names "gated residual" ...] [--write docs/kernels.md]

It compiles what the operators would launch, with the same constants and alignments, for bfloat16 activations, float32
modulation and bfloat16 weights. An SM has 65,536 registers and 227 KB of shared memory. Spilled registers, in bytes per
thread, cost time.

instructions   what a warp issues for a row, from the machine code: the longest loop
programs       as many as fit on an SM at once; a launch has so many for each SM, one wave
issue ratio    bytes of activations a cycle that an SM reads and writes, if each of its four schedulers issues an
               instruction in every cycle, over its share of a copy at COPY. At 1, the kernel is as fast as a copy only
               if no cycle is lost.
"""

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.kernels.triton import gelu, launch, layer_norm, layer_norm_launch, projections, rms_norm

TOKENS = {1536: 32760, 3072: 118800, 5120: 75600, 8192: 75600}
WIDTHS = (128, 1536, 3072, 5120)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
LENGTHS = (32760, 75600, 118800)
MARKER = "<!-- builds -->"
NUM_SMS = 132
COPY = 4.3e12 / NUM_SMS / 1.98e9  # bytes a cycle and SM: an H200's 4.3 TB/s, 132 SMs, 1.98 GHz
FFN = {1536: 8960, 3072: 12288, 5120: 13824}  # feed-forward width, of the models of these widths


@dataclass(frozen=True)
class Build:
    """One compiled kernel. registers, spilled (bytes): per thread. shared: bytes per program.

    instructions, row_bytes: of one round of the loop. programs: on an SM.
    """

    name: str
    direction: str
    width: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    row_bytes: int
    programs: int

    @property
    def issue_ratio(self) -> float:
        """See the top of the file."""
        return self.row_bytes / (self.instructions * self.warps / 4) / COPY


def operators(D: int, tokens: int = 0) -> dict[str, Callable[[str], Any]]:
    """{name: a function of "forward" or "backward" that launches the kernel on meta tensors}. tokens: 0 for TOKENS."""
    L = tokens or TOKENS.get(D, 32760)
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    x, w, mean, K = empty(1, L, D), empty(1, 1, D), empty(1, L, dtype=torch.float32), min(128, D)
    row, pair, each = (empty(1, n, 6, D, dtype=torch.float32)[:, :, 0] for n in (1, 2, L))
    cond_mask = empty(1, L, dtype=torch.bool)
    heads, freqs_cis = x.unflatten(-1, (-1, K)), empty(1, L, K // 2, dtype=torch.complex64)

    def norm(y: Any, gate: Any, scale: Any, affine: bool, cond_mask: Any = None) -> Callable[[str], Any]:
        # A first norm adds the residual's gradient, and a residual sums the gradient of y's bias, as in a block.
        total, normed = None if y is None and scale is w else x, None if scale is None else x
        bias_type = None if y is None else torch.bfloat16
        options = affine, gate is not None, scale is not None, bias_type
        return lambda direction: (
            layer_norm_launch.forward(x, y, gate, scale, scale, cond_mask, affine, 1e-6)
            if direction == "forward"
            else layer_norm_launch.backward(
                total,
                normed,
                normed,
                None if gate is None else y,
                gate,
                scale,
                cond_mask,
                mean,
                mean,
                affine,
                layer_norm.make_sums(x, gate, scale, cond_mask, *options),
            )
        )

    def rms_norm_rope(x: Any, weight: Any, freqs_cis: Any) -> Callable[[str], Any]:
        rstd = rms_norm.empty_rstd(x, weight)
        return lambda direction: (
            rms_norm.launch_forward(x, weight, freqs_cis, None, 1e-6)
            if direction == "forward"
            else rms_norm.launch_backward(x, x, weight, freqs_cis, rstd, False, True)
        )

    def q_and_k(x: Any, weight: Any, freqs_cis: Any) -> Callable[[str], Any]:
        rstd = rms_norm.empty_rstd(x, weight)
        return lambda direction: (
            projections.rms_norm_pair._init_fn(x, x, weight, weight, freqs_cis, 1e-6)
            if direction == "forward"
            else projections.project_backward._init_fn(x, x, x, x, x, weight, weight, freqs_cis, rstd, rstd, joint=True)
        )

    def gelu_backward(direction: str) -> Any:
        u = empty(1, L, FFN.get(D, 4 * D))
        return gelu.gelu_backward._init_fn(u, u, True, torch.bfloat16) if direction == "backward" else None

    return {
        "AdaLN": norm(None, None, row, False),
        "AdaLN, mask": norm(None, None, pair, False, cond_mask),
        "AdaLN, per token": norm(None, None, each, False),
        "LayerNorm": norm(None, None, w, True),
        "gated residual": norm(x, row, None, False),
        "gated residual, LayerNorm": norm(x, row, w, True),
        "gated residual, LayerNorm, mask": norm(x, pair, w, True, cond_mask),
        "gated residual, LayerNorm, per token": norm(x, each, w, True),
        "residual, AdaLN": norm(x, None, row, False),
        "gated residual, AdaLN": norm(x, row, row, False),
        "gated residual, AdaLN, mask": norm(x, pair, pair, False, cond_mask),
        "gated residual, AdaLN, per token": norm(x, each, each, False),
        "RMSNorm": rms_norm_rope(x.unsqueeze(2), empty(D), None),
        "RMSNorm, RoPE": rms_norm_rope(heads, empty(D), freqs_cis),
        "RMSNorm per head": rms_norm_rope(heads, empty(K), None),
        "RMSNorm per head, RoPE": rms_norm_rope(heads, empty(K), freqs_cis),
        "RMSNorm, RoPE of q and k": q_and_k(heads, empty(D), freqs_cis),
        "RMSNorm per head, RoPE of q and k": q_and_k(heads, empty(K), freqs_cis),
        "GELU": gelu_backward,
    }


@contextmanager
def recorded_launches() -> Iterator[list]:
    """Record (kernel, arguments, constants, grid) of each launch instead of launching it."""
    from titan_video.kernels.triton import column_kernels, layer_norm_kernels, rms_norm_kernels, sum_kernels

    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **constants: recorded.append((self.kernel, args, constants, grid))

    with mock.patch.object(launch, "interpreted", lambda: True):
        patches = [
            mock.patch.object(module, name, Recorder(getattr(module, name)))
            for module in (layer_norm_kernels, rms_norm_kernels, column_kernels, sum_kernels)
            for name in vars(module)
            if name.endswith(("_forward", "_backward", "_sums")) and not name.startswith("_")
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


def disassemble(compiled: Any, option: str) -> str:
    """What cuobjdump prints of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes per thread."""
    listing = disassemble(compiled, "-res-usage")
    return tuple(int(re.search(rf"{word}:(\d+)", listing)[1]) for word in ("REG", "STACK"))


def loop_instructions(compiled: Any) -> int:
    """Instructions of the longest loop: from the target of a branch backwards to the branch."""
    code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", disassemble(compiled, "-sass"))
    places = {int(address, 16): i for i, (address, _) in enumerate(code)}
    branches = [(i, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(code)]
    return max((i + 1 - places[int(to[1], 16)] for i, to in branches if to and int(to[1], 16) in places), default=0)


def round_bytes(args: tuple, constants: dict[str, Any], D: int) -> int:
    """Bytes of activations that one round of the loop reads and writes; with a row of modulation for each token, of
    that and of its gradients too.
    """
    per_token = layer_norm_launch.PER_TOKEN in (constants.get("GATE"), constants.get("MODULATION"))
    types = (torch.bfloat16, torch.float32) if per_token else (torch.bfloat16,)
    tensors = [t for t in args if isinstance(t, torch.Tensor) and t.dtype in types]
    largest = max(t.numel() for t in tensors if t.dtype == torch.bfloat16)
    # A tensor beside others in one, as the gradients of q, k and v, is a view of it.
    size = sum(t.element_size() for t in tensors if t.numel() == largest) // (2 if constants.get("PAIR") else 1)
    elements = constants["ROWS"] * constants["BLOCK"] if "ROWS" in constants else D
    return size * elements


def build(name: str, direction: str, D: int) -> Build | None:
    """None: the operator has no kernel in this direction."""
    with recorded_launches() as recorded:
        operators(D)[name](direction)
    if not recorded:
        return None
    kernel, args, constants, _ = recorded[0]  # in backward the sums of all programs are added in a second launch
    warps = constants["num_warps"]
    compiled = compile_kernel(kernel, args, dict(constants))
    registers, spilled = resources(compiled)
    shared, loop = compiled.metadata.shared, loop_instructions(compiled)
    programs = launch.residency(registers, shared, warps)
    return Build(
        name,
        direction,
        D,
        warps,
        constants["STAGES"],
        registers,
        spilled,
        shared,
        loop,
        round_bytes(args, constants, D),
        programs,
    )


def waves(b: Build, tokens: int) -> float:
    """Programs of a launch over so many tokens, of those that NUM_SMS hold at once."""
    with mock.patch.object(launch, "num_programs", lambda *_: NUM_SMS * b.programs), recorded_launches() as recorded:
        operators(b.width, tokens)[b.name](b.direction)
    return math.prod(recorded[0][3]) / (NUM_SMS * b.programs)


def table(builds: list[Build]) -> str:
    rows = [
        "| kernel | | width | warps | stages | registers | shared, KB | instructions | programs | issue ratio "
        "| spilled |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {b.name} | {b.direction} | {b.width} | {b.warps} | {b.stages} | {b.registers} | {b.shared / 1024:.1f} | "
        f"{b.instructions} | {b.programs} | {b.issue_ratio:.2f} | {b.spilled} |"
        for b in builds
    ]
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--names", nargs="+", default=list(operators(128)))
    parser.add_argument("--write", type=Path, help=f"Markdown file; the table goes between two lines {MARKER}")
    parser.add_argument("--json", type=Path, help="write the builds, with the waves at each of LENGTHS")
    options = parser.parse_args(argv)
    cases = itertools.product(options.widths, options.names, ("forward", "backward"))
    builds = [b for width, name, direction in cases if (b := build(name, direction, width))]
    print(table(builds))
    if options.json:
        found = [
            asdict(b) | {"issue_ratio": round(b.issue_ratio, 3), "waves": {n: round(waves(b, n), 3) for n in LENGTHS}}
            for b in builds
        ]
        before = json.loads(options.json.read_text()).get("before", []) if options.json.exists() else []
        options.json.write_text(json.dumps({"builds": found, "before": before}, indent=1) + "\n")
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{table(builds)}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
