"""One rank's training step without the machine.

    python -m titan_video.planner.dry_run CONFIG.toml --world-size N [--rank r] [--cluster NAME] [--section.field ...]

Rank r of N is built on a fake process group and fake tensors, and runs forward and backward of one micro-batch of the
largest bucket on one CPU. With pipelines, where micro-batches overlap, it runs all micro-batches of a step by the real
schedule. What is allocated, sent and computed is counted (step_tracker.py) and printed (describe.py). Nothing is read
but the TOML, and with model.flavor hf the folder's config.json.

Operators save what they save on a GPU: attention its output and log-sum-exp, RMSNorm its input and one number a row.
The fused kernels are counted where a GPU has them: unless model.kernels is torch. Compile is off: it fuses elementwise
operators, so a compiled step needs no more than is printed. Float8 is off: it saves the same.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from titan_video.config.check import check
from titan_video.config.job_config import Compile, JobConfig
from titan_video.config.manager import ConfigError, main_guard, parse_args
from titan_video.data.batch import Batch
from titan_video.data.batching import Batching, Bucket, gradient_accumulation
from titan_video.distributed.activation_checkpoint import block_sections
from titan_video.distributed.parallel_dims import Meshes, ParallelDims, check_layout
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name
from titan_video.flow.matching import FlowMatching
from titan_video.kernels import attention
from titan_video.models import get_args, get_spec
from titan_video.models.layers import attention_flops, token_shape
from titan_video.models.spec import ModelSpec
from titan_video.optim.optimizer import updated_by
from titan_video.planner.dry_run import fake
from titan_video.planner.dry_run.describe import OFFLOADED, STATE, SWAPPED, Report, describe
from titan_video.planner.dry_run.memory import state_bytes
from titan_video.planner.dry_run.step_tracker import StepTracker
from titan_video.tasks.denoising import Denoising, DenoisingInputs
from titan_video.tools.files import writing
from titan_video.tools.parts import resolve
from titan_video.training.parts import load_pipeline
from titan_video.weights.trained import WeightsSettings, build_weights


@dataclass(frozen=True)
class StepSize:
    """The micro-batches of a step on one data-parallel rank.

    num_clips: clips of a micro-batch. num_counted: micro-batches that the dry run counts. accumulation: how often a
    step repeats what is counted.
    """

    bucket: Bucket
    num_tokens: int
    num_clips: int
    num_counted: int
    accumulation: int


class RankStep:
    """One step of one rank: the model, built and parallelized as train.py does, and what it trains on."""

    def __init__(self, config: JobConfig, spec: ModelSpec, args: Any, meshes: Meshes, size: StepSize):
        self.config, self.spec, self.args, self.size = config, spec, args, size
        self.model, self.stages = build_model(config, spec, args, meshes, size.num_tokens)
        cpu, self.pipeline = torch.device("cpu"), None
        if self.stages:
            dtype = getattr(torch, config.training.mixed_precision_param)
            pipeline = load_pipeline(meshes.pp.size())
            self.pipeline = pipeline.Pipeline(
                self.model, self.stages, spec.plan, meshes.pp, config.parallelism, dtype, cpu
            )
        self.shard = SequenceShard.from_meshes(meshes)
        t = config.training
        flow = FlowMatching(config.flow, t.loss, t.huber_c)
        self.task = Denoising(spec, args, flow, self.shard, cpu, guidance_scale=t.guidance)

    def run(self, tracker: StepTracker, load: float = 1.0) -> None:
        """Forward and backward of the micro-batches that are counted, on fake tensors. load: see `dry_run`."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            latent_shape = self.spec.geometry(self.args).latent_shape(self.size.bucket)
            text_dtype = getattr(torch, self.config.encoder.dtype)
            batches = [
                fake.empty_batch(self.args, latent_shape, self.size.num_clips, text_dtype)
                for _ in range(self.size.num_counted)
            ]
            if self.pipeline:
                self.pipeline.state(self.prepare(batches[0]))  # infers shapes, before anything is counted
            a = self.config.activation_checkpoint
            is_offloading = a.offload or any(r.offload for r in a.range)
            offload = fake.watch_offload(tracker) if is_offloading else nullcontext()
            operators = fake.gpu_operators(self.config.model.kernels)
            with tracker, operators, offload, fake.experts_get(fake.loaded(load)):
                self._create_state(tracker)
                fake.watch_forwards(self.model, tracker)
                fake.watch_recomputation(self.model, self.spec.plan, tracker)
                self._forward_backward(batches, tracker)

    def prepare(self, batch: Batch) -> DenoisingInputs:
        """`Denoising.prepare` without reading sample ids, which have no values here."""
        num_clips = len(batch.sample_ids_B)
        noise = torch.empty_like(batch.streams["video"])
        return self.task.add_noise(batch, noise, sigma_B=torch.empty(num_clips), weight_B=torch.empty(num_clips))

    def _create_state(self, tracker: StepTracker) -> None:
        """Weights, and the gradients that exist when a micro-batch begins that is not the first of its step."""
        in_backward = self.config.optimizer.in_backward

        def free(p: Tensor) -> None:
            tracker.set_category(fake.shard_of(p.grad), "gradients")
            p.grad = None

        self.model.to_empty(device="cpu")
        for p in self.model.parameters():
            tracker.set_category(fake.shard_of(p), "parameters")
            if in_backward and p.requires_grad:
                p.register_post_accumulate_grad_hook(free)
            if self.size.accumulation > 1 and p.requires_grad:
                p.grad = torch.zeros_like(p)
        fake.watch_swap(self.model, tracker)

    def _forward_backward(self, batches: list[Batch], tracker: StepTracker) -> None:
        for batch in batches:
            video = batch.streams["video"]
            for t in (video, batch.text_BLD, batch.text_mask_BL, batch.sample_ids_B, *batch.cond.values()):
                tracker.set_category(t, "inputs")
        inputs = [self.prepare(batch) for batch in batches]
        tracker.categorize_live("inputs")

        def loss_fn(prediction: Tensor, i: int) -> Tensor:
            loss = self.task.loss(prediction, inputs[i]).sum() / self.task.num_loss_elements(batches[i])
            tracker.categorize_live("activations")
            tracker.phase = "backward"
            return loss

        if self.pipeline:
            self.pipeline.step(inputs, loss_fn)
        else:
            loss_fn(self.model(**inputs[0].kwargs), 0).backward()
        if not self.config.optimizer.in_backward:
            for name, p in self.model.named_parameters():
                assert p.grad is not None or not p.requires_grad, f"{name} got no gradient"
            fake.set_gradients(self.model, tracker)


def dry_run(config: JobConfig, world_size: int, rank: int = 0, load: float = 1.0) -> Report:
    """Run rank `rank`'s step on fake tensors. No process group may exist.

    load: under expert parallel, the rows that the rank's experts get / the mean.
    ValueError: the configuration cannot run on any machine, or the dry run does not cover it.
    """
    start = time.perf_counter()
    check(config, world_size, files=False)
    world_size = config.encoder.num_training_ranks(world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank: given {rank}; legal: 0 to {world_size - 1}")
    if config.activation_checkpoint.mode == "memory_budget":
        raise ValueError(
            "activation_checkpoint.mode: memory_budget needs the compiler, which a dry run does not use; try "
            "selective and full"
        )
    if "." in config.optimizer.name:
        raise ValueError(
            f"optimizer.name: the state of {config.optimizer.name} is not known here; try AdamW, whose state is 8 "
            f"bytes for an element"
        )
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    dtype = getattr(torch, config.training.mixed_precision_param)
    attention.check(config.model.attention, dtype, args.head_dim, spec.masks_text)
    check_layout(config.parallelism, args, world_size)
    dims = ParallelDims.of(config.parallelism, world_size)
    size = get_step_size(config, spec, args, dims)
    with fake.fake_ranks(world_size, rank):
        meshes = dims.build_mesh("cpu")
        step = RankStep(config, spec, args, meshes, size)
        tracker = StepTracker(fake.get_axes(meshes), bodies=fake.operator_bodies())
        step.run(tracker, load)
        static = static_bytes(step.model, config.optimizer.name, spec.plan.blocks, config.ema.enable)
    host = (OFFLOADED, SWAPPED, *(STATE if config.training.enable_cpu_offload else ()))
    peak = tracker.peak(on_host=host)
    largest, at_peak = peak.largest | static, peak.at_peak | static
    blocks = step.stages.blocks if step.stages else {}
    return Report(
        world_size=world_size,
        rank=rank,
        degrees=asdict(dims),
        bucket=size.bucket,
        tokens=size.num_clips * step.shard.length(size.num_tokens),
        accumulation=size.accumulation,
        microbatches=size.num_counted,
        stages={stage: len(names) for stage, names in blocks.items()},
        largest=largest,
        at_peak=at_peak,
        total=sum(n for category, n in at_peak.items() if category not in host),
        on_host=sum(largest.get(category, 0) for category in host),
        flops=dict(tracker.flops),
        model_flops=model_flops(config, args, size) * dims.dp / world_size,
        collectives=tracker.collectives(),
        seconds=time.perf_counter() - start,
    )


def model_flops(config: JobConfig, args: Any, size: StepSize) -> float:
    """FLOPs of the model's forward and backward. Frozen weights get no gradients: a third of their matmuls is saved."""
    tokens, clips = size.num_tokens, size.num_counted * size.num_clips
    if not config.lora.enable:
        return 3 * args.flops(tokens, clips)
    return 2 * args.flops(tokens, clips) + args.num_layers * attention_flops(clips, tokens, tokens, args.dim)


def num_clip_tokens(bucket: tuple[int, ...], spec: ModelSpec, args: Any) -> int:
    """Tokens of a clip of [frames, height, width] pixels."""
    return token_shape(spec.geometry(args).latent_shape(bucket)[1:], args.patch).num_tokens


def get_step_size(config: JobConfig, spec: ModelSpec, args: Any, dims: ParallelDims) -> StepSize:
    """A step of the bucket with the most tokens in a micro-batch.

    ValueError: the pipeline's schedule cannot run it.
    """
    accumulation = gradient_accumulation(config, dims.dp)
    batching = Batching.of(config.data, config.training, config.parallelism, accumulation * dims.dp)
    pipeline = load_pipeline(dims.pp)
    sizes = []
    for bucket in config.data.sizes:
        tokens = num_clip_tokens(bucket, spec, args)
        clips = batching.clips_per_micro_batch(tokens)
        if pipeline is None:
            sizes.append(StepSize(bucket, tokens, clips, num_counted=1, accumulation=accumulation))
            continue
        microbatch = config.parallelism.pipeline_parallel_microbatch_size
        num_microbatches = accumulation * clips // microbatch
        pipeline.check_microbatches(config.parallelism, num_microbatches)
        sizes.append(StepSize(bucket, tokens, microbatch, num_counted=num_microbatches, accumulation=1))
    return max(sizes, key=lambda size: size.num_tokens * size.num_clips)


def build_model(
    config: JobConfig, spec: ModelSpec, args: Any, meshes: Meshes, num_tokens: int
) -> tuple[nn.Module, Any]:
    """The sharded model on the meta device; with pipelines, this rank's stages of it, and their names (Stages).

    Build it outside the fake mode, where each of its tensors costs much more time.
    """
    plan = spec.plan
    weights = build_weights(
        WeightsSettings(config.model, config.checkpoint, config.training, config.lora, seed=config.debug.seed),
        spec,
        args,
    )
    with torch.device("meta"):
        model = spec.build(args)
    weights.prepare(model)
    sections = block_sections(model, plan, config.activation_checkpoint)
    stages, pipeline = None, load_pipeline(meshes.pp.size())
    if pipeline:
        stages = pipeline.keep_stages(model, plan, meshes.pp, config.parallelism, args, num_tokens)
    parallelize(
        model,
        plan,
        meshes,
        # What needs the compiler or GPUs; neither changes what is counted.
        replace(config.parallelism, enable_async_tensor_parallel=False, enable_fsdp_symm_mem=False),
        config.training,
        sections,
        Compile(enable=False),
    )
    return model, stages


def static_bytes(model: nn.Module, optimizer: str, blocks: tuple[str, ...], ema: bool) -> dict[str, int]:
    """Bytes of this rank's optimizer state, step counts included, and of its EMA weights in float32."""
    trained = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    shards = {name: tuple(fake.shard_of(p).shape) for name, p in trained.items()}
    kinds = {name: updated_by(name, len(shape), optimizer, blocks) for name, shape in shards.items()}
    sizes = {"optimizer": sum(state_bytes(kinds[name], shape) + 4 for name, shape in shards.items())}
    if ema:
        sizes["ema"] = 4 * sum(math.prod(shape) for shape in shards.values())
    return sizes


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the dry run itself, and the rest, which overrides the TOML."""
    about = (
        "Memory, collectives and FLOPs of one rank's training step, without the machine. --section.field VALUE "
        "overrides the TOML."
    )
    parser = argparse.ArgumentParser(
        prog="python -m titan_video.planner.dry_run", description=about, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="TOML of the run")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--rank", type=int, default=0, help="the rank to build")
    parser.add_argument("--cluster", help="a cluster's TOML or name: print the predicted seconds of a step on it, too")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, in bytes")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    options, rest = parse(argv)
    with main_guard():
        if options.world_size < 1:
            raise ConfigError(f"--world-size: given {options.world_size}; legal: at least 1")
        config = parse_args(["--job.config_file", str(options.config), *rest])
        report = dry_run(config, options.world_size, options.rank)
        print(describe(report, config.training.enable_cpu_offload))
        if options.cluster:
            describe_step = resolve("titan_video.planner.report.step_time:describe_step", asked_by="--cluster")
            print(describe_step(config, options.world_size, options.cluster))
        if options.json:
            with writing("report", options.json):
                numbers = asdict(report) | {"needed": report.needed, "fits": report.fits}
                options.json.write_text(json.dumps(numbers, indent=2) + "\n")
