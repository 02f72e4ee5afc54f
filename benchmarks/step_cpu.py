"""The training step on a CPU, ours against the same step written with diffusers' class.

    python benchmarks/step_cpu.py [--rounds 12] [--json FILE] [--write docs/performance.md]

Same weights, same tokens, same AdamW; forward, loss, backward, clipping and update. Ours goes through the trainer's own path (FSDP2 at world size 1,
compute_loss). The two take turns, and what is quoted is the median of the paired ratios, since these times drift with the machine. The losses of both
are compared first. A CPU step is bound by matrix products, so this guards against waste; it says nothing about a GPU.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.components.hf_storage import load_hf  # noqa: E402
from titan_video.components.objective import compute_loss  # noqa: E402
from titan_video.components.optimizer import build_optimizer  # noqa: E402
from titan_video.config.job_config import ActivationCheckpoint, Compile, Optimizer, Parallelism, Training  # noqa: E402
from titan_video.data.batch import Batch  # noqa: E402
from titan_video.distributed.parallel_dims import ParallelDims  # noqa: E402
from titan_video.distributed.parallelize import parallelize  # noqa: E402
from titan_video.distributed.utils import clip_grad_norm, init_distributed  # noqa: E402
from titan_video.flow.matching import interpolate, velocity  # noqa: E402
from titan_video.models.wan import SPEC, WanArgs, WanModel, args_to_hf  # noqa: E402

MARKER = "<!-- step_cpu -->"
CASES = {
    "4 layers x 256, 320 tokens x 4": (WanArgs(dim=256, num_heads=4, num_layers=4, ffn_dim=1024, text_dim=256, text_len=64), (5, 16, 16), 4),
    "4 layers x 512, 1,280 tokens": (WanArgs(dim=512, num_heads=4, num_layers=4, ffn_dim=2048, text_dim=512, text_len=512), (5, 32, 32), 1),
    "2 layers x 1536 (1.3B's block), 640 tokens": (
        WanArgs(dim=1536, num_heads=12, num_layers=2, ffn_dim=8960, text_dim=512, text_len=512), (10, 16, 16), 1,
    ),  # fmt: skip
}


def our_step(args: WanArgs, folder: Path):
    with torch.device("meta"):
        model = WanModel(args)
    meshes, training = ParallelDims().build_mesh("cpu"), Training(mixed_precision_param="float32")
    parallelize(model, SPEC.plan, meshes, Parallelism(), training, ActivationCheckpoint(), Compile())
    model.to_empty(device="cpu")
    load_hf(model, folder, SPEC, args)
    optimizer = build_optimizer(model, Optimizer())

    def step(batch: Batch, noise: torch.Tensor, s_B: torch.Tensor) -> float:
        loss = compute_loss(model, args.patch, batch, noise, s_B, torch.ones_like(s_B)).sum() / batch.latents_BCFHW.numel()
        loss.backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def diffusers_step(args: WanArgs, folder: Path):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder)
    matrices, vectors = [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=Optimizer().lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step(batch: Batch, noise: torch.Tensor, s_B: torch.Tensor) -> float:
        latents = batch.latents_BCFHW
        out = model(interpolate(latents, noise, s_B), 1000 * s_B, batch.text_BLD, return_dict=False)[0]
        loss = (out.float() - velocity(latents, noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(name: str, rounds: int, work: Path) -> dict:
    from diffusers import WanTransformer3DModel

    args, grid, batch_size = CASES[name]
    torch.manual_seed(0)
    folder = work / str(abs(hash(name)))
    WanTransformer3DModel(**{k: v for k, v in args_to_hf(args).items() if not k.startswith("_")}).save_pretrained(folder)
    text = torch.randn(batch_size, args.text_len, args.text_dim)
    batch = Batch(torch.randn(batch_size, args.in_channels, *grid), text, torch.ones(text.shape[:2], dtype=torch.bool), torch.arange(batch_size))
    noise, s_B = torch.randn_like(batch.latents_BCFHW), torch.linspace(0.2, 0.8, batch_size)
    steps = {"ours": our_step(args, folder), "diffusers": diffusers_step(args, folder)}
    for _ in range(2):
        losses = {who: step(batch, noise, s_B) for who, step in steps.items()}
        assert abs(losses["ours"] / losses["diffusers"] - 1) < 1e-4, f"{name}: the two do not compute the same: {losses}"
    seconds = {who: [] for who in steps}
    for i in range(rounds):
        for who in ("ours", "diffusers") if i % 2 else ("diffusers", "ours"):
            start = time.perf_counter()
            steps[who](batch, noise, s_B)
            seconds[who].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    medians = {who: statistics.median(s) for who, s in seconds.items()}
    return {"case": name, "seconds": medians, "ratio": statistics.median(ratios), "ratio_quartiles": [quartiles[0], quartiles[2]], "rounds": rounds}


def table(results: list[dict], versions: dict) -> str:
    lines = ["| case | ours, s | diffusers, s | ratio (quartiles) |", "|---|---|---|---|"]
    for r in results:
        low, high = r["ratio_quartiles"]
        lines.append(f"| {r['case']} | {r['seconds']['ours']:.3f} | {r['seconds']['diffusers']:.3f} | {r['ratio']:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in versions.items()) + f"; {results[0]['rounds']} rounds, eager, float32."])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help=f"Markdown file whose part between two {MARKER} lines is replaced by the table")
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="some of the cases, by name")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    init_distributed(torch.device("cpu"), 600)
    import diffusers

    with tempfile.TemporaryDirectory() as work:
        results = [compare(name, options.rounds, Path(work)) for name in options.cases]
    torch.distributed.destroy_process_group()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    versions["threads"] = torch.get_num_threads()
    print(table(results, versions))
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n")
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{table(results, versions)}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
