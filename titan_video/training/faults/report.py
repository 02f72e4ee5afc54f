"""The clips of a step whose update was left out: named, and kept with the batch for `python -m titan_video.replay`.

    DUMP_FOLDER/bad_steps/step-12-sample-384/
      rank-0.safetensors ...   the micro-batches of each data-parallel rank
      step.json                the step, what was wrong, and its clips; written last

A batch holds no names. Which clips a step has is a function of the sampler's counters before it, so every rank finds
the paths, of all ranks.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_video.data.batch import Batch
from titan_video.data.loader import LatentLoader
from titan_video.distributed.utils import broadcast_from_rank0, gather_objects
from titan_video.tools.files import atomic_write

FOLDER, STEP_FILE = "bad_steps", "step.json"
MAX_KEPT = 10  # batches that a run keeps
MAX_NAMED = 8  # clips in a message; the record has all


def step_clips(loader: LatentLoader) -> list[dict[str, Any]]:
    """The samples of the last step given to training, on all ranks, in the order in which they were drawn."""
    sampler = copy(loader.draw_plan.sampler)
    sampler.reset(loader.state_before)
    draws = [draw for micro_batch in next(sampler) for draw in loader.draw_plan.spec(micro_batch)]
    return [{"sample_id": draw.sample_id, "path": draw.clip.path} for draw in draws]


def sample_losses(losses: list[Tensor], batches: list[Batch]) -> dict[int, float]:
    """{sample id: this rank's part of its loss, per element of the latents}; {} on a rank without the model's end."""
    if not losses:
        return {}
    ids = [i for batch in batches for i in batch.sample_ids_B.tolist()]
    sizes = [sum(x[0].numel() for x in b.streams.values()) for b in batches for _ in b.sample_ids_B]
    values = torch.cat(losses).tolist()
    return {i: value / size for i, value, size in zip(ids, values, sizes, strict=True)}


def find_clips(loader: LatentLoader, parts: list[dict[int, float]]) -> tuple[list[dict[str, Any]], bool]:
    """(samples to name, with their losses; whether these are the bad ones and not all of the step).

    parts: `sample_losses` of all ranks, which have different tokens of a sample. Largest losses first.
    """
    totals: Counter[int] = Counter()
    for part in parts:
        totals.update(part)
    clips = [{**clip, "loss": totals.get(clip["sample_id"], math.nan)} for clip in step_clips(loader)]
    bad = [clip for clip in clips if totals and not math.isfinite(clip["loss"])]
    return bad or sorted(clips, key=lambda clip: -clip["loss"]), bool(bad)


def to_text(clips: list[dict[str, Any]], is_bad: bool) -> str:
    """One sentence."""
    named = [f"{clip['path']} (sample {clip['sample_id']}, loss {clip['loss']:.4g})" for clip in clips[:MAX_NAMED]]
    more = f" and {len(clips) - MAX_NAMED} more" if len(clips) > MAX_NAMED else ""
    what = "Clips whose loss is not finite" if is_bad else "No clip's loss is infinite or NaN; those of the step"
    return f"{what}: {', '.join(named)}{more}."


# ---- the kept batch ----


def to_tensors(batches: list[Batch]) -> dict[str, Tensor]:
    """Micro-batches as named tensors: number.field, or number.field.name where a field is a dict."""
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        for f in fields(batch):
            value = getattr(batch, f.name)
            named = {f"{f.name}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {f.name: value}
            found |= {f"{number}.{name}": x.contiguous() for name, x in named.items()}
    return found


def to_batches(tensors: dict[str, Tensor]) -> list[Batch]:
    """The inverse of `to_tensors`."""
    found: dict[int, dict[str, Any]] = {}
    for name, x in tensors.items():
        number, field, *key = name.split(".")
        values = found.setdefault(int(number), {"streams": {}, "cond": {}})
        if key:
            values[field][key[0]] = x
        else:
            values[field] = x
    return [Batch(**found[number]) for number in sorted(found)]


def read_batches(path: Path) -> list[Batch]:
    """The micro-batches of one `rank-R.safetensors`."""
    from safetensors.torch import load_file

    return to_batches(load_file(path))


def keep(
    folder: Path, record: dict[str, Any], batches: list[Batch], loader: LatentLoader, group: dist.ProcessGroup | None
) -> str:
    """Write every data-parallel rank's micro-batches, then the record, into `folder`; returns why that was not done.

    Collective: the answer is the same on all ranks.
    """
    from safetensors.torch import save

    others = broadcast_from_rank0(lambda: [path for path in folder.parent.glob("*") if path != folder], group)
    if len(others) >= MAX_KEPT:
        return f"{folder.parent} already holds {MAX_KEPT} steps"
    # Ranks that share their clips have the same batches; the first of them writes.
    rank, first = dist.get_rank(group), gather_objects(loader.dp_rank, group).index(loader.dp_rank)
    files = {f"rank-{loader.dp_rank}.safetensors": lambda: save(to_tensors(batches))} if rank == first else {}
    text = json.dumps(record, indent=1) + "\n"
    problems = gather_objects(write(folder, files), group)
    if not any(problems):
        problems = gather_objects(write(folder, {STEP_FILE: lambda: text} if rank == 0 else {}), group)
    return next((problem for problem in problems if problem), "")


def write(folder: Path, files: dict[str, Callable[[], bytes | str]]) -> str:
    """Write files of these contents; returns what went wrong."""
    try:
        for name, content in files.items():
            atomic_write(folder / name, content())
    except OSError as e:
        return str(e)
    return ""


def report(
    folder: Path, step: int, fault: str, losses: list[Tensor], batches: list[Batch], loader: LatentLoader, group: Any
) -> tuple[str, dict[str, Any]]:
    """(text, record) that name the clips of `step`; its batch is kept in the run's `folder`. Collective over `group`.

    losses: of this rank's clips, by micro-batch. batches: this rank's. loader: has given `step` last. group: on the
    host.
    """
    clips, is_bad = find_clips(loader, gather_objects(sample_losses(losses, batches), group))
    first = min(clip["sample_id"] for clip in step_clips(loader))
    kept = folder / FOLDER / f"step-{step}-sample-{first}"
    record = {"step": step, "fault": fault, "clips": [{**c, "loss": to_json(c["loss"])} for c in clips]}
    text = to_text(clips, is_bad)
    if problem := keep(kept, record, batches, loader, group):
        return f" {text} The batch could not be kept: {problem}.", record
    return f" {text} `python -m titan_video.replay {kept}` runs the step again.", {**record, "kept": str(kept)}


def to_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
