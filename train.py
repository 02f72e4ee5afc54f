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
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from datetime import timedelta
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
from titan_video.data.batching import Batching, Bucket, Work, gradient_accumulation
from titan_video.data.loader import DrawPlan, EntryReader, LatentLoader
from titan_video.data.prefetch import Prefetch
from titan_video.distributed.activation_checkpoint import check_save_min_kv, recomputed_flops, select_blocks
from titan_video.distributed.compile import num_graphs
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.parallel_dims import ParallelDims, check_layout
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline
from titan_video.distributed.pipeline_stages import check_microbatches, keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import (
    broadcast_from_rank0,
    clip_grad_norm,
    init_distributed,
    reduce_over,
    set_timeout,
)
from titan_video.encoders import build_encoders
from titan_video.flow.matching import FlowMatching, expert_sigma_range
from titan_video.ingest.prepare import check_encoders, open_cache, prepare_clips
from titan_video.kernels import attention
from titan_video.models import get_args, get_spec
from titan_video.models.layers import token_shape
from titan_video.optim.ema import EmaWeights
from titan_video.optim.lr_scheduler import Scheduler
from titan_video.optim.optimizer import build_optimizer, step_in_backward
from titan_video.tasks.denoising import Denoising
from titan_video.tasks.validation import ClipWriter, Validator, build_prompts
from titan_video.tools.device import get_device, read
from titan_video.tools.logging import init_logger, logger
from titan_video.tools.parts import resolve
from titan_video.training.fault_tolerance import NonFiniteGuard, SignalFlag
from titan_video.training.metrics import MetricsLogger, StepMetrics
from titan_video.weights.trained import WeightsSettings, build_weights

ONLINE = "titan_video.online.setup"  # optional: encoding during training


class Trainer:
    """Built in the order in which it is read; `train` is the loop, `train_step` one optimizer step."""

    def __init__(self, config: JobConfig):
        self.config = config
        self.folder = Path(config.job.dump_folder)
        self.exit_stack = ExitStack()
        self.num_graphs = 0  # compiled so far
        self.build_layout()
        self.build_task()
        self.build_data()
        self.build_model()
        self.load()
        if self.step < config.training.steps:
            self.build_loggers()

    # ---------------------------------------------------------------- build

    def build_layout(self) -> None:
        """The architecture, whether it can be laid out as asked, ranks, device, process groups."""
        config = self.config
        self.spec = get_spec(config.model.name)
        self.args = get_args(
            self.spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length
        )
        self.geometry = self.spec.geometry(self.args)
        world_size = config.encoder.num_training_ranks(int(os.environ.get("WORLD_SIZE", 1)))
        check_layout(config.parallelism, self.args, world_size)
        self.dims = ParallelDims.of(config.parallelism, world_size)
        self.accumulation = gradient_accumulation(config, self.dims.dp)

        self.device = get_device(int(os.environ.get("LOCAL_RANK", 0)))
        kernels.set_backend(kernels.resolve_backend(config.model.kernels, self.device))
        if config.debug.deterministic:
            # cuBLAS is deterministic only with this, and reads it at its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.encoder_channel = None
        if config.encoder.placement == "separate":
            init_process_groups = resolve(f"{ONLINE}:init_process_groups", asked_by="encoder.placement = separate")
            self.encoder_channel = init_process_groups(config.encoder, config.comm, self.device, world_size)
        else:
            init_distributed(self.device, config.comm.init_timeout_seconds)
        self.exit_stack.callback(dist.destroy_process_group)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.meshes = self.dims.build_mesh(self.device.type)
        # Waiting for another rank's encoding, or agreeing on a signal, takes place on the host.
        self.host_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        if self.rank == 0 and config.job.description:
            logger.info(config.job.description)
        if self.rank == 0 and config.job.print_config:
            logger.info(f"configuration:\n{dump(config)}")

    def build_task(self) -> None:
        """What a step trains on, and whether a step of every bucket can be run."""
        config = self.config
        flow = expert_sigma_range(config.flow, config.model.expert, config.model.boundary or self.args.boundary)
        self.task = Denoising(
            self.spec,
            self.args,
            FlowMatching(flow),
            SequenceShard.from_meshes(self.meshes),
            self.device,
            seed=config.debug.seed,
            guidance_scale=config.training.guidance,
        )
        micro_batches = self.accumulation * self.dims.dp
        self.batching = Batching.of(config.data, config.training, config.parallelism, micro_batches)
        works = [self.work(bucket) for bucket in config.data.sizes]
        self.longest = max(work.tokens for work in works)
        for work in works if self.dims.pp > 1 else ():
            clips = self.accumulation * self.batching.clips_per_micro_batch(work.tokens)
            check_microbatches(config.parallelism, clips // config.parallelism.pipeline_parallel_microbatch_size)
        check_save_min_kv(config.activation_checkpoint, self.longest)

    def work(self, bucket: Bucket) -> Work:
        """Of one clip; ValueError where the model's patch does not divide it."""
        tokens = token_shape(self.geometry.latent_shape(bucket)[1:], self.args.patch).num_tokens
        return Work(tokens, self.args.flops(tokens))

    def build_data(self) -> None:
        """Plan the clips, encode what is to be encoded before training (each rank its share), build the loader."""
        config, c, conditioning = self.config, self.config.data, self.args.conditioning
        self.encoders = build_encoders(config.encoder, config.model.hf_assets_path, self.device)
        check_encoders(self.encoders, self.args, self.geometry, config)
        cache_folder = Path(c.cache_folder or self.folder / "cache")
        self.cache = open_cache(cache_folder, self.encoders, conditioning, self.host_group)
        is_ahead = config.encoder.placement == "cached"
        self.clips = prepare_clips(
            c, is_ahead, config.validation, self.folder, self.encoders, self.cache, self.host_group
        )
        self.encoders.free()
        online = None
        if config.encoder.placement != "cached":
            build_online_encoder = resolve(f"{ONLINE}:build_online_encoder", asked_by="encoder.placement")
            online = build_online_encoder(
                config,
                self.encoders,
                self.cache,
                self.dims,
                self.encoder_channel,
                self.geometry.latent_shape,
                self.args.text_len,
            )
            self.exit_stack.callback(online.close)
        draw_plan = DrawPlan(
            self.clips.training,
            self.cache.text_key(""),
            self.batching,
            self.work,
            seed=config.debug.seed,
            shuffle=c.shuffle,
            caption_dropout=c.caption_dropout,
        )
        entries = online.cache if online else self.cache
        keep = c.num_workers == 0 and not online
        self.loader = LatentLoader(
            draw_plan,
            EntryReader(entries, self.args.text_len, self.args.text_dim, keep),
            dp_rank=self.meshes.batch.get_local_rank(),
            dp_size=self.dims.dp,
            num_workers=c.num_workers,
            prefetch_factor=c.prefetch_factor,
            pin_memory=self.device.type == "cuda",
            online=online,
        )

    def build_model(self) -> None:
        """Meta device, trained weights, stages, parallelize, memory; optimizer, schedule and EMA."""
        config, plan = self.config, self.spec.plan
        param_dtype = getattr(torch, config.training.mixed_precision_param)
        backend = attention.set_backend(
            config.model.attention, self.device, param_dtype, self.args.head_dim, self.spec.masks_text
        )
        logger.info(f"attention: {backend}")
        settings = WeightsSettings(
            config.model, config.checkpoint, config.training, config.lora, seed=config.debug.seed
        )
        self.weights = build_weights(settings, self.spec, self.args, self.host_group)
        with torch.device("meta"):
            self.model = self.spec.build(self.args)
        self.weights.prepare(self.model)
        checkpointed = select_blocks(self.model, plan, config.activation_checkpoint.layers)
        stages = None
        if self.dims.pp > 1:
            stages = keep_stages(self.model, plan, self.meshes.pp, config.parallelism, self.args, self.longest)
        parallelize(
            self.model,
            plan,
            self.meshes,
            config.parallelism,
            config.training,
            config.activation_checkpoint,
            config.compile,
            checkpointed=checkpointed,
            float8=config.float8,
        )
        self.model.to_empty(device="cpu" if config.training.enable_cpu_offload else self.device)
        self.pipeline = None
        if stages:
            self.pipeline = Pipeline(
                self.model, stages, plan, self.meshes.pp, config.parallelism, param_dtype, self.device
            )
        self.optimizer = build_optimizer(self.model, config.optimizer, plan.blocks, config.debug.seed)
        self.in_backward = step_in_backward(self.optimizer) if config.optimizer.in_backward else None
        self.scheduler = Scheduler(self.optimizer, config.lr_scheduler, config.optimizer.lr, config.training.steps)
        self.ema = EmaWeights(self.model, config.ema) if config.ema.enable else None

    def load(self) -> None:
        """A checkpoint of this run, else the weights from which the run starts."""
        tensors = {
            "model": ModelState(self.model, self.weights.is_saved),
            "optimizer": OptimizerState(self.model, self.optimizer),
        }
        if self.ema:
            tensors["ema"] = self.ema
        counters = {"data": self.loader, **self.weights.counters()}
        c = self.config.checkpoint
        self.weights.load_frozen(self.model)
        self.checkpoint = CheckpointManager(c, self.folder / c.folder, tensors, counters)
        self.step = self.checkpoint.load()
        if self.step == 0:
            self.weights.load_initial(self.model)
            if self.ema:
                self.ema.reset()

    def build_loggers(self) -> None:
        """What watches a run that is not finished: the resolved TOML, metrics, the non-finite guard, validation."""
        config = self.config
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(dump(config))
        self.metrics = MetricsLogger(
            config.metrics,
            self.folder,
            self.rank,
            self.world_size,
            self.device,
            config.training.steps,
            self.step,
            samples=self.loader.samples,
        )
        self.exit_stack.callback(self.metrics.close)
        self.metrics.log_scalars(self.step, self.clips.numbers, "data")
        self.guard = NonFiniteGuard(config.fault_tolerance.nonfinite, config.fault_tolerance.max_nonfinite_steps)
        if config.validation.enable:
            reader = self.loader.reader
            latent_shape = self.geometry.latent_shape(config.data.sizes[0])
            self.task.evaluator = Validator(
                config.validation,
                self.task,
                self.pipeline or self.model,
                self.meshes,
                self.clips.held_out,
                build_prompts(reader, self.cache, self.clips.prompts, self.clips.of_prompts, latent_shape),
                get_clip=lambda clip, number: reader.batch([clip], [number]),
                output=ClipWriter(self.encoders.decode_video, self.folder / "samples", config.data.fps),
            )

    # ---------------------------------------------------------------- step

    def train_step(self, batches: list[Batch], start: float) -> None:
        """One optimizer step over this rank's micro-batches.

        Losses are divided by the loss elements of all ranks, so gradients only need summing.
        """
        lr = self.scheduler.set_step(self.step)
        infos = [self.task.describe(b) for b in batches]
        local = torch.tensor(
            [
                sum(self.task.num_loss_elements(b) for b in batches),
                sum(i.num_tokens * i.num_clips for i in infos),
                sum(i.num_frames * i.num_clips for i in infos),
            ]
        )
        num_elements, num_tokens, num_frames = reduce_over(self.meshes.batch, local, "sum").tolist()
        loss = self.forward_backward(batches, num_elements)
        if self.in_backward:
            grad_norm = self.in_backward.grad_norm()
        else:
            grad_norm = clip_grad_norm(self.model, self.config.training.max_norm, self.meshes.pp)
        loss = reduce_over(self.meshes.sequence, loss, "sum")
        rank_mean = loss / (local[0].item() / num_elements)
        losses = reduce_over(self.meshes.batch, loss, "sum"), reduce_over(self.meshes.batch, rank_mean, "max")
        numbers = torch.stack([*(x.to(grad_norm.device) for x in losses), grad_norm])
        self.guard.update(self.optimizer, numbers[::2])
        self.optimizer.zero_grad()
        self.steps.prefetch_next()
        global_loss, max_loss, norm = read(numbers)  # the first host-device synchronisation of the step
        if self.guard.check(global_loss, norm, self.step) and self.ema:
            self.ema.update(self.step)

        ranks_per_sample = self.world_size // self.dims.dp
        model_flops = 3 * sum(i.flops for i in infos) / ranks_per_sample
        checkpointing = self.config.activation_checkpoint
        recomputed = sum(recomputed_flops(checkpointing, self.args, i.num_tokens, i.num_clips) for i in infos)
        label = "+".join(dict.fromkeys(i.label for i in infos))
        metrics = StepMetrics(
            loss=global_loss,
            max_loss=max_loss,
            grad_norm=norm,
            lr=lr,
            samples=self.loader.samples,
            tokens=num_tokens,
            video_seconds=num_frames / self.config.data.fps,
            model_flops=model_flops,
            hardware_flops=model_flops + recomputed / ranks_per_sample,
            step_seconds=time.perf_counter() - start,
            data_seconds=self.steps.data_wait_seconds,
            bucket=label,
            extra=self.loader.stats(),
        )
        self.metrics.log(self.step, metrics)
        self.steps.data_wait_seconds = 0.0
        if num_graphs() > self.num_graphs:  # the first steps of each bucket may compile; later ones should not
            new = num_graphs() - self.num_graphs
            logger.info(f"step {self.step} compiled {new} graphs for {label}, {num_graphs()} so far")
            self.num_graphs = num_graphs()

    def forward_backward(self, batches: list[Batch], num_elements: int) -> Tensor:
        """Accumulate the gradients of a step; return the sum of this rank's losses, detached."""
        inputs = self.steps.micro_batches(batches)
        if self.pipeline:
            inputs = list(inputs)
            return self.pipeline.step(inputs, lambda v, i: self.task.loss(v, inputs[i]).sum() / num_elements)
        total = torch.zeros((), device=self.device)
        for micro_batch in inputs:
            prediction = self.model(**micro_batch.kwargs)
            loss = self.task.loss(prediction, micro_batch).sum() / num_elements
            loss.backward()
            total += loss.detach()
        return total

    def validate(self) -> None:
        start = time.perf_counter()
        with self.ema.swapped_in() if self.ema and self.config.validation.use_ema else nullcontext():
            found = self.task.evaluate(self.step)
        reshard(self.model)
        if found.scalars:
            self.metrics.log_scalars(self.step, found.scalars)
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in found.scalars.items())
            logger.info(f"validation at step {self.step}: {numbers}")
        for i, (prompt, frames) in enumerate(found.clips):
            self.metrics.log_video(f"samples/{i} {prompt}", frames.numpy(), self.config.data.fps, self.step)
        if found.clips:
            logger.info(f"{len(found.clips)} clips sampled to {self.folder / 'samples' / f'step-{self.step}'}")
        logger.info(f"validation took {time.perf_counter() - start:.1f} s")

    # ---------------------------------------------------------------- loop

    def train(self) -> None:
        c, last_step = self.config, self.config.training.steps
        if self.step >= last_step:
            return self.finish_again()
        num_parameters = torch.tensor(sum(p.numel() for p in self.model.parameters()))
        logger.info(
            f"training from step {self.step + 1} to {last_step} on {self.world_size} x {self.device.type}, "
            f"{reduce_over(self.meshes.pp, num_parameters, 'sum').item():,} parameters, "
            f"{self.accumulation} micro-batches a step"
        )
        if c.validation.enable and self.step == 0:
            self.validate()

        gc.disable()  # collected on all ranks at once: one rank's pause is every rank's pause
        first_step = self.step + 1
        clips = c.parallelism.pipeline_parallel_microbatch_size if self.pipeline else 0
        self.steps = Prefetch(self.loader, last_step - self.step, self.task.prepare, self.device, clips)
        with SignalFlag() if c.fault_tolerance.save_on_signal else nullcontext() as signals:
            while self.step < last_step:
                start = time.perf_counter()
                batches = self.steps.step()
                self.step += 1
                self.train_step(batches, start)
                if c.validation.enable and (self.step % c.validation.freq == 0 or self.step == last_step):
                    self.validate()
                stopping = signals is not None and signals.requested(self.host_group)
                self.checkpoint.save(self.step, last=self.step == last_step, force=stopping)
                if stopping:
                    logger.info(f"stopped by a signal after step {self.step}; the same command resumes from there")
                    break
                if self.step % c.training.gc_freq == 0:
                    gc.collect(1)
                if self.step == first_step:
                    meshes = [getattr(self.meshes, f.name) for f in fields(self.meshes)]
                    set_timeout(c.comm.train_timeout_seconds, meshes)
            self.checkpoint.wait()
        if self.step == last_step:
            self.export()
            logger.info(f"finished: {self.folder}")

    def finish_again(self) -> None:
        """A run that has all its steps: export what was asked for later, or what a kill after the last save prevented."""
        last_step = self.config.training.steps
        logger.info(
            f"{self.folder} is already at step {self.step} of {last_step}: raise training.steps to go on, or change "
            f"job.dump_folder"
        )
        is_exported = broadcast_from_rank0(lambda: self.weights.is_exported(self.folder), self.host_group)
        if self.step == last_step and not is_exported:
            self.export()

    def export(self) -> None:
        if self.config.checkpoint.last_save_in_hf:
            self.weights.export(self.model, self.folder, self.ema.state_dict() if self.ema else None)

    def close(self) -> None:
        self.exit_stack.close()


@record
def main(argv: list[str]) -> None:
    init_logger()
    with main_guard():
        config = parse_args(argv)
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        check(config, world_size)
    try:
        if int(os.environ.get("RANK", 0)) >= config.encoder.num_training_ranks(world_size):
            run_encoder_rank = resolve(f"{ONLINE}:run_encoder_rank", asked_by="encoder.placement = separate")
            num_training = config.encoder.num_training_ranks(world_size)
            return run_encoder_rank(config.encoder, config.data, config.comm, config.model.hf_assets_path, num_training)
        trainer = Trainer(config)
        try:
            trainer.train()
        except FloatingPointError as e:  # on all ranks at the same step, so that a save under way can still finish
            trainer.checkpoint.wait()
            trainer.close()
            sys.exit(f"error: {e}")
        trainer.close()
    except ValueError as e:  # for the user to fix: the message names the file or field; our own errors are assertions
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
