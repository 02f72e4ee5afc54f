"""The planner's predictions beside published training rates of Wan and HunyuanVideo.

    python benchmarks/planner_published.py [--write docs/planner.md]

A prediction is of this trainer in the published layout, not of the published software: once with its fused kernels and
compile, once with plain torch operators, eager. The constants (train_configs/clusters, and those of
titan_video/planner) were frozen in commit FROZEN before the table was made, and none was changed for it: the errors are
what they are. Nothing here was measured by this project.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown
from titan_video.config.job_config import JobConfig
from titan_video.models import get_spec
from titan_video.planner.candidate import FULL, NONE, Candidate, Range
from titan_video.planner.cluster import load
from titan_video.planner.cost.model import CostModel

FROZEN = "485c148"
MARKER = "<!-- published -->"
WAN_IMAGE = {"in_channels": 36, "image_dim": 1280, "image_len": 257}
DFM = "NVIDIA-NeMo/DFM docs/performance-summary.md"
TELETRON = "Tele-AI/TeleTron README"


@dataclass(frozen=True)
class Run:
    """A published rate. unit: "s", of a step; "TFLOP/s", of the model's FLOPs on a GPU; "FPS", of 8 GPUs; "s forward".

    changed: what differs from the flavor. full: blocks that are recomputed; the others save all. assumed: what the
    source leaves open.
    """

    source: str
    family: str
    flavor: str
    cluster: str
    bucket: tuple[int, int, int]
    candidate: Candidate
    published: float
    unit: str
    full: int = 1000
    changed: Any = ()
    assumed: str = ""


def teletron(flavor: str, size: tuple[int, int], seconds: float, cp: int, changed: tuple = ()) -> Run:
    layout = Candidate(ulysses=cp, dp_shard=8 // cp, reshard=False)
    assumed = "8 training GPUs; H100, full recomputation as in its run.sh"
    bucket = (81, *size)
    return Run(TELETRON, "wan", flavor, "h100x8", bucket, layout, seconds, "s", changed=changed, assumed=assumed)


SMALL = tuple(WAN_IMAGE.items())
HUNYUAN = "TeleTron's first release, its plot; encoders on the training GPUs"
RUNS = (
    Run(
        f"{DFM}, Megatron",
        "wan",
        "t2v-14B",
        "h100x512",
        (93, 480, 832),
        Candidate(dp_shard=16, ulysses=4, tp=2, reshard=False),
        325.77,
        "TFLOP/s",
        full=8,
        assumed="context parallel as Ulysses; 8 blocks recomputed, as in its recipe",
    ),
    Run(
        f"{DFM}, Automodel",
        "wan",
        "t2v-14B",
        "h100x8",
        (93, 480, 832),
        Candidate(dp_shard=8),
        175.88,
        "TFLOP/s",
        assumed="full recomputation",
    ),
    Run(
        f"{DFM}, Automodel",
        "wan",
        "t2v-14B",
        "h100x64",
        (93, 480, 832),
        Candidate(dp_shard=64),
        228.85,
        "TFLOP/s",
        assumed="full recomputation",
    ),
    teletron("t2v-1.3B", (384, 640), 1.77, 1, SMALL),
    teletron("t2v-1.3B", (480, 720), 2.58, 1, SMALL),
    teletron("t2v-1.3B", (720, 1280), 13.5, 1, SMALL),
    teletron("t2v-1.3B", (1088, 1920), 44.2, 1, SMALL),
    teletron("i2v-14B", (384, 640), 7.46, 1),
    teletron("i2v-14B", (480, 720), 11.9, 1),
    teletron("i2v-14B", (720, 1280), 9.24, 8),
    teletron("i2v-14B", (1088, 1920), 34.7, 8),
    Run(
        HUNYUAN,
        "hunyuan_video",
        "t2v-13B",
        "h100x8",
        (125, 720, 1280),
        Candidate(ulysses=8, placement="colocated"),
        21.2,
        "FPS",
        assumed="H100, full recomputation",
    ),
    Run(
        HUNYUAN,
        "hunyuan_video",
        "t2v-13B",
        "h100x8",
        (65, 256, 256),
        Candidate(dp_shard=8, placement="colocated"),
        85.5,
        "FPS",
        assumed="H100, 256 x 256, one clip a GPU",
    ),
    Run(
        "vita-epfl/Stable-Video-Infinity#49",
        "wan",
        "i2v-14B",
        "h200x8",
        (81, 480, 832),
        Candidate(),
        2.05,
        "s forward",
        assumed="forward of LoRA training as that of full training",
    ),
    Run(
        "modelscope/DiffSynth-Studio#658",
        "wan",
        "i2v-14B",
        "a800x64",
        (81, 480, 832),
        Candidate(),
        9.0,
        "s forward",
        assumed="81 x 480 x 832, as its script; forward of LoRA training as that of full training; its timer may not "
        "wait for the GPU",
    ),
    Run(
        "modelscope/DiffSynth-Studio#435",
        "wan",
        "t2v-1.3B",
        "a800x64",
        (81, 480, 832),
        Candidate(),
        8.30,
        "s",
        assumed="81 x 480 x 832, as its script; an A100 of 40 GB as an A800; LoRA as full training, which has 7% more "
        "FLOPs",
    ),
)


def predict(run: Run, fused: bool) -> float:
    """In the run's unit."""
    spec = get_spec(run.family)
    spec.flavors["published"] = replace(spec.flavors[run.flavor], **dict(run.changed))
    config = JobConfig()
    config = replace(
        config,
        model=replace(config.model, name=run.family, flavor="published", kernels="auto" if fused else "torch"),
        encoder=replace(config.encoder, max_text_length=512 if run.family == "wan" else 256),
        data=replace(config.data, buckets=(run.bucket,)),
        compile=replace(config.compile, enable=fused),
    )
    cluster = load(run.cluster)
    model = CostModel(config, cluster)
    blocks = len(model.layers)
    full = min(run.full, blocks)
    ranges = [Range(0, full, FULL), Range(full, blocks, NONE)]
    candidate = replace(run.candidate, ranges=tuple(r for r in ranges if r.last > r.first))
    if run.unit == "s forward":
        return sum(model.step_times(candidate).forward)
    step = model.predict(candidate)
    if run.unit == "TFLOP/s":
        return step.model_flops / step.step_seconds / 1e12
    return run.bucket[0] * step.clips / step.step_seconds if run.unit == "FPS" else step.step_seconds


def layout_of(run: Run) -> str:
    c = run.candidate
    degrees = {"FSDP": c.dp_shard, "Ulysses": c.ulysses, "TP": c.tp}
    return ", ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "1 GPU"


def rows() -> tuple[list[list[str]], str]:
    """The table, and the median error of each way to predict."""
    found, sizes = [], []
    for run in RUNS:
        ours, plain = predict(run, True), predict(run, False)
        errors = [f"{value / run.published - 1:+.0%}" for value in (ours, plain)]
        sizes.append([abs(value / run.published - 1) for value in (ours, plain)])
        size = "x".join(map(str, run.bucket))
        found.append(
            [
                run.source,
                f"{run.flavor}{' with image' if run.changed else ''}, {size}",
                layout_of(run),
                f"{run.published:g} {run.unit}",
                f"{ours:.4g} ({errors[0]})",
                f"{plain:.4g} ({errors[1]})",
                run.assumed,
            ]
        )
        print(found[-1], file=sys.stderr, flush=True)
    fused, plain = (statistics.median(column) for column in zip(*sizes, strict=True))
    return found, f"Median error: {fused:.0%} fused, {plain:.0%} plain."


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=f"file in which the table stands between two lines {MARKER}")
    cli = parser.parse_args(argv)
    header = ["source", "model, bucket", "layout", "published", "predicted, fused", "predicted, plain", "assumed"]
    lines, median = rows()
    table = f"Constants frozen in commit {FROZEN}. {median}\n\n" + markdown(header, lines)
    print(table)
    if cli.write:
        before, _, after = cli.write.read_text().split(MARKER)
        cli.write.write_text(f"{before}{MARKER}\n{table}\n{MARKER}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
