"""The size of the house: lines of the core, of ingest and of each optional part; the worst places against the limits.

    python benchmarks/house.py [--most 10] [--write README.md]

The core is what a newcomer reads: train.py, config/ with its sections, and every package that is neither ingest nor
optional. A function counts without its signature and docstring.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "titan_video"
LEVELS = (  # lowest first; a file imports its own floor and lower ones
    ("tools",),
    ("config",),
    ("kernels", "flow"),
    ("models",),
    ("distributed", "data", "encoders"),
    ("optim", "training", "tasks"),
    ("checkpoint",),
    ("weights",),
    ("ingest",),
    ("lora", "online", "supervision"),
    ("planner",),
)
INGEST = ("ingest", "encoders")
OPTIONAL_PARTS = (  # each can be deleted alone; modules and packages, without `titan_video.`
    "models.hunyuan_video",
    "encoders.hunyuan_video",
    "kernels.triton",
    "kernels.attention_backends",
    "kernels.grouped",
    "models.experts",
    "flow.unipc",
    "distributed.float8",
    "distributed.offload",
    "distributed.block_swap",
    "distributed.checkpoint_ranges",
    "distributed.tensor_parallel",
    "distributed.async_tensor_parallel",
    "distributed.expert_parallel",
    "distributed.pipeline_parallel",
    "distributed.context_parallel",
    "supervision",
    "training.profiling",
    "training.flight_recorder",
    "training.wandb_sink",
    "training.tensorboard_sink",
    "training.out_of_memory",
    "training.faults",
    "training.gradient_check",
    "training.expert_balance",
    "optim.low_bit",
    "optim.muon",
    "optim.mixed",
    "optim.in_backward",
    "optim.by_name",
    "optim.mup",
    "tasks.validation",
    "tasks.sampling",
    "ingest.shape_scores",
    "weights.original",
    "weights.export",
    "ingest.importers",
    "ingest.cache.remote_cache",
    "lora",
    "online",
    "planner",
    "convert",
    "upcycle",
    "download",
    "sample",
    "replay",
)
MAX_COLUMNS, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 120, 400, 60, 8


def optional_part(module: str) -> str | None:
    """The optional part that a module of the package belongs to."""
    name = module.removeprefix(f"{PACKAGE}.")
    return next((part for part in OPTIONAL_PARTS if name == part or name.startswith(f"{part}.")), None)


def sources(root: Path) -> dict[str, Path]:
    """{dotted module name: path} of train.py and the package; a package goes by its own name."""
    found = {"train": root / "train.py"} if (root / "train.py").exists() else {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def ring(module: str) -> str:
    """Where a module belongs: "core: folder", "ingest", "optional: part" or "programs"."""
    if module in ("train", PACKAGE):
        return f"core: {module}"
    if part := optional_part(module):
        return f"optional: {part}"
    folder = module.split(".")[1]
    if folder in INGEST:
        return "ingest"
    in_house = any(folder in floor for floor in LEVELS)
    is_core = in_house and (folder == "config" or not module.endswith("__main__"))
    return f"core: {folder}" if is_core else "programs"


def count_lines(root: Path) -> dict[str, int]:
    """Lines by ring."""
    lines: dict[str, int] = defaultdict(int)
    for module, path in sources(root).items():
        lines[ring(module)] += len(path.read_text().splitlines())
    return dict(lines)


def core_lines(root: Path) -> int:
    return sum(count for name, count in count_lines(root).items() if name.startswith("core"))


def size_line(root: Path) -> str:
    """What the README says about the size, in rounded numbers."""
    lines = count_lines(root)
    optional = sum(count for name, count in lines.items() if name.startswith("optional"))
    core, train, ingest = core_lines(root), lines["core: train"], lines["ingest"]
    return textwrap.fill(
        f"**Size.** What a newcomer reads, the core, is about {round(core, -2):,} lines, of which `train.py` has "
        f"about {round(train, -1)}; preparing data is about {round(ingest, -2):,} more. Optional parts (HunyuanVideo, "
        f"Triton kernels, LoRA, float8, Muon, the memory planner and others) are about {round(optional, -2):,} lines, "
        f"and each can be deleted alone. The script `benchmarks/house.py` counts them.",
        width=MAX_COLUMNS,
        break_on_hyphens=False,
    )


def write_size(page: Path, root: Path) -> None:
    """Replace the paragraph that begins with `**Size.**`."""
    text = re.sub(r"\*\*Size\.\*\*.*?(?=\n\n)", lambda _: size_line(root), page.read_text(), count=1, flags=re.DOTALL)
    page.write_text(text)


def function_length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, without its docstring."""
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    body = node.body[1:] if has_docstring else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function of ours; 0 for torch ops and kernels, which are as wide as what they compute."""
    decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
    if any(word in decorators for word in ("custom_op", "register_", "triton", "jit")):
        return 0
    args = node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls", "ctx")])


def excesses(root: Path) -> Iterator[tuple[float, str]]:
    """(how far beyond its limit, what) of each place."""
    for path in sources(root).values():
        text, name = path.read_text(), path.relative_to(root)
        is_kernel = "kernels/triton" in str(name)
        num_lines = len(text.splitlines())
        if num_lines > MAX_FILE_LINES and not is_kernel:
            yield num_lines / MAX_FILE_LINES, f"{name}: {num_lines} lines"
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                yield len(line) / MAX_COLUMNS, f"{name}:{number}: {len(line)} columns"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                where = f"{name}:{node.lineno} {node.name}"
                if (length := function_length(node)) > MAX_FUNCTION_LINES and not is_kernel:
                    yield length / MAX_FUNCTION_LINES, f"{where}: {length} lines"
                if (count := num_parameters(node)) > MAX_PARAMETERS and not is_kernel:
                    yield count / MAX_PARAMETERS, f"{where}: {count} parameters"
            elif isinstance(node, ast.Call):
                splats = [a for a in node.args if isinstance(a, ast.Starred) and isinstance(a.value, ast.Tuple)]
                if splats:
                    yield 2.0, f"{name}:{node.lineno}: a tuple is splatted into a call"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10, help="places to show")
    parser.add_argument("--write", type=Path, help="page whose paragraph about the size is rewritten")
    options = parser.parse_args(argv)
    if options.write:
        write_size(options.write, ROOT)
    lines = count_lines(ROOT)
    for name in sorted(lines):
        print(f"{lines[name]:7,}  {name}")
    print(f"{core_lines(ROOT):7,}  core in total, with train.py {lines['core: train']}")
    print(f"{sum(lines.values()):7,}  in total\n")
    worst = sorted(excesses(ROOT), reverse=True)
    print(f"{len(worst)} places beyond a limit" + (f"; the worst {min(options.most, len(worst))}:" if worst else ""))
    for _, what in worst[: options.most]:
        print(f"  {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
