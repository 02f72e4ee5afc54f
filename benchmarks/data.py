"""How fast clips are decoded, beside a bare PyAV loop, and how long training waits for a warm cache.

    python benchmarks/data.py [--clips FOLDER] [--json FILE]

Both decode the same files, alternating, with the same number of processes: ours as encoding does it (resampled, resized
to cover the bucket, cropped, sent to the process that encodes); the loop decodes each file up to the last frame that is
taken, converts those that are taken, resizes them to the bucket with the same filter whatever their aspect, and sends
nothing. Besides those of a folder, clips are generated: moving noise, 960 x 540 at 24 fps in H.264.
Then the debug model is trained on these clips with the cache that a first run has filled; and entries of the largest
size are read.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, environment, interleaved, markdown, options, write_json  # noqa: E402
from titan_video.data.latent_cache import LatentCache  # noqa: E402
from titan_video.ingest.cache.encode import Decoder, Job  # noqa: E402
from titan_video.ingest.decode.video import interpolation  # noqa: E402
from titan_video.ingest.decode.worker import map_in_workers, release  # noqa: E402
from titan_video.ingest.plan.build import make_plan  # noqa: E402
from titan_video.ingest.plan.entries import Plan, PlanEntry  # noqa: E402
from titan_video.models.conditioning import TEXT_ONLY  # noqa: E402
from titan_video.tools.video import write_mp4  # noqa: E402

CPU = torch.device("cpu")
PROCESSES = (1, 2)
LATENT, TEXT = (16, 21, 60, 104), (512, 4096)  # of 81 frames of 480 x 832, and of the longest caption


def generate(folder: Path, count: int, frames: int, width: int, height: int) -> None:
    """Clips of noise that moves by a few pixels a frame."""
    folder.mkdir(parents=True)
    for k in range(count):
        coarse = np.random.default_rng(k).integers(0, 255, (height // 6, width // 6 + frames, 3), dtype=np.uint8)
        texture = np.kron(coarse, np.ones((6, 6, 1), np.uint8))
        write_mp4(
            folder / f"{k}.mp4",
            np.stack([texture[:, 2 * i : 2 * i + texture.shape[1] - 6 * frames] for i in range(frames)]),
            24,
        )
        (folder / f"{k}.txt").write_text(f"moving noise, number {k}")


class Bare:
    """The loop, for a DataLoader."""

    def __init__(self, entries: Sequence[PlanEntry]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> int:
        import av

        entry = self.entries[index]
        _, height, width = entry.bucket
        method = interpolation(entry.width, width)
        wanted, taken = set(entry.pts), []
        with av.open(entry.path) as container:
            for frame in container.decode(video=0):
                if frame.pts in wanted:
                    taken.append(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=method))
                if frame.pts >= entry.pts[-1]:
                    break
        return len(np.stack(taken))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def decode_rates(plan: Plan, processes: int, rounds: int) -> dict[str, Any]:
    """Frames per second of both loaders on `processes` processes, by wall clock and by CPU time.

    Other programs on the machine disturb CPU time less.
    """
    jobs = [[Job((("video", ""),), "", e)] for e in plan.kept]
    workers = {"batch_size": None, "num_workers": processes if processes > 1 else 0}

    def ours() -> None:
        for (decoded,) in map_in_workers(Decoder(TEXT_ONLY), jobs, workers["num_workers"]):
            assert not isinstance(decoded, str), decoded
            release(*decoded)

    def bare() -> None:
        assert sum(DataLoader(Bare(plan.kept), **workers)) == frames

    frames = sum(len(set(e.pts)) for e in plan.kept)
    bare()
    cpu: dict[str, list[float]] = {"ours": [], "bare": []}

    def counted_cpu(name: str, function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = cpu_seconds()
            function()
            cpu[name].append(cpu_seconds() - before)

        return run

    times = interleaved({"ours": counted_cpu("ours", ours), "bare": counted_cpu("bare", bare)}, CPU, rounds, budget=0)
    seconds = {name: t.seconds for name, t in times.items()}
    ratios = [statistics.median(b / a for a, b in zip(s["ours"], s["bare"], strict=True)) for s in (seconds, cpu)]
    found = {"processes": processes, "frames": frames, "ratio": ratios[0], "CPU ratio": ratios[1], "CPU seconds": cpu}
    return found | {name: t.as_dict() for name, t in times.items()}


def read_seconds(folder: Path, count: int) -> list[float]:
    """Of one clip with its caption each, from a cache of its own."""
    cache = LatentCache(folder, "v", "t")
    for k in range(count):
        cache.write("video", str(k), torch.randn(LATENT), {"of": ""})
        cache.write("text", str(k), torch.randn(TEXT, dtype=torch.bfloat16), {"of": ""})
    cache.flush()
    seconds = []
    for k in range(count):
        start = time.perf_counter()
        cache.read("video", str(k)), cache.read("text", str(k))
        seconds.append(time.perf_counter() - start)
    return seconds


def train(folder: Path, clips: Path, bucket: Sequence[int], steps: int, workers: int) -> dict[str, Any]:
    """A run of the debug model with a warm cache."""
    from train import main

    options = {
        "data.path": clips,
        "data.buckets": json.dumps([bucket]),
        "data.fps": 16,
        "data.num_workers": workers,
        "data.cache_folder": folder / "cache",
        "training.local_batch_size": 2,
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0,
        "validation.enable": "false",
        "checkpoint.enable": "false",
        "metrics.enable_tensorboard": "false",
    }
    argv = [
        "--job.config_file",
        str(ROOT / "train_configs" / "debug.toml"),
        *(str(w) for k, v in options.items() for w in (f"--{k}", v)),
    ]
    for name, count in (("cold", 1), ("warm", steps)):
        main([*argv, "--training.steps", str(count), "--job.dump_folder", str(folder / name)])
    rows = [json.loads(line) for line in (folder / "warm" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row][1:]  # the first starts the workers
    waited, seconds = (sum(row[key] for row in rows) for key in ("data_seconds", "step_seconds"))
    found = {"bucket": list(bucket), "workers": workers, "steps": len(rows)}
    return found | {"step": seconds / len(rows), "wait": waited / len(rows), "share": waited / seconds}


def table(results: dict[str, Any]) -> str:
    rates = [[r["frames"] / r[name]["median"] for name in ("ours", "bare")] for r in results["decode"]]
    rows = [
        [r["clips"], r["processes"], r["frames"], *rate, r["ratio"], r["CPU ratio"]]
        for r, rate in zip(results["decode"], rates, strict=True)
    ]
    decode = markdown(
        ["clips", "processes", "frames", "ours, frames/s", "bare loop, frames/s", "ratio", "by CPU time"], rows
    )
    trained = [
        [
            "x".join(map(str, r["bucket"])),
            r["workers"],
            r["steps"],
            1000 * r["step"],
            1000 * r["wait"],
            f"{r['share']:.2%}",
        ]
        for r in results["train"]
    ]
    warm = markdown(["bucket", "workers", "steps", "step, ms", "data wait, ms", "share"], trained)
    read = (
        f"A clip of 81 x 480 x 832 with its caption is read from the cache in {1000 * results['read']:.1f} ms by one "
        f"process."
    )
    return f"{decode}\n\n{warm}\n\n{read}"


def main(argv: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--clips", type=Path, help="a folder of captioned clips, beside those generated")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    bucket, small, steps, rounds = (
        ((5, 32, 64), (5, 32, 64), 3, 1) if given.toy else ((81, 480, 832), (17, 128, 224), 40, given.rounds)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "clips", *((2, 12, 96, 48) if given.toy else (8, 126, 960, 540)))
        sets = {"generated": folder / "clips"} | ({given.clips.name: given.clips} if given.clips else {})
        decode = []
        for title, clips in sets.items():
            plan = make_plan(clips, [bucket], 16, 0, folder / "probes")
            decode += [{"clips": title, **decode_rates(plan, n, rounds)} for n in PROCESSES]
        results = {
            "decode": decode,
            "read": statistics.median(read_seconds(folder / "entries", 2 if given.toy else 30)),
            "train": [train(folder / f"run{n}", folder / "clips", small, steps, n) for n in (0, 1)],
        }
    print(table(results))
    if given.json:
        busy = {"cores": os.cpu_count(), "load average": round(os.getloadavg()[0], 1)}
        write_json(given.json, "data", given, environment(CPU) | busy, results)


if __name__ == "__main__":
    main(sys.argv[1:])
