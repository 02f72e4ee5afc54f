"""The run's configuration: one frozen dataclass per TOML section.

TOML chooses, Python defines: sections hold numbers, strings, lists and names from a closed set, never structure. Every
field carries its help text and its limits. The parser's messages (`values.py`) and `docs/config.md` are made from them.
Names and meanings follow torchtitan v0.2 where it has them. Former names of renamed fields: `renames.py`.
"""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.families import encoder_families, model_families, model_flavors
from titan_video.config.option import opt
from titan_video.config.sections.activation_checkpoint import ActivationCheckpoint
from titan_video.config.sections.activation_checkpoint import CheckpointRange as CheckpointRange
from titan_video.config.sections.checkpoint import Checkpoint
from titan_video.config.sections.data import Data
from titan_video.config.sections.data import Source as Source
from titan_video.config.sections.experts import Experts
from titan_video.config.sections.fault_tolerance import FaultTolerance
from titan_video.config.sections.float8 import Float8
from titan_video.config.sections.lora import Lora
from titan_video.config.sections.planner import Planner
from titan_video.config.sections.profiling import Profiling
from titan_video.config.sections.validation import Validation


@dataclass(frozen=True)
class Job:
    dump_folder: str = opt(
        "./outputs", "Folder of everything the run writes: resolved TOML, metrics, checkpoints, samples."
    )
    description: str = opt("", "Free text, printed at start and stored in the resolved TOML.")
    print_config: bool = opt(False, "Print the resolved TOML at start.")


@dataclass(frozen=True)
class Model:
    name: str = opt("wan", "Model family: a folder of titan_video/models.", names=model_families)
    flavor: str = opt(
        "debug",
        "Architecture: a flavor of the family, or `hf` to read `transformer/config.json` of hf_assets_path. Flavors: "
        f"{model_flavors()}.",
    )
    hf_assets_path: str = opt(
        "", "Local diffusers folder, no id of the hub: `python -m titan_video.download ID` fetches one."
    )
    expert: Literal["all", "high", "low"] = opt(
        "all",
        "Wan 2.2 A14B: which of its two experts this model is. `high` trains on sigmas at and above model.boundary, "
        "`low` below it; in a diffusers folder `low` is transformer_2. Validation samples with this model alone; "
        "titan_video.sample uses both.",
    )
    boundary: float = opt(
        0.0,
        "Sigma between the experts; 0: that of the flavor (Wan 2.2: 0.875 for text-to-video, 0.9 for image-to-video).",
        ge=0,
        lt=1,
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "flash3", "flash4", "flex", "math"] = opt(
        "auto",
        "Attention backend of the blocks. There is no fallback: a backend that cannot run is an error. `auto`: cuDNN "
        "on Hopper, otherwise flash attention. flash3 and flash4 are packages to install. On a CPU: auto, flash, math.",
    )
    kernels: Literal["auto", "triton", "torch"] = opt(
        "auto",
        "Norms, residuals and RoPE of the blocks: fused Triton kernels, which need a GPU, or plain torch. "
        "`auto`: triton on a GPU.",
    )


@dataclass(frozen=True)
class Encoder:
    name: str = opt(
        "wan",
        "Frozen VAE, text and image encoders: a module of titan_video/encoders. `debug` needs no weights: a fixed "
        "video transform, and embeddings made from hashes of the words; `debug_outlines`: with another transform, for "
        "shapes of one colour.",
        names=encoder_families,
    )
    dtype: Literal["bfloat16", "float32"] = opt(
        "bfloat16", "Compute dtype of the text encoder. The VAE always runs in float32."
    )
    max_text_length: int = opt(
        512,
        "Prompts are padded or truncated to this many tokens. Wan was trained with 512, HunyuanVideo with 256.",
        ge=1,
    )
    vae_tiling: bool = opt(False, "Encode and decode the VAE in spatial tiles, to save memory at large sizes.")
    vae_temporal_tiling: bool = opt(
        False,
        "HunyuanVideo: encode in chunks of 16 frames, to save memory; false: whole clips, as its training code does "
        "(at 720p with vae_tiling). A run started before the option keeps its chunks.",
    )
    clip_resize: Literal["squeeze", "crop"] = opt(
        "squeeze",
        "Wan 2.1 image-to-video: CLIP sees the whole image, stretched to 224 x 224, as in Wan's own code; crop: its "
        "middle, as in diffusers. A run started before the option keeps crop.",
    )
    placement: Literal["cached", "colocated", "separate"] = opt(
        "cached",
        "Where clips and captions are encoded. cached: before training. colocated: during training, on the training "
        "ranks. separate: during training, on ranks of their own. The batches are the same. Validation data is always "
        "encoded before training.",
    )
    num_ranks: int = opt(0, "For separate: the last num_ranks ranks encode and do not train.", ge=0)
    queue_depth: int = opt(4, "For separate: clips that each training rank receives in advance.", ge=1)
    offload_policy: Literal["keep", "offload", "free"] = opt(
        "offload",
        "For colocated: between uses the encoders stay on the device, move to host memory, or are deleted and loaded "
        "again.",
    )
    write_cache: bool = opt(
        False, "For colocated and separate: write encoded clips to the cache; a later epoch or run reads them."
    )

    def num_training_ranks(self, world_size: int) -> int:
        """How many of `world_size` ranks train. Encoder ranks come after them."""
        return world_size - (self.num_ranks if self.placement == "separate" else 0)


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
    epochs: int = opt(
        0,
        "Instead of steps: passes over the training clips. The last step is filled with clips of the next pass.",
        ge=0,
    )
    loss: Literal["mse", "pseudo_huber"] = opt(
        "mse",
        "Of each element's error d: d^2, or 2c (sqrt(d^2 + c^2) - c), which is near d^2 for errors below huber_c = c "
        "and grows like 2c |d| above.",
    )
    huber_c: float = opt(0.1, "For pseudo_huber: the c above.", gt=0)
    max_norm: float = opt(1.0, "Clip the gradient norm to this value; 0: no clipping.", ge=0)
    mixed_precision_param: Literal["bfloat16", "float32"] = opt(
        "bfloat16", "Compute dtype of the model. Master weights, time embedding and modulation stay in float32."
    )
    dtype: Literal["float32", "bfloat16"] = opt(
        "float32",
        "Dtype of the stored weights. bfloat16: there are no float32 master weights; gradients are bfloat16 too, and "
        "updates use stochastic rounding.",
    )
    guidance: float = opt(
        1.0, "Guidance scale that models with a guidance input receive in training; HunyuanVideo's own code: 6.", gt=0
    )
    enable_cpu_offload: bool = opt(
        False, "Keep master weights, gradients and optimizer state in host memory; the update runs there."
    )
    swap_blocks: int = opt(
        0, "LoRA on one rank: the frozen weights of so many blocks wait in host memory for their turn.", ge=0
    )
    mixed_precision_reduce: Literal["float32", "bfloat16"] = opt(
        "float32",
        "Dtype of the gradient reduction. bfloat16 sends half, and rounds; the model's float32 parts keep float32.",
    )
    read_late: bool = opt(
        False,
        "Read loss and gradient norm while the next step computes. Faults are met before its update, all the same.",
    )
    gc_freq: int = opt(50, "Steps between two runs of Python's garbage collector, on all ranks at once.", ge=1)


@dataclass(frozen=True)
class Optimizer:
    name: str = opt(
        "AdamW",
        "AdamW; AdamW8bit: AdamW with 8-bit moments for matrices; Muon: Muon for the matrices of the blocks and AdamW "
        "for all other parameters, with one learning rate. Or `package.module.Class`: a subclass of "
        "torch.optim.Optimizer of an installed package, such as torch.optim.RAdam.",
    )
    args: dict = opt(
        {},
        "For package.module.Class: further arguments of its constructor, the table [optimizer.args] or "
        "`--optimizer.args.NAME VALUE`. lr and weight_decay are those of [optimizer].",
    )
    lr: float = opt(1e-4, "Peak learning rate.", gt=0)
    beta1: float = opt(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta2: float = opt(0.95, "Decay of the second moment.", ge=0, lt=1)
    eps: float = opt(1e-8, "Added to the denominator.", gt=0)
    weight_decay: float = opt(0.01, "Decoupled weight decay of matrices. Vectors (biases, norms) have none.", ge=0)
    momentum: float = opt(0.95, "Momentum of Muon.", ge=0, lt=1)
    implementation: Literal["fused", "foreach", "for-loop"] = opt(
        "fused", "Implementation in torch.optim of AdamW with float32 weights."
    )
    parametrization: Literal["standard", "mup"] = opt(
        "standard",
        "mup: initial values and rates of each class of parameters follow the width, so that a rate tuned at the width "
        "of base_flavor holds at that of model.flavor (docs/mup.md).",
    )
    base_flavor: str = opt(
        "", "For mup: the flavor at which the rate was tuned, of the same depth and head width as model.flavor."
    )
    mup_finetune: bool = opt(
        False,
        "For mup: start from given weights, which mup has not drawn; of it, only rates, decay and eps remain.",
    )
    in_backward: bool = opt(
        False,
        "Update each weight as soon as backward has computed its gradient, then free the gradient. Excludes clipping.",
    )


@dataclass(frozen=True)
class LrScheduler:
    warmup_steps: int = opt(
        200, "Linear warm-up from 0; shorter, with a notice, in a run of fewer steps than this and the decay.", ge=0
    )
    decay_ratio: float = opt(
        0.0, "The rate decays over this fraction of training.steps, at the end; 0: it stays constant.", ge=0, le=1
    )
    decay_type: Literal["linear", "sqrt", "cosine"] = opt("linear", "Shape of the decay.")
    min_lr_factor: float = opt(0.0, "Final rate of the decay as a fraction of the peak.", ge=0, le=1)


@dataclass(frozen=True)
class Parallelism:
    data_parallel_replicate_degree: int = opt(1, "HSDP: number of replicas of the sharded model.", ge=1)
    data_parallel_shard_degree: int = opt(
        -1, "FSDP: ranks over which a replica is sharded. -1: all remaining ranks.", ge=-1
    )
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = opt(
        "default", "Free a block's gathered weights after its forward. `default`: yes, unless they are on one rank."
    )
    enable_fsdp_symm_mem: bool = opt(
        False, "Gather and reduce through NCCL's symmetric memory, which leaves more of a GPU to compute. Needs GPUs."
    )
    tensor_parallel_degree: int = opt(
        1,
        "Ranks over which the matrices of each block are split, by heads and by feed-forward width. The norms of the "
        "block are split over the tokens.",
        ge=1,
    )
    enable_async_tensor_parallel: bool = opt(
        False, "Overlap the communication of tensor parallel with its matmuls. Needs compile.enable and a GPU."
    )
    context_parallel_degree: int = opt(1, "Ranks over which the tokens of each clip are split.", ge=1)
    context_parallel_method: Literal["ulysses", "ring", "unified"] = opt(
        "ulysses",
        "`ulysses`: all-to-all from tokens to heads around attention. `ring`: keys and values pass from rank to rank. "
        "`unified`: both.",
    )
    context_parallel_ulysses_degree: int = opt(
        1, "For unified: Ulysses degree, over neighbouring ranks; the rest of the degree is ring.", ge=1
    )
    context_parallel_rotate_method: Literal["alltoall", "allgather"] = opt(
        "alltoall",
        "For ring and unified. alltoall: keys and values pass from rank to rank, overlapped with compute. allgather: "
        "they are gathered first.",
    )
    expert_parallel_degree: int = opt(
        1,
        "Ranks over which the experts of a mixture-of-experts flavor are divided; tokens go to the ranks that have "
        "their experts. They are ranks of data, context and tensor parallel: the degree divides the product of these.",
        ge=1,
    )
    pipeline_parallel_degree: int = opt(1, "Ranks over which the blocks are partitioned into stages.", ge=1)
    pipeline_parallel_schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"] = opt(
        "1F1B", "Order of forwards and backwards. The interleaved schedules have two stages on each rank."
    )
    pipeline_parallel_split: tuple[int, ...] = opt(
        (), "First block of each stage, in forward order, such as [0, 9, 20]. Empty: balanced by FLOPs.", ge=0
    )
    pipeline_parallel_microbatch_size: int = opt(
        1, "Clips in each micro-batch of the pipeline; divides training.local_batch_size.", ge=1
    )

    @property
    def model_parallel_degree(self) -> int:
        """Ranks that work on the same samples."""
        return self.pipeline_parallel_degree * self.context_parallel_degree * self.tensor_parallel_degree


@dataclass(frozen=True)
class Compile:
    enable: bool = opt(False, "torch.compile each block, full graph.")
    backend: Literal["inductor", "aot_eager"] = opt(
        "inductor", "Compiler backend; aot_eager traces without generating code."
    )


@dataclass(frozen=True)
class Flow:
    timestep_density: Literal["uniform", "logit_normal", "mode"] = opt(
        "logit_normal", "Density of sigma in (0, 1) before the shift; sigma = 1 is pure noise."
    )
    logit_mean: float = opt(0.0, "Mean of logit(sigma) for logit_normal.")
    logit_std: float = opt(1.0, "Standard deviation of logit(sigma) for logit_normal.", gt=0)
    mode_scale: float = opt(1.29, "Scale of the mode density (Esser et al. 2024, eq. 20).", ge=-1, le=1.75)
    shift: Literal["none", "constant", "resolution"] = opt(
        "constant",
        "Time shift: sigma <- a sigma / (1 + (a - 1) sigma). constant: a = shift_value. "
        "resolution: a = shift_value x sqrt(tokens / shift_base_tokens).",
    )
    shift_value: float = opt(3.0, "The a above. Wan samples 480p with 3 and 720p with 5.", gt=0)
    shift_base_tokens: int = opt(32760, "Token count at which `resolution` gives a = shift_value.", ge=1)
    loss_weighting: Literal["none", "bell"] = opt(
        "none", "Loss weight as a function of sigma; `bell` favours the middle. Its mean over the sampled sigmas is 1."
    )
    min_t: float = opt(
        0.0, "Lowest trained sigma, after the shift. The density is truncated, not rescaled.", ge=0, le=1
    )
    max_t: float = opt(1.0, "Highest trained sigma, after the shift.", ge=0, le=1)


@dataclass(frozen=True)
class Ema:
    enable: bool = opt(False, "Maintain EMA weights: an exponential moving average, sharded like the weights.")
    decay: float = opt(0.999, "Weight of the previous average at each update.", ge=0, lt=1)
    start_step: int = opt(0, "Up to this step the EMA weights are a copy of the weights.", ge=0)
    interval: int = opt(1, "Steps between updates.", ge=1)


@dataclass(frozen=True)
class Metrics:
    log_freq: int = opt(10, "Steps between log lines and TensorBoard points. metrics.jsonl has every step.", ge=1)
    enable_tensorboard: bool = opt(True, "Write TensorBoard scalars and sample clips.")
    save_tb_folder: str = opt("tb", "TensorBoard's folder, inside job.dump_folder.")
    enable_wandb: bool = opt(False, "Send the scalars to Weights & Biases too; needs the package wandb.")


@dataclass(frozen=True)
class Comm:
    init_timeout_seconds: int = opt(
        600, "Timeout of a collective in the first step, which includes first encodings and compilation.", ge=1
    )
    train_timeout_seconds: int = opt(300, "Timeout of a collective after the first step.", ge=1)
    trace_buf_size: int = opt(20000, "Collectives that a rank's NCCL flight recorder keeps; 0 turns it off.", ge=0)
    save_traces_folder: str = opt("comm_traces", "Folder of what it writes at a timeout, inside job.dump_folder.")


@dataclass(frozen=True)
class Debug:
    seed: int = opt(0, "Seed of weights, order of clips, noise, timesteps and caption dropout.", ge=0, lt=2**63)
    deterministic: bool = opt(False, "torch.use_deterministic_algorithms: slower, bitwise repeatable on a GPU.")
    verify_every: int = opt(
        0,
        "Every so many steps each rank runs its micro-batches twice and compares its gradients bit by bit; a rank "
        "that computes wrongly is named, and the run stops. 0: never. Needs deterministic.",
        ge=0,
    )


@dataclass(frozen=True)
class JobConfig:
    job: Job = Job()
    model: Model = Model()
    encoder: Encoder = Encoder()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    float8: Float8 = Float8()
    experts: Experts = Experts()
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
    profiling: Profiling = Profiling()
    planner: Planner = Planner()
    comm: Comm = Comm()
    fault_tolerance: FaultTolerance = FaultTolerance()
    debug: Debug = Debug()
