"""Does it learn? Train on moving shapes, sample a clip for every prompt, and read colour, shape and direction from it.

    python benchmarks/learn_shapes.py [--config train_configs/shapes.toml] [--write docs/converging.md]
                                      [--section.field value ...]

1. The scorer reads the training clips. It must name all of them right; otherwise its scores would mean nothing.
2. `train.py` runs with the TOML. It resumes if it was stopped, and does nothing if the run is finished.
3. One clip is generated for each of the 48 prompts, from noise that no training step has used, and scored.

The scorer sees pixels only. It knows the palette and the outlines of the data set, and nothing of the model.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.manager import parse_args
from titan_video.ingest.shapes import COLORS, COMBINATIONS, SHAPES, caption, combination
from titan_video.sample import find_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- learn_shapes -->"


# ---- the scorer ----


def coverage(frames_FHW3: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, [F, H, W] in [0, 1].

    This is the pixel's distance from the clip's median colour, relative to the largest distance.
    """
    frames = frames_FHW3.astype(np.float64)
    distance = np.linalg.norm(frames - np.median(frames.reshape(-1, 3), axis=0), axis=-1)
    return np.clip((distance - 25) / max(np.quantile(distance, 0.995) - 25, 1), 0, 1)


def read_color(frames_FHW3: np.ndarray, cover: np.ndarray) -> str:
    """The colour of the palette with the same direction from the background as the covered pixels."""
    frames = frames_FHW3.astype(np.float64)
    background = np.median(frames.reshape(-1, 3), axis=0)
    mean = (frames[cover > 0.6] - background).mean(axis=0)
    offsets = {name: np.array(rgb) - background for name, rgb in COLORS.items()}
    return max(offsets, key=lambda name: mean @ offsets[name] / np.linalg.norm(offsets[name]))


def centres(cover: np.ndarray) -> np.ndarray:
    """Centre of the covered area in each frame, [F, (x, y)] in pixels."""
    _, height, width = cover.shape
    weight = np.where(cover > 0.3, cover, 0)
    total = np.maximum(weight.sum((1, 2)), 1e-9)
    return np.stack(
        [(weight * np.arange(width)).sum((1, 2)) / total, (weight * np.arange(height)[:, None]).sum((1, 2)) / total],
        axis=1,
    )


def read_direction(cover: np.ndarray) -> str:
    """The direction from the centre in the first quarter of the frames to the centre in the last quarter."""
    c, quarter = centres(cover), max(len(cover) // 4, 1)
    x, y = c[-quarter:].mean(0) - c[:quarter].mean(0)
    return ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")


def read_shape(cover: np.ndarray) -> str:
    """The outline, of the same area and centre, that agrees best with the covered pixels over all frames."""
    _, height, width = cover.shape
    centre_F2, area_F = centres(cover), (cover > 0.5).sum((1, 2)).astype(float)
    x = np.arange(width) - centre_F2[:, 0, None, None]
    y = np.arange(height)[:, None] - centre_F2[:, 1, None, None]
    area = area_F[:, None, None]
    r, half, leg = np.sqrt(area / np.pi), np.sqrt(area) / 2, np.sqrt(area / 2)
    outlines = {
        "circle": np.hypot(x, y) < r,
        "square": np.maximum(abs(x), abs(y)) < half,
        "triangle": (y < leg * 2 / 3)
        & (y > 2 * abs(x) - leg * 4 / 3),  # base and height 2 x leg, centre a third above the base
    }
    return min(SHAPES, key=lambda name: abs(outlines[name] - cover).sum())


def score(frames_FHW3: np.ndarray) -> tuple[str, str, str] | None:
    """(colour, shape, direction) of a clip; None if almost nothing differs from the background."""
    cover = coverage(frames_FHW3)
    if (cover > 0.5).sum((1, 2)).mean() < 20 or (cover > 0.5).mean() > 0.5:
        return None
    return read_color(frames_FHW3, cover), read_shape(cover), read_direction(cover)


def tally(read: list[tuple[str, str, str] | None], wanted: list[tuple[str, str, str]]) -> dict[str, float]:
    """Share of the clips with the right colour, shape and direction."""
    shares = [np.mean([r is not None and r[i] == w[i] for r, w in zip(read, wanted, strict=True)]) for i in range(3)]
    return dict(zip(("colour", "shape", "direction"), map(float, shares), strict=True))


# ---- the run ----


def read_mp4(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def score_training_clips(folder: Path) -> dict[str, float]:
    clips = sorted(folder.glob("*.mp4"))
    return tally([score(read_mp4(c)) for c in clips], [combination(int(c.stem)) for c in clips])


def generate(dump_folder: Path, out: Path, per_prompt: int, seed: int) -> list[np.ndarray]:
    """Sample `per_prompt` clips for each of the 48 prompts from the newest checkpoint, and write them to `out` as mp4.

    Sampler settings are those of the run's validation.
    """
    from titan_video.checkpoint.manager import load_weights
    from titan_video.encoders import build_encoders
    from titan_video.models import get_args, get_spec
    from titan_video.sample import pad
    from titan_video.tasks.sampling import Prompt, SamplerSettings, sample_latents
    from titan_video.tools.video import write_mp4

    folder, config = find_checkpoint(dump_folder)
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    encoders = build_encoders(config.encoder, config.model.hf_assets_path, torch.device("cpu"))
    with torch.device("meta"):
        model = spec.build(args)
    model.to_empty(device="cpu")
    load_weights(folder, model, "ema" if config.ema.enable else "model")
    prompts = [caption(i) for i in range(COMBINATIONS)] * per_prompt
    padded = [pad(t, args.text_len) for t in encoders.encode_text([*prompts, ""])]
    text, mask = (torch.cat(parts) for parts in zip(*padded, strict=True))
    v = config.validation
    settings = SamplerSettings(v.sample_steps, v.guidance_scale, v.sample_shift, seed=seed)
    size = spec.geometry(args).latent_shape(config.data.sizes[0])
    prompt, null = Prompt(text[:-1], mask[:-1]), Prompt(text[-1:], mask[-1:])
    latents = sample_latents(model, args, prompt, null, size, list(range(len(prompts))), settings)
    decoded = encoders.decode_video(latents)
    clips = [c.permute(1, 2, 3, 0).numpy() for c in decoded]
    out.mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(clips):
        write_mp4(out / f"{i:03d}_{prompts[i].replace(' ', '_')}.mp4", clip, config.data.fps)
    return clips


def contact_sheet(clips: list[np.ndarray], path: Path) -> None:
    """Write an image with five frames of the first clip of every prompt."""
    from PIL import Image

    strips = [
        np.concatenate([clip[k] for k in np.linspace(0, len(clip) - 1, 5).astype(int)], axis=1)
        for clip in clips[:COMBINATIONS]
    ]
    rows = [np.concatenate(strips[i : i + 4], axis=1) for i in range(0, COMBINATIONS, 4)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def table(result: dict) -> str:
    def percent(x: float) -> str:
        return f"{100 * x:.1f} %"

    lines = ["| clips | colour | direction | shape |", "|---|---|---|---|"]
    for name in ("training clips", "training clips through the codec", "generated clips"):
        s = result["scores"][name]
        lines.append(
            f"| {name} ({s['clips']}) | {percent(s['colour'])} | {percent(s['direction'])} | {percent(s['shape'])} |"
        )
    return "\n".join(lines) + "\n\n" + result["run"] + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(ROOT / "train_configs" / "shapes.toml"))
    parser.add_argument("--per-prompt", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--write", type=Path, help=f"Markdown file; the part between two {MARKER} lines is replaced by the table"
    )
    options, overrides = parser.parse_known_args()
    config = parse_args(["--job.config_file", options.config, *overrides])
    dump_folder = Path(config.job.dump_folder)

    start = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--job.config_file", options.config, *overrides], check=True
    )
    minutes = (time.monotonic() - start) / 60
    records = [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]
    train_minutes = sum(r["step_seconds"] for r in records if "loss" in r) / 60

    folder = Path(config.data.cache_folder or dump_folder / "cache") / config.data.path.removeprefix("embedded:")
    scores = {"training clips": score_training_clips(folder) | {"clips": len(list(folder.glob("*.mp4")))}}
    scores["training clips through the codec"] = score_codec(folder)
    clips = generate(dump_folder, dump_folder / "learn_shapes", options.per_prompt, options.seed)
    wanted = [combination(i) for i in range(COMBINATIONS)] * options.per_prompt
    read = [score(c) for c in clips]
    scores["generated clips"] = tally(read, wanted) | {"clips": len(clips)}
    contact_sheet(clips, dump_folder / "learn_shapes.png")
    run = (
        f"`{Path(options.config).name}`: {records[-1]['step']} steps of {config.training.local_batch_size} "
        f"clips, {train_minutes:.1f} minutes "
        f"of training steps on {torch.get_num_threads()} CPU threads; torch {torch.__version__}, Python "
        f"{platform.python_version()}."
    )
    result = {"scores": scores, "run": run, "minutes": minutes}
    (dump_folder / "learn_shapes.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    for i, (r, w) in enumerate(zip(read, wanted, strict=True)):
        if r != w:
            print(f"clip {i}: wanted {' '.join(w)}, read {' '.join(r) if r else 'nothing'}")
    if options.write:
        before, _, after = options.write.read_text().split(MARKER)
        options.write.write_text(f"{before}{MARKER}\n{table(result)}{MARKER}{after}")


def score_codec(folder: Path) -> dict[str, float]:
    """Scores of clips that were encoded and decoded by the debug codec: the best that a model can reach."""
    from titan_video.encoders.debug import DebugEncoders

    encoders, read, wanted = DebugEncoders(16), [], []
    for path in sorted(folder.glob("*.mp4"))[: 4 * COMBINATIONS]:
        frames = torch.from_numpy(read_mp4(path)).permute(3, 0, 1, 2)[None]
        read.append(score(encoders.decode_video(encoders.encode_video(frames))[0].permute(1, 2, 3, 0).numpy()))
        wanted.append(combination(int(path.stem)))
    return tally(read, wanted) | {"clips": len(read)}


if __name__ == "__main__":
    main()
