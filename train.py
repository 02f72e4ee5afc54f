"""The whole program: build, step, loop, save.

data     plan -> encode what the cache lacks -> loader               once, before training
model    meta device -> parallelize -> weights                       sharded at every size
step     micro-batches -> levels, noise -> velocity -> loss -> backward -> clip -> update
loop     step -> log -> validate -> save -> signal?

torchrun --nproc_per_node 8 train.py --job.config_file train_configs/x.toml --training.steps 100
"""

import gc
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from titan_video import kernels
from titan_video.checkpoint.manager import CheckpointManager, ModelState, OptimizerState
from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import dump, main_guard, parse_args
from titan_video.data.batch import Batch
from titan_video.data.batching import Batching, Bucket, Work, gradient_accumulation
from titan_video.data.loader import LatentLoader
from titan_video.data.prefetch import Prefetch
from titan_video.distributed.activation_checkpoint import check_save_min_kv, chosen_blocks, recomputed_flops
from titan_video.distributed.compile import num_graphs
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.parallel_dims import ParallelDims, check_layout
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, check_microbatches, keep_stages
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import broadcast_from_rank0, clip_grad_norm, reduce_over, set_timeout
from titan_video.encoders import build_encoders
from titan_video.flow.matching import FlowMatching, expert_sigma_range
from titan_video.flow.noise import draw_noise, draw_uniform
from titan_video.ingest.plan import Plan, build_plan
from titan_video.ingest.prepare import open_cache, prepare
from titan_video.kernels import attention
from titan_video.lora.adapters import add_adapters, is_adapter
from titan_video.lora.files import MergedWeights, are_exported, lora_path, save_lora
from titan_video.models import get_args, get_spec
from titan_video.models.layers import cast_params, token_shape
from titan_video.online.setup import build_online_encoder, join, run_encoder_rank
from titan_video.optim.ema import EmaWeights
from titan_video.optim.lr_scheduler import Scheduler
from titan_video.optim.optimizer import InBackward, build_optimizer
from titan_video.tasks.denoising import ModelInputs, model_inputs, predict, velocity_loss
from titan_video.tasks.validation import Validator, with_frames, with_size
from titan_video.tools.device import get_device, read, send
from titan_video.tools.logging import init_logger, logger
from titan_video.training.fault_tolerance import NonFiniteGuard, SignalFlag
from titan_video.training.metrics import MetricsLogger
from titan_video.weights.hf_storage import save_hf
from titan_video.weights.initial_weights import LoraState, load_initial_weights
from titan_video.weights.pipeline_folder import complete_pipeline, export_path, is_exported


class Trainer:
    """Built in the order in which it is read; `train` is the loop, `train_step` one optimizer step."""

    def __init__(self, config: JobConfig):
        self.config = config
        self.folder = Path(config.job.dump_folder)
        self.seed = config.debug.seed
        self.exit_stack = []
        self.graphs = 0  # compiled so far

        # --- architecture, and whether it can be laid out as asked ---
        self.spec = get_spec(config.model.name)
        self.args = get_args(
            self.spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length
        )
        self.conditioning = self.args.conditioning
        sigmas = expert_sigma_range(config.flow, config.model.expert, config.model.boundary or self.args.boundary)
        self.hf_folder = f"{self.spec.hf_folder}_2" if config.model.expert == "low" else self.spec.hf_folder
        world_size = config.encoder.num_training_ranks(int(os.environ.get("WORLD_SIZE", 1)))
        check_layout(config.parallelism, self.args, world_size)
        self.dims = ParallelDims.of(config.parallelism, world_size)
        self.accumulation = gradient_accumulation(config, self.dims.dp)
        self.batching = Batching.of(config.data, config.training, config.parallelism, self.accumulation * self.dims.dp)

        # --- ranks and device ---
        self.device = get_device(int(os.environ.get("LOCAL_RANK", 0)))
        kernels.set_backend(kernels.resolve_backend(config.model.kernels, self.device))
        self.channel = join(config.encoder, config.comm, self.device, world_size)
        self.exit_stack.append(dist.destroy_process_group)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.meshes = self.dims.build_mesh(self.device.type)
        self.shard = SequenceShard(self.meshes.sequence, self.dims.tp)
        # Waiting for another rank's encoding, or agreeing on a signal, takes place on the host.
        self.host_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        if config.debug.deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # cuBLAS is deterministic only with this, and reads it at its first use
            torch.use_deterministic_algorithms(True)

        # --- encoders, objective ---
        self.encoders = build_encoders(config.encoder, config.model.hf_assets_path, self.device)
        self.check_encoders()
        works = [self.work(bucket) for bucket in config.data.sizes]
        longest = max(work.tokens for work in works)
        for work in works if self.dims.pp > 1 else ():
            clips = self.accumulation * self.batching.clips_of(work.tokens)
            check_microbatches(config.parallelism, clips // config.parallelism.pipeline_parallel_microbatch_size)
        check_save_min_kv(config.activation_checkpoint, longest)
        self.flow = FlowMatching(sigmas)
        if config.job.description and self.rank == 0:
            logger.info(config.job.description)
        if config.job.print_config and self.rank == 0:
            logger.info(f"configuration:\n{dump(config)}")

        # --- data ---
        self.build_data()

        # --- model, optimizer, averages ---
        self.build_model(longest)

        # --- weights: a checkpoint of this run, else what the run starts from ---
        saved = ModelState(self.model, is_adapter if config.lora.enable else None)
        tensors = {"model": saved, "optimizer": OptimizerState(self.model, self.optimizer)}
        if self.ema:
            tensors["ema"] = self.ema
        counters = {"data": self.loader}
        if config.lora.enable:
            self.load_initial_weights()  # frozen weights are in no checkpoint
            counters["lora"] = LoraState(config.lora, self.initial_weights, self.hf_folder, self.seed, self.host_group)
        self.checkpoint = CheckpointManager(
            config.checkpoint, self.folder / config.checkpoint.folder, tensors, counters
        )
        self.step = self.checkpoint.load()
        if self.step == 0 and not config.lora.enable:
            self.load_initial_weights()
        if self.step >= config.training.steps:
            return  # finished: `train` says so, and nothing in the folder changes

        # --- what watches ---
        self.write_config()
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
        self.exit_stack.append(self.metrics.close)
        self.metrics.log_scalars(self.step, self.clips.numbers, "data")
        self.guard = NonFiniteGuard(config.fault_tolerance.nonfinite, config.fault_tolerance.max_nonfinite_steps)
        self.validator = self.build_validator() if config.validation.enable else None

    # ---------------------------------------------------------------- build

    def check_encoders(self) -> None:
        """The model and the encoders do not know each other; here they meet."""
        e, a, c = self.encoders, self.args, self.conditioning
        flavor, encoder = f"model.flavor = {self.config.model.flavor!r}", f"encoder.name = {self.config.encoder.name!r}"
        if e.text_dim != a.text_dim:
            raise ValueError(
                f"{flavor} takes text of width {a.text_dim}, {encoder} gives {e.text_dim}: choose the two to fit"
            )
        if e.channels != a.out_channels:
            raise ValueError(
                f"{flavor} takes {a.out_channels} latent channels, {encoder} gives {e.channels}: choose the two to fit"
            )
        if c.pooled_text and e.pooled_dim != a.pooled_dim:
            raise ValueError(
                f"{flavor} takes pooled text of width {a.pooled_dim}, {encoder} gives {e.pooled_dim}: choose the "
                f"two to fit"
            )
        if c.image_tokens and e.image_dim != a.image_dim:
            raise ValueError(
                f"{flavor} takes image tokens of width {a.image_dim}, {encoder} gives {e.image_dim}: choose the "
                f"two to fit"
            )
        if c.num_cond_frames and self.config.validation.prompts_path:
            raise ValueError(
                f"validation.prompts_path: {flavor} starts from an image, which a prompt does not have; leave it empty"
            )

    def latent_shape(self, bucket: tuple[int, ...]) -> tuple[int, ...]:
        frames, height, width = bucket
        e = self.encoders
        return e.channels, (frames - 1) // e.stride_t + 1, height // e.stride_s, width // e.stride_s

    def write_config(self) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(dump(self.config))

    def build_data(self) -> None:
        """Plan the clips, encode what is to be encoded before training (each rank its share), hold some out, and make
        the loader.
        """
        config, c = self.config, self.config.data
        cache_folder = Path(c.cache_folder or self.folder / "cache")
        self.cache = open_cache(cache_folder, self.encoders, self.conditioning, self.host_group)

        def make(path: str) -> Plan:
            plan = build_plan(c, cache_folder, path)
            return plan.without_single_frames() if self.conditioning.num_cond_frames else plan

        is_ahead = config.encoder.placement == "cached"
        self.clips = prepare(
            make, is_ahead, config.validation, self.folder, self.encoders, self.cache, self.host_group, c.num_workers
        )
        self.encoders.free()
        placed = self.dims, self.channel, self.latent_shape, self.args.text_len
        live = build_online_encoder(config.encoder, c, config.comm, self.encoders, self.cache, *placed)
        if live:
            self.exit_stack.append(live.close)
        self.loader = LatentLoader(
            self.clips.training,
            self.cache,
            self.cache.text_key(""),
            self.batching,
            self.work,
            dp_rank=self.meshes.batch.get_local_rank(),
            dp_size=self.dims.dp,
            seed=self.seed,
            shuffle=c.shuffle,
            caption_dropout=c.caption_dropout,
            max_text_length=self.args.text_len,
            text_dim=self.args.text_dim,
            num_workers=c.num_workers,
            prefetch_factor=c.prefetch_factor,
            pin_memory=self.device.type == "cuda",
            live=live,
        )

    def build_model(self, longest: int) -> None:
        """Meta device, adapters, stages, parallelize, memory; the optimizer and the averages. longest:

        tokens of the largest bucket.
        """
        config, param_dtype = self.config, getattr(torch, self.config.training.mixed_precision_param)
        words = attention.set_backend(
            config.model.attention, self.device, param_dtype, self.args.head_dim, self.spec.masks_text
        )
        logger.info(f"attention: {words}")
        with torch.device("meta"):
            self.model = self.spec.build(self.args)
        if config.lora.enable:
            add_adapters(self.model, self.spec, config.lora, param_dtype)
        else:
            cast_params(self.model, self.spec.plan.fp32, getattr(torch, config.training.dtype))
        stages, checkpointed = None, chosen_blocks(self.model, self.spec.plan, config.activation_checkpoint.layers)
        if self.dims.pp > 1:
            stages = keep_stages(self.model, self.spec.plan, self.meshes.pp, config.parallelism, self.args, longest)
        parallelize(
            self.model,
            self.spec.plan,
            self.meshes,
            config.parallelism,
            config.training,
            config.activation_checkpoint,
            config.compile,
            checkpointed,
            config.float8,
        )
        self.model.to_empty(device="cpu" if config.training.enable_cpu_offload else self.device)
        self.pipeline = None
        if stages:
            self.pipeline = Pipeline(
                self.model, stages, self.spec.plan, self.meshes.pp, config.parallelism, param_dtype, self.device
            )
        self.optimizer = build_optimizer(self.model, config.optimizer, self.spec.plan.blocks, self.seed)
        self.in_backward = InBackward(self.optimizer) if config.optimizer.in_backward else None
        self.scheduler = Scheduler(self.optimizer, config.lr_scheduler, config.optimizer.lr, config.training.steps)
        self.ema = EmaWeights(self.model, config.ema) if config.ema.enable else None

    def work(self, bucket: Bucket) -> Work:
        """Of one clip; ValueError where the model's patch does not divide it."""
        tokens = token_shape(self.latent_shape(bucket)[1:], self.args.patch).num_tokens
        return Work(tokens, self.args.flops(tokens))

    @property
    def initial_weights(self) -> str:
        """Where they are; empty: drawn from the seed."""
        c = self.config
        return c.checkpoint.initial_load_path or (c.model.hf_assets_path if c.checkpoint.initial_load_in_hf else "")

    def load_initial_weights(self) -> None:
        load_initial_weights(
            self.model,
            self.initial_weights,
            self.spec,
            self.args,
            self.hf_folder,
            self.seed,
            self.config.lora,
            self.host_group,
        )
        if self.ema:
            self.ema.reset()

    def build_validator(self) -> Validator:
        reader, null_key, prompts = self.loader.reader, self.cache.text_key(""), None
        clips = self.clips
        if clips.prompts and self.conditioning.num_cond_frames:
            prompts = with_frames(reader, clips.of_prompts, null_key)
        elif clips.prompts:
            keys = [self.cache.text_key(p) for p in clips.prompts]
            prompts = with_size(reader, clips.prompts, keys, null_key, self.latent_shape(self.config.data.sizes[0]))
        return Validator(
            self.config.validation,
            self.pipeline or self.model,
            self.args.patch,
            self.meshes,
            self.shard,
            self.device,
            self.seed,
            num_clips=len(clips.held_out),
            get_clip=lambda i: reader.batch([clips.held_out[i]], [i]),
            prompts=prompts,
            decode=self.encoders.decode_video,
            fps=self.config.data.fps,
            folder=self.folder / "samples",
            conditioning=self.conditioning,
            guidance_scale=self.config.training.guidance,
            interval=self.flow.interval,
        )

    # ---------------------------------------------------------------- step

    def train_step(self, batches: list[Batch], start: float) -> None:
        """One optimizer step over this rank's micro-batches.

        Losses are divided by the elements of all ranks, so gradients only need summing.
        """
        lr = self.scheduler.set_step(self.step)
        num_loss_elements = sum(self.conditioning.num_loss_elements(b.streams["video"]) for b in batches)
        pixel_sizes = [self.pixel_size(b) for b in batches]
        frames = sum(size[0] * len(b.sample_ids_B) for size, b in zip(pixel_sizes, batches, strict=True))
        sizes = torch.tensor(
            [num_loss_elements, sum(self.num_tokens(b) * len(b.sample_ids_B) for b in batches), frames]
        )
        num_elements, num_tokens, num_frames = reduce_over(self.meshes.batch, sizes, "sum").tolist()

        def loss_fn(velocity: Tensor, inputs: ModelInputs) -> Tensor:
            return velocity_loss(velocity, inputs).sum() / num_elements

        if self.pipeline:
            inputs = list(self.steps.micro_batches(batches))
            loss = self.pipeline.step(inputs, lambda velocity, i: loss_fn(velocity, inputs[i]))
        else:
            loss = torch.zeros((), device=self.device)
            for inputs in self.steps.micro_batches(batches):
                micro_loss = loss_fn(predict(self.model, inputs), inputs)
                micro_loss.backward()
                loss += micro_loss.detach()

        if self.in_backward:
            grad_norm = self.in_backward.grad_norm()
        else:
            grad_norm = clip_grad_norm(self.model, self.config.training.max_norm, self.meshes.pp)
        share = num_loss_elements / num_elements
        loss = reduce_over(self.meshes.sequence, loss, "sum")
        losses = reduce_over(self.meshes.batch, loss, "sum"), reduce_over(self.meshes.batch, loss / share, "max")
        numbers = torch.stack([*(x.to(grad_norm.device) for x in losses), grad_norm])
        self.guard.update(self.optimizer, numbers[::2])
        self.optimizer.zero_grad()
        self.steps.ahead()
        global_loss, max_loss, norm = read(numbers)  # up to here the device has never been waited for
        if self.guard.check(global_loss, norm, self.step) and self.ema:
            self.ema.update(self.step)

        shares = [(self.num_tokens(b), len(b.sample_ids_B)) for b in batches]
        ranks_per_sample = self.world_size // self.dims.dp
        model_flops = 3 * sum(self.args.flops(*share) for share in shares) / ranks_per_sample
        recomputed = (
            sum(recomputed_flops(self.config.activation_checkpoint, self.args, *share) for share in shares)
            / ranks_per_sample
        )
        bucket = "+".join(dict.fromkeys("x".join(map(str, size)) for size in pixel_sizes))
        self.metrics.log(
            self.step,
            loss=global_loss,
            max_loss=max_loss,
            grad_norm=norm,
            lr=lr,
            samples=self.loader.samples,
            tokens=num_tokens,
            video_seconds=num_frames / self.config.data.fps,
            model_flops=model_flops,
            hardware_flops=model_flops + recomputed,
            step_seconds=time.perf_counter() - start,
            data_seconds=self.steps.waited,
            bucket=bucket,
            extra=self.loader.stats(),
        )
        self.steps.waited = 0.0
        if num_graphs() > self.graphs:  # the first steps of each bucket may; later ones should not
            logger.info(
                f"step {self.step} compiled {num_graphs() - self.graphs} graphs for {bucket}, {num_graphs()} so far"
            )
            self.graphs = num_graphs()

    def noisy(self, batch: Batch) -> ModelInputs:
        """A micro-batch at its noise levels, on the device:

        what is drawn depends on nothing but the seed and the samples.
        """
        tokens = self.num_tokens(batch)
        sigma_B = self.flow.sigmas(draw_uniform(self.seed, batch.sample_ids_B), tokens)
        noise = draw_noise(self.seed, batch.sample_ids_B, tuple(batch.streams["video"].shape[1:]), self.device)
        weight_B = send(self.flow.weights(sigma_B, tokens), self.device)
        told = self.conditioning, self.config.training.guidance
        return model_inputs(
            self.args.patch, batch.to(self.device), noise, send(sigma_B, self.device), weight_B, self.shard, *told
        )

    def num_parameters(self) -> int:
        own = torch.tensor(sum(p.numel() for p in self.model.parameters()))
        return reduce_over(self.meshes.pp, own, "sum").item()

    def num_tokens(self, batch: Batch) -> int:
        """Tokens of one clip of the batch."""
        return token_shape(batch.streams["video"].shape[2:], self.args.patch).num_tokens

    def pixel_size(self, batch: Batch) -> Bucket:
        _, F, H, W = batch.streams["video"].shape[1:]
        e = self.encoders
        return (F - 1) * e.stride_t + 1, H * e.stride_s, W * e.stride_s

    def validate(self) -> None:
        start = time.perf_counter()
        with self.ema.swapped_in() if self.ema and self.config.validation.use_ema else nullcontext():
            losses = self.validator.losses()
            clips = self.validator.sample(self.step)
        reshard(self.model)
        if losses:
            self.metrics.log_scalars(self.step, losses)
            logger.info(
                f"validation at step {self.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            )
        for i, (prompt, frames) in enumerate(clips):
            self.metrics.log_video(f"samples/{i} {prompt}", frames.numpy(), self.config.data.fps, self.step)
        if clips:
            logger.info(f"{len(clips)} clips sampled to {self.folder / 'samples' / f'step-{self.step}'}")
        logger.info(f"validation took {time.perf_counter() - start:.1f} s")

    # ---------------------------------------------------------------- loop

    def train(self) -> None:
        c = self.config
        last_step, freq = c.training.steps, c.validation.freq
        if self.step >= last_step:
            logger.info(
                f"{self.folder} is already at step {self.step} of {last_step}: raise training.steps to go on, or "
                f"change job.dump_folder"
            )
            if self.step == last_step and not broadcast_from_rank0(self.is_exported, self.host_group):
                self.export()  # asked for later, or the run was killed between its last checkpoint and this
            return
        logger.info(
            f"training from step {self.step + 1} to {last_step} on {self.world_size} x {self.device.type}, "
            f"{self.num_parameters():,} parameters, {self.accumulation} micro-batches a step"
        )
        if self.validator and self.step == 0:
            self.validate()

        gc.disable()  # collected on all ranks at once: one rank's pause is every rank's pause
        first_step, size = self.step + 1, c.parallelism.pipeline_parallel_microbatch_size if self.pipeline else 0
        self.steps = Prefetch(self.loader, last_step - self.step, self.noisy, self.device, size)
        with SignalFlag() if c.fault_tolerance.save_on_signal else nullcontext() as signals:
            while self.step < last_step:
                start = time.perf_counter()
                batches = self.steps.step()
                self.step += 1
                self.train_step(batches, start)
                if self.validator and (self.step % freq == 0 or self.step == last_step):
                    self.validate()
                stopping = signals is not None and signals.requested(self.host_group)
                self.checkpoint.save(self.step, last=self.step == last_step, force=stopping)
                if stopping:
                    logger.info(f"stopped by a signal after step {self.step}; the same command goes on from there")
                    break
                if self.step % c.training.gc_freq == 0:
                    gc.collect(1)
                if self.step == first_step:
                    set_timeout(
                        c.comm.train_timeout_seconds, *(getattr(self.meshes, f.name) for f in fields(self.meshes))
                    )
            self.checkpoint.wait()
        if self.step == last_step:
            self.export()
            logger.info(f"finished: {self.folder}")

    def is_exported(self) -> bool:
        c, lora = self.config.checkpoint, self.config.lora
        path = export_path(self.folder, c.export_format, self.hf_folder)
        return are_exported(self.folder, lora) and (lora.only_adapters or is_exported(path, c.export_format, self.spec))

    def export(self) -> None:
        c, assets, lora = self.config.checkpoint, self.config.model.hf_assets_path, self.config.lora
        if not c.last_save_in_hf:
            return
        path, weights = (
            export_path(self.folder, c.export_format, self.hf_folder),
            self.ema.state_dict() if self.ema else None,
        )
        dtype = getattr(torch, c.export_dtype)
        for form in lora.forms:
            save_lora(self.model, lora_path(self.folder, form), self.spec, self.args, lora, form, dtype, weights)
        if lora.only_adapters:
            return
        if c.export_format == "diffusers" and assets:
            broadcast_from_rank0(lambda: complete_pipeline(Path(assets), path.parent, self.hf_folder), self.host_group)
        weights = MergedWeights(self.model, weights) if lora.enable else weights
        save_hf(self.model, path, self.spec, self.args, dtype, weights=weights, format_name=c.export_format)
        logger.info(f"exported to {path}")

    def close(self) -> None:
        for closer in reversed(self.exit_stack):
            closer()


@record
def main(argv: list[str]) -> None:
    init_logger()
    with main_guard():
        config = parse_args(argv)
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        check(config, world_size)
    try:
        num_training = config.encoder.num_training_ranks(world_size)
        if int(os.environ.get("RANK", 0)) >= num_training:
            return run_encoder_rank(config.encoder, config.data, config.comm, config.model.hf_assets_path, num_training)
        trainer = Trainer(config)
        try:
            trainer.train()
        except (
            FloatingPointError
        ) as e:  # seen by all ranks at the same step, so that a save under way can still be finished
            trainer.checkpoint.wait()
            trainer.close()
            sys.exit(f"error: {e}")
        trainer.close()
    except ValueError as e:  # the user's to mend: the message names the file or field; ours are assertions
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
