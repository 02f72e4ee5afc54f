"""Which values of the configuration ask for an optional part of the program (tools/parts.py).

A section whose part is not installed parses as long as it equals its defaults, so that any resolved TOML can be read
again. A value that asks for a missing part is refused before the run starts.
"""

from collections.abc import Iterator

from titan_video.config.job_config import JobConfig
from titan_video.tools.parts import find_module

CHANGED = ()  # any value but the default
DOTTED = (".",)  # any value with a dot
EXPERTS = ("moe-debug", "moe-debug-expert-choice", "moe-1.3B", "moe-14B-shared", "moe-14B-copies")  # flavors
PARTS = (  # (section or option, the values that ask for a part, the part)
    ("lora", CHANGED, "titan_video.lora"),
    ("lora", CHANGED, "titan_video.weights.export"),
    ("float8", CHANGED, "titan_video.distributed.float8"),
    ("model.flavor", EXPERTS, "titan_video.models.experts"),
    ("model.flavor", EXPERTS, "titan_video.kernels.grouped"),
    ("model.flavor", EXPERTS, "titan_video.training.expert_balance"),
    ("experts", CHANGED, "titan_video.training.expert_balance"),
    ("optimizer.name", ("Muon",), "titan_video.optim.muon"),
    ("optimizer.name", ("AdamW8bit", "Muon"), "titan_video.optim.low_bit"),  # stochastic rounding is there, too
    ("optimizer.name", ("AdamW8bit", "Muon"), "titan_video.optim.mixed"),
    ("optimizer.name", DOTTED, "titan_video.optim.by_name"),
    ("optimizer.parametrization", ("mup",), "titan_video.optim.mup"),
    ("optimizer.base_flavor", CHANGED, "titan_video.optim.mup"),
    ("optimizer.mup_finetune", (True,), "titan_video.optim.mup"),
    ("training.dtype", ("bfloat16",), "titan_video.optim.low_bit"),
    ("training.dtype", ("bfloat16",), "titan_video.optim.mixed"),
    ("optimizer.in_backward", (True,), "titan_video.optim.in_backward"),
    ("checkpoint.export_format", ("original", "single_file", "comfyui"), "titan_video.weights.original"),
    ("checkpoint.last_save_in_hf", (True,), "titan_video.weights.export"),
    ("checkpoint.export_every", CHANGED, "titan_video.weights.export"),
    ("checkpoint.keep_exports", CHANGED, "titan_video.weights.export"),
    ("activation_checkpoint.offload", (True,), "titan_video.distributed.offload"),
    ("activation_checkpoint.range", CHANGED, "titan_video.distributed.checkpoint_ranges"),
    ("parallelism.tensor_parallel_degree", CHANGED, "titan_video.distributed.tensor_parallel"),
    ("training.swap_blocks", CHANGED, "titan_video.distributed.block_swap"),
    ("parallelism.context_parallel_degree", CHANGED, "titan_video.distributed.context_parallel"),
    ("parallelism.context_parallel_ulysses_degree", CHANGED, "titan_video.distributed.context_parallel"),
    ("parallelism.expert_parallel_degree", CHANGED, "titan_video.distributed.expert_parallel"),
    ("parallelism.expert_parallel_degree", CHANGED, "titan_video.training.expert_balance"),
    ("parallelism.pipeline_parallel_degree", CHANGED, "titan_video.distributed.pipeline_parallel"),
    ("parallelism.pipeline_parallel_split", CHANGED, "titan_video.distributed.pipeline_parallel"),
    ("parallelism.enable_async_tensor_parallel", (True,), "titan_video.distributed.async_tensor_parallel"),
    ("planner", CHANGED, "titan_video.planner"),
    ("profiling.enable_profiling", (True,), "titan_video.training.profiling"),
    ("profiling.enable_memory_snapshot", (True,), "titan_video.training.profiling"),
    ("metrics.enable_wandb", (True,), "titan_video.training.wandb_sink"),
    ("comm.trace_buf_size", CHANGED, "titan_video.training.flight_recorder"),
    ("fault_tolerance.nonfinite", ("skip", "rollback"), "titan_video.training.faults"),
    ("fault_tolerance.spike_deviations", CHANGED, "titan_video.training.faults"),
    ("debug.verify_every", CHANGED, "titan_video.training.gradient_check"),
    ("validation.solver", ("unipc",), "titan_video.flow.unipc"),
    ("validation.enable", (True,), "titan_video.tasks.validation"),
    ("validation.enable", (True,), "titan_video.tasks.sampling"),
    ("validation.num_scored", CHANGED, "titan_video.ingest.shape_scores"),
    ("data.cache_url", CHANGED, "titan_video.ingest.cache.remote_cache"),
    ("encoder.placement", ("colocated", "separate"), "titan_video.online"),
    ("model.kernels", ("triton",), "titan_video.kernels.triton"),
    ("model.attention", ("flash3", "flash4", "flex"), "titan_video.kernels.attention_backends"),
)


def missing_sections(config: JobConfig) -> Iterator[str]:
    """One line for each section that is not at its defaults and has a part that is not installed."""
    for option, part in _asked(config):
        if "." not in option and not find_module(part):
            yield f"{option}: {_not_installed(part)}, or remove the section"


def missing_parts(config: JobConfig) -> Iterator[str]:
    """One line for each section or value that asks for a part that is not installed."""
    yield from missing_sections(config)
    for option, part in _asked(config):
        if "." in option and not find_module(part):
            value = str(_value(config, option)).replace("True", "true")
            yield f"{option}: given {value}, which {_not_installed(part)}, or choose another value"


def installed_parts(config: JobConfig) -> set[str]:
    """The installed optional parts that the configuration asks for."""
    return {part for _, part in _asked(config) if find_module(part)}


def _asked(config: JobConfig) -> Iterator[tuple[str, str]]:
    """(section or option, part) for each one that asks for a part."""
    defaults = JobConfig()
    for option, values, part in PARTS:
        value = _value(config, option)
        is_changed = values is CHANGED and value != _value(defaults, option)
        if value in values or is_changed or (values is DOTTED and "." in value):
            yield option, part


def _value(config: JobConfig, option: str):
    section, _, name = option.partition(".")
    return getattr(getattr(config, section), name) if name else getattr(config, section)


def _not_installed(part: str) -> str:
    return f"needs the optional part {part.replace('.', '/')}, which is not installed; restore it"
