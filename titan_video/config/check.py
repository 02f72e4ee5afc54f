"""Rules across fields, checked before any process group or model exists.

What one field alone may hold is in `job_config.py`.
"""

import os
import re
from collections.abc import Iterator

from titan_video.config.job_config import (
    Checkpoint,
    Data,
    Encoder,
    Flow,
    Job,
    JobConfig,
    LrScheduler,
    Metrics,
    Parallelism,
    Training,
    Validation,
)
from titan_video.config.manager import ConfigError

SPATIAL_MULTIPLE = 16  # VAE stride 8 x patch 2
TEMPORAL_STRIDE = 4
MAX_EMBEDDED_CLIPS = 100_000
FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".tar", ".parquet", ".arrow")


def check(config: JobConfig, world_size: int, files: bool = True) -> None:
    """Raises ConfigError with every rule that `config` breaks on `world_size` ranks, one line each: the field, what was
    given, the fix.

    files: also that the files and folders which the run reads exist.
    """
    assert world_size >= 1
    c, training = config, max(training_ranks(config.encoder, world_size), 1)
    dp = max(training // model_parallel_degree(c.parallelism), 1)
    errors = [
        *_buckets(c.data),
        *_encoder(c.encoder, world_size),
        *_degrees(c.parallelism, training),
        *check_batch_size(c, dp),
        *_parallelism(c),
        *_attention(c),
        *_activation_checkpoint(c),
        *_optimizer(c, dp),
        *_low_precision(c),
        *_schedule(c.lr_scheduler, c.training),
        *_flow(c.flow),
        *_expert(c),
        *_validation(c.validation),
        *_checkpoint(c.checkpoint),
        *_lora(c),
        *_folders(c.job, c.data, c.checkpoint, c.metrics),
        *(_files(c) if files else ()),
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def training_ranks(encoder: Encoder, world_size: int) -> int:
    """How many of the ranks train; those that follow them encode."""
    return world_size - (encoder.num_ranks if encoder.placement == "separate" else 0)


def data_parallel_degrees(parallelism: Parallelism, world_size: int) -> tuple[int, int]:
    """(replicate, shard) degrees on `world_size` ranks, a shard degree of -1 filled.

    Raises ConfigError unless all degrees multiply to it.
    """
    errors = list(_degrees(parallelism, world_size))
    if errors:
        raise ConfigError("\n".join(errors))
    replicate = parallelism.data_parallel_replicate_degree
    return replicate, world_size // model_parallel_degree(parallelism) // replicate


def model_parallel_degree(parallelism: Parallelism) -> int:
    """Ranks that work on the same samples."""
    return (
        parallelism.pipeline_parallel_degree * parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    )


def gradient_accumulation(config: JobConfig, dp: int) -> int:
    """Micro-batches per optimizer step and rank, with `dp` data-parallel ranks.

    Raises ConfigError unless it is a whole number.
    """
    errors = list(check_batch_size(config, dp))
    if errors:
        raise ConfigError("\n".join(errors))
    t, d = config.training, config.data
    if d.tokens_per_microbatch:
        return max(1, d.global_micro_batches // dp)
    return max(1, t.global_batch_size // (t.local_batch_size * dp))


# ---- the rules: each yields one line per mistake ----


def _clips(name: str, path: str) -> Iterator[str]:
    form = f"`embedded:shapes-N`, N from 1 to {MAX_EMBEDDED_CLIPS}, generates clips"
    if not path:
        yield f"{name}: empty; give a folder of clips, a file ({' '.join(FILE_SUFFIXES)}), or {form}"
    elif path.startswith("embedded:"):
        match = re.fullmatch(r"embedded:shapes-([0-9]{1,9})", path)
        if not match or not 1 <= int(match[1]) <= MAX_EMBEDDED_CLIPS:
            yield f"{name}: given {path}; legal: {form}"
    elif "://" in path or set("*?[{") & set(path):
        if not path.lower().endswith(FILE_SUFFIXES):
            yield (
                f"{name}: given {path}; a path with wildcards, braces or a URL names files that end in "
                f"{' '.join(FILE_SUFFIXES)}"
            )
    elif not os.path.exists(path):
        yield f"{name}: {path} does not exist; give a folder of clips, a file ({' '.join(FILE_SUFFIXES)}), or {form}"
    elif not os.path.isdir(path) and not path.lower().endswith(FILE_SUFFIXES):
        yield f"{name}: {path} is a file; legal: one that ends in {' '.join(FILE_SUFFIXES)}, or a folder of clips"


def _nearest_multiples(value: int, step: int, offset: int = 0) -> str:
    """The positive values `k step + offset` on both sides of `value`, in words."""
    below = (value - offset) // step * step + offset
    return f"{below} or {below + step}" if below > 0 else f"{below + step}"


def _buckets(data: Data) -> Iterator[str]:
    if not data.buckets and not data.resolutions:
        yield (
            "data.buckets: empty; give at least one [frames, height, width], such as [[81, 480, 832]], or derive "
            "them by data.resolutions"
        )
    if data.buckets and data.resolutions:
        yield (
            f"data.resolutions: given {list(data.resolutions)}, which derives the buckets, but data.buckets "
            f"names them; "
            f"set buckets to [], or leave this []"
        )
    if data.min_ar > data.max_ar:
        yield f"data.min_ar: given {data.min_ar}; legal: at most data.max_ar, which is {data.max_ar}"
    if data.resolutions and not data.frame_buckets:
        yield "data.frame_buckets: empty; give at least one number of frames, such as [81]"
    for frames in data.frame_buckets:
        if frames % TEMPORAL_STRIDE != 1:
            yield (
                f"data.frame_buckets: given {frames}; legal: {TEMPORAL_STRIDE}k+1; nearest: "
                f"{_nearest_multiples(frames, TEMPORAL_STRIDE, 1)}"
            )
    for i, bucket in enumerate(data.buckets):
        where = f"data.buckets: item {i}, {list(bucket)}"
        if bucket in data.buckets[:i]:
            yield f"{where}, is there twice; remove one"
        yield from (f"{where}: {problem}" for problem in check_bucket(bucket))


def check_bucket(bucket: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with a size [frames, height, width]."""
    if len(bucket) != 3:
        yield f"it has {len(bucket)} numbers; legal: [frames, height, width]"
        return
    if bucket[0] % TEMPORAL_STRIDE != 1:
        yield f"frames must be {TEMPORAL_STRIDE}k+1; nearest: {_nearest_multiples(bucket[0], TEMPORAL_STRIDE, 1)}"
    for side, size in zip(("height", "width"), bucket[1:], strict=True):
        if size % SPATIAL_MULTIPLE:
            yield (
                f"{side} must be a multiple of {SPATIAL_MULTIPLE}; nearest: "
                f"{_nearest_multiples(size, SPATIAL_MULTIPLE)}"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _degrees(parallelism: Parallelism, world_size: int) -> Iterator[str]:
    left, taken = world_size, []
    for axis in (
        "pipeline_parallel_degree",
        "tensor_parallel_degree",
        "context_parallel_degree",
        "data_parallel_replicate_degree",
    ):
        degree = getattr(parallelism, axis)
        if left % degree:
            given = f" that {' and '.join(taken)} leave{'s' * (len(taken) == 1)}" if taken else ""
            yield (
                f"parallelism.{axis}: given {degree}, which does not divide the {left} ranks{given}; legal: "
                f"{_divisors(left)}"
            )
            return
        left //= degree
        taken += [f"{axis} {degree}"] * (degree > 1)
    if parallelism.data_parallel_shard_degree not in (-1, left):
        given = f" with {' and '.join(taken)}" if taken else ""
        yield (
            f"parallelism.data_parallel_shard_degree: given {parallelism.data_parallel_shard_degree};{given} on "
            f"{world_size} ranks "
            f"legal: {left}, or -1 for the same"
        )


def _parallelism(config: JobConfig) -> Iterator[str]:
    p, local = config.parallelism, config.training.local_batch_size
    cp, ulysses = p.context_parallel_degree, p.context_parallel_ulysses_degree
    if p.enable_async_tensor_parallel and not config.compile.enable:
        yield (
            "parallelism.enable_async_tensor_parallel: true, but the compiler does the overlapping; set "
            "compile.enable, or leave it false"
        )
    if p.enable_async_tensor_parallel and p.tensor_parallel_degree == 1:
        yield (
            "parallelism.enable_async_tensor_parallel: true, but parallelism.tensor_parallel_degree is 1; raise "
            "that, or leave it false"
        )
    if p.context_parallel_method == "unified" and cp % ulysses:
        yield (
            f"parallelism.context_parallel_ulysses_degree: given {ulysses}, which does not divide "
            f"parallelism.context_parallel_degree {cp}; "
            f"legal: {_divisors(cp)}"
        )
    if p.context_parallel_method != "unified" and ulysses != 1:
        yield (
            f"parallelism.context_parallel_ulysses_degree: given {ulysses}, but parallelism.context_parallel_method is "
            f"{p.context_parallel_method}; set that to unified, or leave this at 1"
        )
    if (
        p.pipeline_parallel_degree > 1
        and p.pipeline_parallel_schedule == "InterleavedZeroBubble"
        and config.compile.enable
    ):
        yield (
            "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble, but the backward of a compiled block "
            "cannot be split; "
            "leave compile.enable false, or choose another schedule, such as Interleaved1F1B"
        )
    if (
        p.pipeline_parallel_degree > 1
        and not config.data.tokens_per_microbatch
        and local % p.pipeline_parallel_microbatch_size
    ):
        yield (
            f"parallelism.pipeline_parallel_microbatch_size: given {p.pipeline_parallel_microbatch_size}; it "
            f"must divide "
            f"training.local_batch_size {local}; legal: {_divisors(local)}"
        )


def _attention(config: JobConfig) -> Iterator[str]:
    a, p, c = config.model.attention, config.parallelism, config.activation_checkpoint
    if a != "flex":
        return
    if p.context_parallel_degree > 1 and p.context_parallel_method != "ulysses":
        yield (
            "model.attention: flex, but a ring merges parts of attention, which flex cannot give; choose another "
            "backend, "
            "or parallelism.context_parallel_method ulysses"
        )
    if c.mode == "selective" and "attention" in c.save and not config.compile.enable:
        yield (
            "model.attention: flex, but outside a compiled block its result cannot be kept "
            "(activation_checkpoint.save); set compile.enable, "
            "or choose another backend"
        )


def _encoder(encoder: Encoder, world_size: int) -> Iterator[str]:
    e = encoder
    where = f"but encoder.placement is {e.placement}"
    if e.placement == "separate" and not 1 <= e.num_ranks < world_size:
        fix = (
            f"legal: 1 to {world_size - 1}"
            if world_size > 1
            else "start more (NGPU), or set encoder.placement to cached or colocated"
        )
        yield (
            f"encoder.num_ranks: given {e.num_ranks} of {world_size} ranks, but encoder.placement separate needs "
            f"some that encode and some that "
            f"train; {fix}"
        )
    if e.placement != "separate" and e.num_ranks:
        yield f"encoder.num_ranks: given {e.num_ranks}, {where}; set that to separate, or leave this at 0"
    if e.placement != "separate" and e.queue_depth != Encoder.queue_depth:
        yield (
            f"encoder.queue_depth: given {e.queue_depth}, {where}; set that to separate, or leave this at "
            f"{Encoder.queue_depth}"
        )
    if e.placement != "colocated" and e.offload_policy != Encoder.offload_policy:
        yield (
            f"encoder.offload_policy: given {e.offload_policy}, {where}; set that to colocated, or leave this at "
            f"{Encoder.offload_policy}"
        )
    if e.placement == "cached" and e.write_cache:
        yield (
            f"encoder.write_cache: true, {where}, which writes all before training; leave it false, or choose "
            f"colocated or separate"
        )


def _activation_checkpoint(config: JobConfig) -> Iterator[str]:
    a = config.activation_checkpoint
    if a.mode == "memory_budget" and not config.compile.enable:
        yield (
            "activation_checkpoint.mode: memory_budget, but the compiler keeps to it; set compile.enable, or choose "
            "another mode"
        )
    if a.mode == "memory_budget" and a.layers:
        yield (
            f"activation_checkpoint.layers: given {list(a.layers)}, but a memory budget holds for all blocks; leave "
            f"it empty"
        )
    if a.mode == "selective" and not a.save:
        yield (
            "activation_checkpoint.save: empty, which is mode full; give at least one of attention, matmul, or "
            "choose full"
        )
    for name in ("save", "layers"):
        if len(set(getattr(a, name))) < len(getattr(a, name)):
            yield f"activation_checkpoint.{name}: given {list(getattr(a, name))}; remove what is there twice"
    if a.offload and a.mode in ("none", "memory_budget"):
        yield (
            f"activation_checkpoint.offload: true, but mode is {a.mode}; choose full or selective, which say what is "
            f"kept"
        )


def _optimizer(config: JobConfig, dp: int) -> Iterator[str]:
    o, t = config.optimizer, config.training
    if o.name == "Muon" and config.lora.enable:
        yield (
            "optimizer.name: Muon makes whole weights' updates orthogonal, but lora.enable trains adapters only; "
            "choose AdamW or AdamW8bit"
        )
    if not o.in_backward:
        return
    where = "optimizer.in_backward: true, but"
    if o.name == "Muon":
        yield (
            f"{where} optimizer.name is Muon, whose matrices are dealt out over the ranks at the end; choose AdamW "
            f"or AdamW8bit"
        )
    if t.max_norm > 0:
        yield (
            f"{where} training.max_norm is {t.max_norm}, and the norm is known when all weights are updated already; "
            f"set it to 0"
        )
    if not list(check_batch_size(config, dp)) and gradient_accumulation(config, dp) > 1:
        name = "data.global_micro_batches" if config.data.tokens_per_microbatch else "training.global_batch_size"
        yield f"{where} {name} takes several backwards for one update; set it to -1"
    if config.parallelism.pipeline_parallel_degree > 1:
        yield (
            f"{where} a pipeline adds up gradients over several backwards; set parallelism.pipeline_parallel_degree "
            f"to 1"
        )
    if config.parallelism.data_parallel_replicate_degree > 1:
        yield (
            f"{where} replicas keep all gradients until backward is over; set "
            f"parallelism.data_parallel_replicate_degree to 1"
        )
    if t.enable_cpu_offload:
        yield f"{where} with training.enable_cpu_offload gradients are on the host anyway; set one of them to false"
    if config.fault_tolerance.nonfinite == "skip":
        yield f"{where} an update that has been made cannot be skipped; set fault_tolerance.nonfinite to stop"


def _low_precision(config: JobConfig) -> Iterator[str]:
    t, f = config.training, config.float8
    if t.dtype == "bfloat16" and t.mixed_precision_param != "bfloat16":
        yield (
            f"training.dtype: bfloat16, but training.mixed_precision_param is {t.mixed_precision_param}; set that to "
            f"bfloat16 too"
        )
    if t.dtype == "bfloat16" and config.lora.enable:
        yield (
            "training.dtype: bfloat16, but with lora.enable frozen weights are held as "
            "training.mixed_precision_param anyway; leave it float32"
        )
    if f.enable and not f.emulate and t.mixed_precision_param != "bfloat16":
        yield (
            f"float8.enable: true, but training.mixed_precision_param is {t.mixed_precision_param}; set that to "
            f"bfloat16, or float8.emulate"
        )
    if f.enable and config.parallelism.enable_async_tensor_parallel:
        yield (
            "float8.enable: true, but the compiler does not overlap float8 products; leave "
            "parallelism.enable_async_tensor_parallel false"
        )
    if (
        f.enable
        and config.parallelism.pipeline_parallel_degree > 1
        and config.parallelism.pipeline_parallel_schedule == "InterleavedZeroBubble"
    ):
        yield (
            "parallelism.pipeline_parallel_schedule: InterleavedZeroBubble, but a float8 product gives both its "
            "gradients at once; leave "
            "float8.enable false, or choose another schedule, such as Interleaved1F1B"
        )


def check_batch_size(config: JobConfig, dp: int) -> Iterator[str]:
    """What is wrong with a step's clips on `dp` data-parallel ranks."""
    d, local = config.data, config.training.local_batch_size
    if d.tokens_per_microbatch:
        name, given, unit, of = "data.global_micro_batches", d.global_micro_batches, dp, f"{dp} data-parallel ranks"
        for other, default in (("local_batch_size", 1), ("global_batch_size", -1)):
            if (value := getattr(config.training, other)) != default:
                yield (
                    f"training.{other}: given {value}, but data.tokens_per_microbatch says how many clips make a "
                    f"micro-batch and "
                    f"data.global_micro_batches how many of these a step; leave it at {default}"
                )
    else:
        name, given, unit = "training.global_batch_size", config.training.global_batch_size, local * dp
        of = f"training.local_batch_size {local} x {dp} ranks"
        if d.global_micro_batches != -1:
            yield (
                f"data.global_micro_batches: given {d.global_micro_batches}, but data.tokens_per_microbatch is 0; "
                f"set that, or use training.global_batch_size"
            )
    if given != -1 and (given <= 0 or given % unit):
        yield (
            f"{name}: given {given}; legal: a multiple of {unit} ({of}), nearest {_nearest_multiples(given, unit)}, "
            f"or -1 for {unit}"
        )
    elif (max(given, unit) // unit) % d.groups_per_step:
        accumulation = max(given, unit) // unit
        yield (
            f"data.groups_per_step: given {d.groups_per_step}; a rank has {accumulation} micro-batches in a step; "
            f"legal: {_divisors(accumulation)}"
        )
    if d.groups_per_step > 1 and config.parallelism.pipeline_parallel_degree > 1:
        yield (
            f"data.groups_per_step: given {d.groups_per_step}, but the micro-batches that pass a pipeline have one "
            f"size; leave it at 1"
        )


def _schedule(lr_scheduler: LrScheduler, training: Training) -> Iterator[str]:
    steps, warmup, ratio = training.steps, lr_scheduler.warmup_steps, lr_scheduler.decay_ratio
    decay = round(ratio * steps)
    if warmup + decay > steps:
        yield (
            f"lr_scheduler.warmup_steps: given {warmup}, which with {decay} steps of decay "
            f"(lr_scheduler.decay_ratio {ratio}) is more than "
            f"training.steps {steps}; legal: at most {steps - decay}"
        )


def _flow(flow: Flow) -> Iterator[str]:
    if flow.min_t >= flow.max_t:
        yield f"flow.min_t: given {flow.min_t}; must be below flow.max_t, which is {flow.max_t}"


def _expert(config: JobConfig) -> Iterator[str]:
    m, f = config.model, config.flow
    if m.expert != "all" and (f.min_t, f.max_t) != (0, 1):
        yield (
            f"model.expert: given {m.expert}, which sets the noise levels; leave flow.min_t at 0 and flow.max_t at "
            f"1, or model.expert at all"
        )
    if m.expert == "all" and m.boundary:
        yield (
            f"model.boundary: given {m.boundary}, but model.expert is all; set that to high or low, or leave this at 0"
        )


def _validation(validation: Validation) -> Iterator[str]:
    if not validation.timesteps:
        yield "validation.timesteps: empty; give at least one noise level, such as [0.5]"
    if len(set(validation.timesteps)) < len(validation.timesteps):
        yield f"validation.timesteps: given {list(validation.timesteps)}; remove what is there twice"
    if validation.enable and not validation.path and validation.holdout == 0 and validation.num_videos == 0:
        yield (
            "validation.enable: there is nothing to validate; set validation.path, validation.holdout above 0 or "
            "validation.num_videos above 0"
        )


def _files(config: JobConfig) -> Iterator[str]:
    validation = config.validation
    if config.data.path and config.data.source:
        yield (
            f"data.path: given {config.data.path}, but data.source is there too; make it one of the sources, or "
            f"remove these"
        )
    elif not config.data.source:
        yield from _clips("data.path", config.data.path)
    for i, source in enumerate(config.data.source):
        yield from _clips(f"data.source: item {i}: path", source.path)
    if validation.path:
        yield from _clips("validation.path", validation.path)
    if validation.prompts_path and not os.path.isfile(validation.prompts_path):
        yield (
            f"validation.prompts_path: there is no file {validation.prompts_path}; give a text file, one prompt a "
            f"line, or leave it empty"
        )
    yield from _assets(config)


def _assets(config: JobConfig) -> Iterator[str]:
    """What is read from local folders of pretrained weights."""
    assets, initial = config.model.hf_assets_path, config.checkpoint.initial_load_path
    name = "model.hf_assets_path"
    if assets and not os.path.isdir(assets):
        yield f"{name}: there is no folder {assets}; give a local diffusers folder, or leave it empty"
    if config.encoder.name != "debug" and not assets:
        encoder = config.encoder.name
        yield (
            f"{name}: empty, but encoder.name {encoder} reads the VAE and the text encoder there; give a diffusers "
            f"folder or encoder.name debug"
        )
    if config.model.flavor == "hf" and not assets:
        yield (
            f"{name}: empty, but model.flavor hf reads transformer/config.json there; give a local diffusers folder, "
            f"or another flavor"
        )
    elif (
        config.model.flavor == "hf"
        and os.path.isdir(assets)
        and not os.path.isfile(os.path.join(assets, "transformer", "config.json"))
    ):
        yield (
            f"{name}: {assets} has no transformer/config.json, which model.flavor hf reads; give a whole diffusers "
            f"folder, or another flavor"
        )
    if initial and not os.path.exists(initial):
        yield (
            f"checkpoint.initial_load_path: there is no {initial}; give a step-N folder, a folder or file of public "
            f"weights, or leave it empty"
        )
    adapters = config.lora.initial_load_path
    if adapters and not os.path.isfile(adapters):
        yield (
            f"lora.initial_load_path: there is no file {adapters}; give a safetensors file of adapters, or leave it "
            f"empty"
        )
    if config.checkpoint.initial_load_in_hf and not initial and not assets:
        yield (
            "checkpoint.initial_load_in_hf: nothing to load; give a diffusers folder in checkpoint.initial_load_path "
            "or model.hf_assets_path"
        )


def _checkpoint(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.load_step >= 0 and not checkpoint.enable:
        yield (
            f"checkpoint.load_step: given {checkpoint.load_step}, but checkpoint.enable is false; enable it, or set "
            f"load_step to -1"
        )


def _lora(config: JobConfig) -> Iterator[str]:
    lora = config.lora
    for name in ("target_modules", "export"):
        values = getattr(lora, name)
        if len(set(values)) < len(values):
            yield f"lora.{name}: given {list(values)}; remove what is there twice"
    if lora.enable and config.checkpoint.last_save_in_hf and not lora.export:
        yield (
            "lora.export: empty, but checkpoint.last_save_in_hf is true; give at least one of diffusers, comfyui, "
            "merged, or set that to false"
        )
    if lora.initial_load_path and not lora.enable:
        yield (
            f"lora.initial_load_path: given {lora.initial_load_path}, but lora.enable is false; enable it, or leave "
            f"this empty"
        )


def _folders(job: Job, data: Data, checkpoint: Checkpoint, metrics: Metrics) -> Iterator[str]:
    if not job.dump_folder:
        yield "job.dump_folder: empty; give a folder, such as ./outputs"
    for name, folder in (("job.dump_folder", job.dump_folder), ("data.cache_folder", data.cache_folder)):
        if os.path.exists(folder) and not os.path.isdir(folder):
            yield f"{name}: {folder} is a file; give a folder"
    inside = {"checkpoint.folder": checkpoint.folder, "metrics.save_tb_folder": metrics.save_tb_folder}
    for name, folder in inside.items():
        if os.path.isabs(folder) or os.path.normpath(folder) == "." or ".." in folder.split("/"):
            yield f"{name}: given {folder!r}; legal: the relative name of a folder inside job.dump_folder"
    if len({os.path.normpath(folder) for folder in inside.values()}) < len(inside):
        yield (
            f"metrics.save_tb_folder: given {metrics.save_tb_folder!r}, the same as checkpoint.folder; give another "
            f"name"
        )
