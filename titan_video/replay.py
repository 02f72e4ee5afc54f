"""A step that went wrong, again: `python -m titan_video.replay outputs/run/bad_steps/step-12-sample-384`.

Runs the kept micro-batches forward and backward on one process, with the same noise, and prints the loss of each clip,
the first module whose output is not finite, and the norm of the gradients. The weights are those of the newest
checkpoint at or before the step, or the run's first ones; the step itself may have had newer ones.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_video import kernels
from titan_video.checkpoint.files import is_valid_fast, list_steps, step_folder
from titan_video.checkpoint.manager import load_weights
from titan_video.config.job_config import ActivationCheckpoint, Compile, JobConfig, Parallelism
from titan_video.config.manager import load
from titan_video.data.batch import Batch
from titan_video.data.prefetch import iter_tensors
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import whole_sequence
from titan_video.distributed.utils import clean_name, clip_grad_norm, init_distributed, to_local
from titan_video.flow.matching import FlowMatching, expert_sigma_range
from titan_video.kernels import attention
from titan_video.models import get_args, get_spec
from titan_video.models.spec import ModelSpec
from titan_video.tasks.denoising import Denoising
from titan_video.tools.device import get_device, set_deterministic
from titan_video.tools.logging import init_logger, logger
from titan_video.training.faults.report import STEP_FILE, read_batches
from titan_video.weights.trained import WeightsSettings, build_weights

MAX_NAMED = 5


def find_run(folder: Path) -> tuple[dict[str, Any], JobConfig, Path]:
    """(what step.json says, the configuration of the run, its dump folder). ValueError: not a kept step of a run."""
    try:
        step = json.loads((folder / STEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder}: no readable {STEP_FILE}; give a folder of DUMP_FOLDER/bad_steps ({e})") from e
    dump_folder = folder.resolve().parents[1]
    if not (dump_folder / "config.toml").is_file():
        raise ValueError(f"{folder}: there is no config.toml in {dump_folder}; leave the folder in that of its run")
    return step, load(dump_folder / "config.toml"), dump_folder


def load_model(config: JobConfig, spec: ModelSpec, args: Any, checkpoint: Path | None, device: torch.device):
    """The model as it trains, on one process: dtypes as in the run, nothing compiled or recomputed.

    checkpoint: a step-N folder; None: the run's first weights.
    """
    settings = WeightsSettings(config.model, config.checkpoint, config.training, config.lora, seed=config.debug.seed)
    weights = build_weights(settings, spec, args)
    with torch.device("meta"):
        model = spec.build(args)
    weights.prepare(model)
    training = replace(config.training, enable_cpu_offload=False)
    plain = Parallelism(), training, ActivationCheckpoint(), Compile()
    parallelize(model, spec.plan, ParallelDims().build_mesh(device.type), *plain, float8=config.float8)
    model.to_empty(device=device)
    weights.load_frozen(model)
    if checkpoint is None:
        weights.load_initial(model)
        logger.info("weights: the run's first ones; there is no checkpoint at or before the step")
    else:
        load_weights(checkpoint, model, "model", which=weights.is_saved)
        logger.info(f"weights: {checkpoint}")
    return model


def find_checkpoint(folder: Path, last_step: int) -> Path | None:
    """The newest valid step-N folder with N <= last_step."""
    steps = [n for n in list_steps(folder) if n <= last_step and is_valid_fast(step_folder(folder, n))]
    return step_folder(folder, steps[-1]) if steps else None


def is_finite(x: Any) -> bool:
    return all(t.isfinite().all().item() for t in iter_tensors(x) if t.is_floating_point())


class FirstNonFinite:
    """Inside the `with` block, finds the first module of a forward whose output is not finite: `name`, or ""."""

    def __init__(self, model: nn.Module):
        self.model, self.name = model, ""

    def __enter__(self) -> "FirstNonFinite":
        names = [(clean_name(name), module) for name, module in self.model.named_modules()]
        self.handles = [m.register_forward_hook(lambda *x, name=name: self._look(name, x[-1])) for name, m in names]
        return self

    def _look(self, name: str, output: Any) -> None:
        if not self.name and not is_finite(output):
            self.name = name or "the whole model"

    def __exit__(self, *exc: Any) -> None:
        for handle in self.handles:
            handle.remove()


def replay(model: nn.Module, task: Denoising, batch: Batch, paths: dict[int, str]) -> Iterator[str]:
    """Run one micro-batch; yields lines of text. paths: of the clips, by sample id."""
    inputs = task.prepare(batch)
    bad_inputs = [name for name, x in inputs.kwargs.items() if not is_finite(x)]
    with FirstNonFinite(model) as first:
        loss_B = task.loss(model(**inputs.kwargs), inputs)
    (loss_B.sum() / task.num_loss_elements(batch)).backward()
    num_elements = task.num_loss_elements(batch) / len(loss_B)
    for sample_id, loss in zip(batch.sample_ids_B.tolist(), (loss_B / num_elements).tolist(), strict=True):
        yield f"  sample {sample_id}: loss {loss:.6g}  {paths.get(sample_id, 'a clip that step.json does not name')}"
    if bad_inputs:
        yield f"  inputs of the model that are not finite: {', '.join(bad_inputs)}"
    if first.name:
        yield f"  first module whose output is not finite: {first.name}"
    bad = [clean_name(n) for n, p in model.named_parameters() if p.grad is not None and not is_finite(to_local(p.grad))]
    norm = clip_grad_norm(model, 0).item()
    where = f"; not finite in {len(bad)} parameters: {', '.join(bad[:MAX_NAMED])}" if bad else ""
    yield f"  gradient norm {norm:.6g}{where}"
    model.zero_grad()
    if math.isfinite(norm) and not first.name:
        yield "  all is finite with these weights"


def run(folder: Path) -> None:
    """Replay every micro-batch of a kept step. ValueError: see find_run."""
    step, config, dump_folder = find_run(folder)
    device = get_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.debug.deterministic:
        set_deterministic()
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    kernels.set_backend(kernels.resolve_backend(config.model.kernels, device))
    param_dtype = getattr(torch, config.training.mixed_precision_param)
    attention.set_backend(config.model.attention, device, param_dtype, args.head_dim, spec.masks_text)
    init_distributed(device, config.comm.init_timeout_seconds)
    checkpoint = find_checkpoint(dump_folder / config.checkpoint.folder, step["step"])
    model = load_model(config, spec, args, checkpoint, device)
    flow = expert_sigma_range(config.flow, config.model.expert, config.model.boundary or args.boundary)
    t, seed = config.training, config.debug.seed
    flow = FlowMatching(flow, t.loss, t.huber_c)
    task = Denoising(spec, args, flow, whole_sequence(), device, seed, t.guidance, t.mixed_precision_param)
    paths = {clip["sample_id"]: clip["path"] for clip in step["clips"]}
    logger.info(f"it was: {step['fault']}")
    for path in sorted(folder.glob("rank-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2])):
        for number, batch in enumerate(read_batches(path)):
            logger.info(f"data-parallel {path.stem}, micro-batch {number}:")
            for line in replay(model, task, batch, paths):
                logger.info(line)


def main(argv: list[str]) -> None:
    about = "Run a step that went wrong again, on one process."
    parser = argparse.ArgumentParser(prog="python -m titan_video.replay", description=about)
    parser.add_argument("folder", type=Path, help="a folder of DUMP_FOLDER/bad_steps, such as step-12-sample-384")
    options = parser.parse_args(argv)
    init_logger()
    try:
        run(options.folder)
    except ValueError as e:
        sys.exit(f"error: {e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
