"""A training step on one device: our variants and diffusers', timed in turns in one process after their results agree.

    python benchmarks/step.py [--cases 1.3b 14b-stack 14b-block] [--groups 0 1] [--variants "ours" ...] [--json FILE]
    python benchmarks/step.py --device cpu --json FILE

A step is forward, loss, backward, clipping and update, with the same weights and data in all variants. Variants are
timed in groups whose states and largest activations fit on the device; FILE is written after each group. The report
has:

    step, IQR   median over the rounds, and the spread between quartiles
    MFU, HFU    of the data sheet's peak; MFU counts each FLOP of the model once, HFU also recomputed ones
    T_roof/T    see roof.py
    peak        memory as if the variant were alone on the device
    speed       relative to each of diffusers' variants; a difference below twice the spread is called a tie

A step on a CPU is bound by matmuls: there it guards against waste, and says nothing about a GPU.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    cosine,
    environment,
    failure,
    get_seconds,
    get_tensor_device,
    interleaved,
    markdown,
    options,
    relative_error,
    write_json,
)
from benchmarks.roof import Ceilings, measure, roof
from benchmarks.training import Data, Diffusers, Ours, Step, diffusers_step, make_data, our_step, process_group
from titan_video.config.job_config import ActivationCheckpoint, Compile, Float8, JobConfig
from titan_video.distributed.activation_checkpoint import recomputed_flops
from titan_video.models.layers import token_shape
from titan_video.models.wan import SPEC, WanArgs
from titan_video.tools.device import peak_flops, synchronize

VARIANTS: dict[str, Ours | Diffusers] = {
    "ours": Ours(),
    "ours, attention saved": Ours(checkpoint="selective"),
    "ours, full checkpointing": Ours(checkpoint="full"),
    "ours, torch kernels": Ours(kernels="torch"),
    "ours, eager": Ours(compile=False),
    "ours, eager, torch kernels": Ours(kernels="torch", compile=False),
    "ours, eager, full checkpointing": Ours(checkpoint="full", compile=False),
    "ours, float8": Ours(float8=True),
    "diffusers": Diffusers(),
    "diffusers, compiled": Diffusers(compile=True),
    "diffusers, tuned": Diffusers(compile=True, cudnn=True, weights="bfloat16"),
    "diffusers, tuned, nothing recomputed": Diffusers(checkpoint=False, compile=True, cudnn=True, weights="bfloat16"),
    "ours, float32": Ours(kernels="torch", compile=False, dtype="float32"),
    "diffusers, float32": Diffusers(checkpoint=False, weights="float32"),
}
# The states of a group's variants are on the device together, and the activations of one: see `expected_gib`.
GPU_GROUPS = (
    ("ours", "diffusers, tuned"),
    ("ours, attention saved", "ours, full checkpointing", "diffusers"),
    ("ours, eager", "ours"),
    ("ours, torch kernels", "ours"),
    ("ours, float8", "ours"),
)
H200_GIB = 139
# Bytes an element of tokens x width that a block keeps for backward; compiled, torch keeps GELU's result too. From
# benchmarks/block_bytes.py, and the graphs of compiled blocks on a CPU.
KEPT = {"compiled": 57.5, "eager": 45.8, "eager, torch kernels": 81.5, "selective": 4.1, "full": 2.0, "diffusers": 74.2}
WORKING_GIB = 8  # gradients, one block's activations, workspaces
STACK_GROUPS = (("ours", "ours, attention saved", "ours, full checkpointing", "diffusers", "diffusers, tuned"),)
CPU_GROUPS = (("ours, float32", "diffusers, float32"),)
AGREE = 0.9999  # cosine, with the step in float32


@dataclass(frozen=True)
class Case:
    """A model, and `batch` clips of `grid` latent frames, rows and columns. groups: variants timed in turns."""

    args: WanArgs
    grid: tuple[int, int, int]
    batch: int = 1
    groups: tuple[tuple[str, ...], ...] = GPU_GROUPS

    @property
    def tokens(self) -> int:
        return token_shape(self.grid, self.args.patch).num_tokens


def _small(dim: int, heads: int, layers: int, ffn: int, text: tuple[int, int]) -> WanArgs:
    return WanArgs(dim=dim, num_heads=heads, num_layers=layers, ffn_dim=ffn, text_dim=text[0], text_len=text[1])


_14B = SPEC.flavors["t2v-14B"]
CASES = {
    "1.3b": Case(SPEC.flavors["t2v-1.3B"], (21, 60, 104)),
    "14b-stack": Case(replace(_14B, num_layers=4), (24, 60, 104), groups=STACK_GROUPS),
    "14b-block": Case(replace(_14B, num_layers=1), (21, 90, 160), groups=STACK_GROUPS),
    "cpu-256": Case(_small(256, 4, 4, 1024, (256, 64)), (5, 16, 16), 4, CPU_GROUPS),
    "cpu-512": Case(_small(512, 4, 4, 2048, (512, 512)), (5, 32, 32), 1, CPU_GROUPS),
    "cpu-1536": Case(_small(1536, 12, 2, 8960, (512, 512)), (10, 16, 16), 1, CPU_GROUPS),
    "toy": Case(SPEC.flavors["debug"], (2, 8, 8), 2, (tuple(VARIANTS),)),
}
DEFAULTS = {"cuda": ("1.3b", "14b-stack", "14b-block"), "cpu": ("cpu-256", "cpu-512", "cpu-1536")}


def expected_gib(case: Case, group: tuple[str, ...]) -> float:
    """GiB of a group: weights and AdamW of each variant, and the activations of the one that keeps most."""
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in SPEC.build(case.args).parameters())
    states = kept = 0.0
    for variant in (VARIANTS[name] for name in group):
        low = getattr(variant, "weights", "") == "bfloat16"
        states += num_parameters * (6 if low else 12)
        mode = checkpoint_mode(variant)
        if mode == "none":
            plain = "eager, torch kernels" if getattr(variant, "kernels", "triton") == "torch" else "eager"
            mode = "compiled" if variant.compile else plain if isinstance(variant, Ours) else "diffusers"
        elements = case.args.num_layers * case.batch * case.tokens * case.args.dim
        kept = max(kept, KEPT[mode] * elements)
    return (states + kept) / 2**30 + WORKING_GIB


def fitted(variant: Ours | Diffusers, device: torch.device, toy: bool) -> Ours | Diffusers:
    """The variant without what a CPU does not have. toy: compile only traces, it generates no code."""
    backend = "eager" if toy else "inductor"
    if isinstance(variant, Diffusers):
        return replace(variant, cudnn=variant.cudnn and device.type == "cuda", backend=backend)
    config = replace(
        JobConfig(),
        compile=Compile(backend=backend),
        activation_checkpoint=ActivationCheckpoint(save_min_kv=0 if toy else 1024),
        float8=Float8(emulate=device.type == "cpu"),
    )
    return replace(variant, config=config)


def build(variant: Ours | Diffusers, case: Case, device: torch.device) -> Step:
    return (our_step if isinstance(variant, Ours) else diffusers_step)(variant, case.args, device)


def get_data(variant: Ours | Diffusers, case: Case, device: torch.device) -> Data:
    dtype = (
        torch.float32
        if "float32" in (getattr(variant, "dtype", ""), getattr(variant, "weights", ""))
        else torch.bfloat16
    )
    return make_data(case.args, case.grid, case.batch, device, dtype)


def free() -> None:
    """Free unreferenced memory. Compiled graphs stay, because the blocks that are compared are timed afterwards."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- agreement ----


def compare(case: Case, variants: dict[str, Ours | Diffusers], device: torch.device) -> dict[str, Any]:
    """Velocity and all weight gradients of each variant against diffusers in float32, with one block."""
    case = replace(case, args=replace(case.args, num_layers=1))

    def run(variant: Ours | Diffusers) -> tuple[float, Tensor, dict[str, Tensor]]:
        step = build(variant, case, device)
        loss, velocity = step.forward_backward(get_data(variant, case, device))
        found = loss.item(), velocity, step.gradients()
        del step
        free()
        return found

    loss, velocity, gradients = run(Diffusers(checkpoint=False, weights="float32"))
    found = {}
    for name, variant in variants.items():
        try:
            its_loss, its_velocity, its_gradients = run(variant)
        except Exception as e:
            free()
            found[name] = {"failed": failure(e)}
            continue
        found[name] = {
            "loss": its_loss,
            "float32 loss": loss,
            "velocity error": relative_error(its_velocity, velocity),
            "velocity cosine": cosine([its_velocity], [velocity]),
            "gradient cosine": cosine([its_gradients[n] for n in gradients], list(gradients.values())),
        }
    return found


def comparison_table(found: dict[str, Any]) -> str:
    rows = []
    for name, r in found.items():
        if "failed" in r:
            rows.append([name, r["failed"], None, None])
            continue
        low = min(r["velocity cosine"], r["gradient cosine"])
        rows.append(
            [
                name,
                f"{r['velocity cosine']:.6f}",
                f"{r['gradient cosine']:.6f}",
                "yes" if low >= AGREE else f"NO, below {AGREE}",
            ]
        )
    return markdown(["one block against float32", "velocity, cosine", "gradients, cosine", "agrees"], rows)


# ---- time ----


def warm_up(step: Step, data: Data, device: torch.device, before: int) -> tuple[float, float | None]:
    """(seconds of the first step, with compilation; peak GiB of a later step as if the variant were alone).

    before: bytes that were allocated before the variant was built.
    """
    first = get_seconds(lambda: step.run(data), device)
    if device.type != "cuda":
        step.run(data)
        return first, None
    state = torch.cuda.memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step.run(data)
    synchronize(device)
    return first, (state + torch.cuda.max_memory_allocated(device) - start) / 2**30


def time_group(
    case: Case, variants: dict[str, Ours | Diffusers], device: torch.device, rounds: int, ceilings: Ceilings | None
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, variant in variants.items():
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            step, data = build(variant, case, device), get_data(variant, case, device)
            first, peak = warm_up(step, data, device, before)
        except Exception as e:
            step = data = None
            free()
            results[name] = {"failed": failure(e)}
            continue
        num_parameters = sum(p.numel() for p in step.model.parameters())
        steps[name], results[name] = (
            partial(step.run, data),
            {"first step": first, "peak GiB": peak, "parameters": num_parameters},
        )
    times = interleaved(steps, device, rounds, budget=0)
    for name, t in times.items():
        results[name] |= t.as_dict() | figures(
            case, variants[name], t.median, device, ceilings, results[name]["parameters"]
        )
        results[name]["speedup"] = {
            other: t.speedup(over=times[other]) for other in times if other != name and "diffusers" in other
        }
    return results


def figures(
    case: Case,
    variant: Ours | Diffusers,
    seconds: float,
    device: torch.device,
    ceilings: Ceilings | None,
    num_parameters: int,
) -> dict[str, Any]:
    args, mode = case.args, checkpoint_mode(variant)
    model = 3 * args.flops(case.tokens, case.batch)
    hardware = model + recomputed_flops(ActivationCheckpoint(mode=mode), args, case.tokens, case.batch)
    found = {"TFLOP/s": model / seconds / 1e12}
    if (peak := peak_flops(device)) is not None:
        found |= {"MFU": model / seconds / peak, "HFU": hardware / seconds / peak}
    if ceilings is not None:
        parts = roof(args, case.tokens, case.batch, mode, num_parameters, ceilings)
        found |= {"roof": parts, "T_roof/T": sum(parts.values()) / seconds}
    return found


def checkpoint_mode(variant: Ours | Diffusers) -> str:
    return variant.checkpoint if isinstance(variant, Ours) else "full" if variant.checkpoint else "none"


def step_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, r in results.items():
        if "failed" in r:
            rows.append([name, r["failed"], *[None] * 7])
            continue
        shares = [None if (x := r.get(key)) is None else f"{100 * x:.1f} %" for key in ("MFU", "HFU")]
        speedups = "; ".join(f"{ratio} x {other}" for other, ratio in r["speedup"].items()) or "-"
        rows.append(
            [
                name,
                f"{r['median']:.3f}",
                f"{r['iqr']:.3f}",
                r["TFLOP/s"],
                *shares,
                r.get("T_roof/T"),
                r["peak GiB"],
                speedups,
            ]
        )
    return markdown(["variant", "step, s", "IQR, s", "TFLOP/s", "MFU", "HFU", "T_roof/T", "peak GiB", "speed"], rows)


# ---- the program ----


def run_case(
    name: str, cli: argparse.Namespace, device: torch.device, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The figures of a case, which are saved after each group of variants."""
    case = CASES[name]
    groups = (tuple(cli.variants),) if cli.variants else case.groups
    groups = tuple(groups[i] for i in cli.groups) if cli.groups else groups
    chosen = {v: fitted(VARIANTS[v], device, cli.toy) for group in groups for v in group}
    print(
        f"\n## {name}: {case.args.num_layers} blocks of width {case.args.dim}, {case.batch} x {case.tokens:,} tokens\n",
        flush=True,
    )
    with_roof = device.type == "cuda" or cli.toy
    ceilings = measure(case.args, case.tokens, device, cli.toy) if with_roof else None
    if ceilings:
        print(ceilings.table() + "\n", flush=True)
    agreement = compare(case, chosen, device)
    print(comparison_table(agreement) + "\n", flush=True)
    size = {"tokens": case.tokens, "batch": case.batch, "layers": case.args.num_layers, "dim": case.args.dim}
    found = {"case": name, **size, "ceilings": ceilings and ceilings.as_dict(), "agreement": agreement}
    found |= {"groups": [], "rounds": cli.rounds}
    for group in groups:
        timed = time_group(case, {v: chosen[v] for v in group}, device, cli.rounds, ceilings)
        print(step_table(timed) + "\n", flush=True)
        found["groups"].append(timed)
        save(found)
        free()
    torch._dynamo.reset()  # otherwise the next case, with other lengths, would be compiled for dynamic lengths
    return found


def main(argv: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: the GPU's, or the CPU's")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        help="default: those of the case; all of them are on the device at once",
    )
    parser.add_argument("--groups", type=int, nargs="+", help="numbers of the case's groups, from 0; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    cli = parser.parse_args(argv)
    device = get_tensor_device(cli)
    env, done = environment(device), []

    def save(found: dict[str, Any]) -> None:
        if cli.json:
            write_json(cli.json, "step", cli, env, [*done, found])

    with process_group(device):
        for name in cli.cases or (("toy",) if cli.toy else DEFAULTS[device.type]):
            done.append(run_case(name, cli, device, save))


if __name__ == "__main__":
    main(sys.argv[1:])
