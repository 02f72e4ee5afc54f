"""docs/performance.md from the figures in benchmarks/results: python benchmarks/report.py [--check]

One JSON of a benchmark is one section; several, NAME.json and NAME.2.json, are put together where their results are
lists of cases. What has no JSON is called not yet measured.
"""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention, block_bytes, data, kernels, memory, profile_step, step
from benchmarks.common import ROOT, markdown

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
NOT_YET = "not yet measured"
Record = dict[str, Any]

INTRO = """# Performance

`python benchmarks/report.py` writes this page from `benchmarks/results`. Each figure names its machine, versions and
date. Where a row or section is not yet measured, its benchmark has run only at toy size on a CPU.
`benchmarks/run_all.sh` measures everything that needs a GPU, in commands of at most eight minutes each.

Protocol: one process, random bfloat16 data (zeros are faster than real data), and the same weights in all variants.
Their results are compared first. Then they are timed in turns for several rounds. Tables show medians and the spread
between quartiles (IQR); a difference below twice the spread is called a tie. The ceilings (copy, matmuls at the model's
shapes, attention) are measured in the same run. T_roof is the time of a step at these ceilings (`benchmarks/roof.py`).
"""

COMMANDS = {
    "block_bytes": "python benchmarks/block_bytes.py",
    "step_cpu": "python benchmarks/step.py --device cpu",
    "data": "python benchmarks/data.py",
    "kernels": "python benchmarks/kernels.py",
    "attention": "python benchmarks/attention.py",
    "step": "python benchmarks/step.py --cases 1.3b",
    "step_14b": "python benchmarks/step.py --cases 14b-stack 14b-block",
    "profile": "python benchmarks/profile_step.py",
    "memory": "python benchmarks/memory.py",
    "memory_14b": "python benchmarks/memory.py --14b",
}


def load(folder: Path) -> dict[str, Record]:
    """{benchmark: its figures} of the JSONs of a folder."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stem.partition(".")[0], path.stem)):
        name, _, part = path.stem.partition(".")
        record = json.loads(path.read_text())
        if part and name in found:
            found[name]["results"] += record["results"]
        elif name in COMMANDS:
            found[name] = record
    return found


# ---- targets ----


def _steps(record: Record, case: str) -> dict[str, Record]:
    """{variant: its figures}, from the first group in which the variant was timed."""
    found: dict[str, Record] = {}
    for c in record["results"]:
        if c["case"] == case:
            for group in c["groups"]:
                found = {**group, **found}
    return {name: r for name, r in found.items() if "failed" not in r}


def _step(case: str, variant: str, key: str, form: Callable[[Any], str]) -> Callable[[Record], str]:
    return lambda record: form(_steps(record, case)[variant][key])


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def _worst(half: str) -> Callable[[Record], str]:
    return lambda record: f"{min(op[half]['fraction'] for op in record['results']['ops']):.2f} (worst)"


def _worst_error(record: Record) -> str:
    return f"{max(op['errors']['ratio'] for op in record['results']['ops']):.2f} (worst)"


def _bytes_ratio(what: str) -> Callable[[Record], str]:
    def ratio(record: Record) -> str:
        found = record["results"]["per element"].values()
        return ", ".join(f"{who['ours, triton kernels'][what] / who['diffusers'][what]:.2f}" for who in found)

    return ratio


def _speed(over: str) -> Callable[[Record], str]:
    return lambda record: f"{_steps(record, '1.3b')['ours']['speedup'][over]} x"


def _full_14b(record: Record) -> str:
    runs = [r for r in record["results"]["runs"] if "failed" not in r]
    return (
        f"{len(runs)} steps, peak {max(r['peak GiB'] for r in runs):.0f} GiB, {runs[-1]['seconds']:.0f} s each"
        if runs
        else "failed"
    )


def _decoding(record: Record) -> str:
    worst: dict[int, float] = {}
    for r in record["results"]["decode"]:
        worst[r["processes"]] = min(r["ratio"], worst.get(r["processes"], float("inf")))
    return "worst: " + ", ".join(f"{ratio:.2f} in {n} process{'es' * (n > 1)}" for n, ratio in worst.items())


def _data_wait(record: Record) -> str:
    return ", ".join(
        f"{r['share']:.1%} with {r['workers']} worker{'s' * (r['workers'] != 1)}" for r in record["results"]["train"]
    )


TARGETS: tuple[tuple[str, str, str, Callable[[Record], str]], ...] = (
    ("saved bytes of a block, 1.3B and 14B", "<= 0.75 x diffusers'", "block_bytes", _bytes_ratio("saved")),
    ("bytes moved outside matmuls and attention", "<= 0.235 x diffusers'", "block_bytes", _bytes_ratio("traffic")),
    ("decoding, resizing and cropping, relative to a bare PyAV loop", ">= 0.9", "data", _decoding),
    ("data wait with a warm cache, debug model on a CPU", "<= 2 % of a step", "data", _data_wait),
    ("kernels forward, fraction of the copy bandwidth", ">= 0.85", "kernels", _worst("forward")),
    ("kernels backward, fraction of the copy bandwidth", ">= 0.80", "kernels", _worst("backward")),
    ("kernels' error, relative to compiled torch's", "<= 1.1", "kernels", _worst_error),
    ("1.3B step at 32,760 tokens, MFU", ">= 52 %", "step", _step("1.3b", "ours", "MFU", _percent)),
    ("same, attention saved", ">= 48 %", "step", _step("1.3b", "ours, attention saved", "MFU", _percent)),
    ("same, full checkpointing", ">= 41 %", "step", _step("1.3b", "ours, full checkpointing", "MFU", _percent)),
    ("same, T_roof / T", ">= 0.90", "step", _step("1.3b", "ours", "T_roof/T", "{:.2f}".format)),
    ("same, against diffusers with gradient checkpointing", ">= 2.0 x", "step", _speed("diffusers")),
    (
        "same, against diffusers tuned: compiled, cuDNN, bfloat16 weights",
        ">= 1.2 x",
        "step",
        _speed("diffusers, tuned"),
    ),
    (
        "14B, four blocks at 37,440 tokens",
        ">= 520 TFLOP/s",
        "step_14b",
        _step("14b-stack", "ours", "TFLOP/s", "{:.0f} TFLOP/s".format),
    ),
    (
        "same, attention saved",
        ">= 470 TFLOP/s",
        "step_14b",
        _step("14b-stack", "ours, attention saved", "TFLOP/s", "{:.0f} TFLOP/s".format),
    ),
    (
        "longest clip that 1.3B trains on, one GPU",
        ">= 400,920 tokens",
        "memory",
        lambda r: f"{r['results']['longest tokens']:,} tokens",
    ),
    ("14B, all parameters, 75,600 tokens, one GPU", "runs, <= 135 GiB", "memory_14b", _full_14b),
)


def targets(records: dict[str, Record]) -> str:
    rows = []
    for item, bar, benchmark, measured in TARGETS:
        try:
            found = measured(records[benchmark]) if benchmark in records else NOT_YET
        except (KeyError, ValueError, TypeError):  # the run had no such variant, or it failed
            found = NOT_YET
        rows.append([item, bar, found])
    return markdown(["", "target", "measured"], rows)


# ---- the sections ----


def _step_section(record: Record) -> str:
    parts = []
    for c in record["results"]:
        clips = "1 clip" if c["batch"] == 1 else f"{c['batch']} clips"
        parts.append(f"### {c['layers']} blocks of width {c['dim']:,}, {clips} of {c['tokens']:,} tokens")
        if c["ceilings"]:
            parts.append(_ceilings(c["ceilings"]))
        parts += [step.comparison_table(c["agreement"]), *(step.step_table(group) for group in c["groups"])]
    return "\n\n".join(parts)


def _ceilings(c: Record) -> str:
    rates = "; ".join(f"{shape} {rate / 1e12:,.0f}" for shape, rate in c["gemm"].items())
    attention_rates = f"forward {c['attention_forward'] / 1e12:,.0f}, backward {c['attention_backward'] / 1e12:,.0f}"
    return (
        f"Ceilings: copy {c['copy'] / 1e12:.2f} TB/s; in TFLOP/s matmuls {rates}; attention ({c['attention']}) "
        f"{attention_rates}."
    )


def _memory_section(record: Record) -> str:
    r = record["results"]
    offload = ", block inputs on the host" if r["offload"] else ""
    return f"Checkpointing {r['checkpoint']}{offload}.\n\n{memory.table(r['runs'])}\n\n{memory.summary(r)}."


def _attention_section(record: Record) -> str:
    r = record["results"]
    return f"`auto` is {r['auto']} there.\n\n{attention.table(r['shapes'])}\n\n{attention.kernels_table(r['kernels'])}"


def _profile_section(record: Record) -> str:
    r = record["results"]
    title = f"Variant: {r['variant']}, {r['tokens']:,} tokens."
    return f"{title}\n\n{profile_step.table(r['parts'], r['floor'], r['step'])}\n\n{profile_step.kernels_table(r)}"


SECTIONS: dict[str, tuple[str, str, Callable[[Record], str]]] = {  # title, what the command does, its tables
    "block_bytes": (
        "Bytes of a block",
        "counts bytes per element of tokens x width, in bfloat16, on the meta device. The counts are exact, "
        "and the same on every machine. Saved: for backward, without checkpointing. Moved: read and written "
        "by all operators except matmuls and attention; a kernel of ours is one operator. Compile, which "
        "fuses plain torch's operators, is off.",
        lambda r: block_bytes.table(r["results"]["per element"]),
    ),
    "step_cpu": (
        "CPU step against diffusers",
        "times the trainer's own step and the same step written with `diffusers.WanTransformer3DModel`. A "
        "step on a CPU is bound by matmuls, so this guards against waste and says nothing about a GPU.",
        _step_section,
    ),
    "data": (
        "Decoding and the cache",
        "compares our decoding with a bare PyAV loop. Ours decodes, resizes, crops and, with several "
        "processes, sends the frames to the process that encodes. The loop decodes and resizes with the same "
        "filter. Ratios are medians of pairs, by wall time and by CPU time; other programs on the machine "
        "disturb CPU time less. Then the debug model trains with a warm cache.",
        lambda r: data.table(r["results"]),
    ),
    "kernels": (
        "Kernels",
        "times each memory-bound operator; the top of the script defines the columns.",
        lambda r: kernels.table(r["results"]["ops"]),
    ),
    "attention": (
        "Attention",
        "times each backend of model.attention, with 128 channels per head. Forward counts two matmuls, backward five.",
        _attention_section,
    ),
    "step": (
        "Training step, Wan 1.3B",
        "times forward, loss, backward, clipping and AdamW. `diffusers` is what its users run: eager mode "
        "under autocast with gradient checkpointing. `tuned` adds regional compile, cuDNN attention and "
        "bfloat16 weights.",
        _step_section,
    ),
    "step_14b": (
        "Training step, blocks of Wan 14B",
        "times the same on one GPU, without communication.",
        _step_section,
    ),
    "profile": (
        "Where a step's time goes",
        "shows the time of each part of a step beside its lower bound.",
        _profile_section,
    ),
    "memory": ("Longest clip on one GPU", "runs whole steps of Wan 1.3B with AdamW.", _memory_section),
    "memory_14b": (
        "All parameters of Wan 14B on one GPU",
        "runs steps with 75,600 tokens: bfloat16 weights with stochastic rounding, 8-bit AdamW in backward, "
        "attention saved.",
        lambda r: memory.table(r["results"]["runs"]),
    ),
}


def where(record: Record) -> str:
    """Machine, versions, date and arguments of a run."""
    shown = {
        k: " ".join(map(str, v)) if isinstance(v, list) else v
        for k, v in record["arguments"].items()
        if v not in (None, False)
    }
    arguments = " ".join(f"--{k} {v}" for k, v in shown.items())
    return ", ".join(f"{k} {v}" for k, v in record["environment"].items()) + f". Arguments: `{arguments}`."


def page(records: dict[str, Record]) -> str:
    parts = [INTRO.strip(), "## Targets", targets(records)]
    for name, (title, about, section) in SECTIONS.items():
        description = textwrap.fill(f"`{COMMANDS[name]}` {about}", 120, break_on_hyphens=False)
        parts += [f"## {title}", description]
        parts += (
            [section(records[name]), f"_{where(records[name])}_"] if name in records else [f"{NOT_YET.capitalize()}."]
        )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    text = page(load(RESULTS))
    if argv == ["--check"]:
        if PAGE.read_text() != text:
            sys.exit(f"{PAGE} is not what benchmarks/results gives: run python benchmarks/report.py")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
