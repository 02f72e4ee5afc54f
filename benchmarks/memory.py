"""How much fits on one GPU: the longest clip for training Wan 1.3B, and a step of all parameters of Wan 14B.

    python benchmarks/memory.py [--checkpoint full] [--offload] [--seconds 500] [--json FILE]
    python benchmarks/memory.py --14b --json FILE

Whole steps run: forward, backward, clipping, AdamW. First at a few lengths, and a line is fitted to their peaks. Then a
binary search runs longer ones, between the longest that is known to fit and the shortest that is known not to, as long
as a step is expected to end within the time limit. What the line predicts and was not run is called predicted. The 14B
step, at 75,600 tokens: bfloat16 weights with stochastic rounding, 8-bit AdamW in backward, attention saved. FILE is
written after each step.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, failure, get_tensor_device, markdown, options, write_json
from benchmarks.step import free
from benchmarks.training import Ours, Step, make_data, our_step, process_group
from titan_video.config.job_config import ActivationCheckpoint, JobConfig, Optimizer, Training
from titan_video.models.wan import SPEC, WanArgs
from titan_video.tools.device import DeviceMemory, synchronize

ROWS, COLS = 60, 104  # latents of 480 x 832
FIRST = (21, 41, 81)  # latent frames of the first runs; 21 latent frames are 81 frames
FRAMES_A_LATENT, FPS = 4, 16
STEP = 4  # smallest difference of two lengths, in latent frames
FULL_14B = replace(
    JobConfig(),
    training=Training(dtype="bfloat16", max_norm=0),
    optimizer=Optimizer(name="AdamW8bit", in_backward=True),
)


Save = Callable[[dict[str, Any]], None]


def attempt(step: Step, args: WanArgs, grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Run one step at this length. Returns peak GiB, seconds and loss, or why it failed."""
    memory = DeviceMemory(device)
    free()
    tokens = grid[0] * grid[1] * grid[2] // args.patch_volume
    found: dict[str, Any] = {"latent frames": grid[0], "tokens": tokens}
    try:
        data = make_data(args, grid, 1, device)
        memory.reset_peak()
        synchronize(device)
        start = time.perf_counter()
        loss = step.run(data).item()
    except Exception as e:
        return found | {"failed": failure(e)}
    finally:
        for p in step.model.parameters():
            p.grad = None
    stats = memory.stats()
    return found | {
        "seconds": time.perf_counter() - start,
        "loss": loss,
        "peak GiB": stats.max_active_gib,
        "reserved GiB": stats.max_reserved_gib,
    }


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(slope, offset) of the least-squares line."""
    n, sum_x, sum_y = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    slope = (n * sum(x * y for x, y in points) - sum_x * sum_y) / (n * sum(x * x for x, _ in points) - sum_x**2)
    return slope, (sum_y - slope * sum_x) / n


def longest(fits: Callable[[int], bool | None], low: int, high: int, guess: int, step: int) -> int:
    """The largest number that is known to fit, by binary search. `low` fits; `guess` is tried first.

    fits: whether a number fits, or None if it cannot be tried.
    """
    trial = min(max(guess, low + step), high)
    while high - low >= step:
        answer = fits(trial)
        if answer is None:
            break
        low, high = (trial, high) if answer else (low, trial)
        trial = (low + high) // 2
    return low


def longest_clip(
    args: WanArgs, cli: Any, device: torch.device, first: tuple[int, ...], size: tuple[int, int], save: Save
) -> dict[str, Any]:
    """Runs at the lengths `first` (latent frames, of latents of this size), the line through their peaks, and what the
    search found within cli.seconds. save: called with the figures after each run.
    """
    end = time.perf_counter() + cli.seconds
    config = replace(JobConfig(), activation_checkpoint=ActivationCheckpoint(offload=cli.offload))
    step = our_step(Ours(cli.checkpoint, compile=False, config=config), args, device)
    attempt(step, args, (first[0], *size), device)  # makes the optimizer's state
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {"checkpoint": cli.checkpoint, "offload": cli.offload, "runs": runs}

    def run(frames: int) -> bool:
        runs.append(attempt(step, args, (frames, *size), device))
        save(result)
        return "failed" not in runs[-1]

    for frames in first:
        run(frames)
    done = [r for r in runs if "failed" not in r]
    if len(done) < 2:
        return result
    slope, offset = fit_line([(r["tokens"], r["peak GiB"]) for r in done])
    capacity = DeviceMemory(device).capacity / 2**30
    tokens_per_frame = done[0]["tokens"] / done[0]["latent frames"]
    predicted = int((capacity - offset) / max(slope, 1e-12) / tokens_per_frame)
    result |= {"KiB a token": slope * 2**20, "GiB at no tokens": offset}
    result |= {"predicted latent frames": predicted, "predicted tokens": round(predicted * tokens_per_frame)}

    def fits(frames: int) -> bool | None:
        known = max((r for r in runs if "failed" not in r), key=lambda r: r["tokens"])
        result["longest latent frames"] = known["latent frames"]
        result["longest tokens"] = round(known["latent frames"] * tokens_per_frame)
        expected = known["seconds"] * (frames / known["latent frames"]) ** 2
        if device.type != "cuda" or time.perf_counter() + expected > end:
            return None
        return run(frames)

    low = done[-1]["latent frames"]
    found = longest(fits, low, max(int(1.1 * predicted), low + STEP), int(0.95 * predicted), STEP)
    result |= {"longest latent frames": found, "longest tokens": round(found * tokens_per_frame)}
    save(result)
    return result


def full_parameters(
    args: WanArgs, grid: tuple[int, int, int], device: torch.device, save: Save, steps: int = 3
) -> dict[str, Any]:
    """Run a few steps that train all parameters, in bfloat16. save: called with the figures after each."""
    config = replace(
        FULL_14B, activation_checkpoint=ActivationCheckpoint(save_min_kv=0 if device.type == "cpu" else 1024)
    )
    step = our_step(Ours("selective", compile=False, config=config), args, device)
    size = sum(p.numel() for p in step.model.parameters())
    result = {"parameters": size, "layers": args.num_layers, "runs": []}
    for _ in range(steps):
        result["runs"].append(attempt(step, args, grid, device))
        save(result)
    return result


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for r in runs:
        clip = f"{(r['latent frames'] - 1) * FRAMES_A_LATENT + 1:,}"
        rest = [r.get("failed"), None, None, None]
        if "failed" not in r:
            rest = [f"{r['peak GiB']:.1f}", f"{r['reserved GiB']:.1f}", r["seconds"], f"{r['loss']:.4f}"]
        rows.append([clip, f"{r['tokens']:,}", *rest])
    return markdown(["frames", "tokens", "peak, GiB", "reserved, GiB", "step, s", "loss"], rows)


def summary(result: dict[str, Any]) -> str:
    if "longest tokens" not in result:
        return "too few lengths ran to say more"
    seconds = (result["predicted latent frames"] - 1) * FRAMES_A_LATENT / FPS
    return (
        f"{result['KiB a token']:.0f} KiB per token beside {result['GiB at no tokens']:.1f} GiB: the line reaches "
        f"all of the memory at "
        f"{result['predicted tokens']:,} tokens ({seconds:,.0f} s of video); the longest that was run is "
        f"{result['longest tokens']:,} tokens"
    )


def main(argv: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--checkpoint", choices=("full", "selective", "none"), default="full")
    parser.add_argument("--offload", action="store_true", help="keep blocks' inputs in host memory")
    parser.add_argument("--seconds", type=float, default=500, help="time for the search")
    parser.add_argument("--14b", action="store_true", dest="full_14b", help="the step of Wan 14B instead")
    cli = parser.parse_args(argv)
    device, debug = get_tensor_device(cli), SPEC.flavors["debug"]
    env, name = environment(device), "memory_14b" if cli.full_14b else "memory"

    def save(results: dict[str, Any]) -> None:
        if cli.json:
            write_json(cli.json, name, cli, env, results)

    with process_group(device):
        if cli.full_14b:
            args, grid = (debug, (2, 8, 8)) if cli.toy else (SPEC.flavors["t2v-14B"], (21, 90, 160))
            results = full_parameters(args, grid, device, save)
            print(f"{results['parameters']:,} parameters, all trained\n\n{table(results['runs'])}")
        else:
            which = (debug, (2, 3), (8, 8)) if cli.toy else (SPEC.flavors["t2v-1.3B"], FIRST, (ROWS, COLS))
            args, first, size = which
            results = longest_clip(args, cli, device, first, size, save)
            print(f"{table(results['runs'])}\n\n{summary(results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
