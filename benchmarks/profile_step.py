"""One training step as a table: where the device's time goes, beside the lower bound of each part (roof.py).

    python benchmarks/profile_step.py [--case 1.3b] [--variant "ours"] [--trace FILE] [--json FILE]

Kernels are sorted into parts by their names. Host gaps are the time in which no kernel runs. On a CPU the parts are
sums of the operators' own time, and there is no gap.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, get_seconds, get_tensor_device, markdown, options, write_json
from benchmarks.roof import PARTS, measure, roof
from benchmarks.step import CASES, VARIANTS, build, checkpoint_mode, fitted, get_data
from benchmarks.training import process_group
from titan_video.tools.device import synchronize

# Words in kernel names, in the order of the search: a generated kernel is named after everything that it fuses, and the
# names of attention kernels contain words of matmuls.
WORDS = {
    "norms and element-wise": ("triton_", "layer_norm_forward", "layer_norm_backward", "rms_norm"),
    "attention": ("flash", "fmha", "sdpa", "attention", "attend"),
    "matmuls": ("gemm", "nvjet", "cutlass", "xmma", "wgmma", "cublas", "aten::mm", "addmm", "aten::bmm", "splitk"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"),
}
LONGEST = 20


def get_part(kernel: str) -> str:
    """One of PARTS; a kernel with an unknown name counts as element-wise."""
    name = kernel.lower()
    return next(
        (part for part, words in WORDS.items() if any(word in name for word in words)), "norms and element-wise"
    )


def busy(intervals: list[tuple[float, float]]) -> float:
    """Total length of the union of the intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def profiled(run, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """Seconds and counts of a step by kernel, and its host gaps."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as p:
        run()
        synchronize(device)
    if trace:
        p.export_chrome_trace(str(trace))
    kernels: dict[str, float] = {}
    counts: dict[str, int] = {}
    if gpu:
        events = [e for e in p.events() if e.device_type == DeviceType.CUDA]
        for e in events:
            kernels[e.name] = kernels.get(e.name, 0.0) + (e.time_range.end - e.time_range.start) / 1e6
            counts[e.name] = counts.get(e.name, 0) + 1
        spans = [(e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
        span = max(end for _, end in spans) - min(start for start, _ in spans)
        return {"kernels": kernels, "counts": counts, "span": span, "host gaps": span - busy(spans)}
    for e in p.key_averages():
        kernels[e.key], counts[e.key] = e.self_cpu_time_total / 1e6, e.count
    return {"kernels": kernels, "counts": counts, "span": sum(kernels.values()), "host gaps": 0.0}


def sum_by_part(found: dict[str, Any]) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    for name, seconds in found["kernels"].items():
        parts[get_part(name)] += seconds
    return parts | {"host gaps": found["host gaps"]}


def table(parts: dict[str, float], floor: dict[str, float], step: float) -> str:
    pairs = [(part, seconds, floor.get(part, 0.0)) for part, seconds in parts.items()] + [
        ("step, not profiled", step, sum(floor.values()))
    ]
    rows = [
        [part, *(f"{1000 * x:,.1f}" for x in (s, least, s - least)), f"{100 * s / step:.1f} %"]
        for part, s, least in pairs
    ]
    return markdown(["part", "time, ms", "floor, ms", "above floor, ms", "of the step"], rows)


def kernels_table(found: dict[str, Any]) -> str:
    longest = sorted(found["kernels"].items(), key=lambda item: -item[1])[:LONGEST]
    return markdown(
        ["kernel", "part", "times", "ms"],
        [[f"`{k[:100]}`", get_part(k), found["counts"][k], f"{1000 * s:,.1f}"] for k, s in longest],
    )


def main(argv: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--variant", choices=list(VARIANTS), default="ours")
    parser.add_argument("--trace", type=Path, help="file for the whole trace, for a trace viewer")
    cli = parser.parse_args(argv)
    device = get_tensor_device(cli)
    case = CASES[cli.case or ("toy" if cli.toy else "1.3b" if device.type == "cuda" else "cpu-256")]
    variant = fitted(VARIANTS[cli.variant], device, cli.toy)
    with process_group(device):
        ceilings = measure(case.args, case.tokens, device, cli.toy or device.type == "cpu")
        step, data = build(variant, case, device), get_data(variant, case, device)
        for _ in range(2):
            step.run(data)
        seconds = get_seconds(lambda: step.run(data), device, repeats=1 if cli.toy else 3)
        found = profiled(lambda: step.run(data), device, cli.trace)
        floor = roof(
            case.args,
            case.tokens,
            case.batch,
            checkpoint_mode(variant),
            sum(p.numel() for p in step.model.parameters()),
            ceilings,
        )
    parts = sum_by_part(found)
    print(
        f"{cli.variant}, {case.batch} x {case.tokens:,} "
        f"tokens\n\n{table(parts, floor, seconds)}\n\n{kernels_table(found)}"
    )
    if cli.json:
        results = {
            "variant": cli.variant,
            "tokens": case.tokens,
            "batch": case.batch,
            "step": seconds,
            "parts": parts,
            "floor": floor,
            **found,
        }
        write_json(cli.json, "profile", cli, environment(device), results | {"ceilings": ceilings.as_dict()})


if __name__ == "__main__":
    main(sys.argv[1:])
