"""Does it learn? Train on moving shapes, sample clips, and read colour, shape and direction from them.

    python benchmarks/learn_shapes.py [--config train_configs/shapes.toml] [--write docs/converging.md]
                                      [--section.field value ...]

1. The reader (titan_video/ingest/shape_scores.py) reads the training clips. It must name all of them right; otherwise
   its scores would mean nothing.
2. `train.py` runs with the TOML. It resumes if it was stopped, and does nothing if the run is finished. At its end it
   generates clips, two for each of the 48 prompts, from noise that no training step has used, and scores them
   (validation.num_scored).
3. A contact sheet is made of one more clip for each prompt, sampled as validation samples.

Exit code 1: fewer clips than GOALS show the colour, direction or shape of their prompt.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import parse_args
from titan_video.encoders import build_encoders
from titan_video.ingest.files.shapes import COMBINATIONS, FPS, caption, combination
from titan_video.ingest.shape_scores import score, tally

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- learn_shapes -->"
GOALS = {"colour": 0.95, "direction": 0.9, "shape": 0.7}  # of the default run's generated clips


def read_mp4(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def score_training_clips(folder: Path) -> dict[str, float]:
    clips = sorted(folder.glob("*.mp4"))
    read = [score(read_mp4(c)) for c in clips]
    return tally(read, [combination(int(c.stem)) for c in clips]) | {"clips": len(clips)}


def score_codec(folder: Path, config: JobConfig) -> dict[str, float]:
    """Scores of clips that were encoded and decoded as the run does: the best that a model can reach.

    The frames are those that the run takes, of the first of data.buckets.
    """
    encoders, read, wanted = build_encoders(config.encoder, "", "cpu"), [], []
    for path in sorted(folder.glob("*.mp4"))[: 4 * COMBINATIONS]:
        frames = torch.from_numpy(read_mp4(path)[:: round(FPS / config.data.fps)]).permute(3, 0, 1, 2)[None]
        read.append(score(encoders.decode_video(encoders.encode_video(frames))[0].permute(1, 2, 3, 0).numpy()))
        wanted.append(combination(int(path.stem)))
    return tally(read, wanted) | {"clips": len(read)}


def sample(dump_folder: Path) -> list[np.ndarray]:
    """One clip for each of the 48 prompts from the newest checkpoint, by `python -m titan_video.sample`."""
    prompts, out = dump_folder / "prompts.txt", dump_folder / "learn_shapes"
    prompts.write_text("\n".join(caption(i) for i in range(COMBINATIONS)) + "\n")
    command = [sys.executable, "-m", "titan_video.sample", str(dump_folder), "--prompts", str(prompts)]
    subprocess.run([*command, "--out", str(out), "--seed", "1"], check=True, cwd=ROOT)
    return [read_mp4(path) for path in sorted(out.glob("*.mp4"), key=lambda path: int(path.name.split("_")[0]))]


def contact_sheet(clips: list[np.ndarray], path: Path) -> None:
    """Write an image with five frames of each clip, four clips a row."""
    from PIL import Image

    strips = [
        np.concatenate([clip[k] for k in np.linspace(0, len(clip) - 1, 5).astype(int)], axis=1)
        for clip in clips[:COMBINATIONS]
    ]
    rows = [np.concatenate(strips[i : i + 4], axis=1) for i in range(0, len(strips), 4)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def table(result: dict) -> str:
    lines = ["| clips | colour | direction | shape |", "|---|---|---|---|"]
    for name, s in result["scores"].items():
        numbers = " | ".join(f"{100 * s[key]:.1f} %" for key in GOALS)
        lines.append(f"| {name} ({s['clips']}) | {numbers} |")
    return "\n".join(lines) + "\n\n" + result["run"] + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "train_configs" / "shapes.toml"))
    parser.add_argument(
        "--write", type=Path, help=f"Markdown file; the part between two {MARKER} lines is replaced by the table"
    )
    options, overrides = parser.parse_known_args()
    overrides = ["--validation.num_scored", "96", *overrides]
    config = parse_args(["--job.config_file", options.config, *overrides])
    dump_folder, start = Path(config.job.dump_folder).resolve(), time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), "--job.config_file", options.config, *overrides]
    subprocess.run(command, check=True)
    minutes, used = (time.monotonic() - start) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)

    records = [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    found = [r["validation"] for r in records if "score_colour" in r.get("validation", {})][-1]
    folder = Path(config.data.cache_folder or dump_folder / "cache") / config.data.path.removeprefix("embedded:")
    scores = {
        "training clips": score_training_clips(folder),
        "training clips through the codec": score_codec(folder, config),
        "generated clips": {key: found[f"score_{key}"] for key in GOALS} | {"clips": config.validation.num_scored},
    }
    contact_sheet(sample(dump_folder), dump_folder / "learn_shapes.png")
    run = (
        f"`{Path(options.config).name}`: {steps[-1]['step']} steps of {config.training.local_batch_size} clips, "
        f"{sum(r['step_seconds'] for r in steps) / 60:.1f} minutes of training steps on {torch.get_num_threads()} CPU "
        f"threads; the program, with encoding, validation and scoring, took {used.ru_utime / 60:.1f} CPU minutes; "
        f"torch {torch.__version__}, Python {platform.python_version()}."
    )
    result = {"scores": scores, "run": run, "minutes": minutes}
    (dump_folder / "learn_shapes.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{table(result)}{MARKER}{after}")
    missed = [
        f"{key} {found[f'score_{key}']:.1%} < {goal:.0%}" for key, goal in GOALS.items() if found[f"score_{key}"] < goal
    ]
    if missed:
        sys.exit(f"error: below the goals: {', '.join(missed)}")


if __name__ == "__main__":
    main()
