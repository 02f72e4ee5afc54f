"""The run's configuration: one frozen dataclass per TOML section.

TOML chooses, Python defines: sections hold scalars, lists and closed sets of names, never structure. Every field
carries its help text and legal range, from which the parser's messages (`manager.py`) and `docs/config.md` are made.
Names and meanings follow torchtitan v0.2 where it has them.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

DERIVED_MULTIPLE = 32  # of pixels: every VAE's stride times every model's patch


def opt(default: Any, help: str, **limits: float) -> Any:
    """A documented field. `limits` are among ge, gt, le, lt and hold for the value, or for every number in a list."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Job:
    dump_folder: str = opt(
        "./outputs", "Folder of everything the run writes: resolved TOML, metrics, checkpoints, samples."
    )
    description: str = opt("", "Free text, printed at start and kept in the resolved TOML.")
    print_config: bool = opt(False, "Print the resolved TOML at start.")


@dataclass(frozen=True)
class Model:
    name: Literal["wan", "hunyuan_video"] = opt("wan", "Model family: a folder of titan_video/models.")
    flavor: str = opt(
        "debug", "Architecture: a flavor of the family, or `hf` to read `transformer/config.json` of hf_assets_path."
    )
    hf_assets_path: str = opt(
        "", "Local diffusers folder (transformer/, vae/, text_encoder/, tokenizer/). Nothing is downloaded."
    )
    expert: Literal["all", "high", "low"] = opt(
        "all",
        "Wan 2.2 A14B: which of two models that share the noise levels this is. It trains those at and above "
        "model.boundary, or below; "
        "in a diffusers folder `low` is transformer_2. Validation samples with this model alone; "
        "titan_video.sample takes both.",
    )
    boundary: float = opt(
        0.0,
        "Noise level between the experts; 0: the flavor's own (Wan 2.2: 0.875 for text-to-video, 0.9 for "
        "image-to-video).",
        ge=0,
        lt=1,
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "flash3", "flash4", "flex", "math"] = opt(
        "auto",
        "Backend of the blocks' attention; no other takes over what it cannot do. `auto`: cuDNN on Hopper, else "
        "flash attention. flash3 and "
        "flash4 are packages to install. On a CPU: auto, flash, math.",
    )
    kernels: Literal["auto", "triton", "torch"] = opt(
        "auto",
        "Norms, residuals and rotations of the blocks: fused Triton kernels, which need a GPU, or plain torch. "
        "`auto`: triton on a GPU.",
    )


@dataclass(frozen=True)
class Encoder:
    name: Literal["wan", "hunyuan_video", "debug"] = opt(
        "wan",
        "Frozen VAE, text and image encoders. `debug` needs no weights: a fixed video transform and hashed words.",
    )
    dtype: Literal["bfloat16", "float32"] = opt(
        "bfloat16", "Arithmetic of the text encoder. The VAE always runs in float32."
    )
    max_text_length: int = opt(
        512, "Tokens a prompt is padded or cut to. Wan was trained with 512, HunyuanVideo with 256.", ge=1
    )
    vae_tiling: bool = opt(False, "Encode and decode the VAE in spatial tiles, to save memory at large sizes.")
    placement: Literal["cached", "colocated", "separate"] = opt(
        "cached",
        "Where clips and captions are encoded: before training; during it, on the ranks that train; or during "
        "it, on ranks of their own. The batches "
        "are the same. What validation needs is always encoded before.",
    )
    num_ranks: int = opt(0, "For separate: how many of the ranks, the last ones, encode and do not train.", ge=0)
    queue_depth: int = opt(4, "For separate: clips that each training rank receives ahead of their turn.", ge=1)
    idle: Literal["keep", "offload", "free"] = opt(
        "offload",
        "For colocated: between uses the encoders stay on the device, go to host memory, or are dropped and "
        "loaded again.",
    )
    write_cache: bool = opt(
        False, "For colocated and separate: put what is encoded into the cache, so that a later epoch or run reads it."
    )


@dataclass(frozen=True)
class Source:
    """One of several sources of clips, a table `[[data.source]]`."""

    path: str = opt("", "Where its clips are, in any form that data.path takes.")
    num_repeats: int = opt(1, "How often an epoch holds each of its clips.", ge=1)
    caption_prefix: str = opt("", "Put before each of its captions.")
    caption_column: str = opt(
        "",
        "Column of metadata or tables, or key of a tar's .json, that holds the captions. Empty: the first known name.",
    )
    fps: float = opt(0.0, "Its clips are resampled to this instead of data.fps; 0: to that.", ge=0)
    source_fps: float = opt(0.0, "Rate of its folders of frames, which do not tell it. 0: they are dropped.", ge=0)
    clip_choice: Literal["default", "head", "chunk", "slide", "uniform", "full"] = opt(
        "default", "Instead of data.clip_choice; `default`: that."
    )
    trust_metadata: bool = opt(
        False,
        "Believe the columns width, height, num_frames and fps, where a row has all of them, and do not open the "
        "file for the plan. "
        "The decoder compares, and drops a clip that is not as stated.",
    )


@dataclass(frozen=True)
class Data:
    path: str = opt(
        "",
        "Folder of clips with same-name .txt captions, a metadata .csv/.json/.jsonl file, WebDataset tars "
        "(wildcards, braces, "
        "URLs), or .parquet/.arrow files. `embedded:shapes-N` generates N clips of moving shapes. Short for one "
        "data.source.",
    )
    source: tuple[Source, ...] = opt((), "Several sources, instead of path.")
    buckets: tuple[tuple[int, ...], ...] = opt(
        ((81, 480, 832),),
        "Training sizes [frames, height, width]; frames = 4k+1. A clip goes to the bucket of nearest aspect "
        "ratio among those with the most frames "
        "it can fill.",
        ge=1,
    )
    resolutions: tuple[int, ...] = opt(
        (),
        "Derive the buckets, with `buckets` empty: for each of frame_buckets and each of these, num_ar_buckets "
        "sizes of about the area of a "
        "square with this side, in multiples of 32.",
        ge=64,
    )
    frame_buckets: tuple[int, ...] = opt((1, 33, 81), "Frames of derived buckets; 4k+1.", ge=1)
    min_ar: float = opt(0.5, "Lowest aspect ratio, width to height, of derived buckets.", gt=0)
    max_ar: float = opt(2.0, "Highest aspect ratio of derived buckets.", gt=0)
    num_ar_buckets: int = opt(5, "Aspect ratios of derived buckets, evenly spread as ratios.", ge=1)
    clip_choice: Literal["head", "chunk", "slide", "uniform", "full"] = opt(
        "head",
        "What a file longer than its bucket gives: its head; all chunks one after the other; a clip every "
        "slide_stride frames; uniform_clips "
        "clips evenly spread; or its full length, cut to 4k+1 frames and to the most of any bucket, as a size of "
        "its own.",
    )
    uniform_clips: int = opt(4, "For uniform: clips of a file, at most.", ge=1)
    slide_stride: int = opt(16, "For slide: frames, after resampling, between the starts of two clips.", ge=1)
    fps: float = opt(16.0, "Frames per second every clip is resampled to.", gt=0)
    decoder: Literal["pyav", "torchcodec"] = opt(
        "pyav",
        "What decodes videos. torchcodec must be installed; its pixels may differ a little, so what it decodes "
        "is cached by itself.",
    )
    caption_dropout: float = opt(
        0.1, "Share of draws trained with the empty caption, for classifier-free guidance.", ge=0, le=1
    )
    tokens_per_microbatch: int = opt(
        0,
        "Instead of training.local_batch_size: as many clips of a bucket as have so many tokens make a "
        "micro-batch, at least one. 0: none.",
        ge=0,
    )
    global_micro_batches: int = opt(
        -1,
        "With tokens_per_microbatch: micro-batches of all ranks in an optimizer step; a multiple of the "
        "data-parallel degree. "
        "-1: one for each data-parallel rank.",
        ge=-1,
    )
    buckets_per_step: int = opt(
        1,
        "Parts in which a step's clips are drawn, each of one bucket or, with tokens_per_microbatch, of buckets "
        "of equal cost. "
        "Divides the micro-batches of a rank.",
        ge=1,
    )
    shuffle: bool = opt(True, "Draw the clips in a new random order each epoch.")
    num_workers: int = opt(
        2, "Worker processes per rank that decode clips or read cached latents; 0 works in the main process.", ge=0
    )
    prefetch_factor: int = opt(2, "Batches each worker holds ready.", ge=1)
    cache_folder: str = opt("", "Latents and text embeddings, keyed by content. Empty: `cache` in job.dump_folder.")

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.source or (Source(path=self.path),)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The buckets, given or derived."""
        if not self.resolutions:
            return self.buckets
        last = self.num_ar_buckets - 1
        ratios = [
            self.min_ar * (self.max_ar / self.min_ar) ** (i / last if last else 0.5) for i in range(self.num_ar_buckets)
        ]
        grid = [
            [max(1, round(side * ratio**power / DERIVED_MULTIPLE)) * DERIVED_MULTIPLE for power in (-0.5, 0.5)]
            for side in self.resolutions
            for ratio in ratios
        ]
        return tuple(dict.fromkeys((frames, *size) for frames in self.frame_buckets for size in grid))


@dataclass(frozen=True)
class Training:
    local_batch_size: int = opt(1, "Clips per micro-batch on each data-parallel rank.", ge=1)
    global_batch_size: int = opt(
        -1,
        "Clips per optimizer step; a multiple of local_batch_size x data-parallel degree (gradients accumulate). "
        "-1: exactly one micro-batch.",
        ge=-1,
    )
    steps: int = opt(10000, "Optimizer steps of the whole run.", ge=1)
    max_norm: float = opt(1.0, "Gradient norm is clipped to this; 0 does not clip.", ge=0)
    mixed_precision_param: Literal["bfloat16", "float32"] = opt(
        "bfloat16", "Arithmetic of the model. Master weights, time embedding and modulation stay in float32."
    )
    dtype: Literal["float32", "bfloat16"] = opt(
        "float32",
        "Weights that are held and updated. bfloat16: no float32 masters; gradients are bfloat16 too, and "
        "updates round stochastically.",
    )
    guidance: float = opt(
        1.0, "Guidance scale that models which take it as an input (HunyuanVideo) are told in training.", gt=0
    )
    enable_cpu_offload: bool = opt(
        False, "Keep master weights, gradients and optimizer state in host memory; the update runs there."
    )
    mixed_precision_reduce: Literal["float32"] = opt("float32", "Arithmetic of the gradient reduction.")
    gc_freq: int = opt(50, "Python's garbage collector runs every so many steps, on all ranks at once.", ge=1)


@dataclass(frozen=True)
class Optimizer:
    name: Literal["AdamW", "AdamW8bit", "Muon"] = opt(
        "AdamW",
        "AdamW8bit: the moments of matrices in 8 bits. Muon: the blocks' matrices, the rest by AdamW, with one "
        "learning rate for both.",
    )
    lr: float = opt(1e-4, "Peak learning rate.", gt=0)
    beta1: float = opt(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta2: float = opt(0.95, "Decay of the second moment.", ge=0, lt=1)
    eps: float = opt(1e-8, "Added to the denominator.", gt=0)
    weight_decay: float = opt(
        0.01, "Decoupled weight decay of matrices; vectors (biases, norms) are not decayed.", ge=0
    )
    momentum: float = opt(0.95, "Of Muon.", ge=0, lt=1)
    implementation: Literal["fused", "foreach", "for-loop"] = opt(
        "fused", "Implementation in torch.optim of AdamW with float32 weights."
    )
    in_backward: bool = opt(
        False, "Update each weight as soon as backward has its gradient, and free that. Gradients cannot be clipped."
    )


@dataclass(frozen=True)
class Float8:
    enable: bool = opt(
        False, "Products of the blocks' Linears in float8, by torchao. Needs a GPU of compute capability 8.9 or more."
    )
    recipe_name: Literal["tensorwise", "rowwise"] = opt(
        "tensorwise", "One scale for each tensor, or for each row and column of a product."
    )
    filter_fqns: tuple[str, ...] = opt(
        ("modulation",), "Linears whose dotted name contains one of these stay as they are."
    )
    emulate: bool = opt(False, "Round to float8 and multiply in the unrounded type: for tests, on any device.")


@dataclass(frozen=True)
class LrScheduler:
    warmup_steps: int = opt(200, "Linear warm-up from 0.", ge=0)
    decay_ratio: float = opt(
        0.0, "Share of training.steps at the end over which the rate decays; 0 keeps it constant.", ge=0, le=1
    )
    decay_type: Literal["linear", "sqrt", "cosine"] = opt("linear", "Shape of the decay.")
    min_lr_factor: float = opt(0.0, "Last rate of the decay as a share of the peak.", ge=0, le=1)


@dataclass(frozen=True)
class Parallelism:
    data_parallel_replicate_degree: int = opt(1, "HSDP: groups that each hold a whole sharded copy of the model.", ge=1)
    data_parallel_shard_degree: int = opt(-1, "FSDP: ranks over which a copy is sharded. -1: all that are left.", ge=-1)
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = opt(
        "default", "Free a block's gathered weights after its forward. `default`: yes, unless they are on one rank."
    )
    tensor_parallel_degree: int = opt(
        1,
        "Ranks over which each block's matrices are split, by heads and by feed-forward width; its norms are "
        "split over the tokens.",
        ge=1,
    )
    enable_async_tensor_parallel: bool = opt(
        False, "Overlap tensor parallel's communication with its products. Needs compile.enable and a GPU."
    )
    context_parallel_degree: int = opt(1, "Ranks over which the tokens of each clip are split.", ge=1)
    context_parallel_method: Literal["ulysses", "ring", "unified"] = opt(
        "ulysses",
        "`ulysses` exchanges heads for tokens around attention; `ring` passes keys and values round; `unified` "
        "does both.",
    )
    context_parallel_ulysses_degree: int = opt(
        1, "For unified: the part of the degree, on neighbouring ranks, that is Ulysses; the rest is ring.", ge=1
    )
    context_parallel_rotate_method: Literal["alltoall", "allgather"] = opt(
        "alltoall",
        "For ring and unified: keys and values go from rank to rank behind the arithmetic, or are all gathered first.",
    )
    pipeline_parallel_degree: int = opt(1, "Ranks over which the blocks are split in depth.", ge=1)
    pipeline_parallel_schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"] = opt(
        "1F1B", "Order of forwards and backwards; the interleaved ones have two stages on each rank."
    )
    pipeline_parallel_microbatch_size: int = opt(
        1, "Clips in each micro-batch that passes the pipeline; divides training.local_batch_size.", ge=1
    )


@dataclass(frozen=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full", "memory_budget"] = opt(
        "none",
        "`full` keeps each block's input and recomputes the block in backward; `selective` also keeps the "
        "results of `save`; "
        "`memory_budget` lets the compiler choose what to keep.",
    )
    save: tuple[Literal["attention", "matmul"], ...] = opt(
        ("attention",),
        "For selective: results that are kept. attention: never computed twice. matmul: those of every second "
        "matrix product.",
    )
    save_min_kv: int = opt(
        1024,
        "For selective: attention over fewer keys than this, such as cross-attention to a text, is computed again.",
        ge=0,
    )
    layers: tuple[int, ...] = opt(
        (), "Blocks to which the mode applies, by number; the others keep everything. Empty: all blocks.", ge=0
    )
    offload: bool = opt(False, "Move what is kept to host memory after forward and back before backward.")
    memory_budget: float = opt(
        0.5,
        "For memory_budget: activation memory of a block between 0, as little as full, and 1, as much as none.",
        ge=0,
        le=1,
    )


@dataclass(frozen=True)
class Compile:
    enable: bool = opt(False, "torch.compile each block, full graph.")
    backend: Literal["inductor", "aot_eager"] = opt(
        "inductor", "Compiler backend; aot_eager traces without generating code."
    )


@dataclass(frozen=True)
class Flow:
    timestep_density: Literal["uniform", "logit_normal", "mode"] = opt(
        "logit_normal", "Density of the noise level s in (0, 1) before the shift; s = 1 is pure noise."
    )
    logit_mean: float = opt(0.0, "Mean of logit(s) for logit_normal.")
    logit_std: float = opt(1.0, "Standard deviation of logit(s) for logit_normal.", gt=0)
    mode_scale: float = opt(1.29, "Scale of the mode density (Esser et al. 2024, eq. 20).", ge=-1, le=1.75)
    shift: Literal["none", "constant", "resolution"] = opt(
        "constant", "s <- a s / (1 + (a - 1) s): a = shift_value, or shift_value x sqrt(tokens / shift_base_tokens)."
    )
    shift_value: float = opt(3.0, "The a above. Wan samples 480p with 3 and 720p with 5.", gt=0)
    shift_base_tokens: int = opt(32760, "Token count at which `resolution` gives a = shift_value.", ge=1)
    loss_weighting: Literal["none", "bell"] = opt(
        "none", "Weight of the loss over s; `bell` favours the middle, with mean 1 over the sampled levels."
    )
    min_t: float = opt(
        0.0, "Lowest noise level trained, after the shift. The density is cut, not squeezed.", ge=0, le=1
    )
    max_t: float = opt(1.0, "Highest noise level trained, after the shift.", ge=0, le=1)


@dataclass(frozen=True)
class Validation:
    enable: bool = opt(False, "Measure the held-out loss and sample clips, at step 0, every freq steps and at the end.")
    freq: int = opt(500, "Steps between validations.", ge=1)
    path: str = opt("", "Held-out clips, in any form that data.path takes. Empty: `holdout` of the training clips.")
    holdout: float = opt(
        0.05, "Share of the training clips held out when path is empty, chosen by content.", ge=0, lt=1
    )
    max_clips: int = opt(64, "Held-out clips measured, at most.", ge=1)
    timesteps: tuple[float, ...] = opt(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        "Noise levels at which the held-out loss is measured, as shares of "
        "the trained interval, from 0 to 1 or as an expert or flow.min_t and max_t say.",
        gt=0,
        le=1,
    )
    prompts_path: str = opt(
        "",
        "Text file, one prompt a line. Empty: captions of held-out clips (of training clips if none are held out). "
        "Image-to-video takes these, with their frames.",
    )
    num_videos: int = opt(2, "Clips sampled at each validation; 0 samples none.", ge=0)
    sample_steps: int = opt(30, "Euler steps of the sampler.", ge=1)
    guidance_scale: float = opt(5.0, "Classifier-free guidance; 1 does without.", ge=1)
    embedded_guidance: float = opt(
        6.0,
        "Guidance scale that models which take it as an input are told in sampling; they do with guidance_scale 1.",
        gt=0,
    )
    sample_shift: float = opt(3.0, "Shift of the sampler's schedule.", gt=0)
    use_ema: bool = opt(True, "Use the averaged weights where ema.enable.")


@dataclass(frozen=True)
class Ema:
    enable: bool = opt(False, "Keep an exponential moving average of the weights, sharded like them.")
    decay: float = opt(0.999, "Weight of the old average at each update.", ge=0, lt=1)
    start_step: int = opt(0, "Until this step the average is a copy of the weights.", ge=0)
    interval: int = opt(1, "Steps between updates.", ge=1)


@dataclass(frozen=True)
class Lora:
    enable: bool = opt(
        False,
        "Train low-rank adapters of frozen weights, which are held in training.mixed_precision_param. "
        "Checkpoints hold the "
        "adapters and what belongs to them; the frozen weights are read again from where the run started.",
    )
    rank: int = opt(32, "Rank of an adapter.", ge=1)
    alpha: float = opt(32.0, "An adapter counts alpha / rank.", gt=0)
    target_modules: tuple[str, ...] = opt(
        (),
        "Linears of the blocks that get an adapter, by the end of their dotted names in our model, such as "
        "self_attn.q. Empty: all of attention and feed-forward but those of image tokens.",
    )
    initial_load_path: str = opt(
        "", "File of adapters to start from when there is no checkpoint yet, in diffusers' or ComfyUI's form."
    )
    export: tuple[Literal["diffusers", "comfyui", "merged"], ...] = opt(
        ("diffusers", "comfyui"),
        "What checkpoint.last_save_in_hf writes: `lora/pytorch_lora_weights.safetensors` for diffusers, "
        "`lora/comfyui.safetensors`, and all weights "
        "with the adapters added to them, as checkpoint.export_format says.",
    )

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of files of adapters that are exported."""
        return tuple(form for form in self.export if form != "merged") if self.enable else ()

    @property
    def only_adapters(self) -> bool:
        """Whether an export holds no whole weights."""
        return self.enable and "merged" not in self.export


@dataclass(frozen=True)
class Checkpoint:
    enable: bool = opt(True, "Save, and resume from the newest valid checkpoint of the folder.")
    folder: str = opt("checkpoint", "Folder of the step-N folders, inside job.dump_folder.")
    interval: int = opt(500, "Steps between checkpoints; the last step is always saved.", ge=1)
    keep_latest_k: int = opt(3, "Valid checkpoints kept; 0 keeps all.", ge=0)
    async_mode: Literal["disabled", "async"] = opt(
        "async", "`async` writes from a copy in host memory while training goes on."
    )
    load_step: int = opt(-1, "Step to resume from; -1: the newest valid one.", ge=-1)
    initial_load_path: str = opt(
        "",
        "Weights to start from when there is no checkpoint yet: a step-N folder, or a folder or file of any "
        "public format, which its names tell.",
    )
    initial_load_in_hf: bool = opt(False, "Start from model.hf_assets_path where initial_load_path is empty.")
    last_save_in_hf: bool = opt(
        False,
        "After the last step also export the weights (the averaged ones with ema.enable) into job.dump_folder, "
        "in export_format.",
    )
    export_format: Literal["diffusers", "original", "single_file", "comfyui"] = opt(
        "diffusers",
        "A diffusers folder `hf`, whole where model.hf_assets_path is; a folder `original` in the layout of the "
        "model's public code; one file "
        "`single_file.safetensors` of that layout; or `comfyui.safetensors`, the same with names behind "
        "`model.diffusion_model.`",
    )
    export_dtype: Literal["float32", "bfloat16"] = opt("bfloat16", "Type of the exported tensors.")


@dataclass(frozen=True)
class Metrics:
    log_freq: int = opt(10, "Steps between log lines and TensorBoard points. metrics.jsonl has every step.", ge=1)
    enable_tensorboard: bool = opt(True, "Write TensorBoard scalars and sample clips.")
    save_tb_folder: str = opt("tb", "TensorBoard's folder, inside job.dump_folder.")


@dataclass(frozen=True)
class Comm:
    init_timeout_seconds: int = opt(
        600, "A collective of the first step fails after this; first encodings and compilation take place in it.", ge=1
    )
    train_timeout_seconds: int = opt(300, "A collective fails after this, once the first step is done.", ge=1)


@dataclass(frozen=True)
class FaultTolerance:
    save_on_signal: bool = opt(
        True, "SIGTERM and SIGUSR2 save at the next step boundary and exit 0; a second signal exits at once."
    )
    nonfinite: Literal["stop", "skip"] = opt(
        "stop", "What a loss or gradient that is not finite does: stop the run, or skip the update."
    )
    max_nonfinite_steps: int = opt(10, "Updates skipped one after the other before the run stops.", ge=1)


@dataclass(frozen=True)
class Debug:
    seed: int = opt(0, "Seed of weights, order of clips, noise, timesteps and caption dropout.", ge=0, lt=2**63)
    deterministic: bool = opt(False, "torch.use_deterministic_algorithms: slower, bitwise repeatable on a GPU.")


@dataclass(frozen=True)
class JobConfig:
    job: Job = Job()
    model: Model = Model()
    encoder: Encoder = Encoder()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    float8: Float8 = Float8()
    lr_scheduler: LrScheduler = LrScheduler()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    compile: Compile = Compile()
    flow: Flow = Flow()
    validation: Validation = Validation()
    ema: Ema = Ema()
    lora: Lora = Lora()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    comm: Comm = Comm()
    fault_tolerance: FaultTolerance = FaultTolerance()
    debug: Debug = Debug()


SECTIONS = tuple(f.name for f in fields(JobConfig))
