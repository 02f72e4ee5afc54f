"""The whole program: build, step, loop, save.

data     plan -> encode what the cache lacks -> loader               once, before training
model    meta device -> parallelize -> weights                       sharded at every size
step     micro-batches -> task.prepare -> model -> task.loss -> backward -> clip -> update
loop     step -> log -> validate -> save -> signal?

torchrun --nproc_per_node 8 train.py --job.config_file train_configs/x.toml --training.steps 100
"""

import gc
import os
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from titan_video import kernels
from titan_video.checkpoint.manager import CheckpointManager
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import dump, main_guard, parse_args
from titan_video.data.batch import Batch
from titan_video.data.batching import Batching, gradient_accumulation
from titan_video.data.loader import DrawPlan, build_loader
from titan_video.data.prefetch import Prefetch
from titan_video.distributed.activation_checkpoint import block_sections, check_save_min_kv
from titan_video.distributed.compile import GraphLog
from titan_video.distributed.fsdp import count_parameters, reshard
from titan_video.distributed.parallel_dims import ParallelDims, check_layout
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import broadcast_from_rank0, clip_grad_norm, reduce_over, set_timeout
from titan_video.encoders import build_encoders
from titan_video.flow.matching import FlowMatching, expert_sigma_range
from titan_video.ingest.prepare import check_encoders, open_run_cache, prepare_clips, with_steps
from titan_video.ingest.started import as_started
from titan_video.kernels import attention
from titan_video.models import get_args, get_spec
from titan_video.optim.ema import EmaWeights
from titan_video.optim.lr_scheduler import Scheduler
from titan_video.optim.optimizer import build_optimizer, step_in_backward
from titan_video.tasks.denoising import Denoising
from titan_video.tools import heartbeat, signals
from titan_video.tools.device import get_device, set_deterministic
from titan_video.tools.files import atomic_write
from titan_video.tools.logging import init_logger, logger
from titan_video.tools.signals import Stopped
from titan_video.training import parts
from titan_video.training.ending import RunEnd
from titan_video.training.fault_tolerance import StopAgreement
from titan_video.training.metrics import MetricsLogger, StepCost
from titan_video.training.step_numbers import StepJudge, UnreadStep
from titan_video.weights.trained import WeightsSettings, build_weights


class Trainer:
    """Built in the order in which it is read; `train` is the loop, `train_step` one optimizer step."""

    def __init__(self, config: JobConfig, supervisor: RunEnd):
        self.config, self.supervisor = config, supervisor
        self.folder = Path(config.job.dump_folder)
        self.exit_stack = ExitStack()
        self.step, self.bucket = 0, "none yet"  # the current step, and the sizes of its clips
        self.build_layout()
        self.build_task()
        self.build_data()
        self.build_model()
        self.load()
        if self.step < self.config.training.steps:
            self.build_loggers()

    # ---------------------------------------------------------------- build

    def build_layout(self) -> None:
        """The architecture, whether it can be laid out as asked, ranks, device, process groups."""
        config, m, length = self.config, self.config.model, self.config.encoder.max_text_length
        self.spec = parts.parametrize(get_spec(m.name), config)
        self.args = get_args(self.spec, m.flavor, m.hf_assets_path, length)
        self.geometry = self.spec.geometry(self.args)
        world_size = config.encoder.num_training_ranks(int(os.environ.get("WORLD_SIZE", 1)))
        check_layout(config.parallelism, self.args, world_size)
        self.dims = ParallelDims.of(config.parallelism, world_size)
        self.accumulation = gradient_accumulation(config, self.dims.dp)
        self.device = get_device(int(os.environ.get("LOCAL_RANK", 0)))
        kernels.set_backend(kernels.resolve_backend(config.model.kernels, self.device))
        if config.debug.deterministic:
            set_deterministic()
        self.encoder_channel = parts.init_process_groups(config, self.device, world_size)
        self.exit_stack.callback(dist.destroy_process_group)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.meshes = self.dims.build_mesh(self.device.type)
        # Waiting for another rank's encoding, or agreeing on a signal, takes place on the host.
        self.host_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.stop = StopAgreement(self.host_group)

    def build_task(self) -> None:
        """What a step trains on, and whether a step of every bucket can be run."""
        config, t, seed = self.config, self.config.training, self.config.debug.seed
        shard, boundary = SequenceShard.from_meshes(self.meshes), config.model.boundary or self.args.boundary
        sigmas, dtype = expert_sigma_range(config.flow, config.model.expert, boundary), t.mixed_precision_param
        flow = FlowMatching(sigmas, t.loss, t.huber_c)
        self.task = Denoising(self.spec, self.args, flow, shard, self.device, seed, t.guidance, dtype)
        self.batching = Batching.of(config.data, config.training, config.parallelism, self.accumulation * self.dims.dp)
        num_tokens = [self.task.work(bucket).tokens for bucket in config.data.sizes]
        self.longest = max(num_tokens)
        check_save_min_kv(config.activation_checkpoint, self.longest, self.args.num_layers)
        self.pp = parts.load_pipeline(self.dims.pp)
        for clips in (self.batching.clips_per_micro_batch(tokens) for tokens in num_tokens if self.pp):
            size = config.parallelism.pipeline_parallel_microbatch_size
            self.pp.check_microbatches(config.parallelism, self.accumulation * clips // size)

    def build_data(self) -> None:
        """Plan the clips, encode what is to be encoded before training (each rank its share), build the loader."""
        config, c, group = self.config, self.config.data, self.host_group
        self.encoders = build_encoders(config.encoder, config.model.hf_assets_path, self.device)
        check_encoders(self.encoders, self.args, self.geometry, config)
        cache = open_run_cache(config, self.encoders, self.args.conditioning, group)
        self.clips = prepare_clips(config, self.args, self.encoders, cache, group)
        self.encoders.free()
        channel, latent_shape, text_len = self.encoder_channel, self.geometry.latent_shape, self.args.text_len
        online = parts.build_online_encoder(config, self.encoders, cache, self.dims, channel, latent_shape, text_len)
        if online:
            self.exit_stack.callback(online.close)
        clips, null, seed, b = self.clips.training, cache.text_key(""), config.debug.seed, self.batching
        draw_plan = DrawPlan(clips, null, b, self.task.work, seed, c.shuffle, c.caption_dropout, c.image_dropout)
        text_shape, dp = (text_len, self.args.text_dim), (self.meshes.batch.get_local_rank(), self.dims.dp)
        self.loader = build_loader(c, draw_plan, cache, text_shape, dp, self.device.type == "cuda", online)
        self.config = with_steps(config, self.loader)

    def build_model(self) -> None:
        """Meta device, trained weights, stages, parallelize, memory; optimizer, schedule and EMA."""
        config, plan, args = self.config, self.spec.plan, self.args
        param_dtype = getattr(torch, config.training.mixed_precision_param)
        name, masked = config.model.attention, self.spec.masks_text
        logger.info(f"attention: {attention.set_backend(name, self.device, param_dtype, args.head_dim, masked)}")
        settings = WeightsSettings(config.model, config.checkpoint, config.training, config.lora, config.debug.seed)
        self.weights = build_weights(settings, self.spec, args, self.host_group)
        with torch.device("meta"):
            self.model = self.spec.build(args)
        self.weights.prepare(self.model)
        sections, stages = block_sections(self.model, plan, config.activation_checkpoint), None
        if self.pp:
            stages = self.pp.keep_stages(self.model, plan, self.meshes.pp, config.parallelism, args, self.longest)
        model, meshes, c = self.model, self.meshes, config
        parallelize(model, plan, meshes, c.parallelism, c.training, sections, c.compile, c.float8)
        self.model.to_empty(device="cpu" if config.training.enable_cpu_offload else self.device)
        self.pipeline, p = None, c.parallelism
        if stages:
            self.pipeline = self.pp.Pipeline(model, stages, plan, meshes.pp, p, param_dtype, self.device)
        self.optimizer = build_optimizer(model, c.optimizer, plan.blocks, c.debug.seed, self.spec.adjust_group)
        self.grad_norm = lambda: clip_grad_norm(model, config.training.max_norm, meshes.pp)
        if config.optimizer.in_backward:
            self.grad_norm = step_in_backward(self.optimizer).grad_norm
        self.scheduler = Scheduler(self.optimizer, config.lr_scheduler, config.optimizer.lr, config.training.steps)
        self.ema = EmaWeights(self.model, config.ema) if config.ema.enable else None

    def load(self) -> None:
        """A checkpoint of this run, else the weights from which the run starts."""
        model, optimizer = ModelState(self.model, self.weights.is_saved), OptimizerState(self.model, self.optimizer)
        tensors = {"model": model, "optimizer": optimizer, **({"ema": self.ema} if self.ema else {})}
        self.guard, section = parts.build_guard(self.config.fault_tolerance), self.config.checkpoint
        counters = {"data": self.loader, **self.guard.counters(), **self.weights.counters()}
        self.weights.load_frozen(self.model)
        self.checkpoint = CheckpointManager(section, self.folder / section.folder, tensors, counters)
        self.exit_stack.callback(self.checkpoint.wait)
        self.step = self.checkpoint.load()
        if self.step == 0:
            self.weights.load_initial(self.model)
            if self.ema:
                self.ema.reset()
        logger.info(f"weights: {self.weights.origin(self.step)}")

    def build_loggers(self) -> None:
        """What watches a run that is not finished: the resolved TOML, metrics, what runs around a step, validation."""
        config, steps = self.config, self.config.training.steps
        if self.rank == 0:
            atomic_write(self.folder / "config.toml", dump(config), "resolved configuration")
        self.cost = StepCost(self.args, config.activation_checkpoint, self.world_size // self.dims.dp)
        self.metrics = MetricsLogger(
            config.metrics, self.folder, self.rank, self.world_size, self.device, steps, self.step, self.loader.samples
        )
        self.exit_stack.callback(self.metrics.close)
        self.metrics.log_table(self.step, self.clips.numbers, "data")
        self.graphs = GraphLog()
        run = parts.build_gradient_check(config.debug, self.model, self.host_group)
        self.run_step = parts.balance_experts(
            config, self.args, run, model=self.model, optimizer=self.optimizer, meshes=self.meshes, metrics=self.metrics
        )
        if config.validation.enable:
            model, size = self.stop.guard(self.pipeline or self.model), self.geometry.latent_shape(config.data.sizes[0])
            validation, folder = parts.load_validation(), self.folder / "samples"
            output = validation.ClipWriter(self.encoders.decode_video, folder, config.data.fps)
            self.task.evaluator = validation.build_validator(
                self.clips.sampling, self.task, model, self.meshes, self.clips, self.loader.reader, size, output
            )

    # ---------------------------------------------------------------- step

    def train_step(self, batches: list[Batch], start: float) -> None:
        """One optimizer step over this rank's micro-batches. After a fault `step` may be that of a checkpoint.

        Losses are divided by the loss elements of all ranks, so gradients only need summing.
        """
        lr = self.scheduler.set_step(self.step)
        infos = [self.task.describe(b) for b in batches]
        self.bucket = "+".join(dict.fromkeys(i.label for i in infos))
        elements = sum(self.task.num_loss_elements(b) for b in batches)
        tokens, frames = sum(i.num_tokens * i.num_clips for i in infos), sum(i.num_frames * i.num_clips for i in infos)
        counts = reduce_over(self.meshes.batch, torch.tensor([elements, tokens, frames]), "sum").tolist()
        loss = self.run_step(self.step, lambda: self.forward_backward(batches, num_elements=counts[0]))
        grad_norm = self.grad_norm()
        loss = reduce_over(self.meshes.sequence, loss, "sum")
        max_loss = reduce_over(self.meshes.batch, loss / (elements / counts[0]), "max")
        losses = reduce_over(self.meshes.batch, loss, "sum"), max_loss
        numbers = torch.stack([*(x.to(grad_norm.device) for x in losses), grad_norm])
        step, self.step = self.step, self.judge.settle(self.step)
        if self.step < step:  # the step before was wrong, and this one is not taken
            return self.optimizer.zero_grad()
        self.guard.update(self.optimizer, numbers)
        self.optimizer.zero_grad()
        self.steps.prefetch_next()
        known = {
            "lr": lr,
            "samples": self.loader.samples,
            "tokens": counts[1],
            "video_seconds": counts[2] / self.config.data.fps,
            "data_seconds": self.steps.take_data_wait(),
            "bucket": self.bucket,
            "extra": self.loader.stats(),
            **self.cost.flops(infos),
        }
        self.graphs.step(self.step, self.bucket)
        state, losses = self.loader.state_before, self.guard.losses
        self.step = self.judge.add(UnreadStep(self.step, start, numbers, known, batches, losses, state))

    def forward_backward(self, batches: list[Batch], num_elements: int) -> Tensor:
        """Accumulate the gradients of a step; return the sum of this rank's losses, detached."""
        inputs, task, guard = self.steps.micro_batches(batches), self.task, self.guard
        if self.pipeline:
            inputs = list(inputs)
            return self.pipeline.step(inputs, lambda v, i: guard.sum(i, task.loss(v, inputs[i])) / num_elements)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(inputs):
            prediction = self.model(**micro_batch.kwargs)
            loss = guard.sum(i, task.loss(prediction, micro_batch)) / num_elements
            loss.backward()
            total += loss.detach()
        return total

    def validate(self) -> None:
        """Measure and sample the model. A stop request ends it early, without a result."""
        start, found = time.perf_counter(), None
        with self.ema.swapped_in() if self.ema and self.config.validation.use_ema else nullcontext(), suppress(Stopped):
            found = self.task.evaluate(self.step)
        reshard(self.model)
        if found:
            self.metrics.log_evaluation(self.step, found, self.config.data.fps, time.perf_counter() - start)

    # ---------------------------------------------------------------- loop

    def train(self) -> None:
        c, last_step = self.config, self.config.training.steps
        if self.step >= last_step:
            return self.finish_again()
        size = f"{count_parameters(self.model, self.meshes.pp):,} parameters, {self.accumulation} micro-batches a step"
        ranks = f"{self.world_size} x {self.device.type}"
        logger.info(f"training from step {self.step + 1} to {last_step} on {ranks}, {size}")
        if c.validation.enable and self.step == 0:
            self.validate()
        self.stop.check("stopped by a signal before a step; the same command goes on")
        gc.disable()  # collected on all ranks at once: one rank's pause is every rank's pause
        first_step = self.step + 1
        clips = c.parallelism.pipeline_parallel_microbatch_size if self.pipeline else 0
        self.steps = Prefetch(self.loader, last_step - self.step, self.task.prepare, self.device, clips)
        run = {"guard": self.guard, "checkpoint": self.checkpoint, "metrics": self.metrics, "steps": self.steps}
        handle = partial(parts.handle_fault, last_step, **run, folder=self.folder, group=self.host_group)
        self.judge = StepJudge(c, self.guard, self.ema, self.metrics, handle)
        with parts.build_profiler(c, self.folder, self.device) as profiler:
            while self.step < last_step:
                self.export()  # of the step before; a resumed run makes up for it
                start = time.perf_counter()
                batches = self.steps.step()
                self.step = step = self.step + 1
                heartbeat.enter(f"step {step}")
                self.train_step(batches, start)
                if self.step < step:  # rolled back
                    continue
                profiler.step(self.step)
                if c.validation.enable and (self.step % c.validation.freq == 0 or self.step == last_step):
                    self.validate()
                stopping, saving = self.stop.requested(self.checkpoint.wanted())
                if stopping or saving:
                    self.step = self.judge.settle(self.step)
                self.checkpoint.save(self.step, last=self.step == last_step, force=stopping or saving)
                if stopping:
                    raise Stopped(f"stopped by a signal after step {self.step}; the same command resumes from there")
                if self.step % c.training.gc_freq == 0:
                    gc.collect(1)
                if self.step == first_step:
                    set_timeout(c.comm.train_timeout_seconds, self.meshes)
                    self.supervisor.set_limit(c.comm.train_timeout_seconds)
            self.checkpoint.wait()
        self.export(last=True)
        logger.info(f"finished: {self.folder}")

    def finish_again(self) -> None:
        """A run that has all its steps: export what was asked for later, or prevented by a kill after the last save."""
        steps, fix = self.config.training.steps, "raise training.steps to train further, or change job.dump_folder"
        logger.info(f"{self.folder} is already at step {self.step} of {steps}: {fix}")
        is_exported = broadcast_from_rank0(lambda: self.weights.is_exported(self.folder, self.step), self.host_group)
        if self.step == steps and not is_exported:
            self.export(last=True)

    def export(self, last: bool = False) -> None:
        self.weights.export(self.model, self.folder, self.step, self.ema, last)


@record
def main(argv: list[str]) -> None:
    init_logger()
    signals.install()
    with main_guard():
        config = as_started(parse_args(argv))
        check(config, world_size := int(os.environ.get("WORLD_SIZE", 1)))
    num_training = config.encoder.num_training_ranks(world_size)
    with parts.supervise(config) as supervisor:
        if int(os.environ.get("RANK", 0)) >= num_training:
            return parts.run_encoder_rank(config, num_training)
        trainer = Trainer(config, supervisor)
        try:
            trainer.train()
        except (FloatingPointError, Stopped):  # on all ranks at the same step, so that a save under way can finish
            trainer.exit_stack.close()
            raise
        except torch.OutOfMemoryError as e:
            sys.exit(f"error: {parts.explain_out_of_memory(e, config, trainer.step, trainer.bucket)}")
        trainer.exit_stack.close()


if __name__ == "__main__":
    main(sys.argv[1:])
