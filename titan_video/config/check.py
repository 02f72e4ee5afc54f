"""Rules across fields, checked before any process group or model exists.

A rule is beside the code that imposes it: a function `rules(config, world_size)` that yields one line per mistake. This
file names these functions and collects what they yield. What one field alone may hold is in `job_config.py`.
"""

from itertools import islice
from types import MappingProxyType

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import MAX_MISTAKES, ConfigError, listed
from titan_video.config.parts import installed_parts, missing_parts
from titan_video.tools.parts import find_module, resolve

RULES = (
    "titan_video.encoders:rules",
    "titan_video.ingest.bucketing:rules",
    "titan_video.data.batching:rules",
    "titan_video.distributed.parallel_dims:rules",
    "titan_video.distributed.fsdp:rules",
    "titan_video.distributed.activation_checkpoint:rules",
    "titan_video.optim.optimizer:rules",
    "titan_video.flow.matching:rules",
    "titan_video.checkpoint.manager:rules",
    "titan_video.config.folders:rules",
)
PART_RULES = MappingProxyType(  # {optional part: its rules}, loaded only where the configuration asks for the part
    {
        "titan_video.distributed.async_tensor_parallel": "titan_video.distributed.async_tensor_parallel:rules",
        "titan_video.distributed.float8": "titan_video.distributed.float8:rules",
        "titan_video.distributed.block_swap": "titan_video.distributed.block_swap:rules",
        "titan_video.distributed.checkpoint_ranges": "titan_video.distributed.checkpoint_ranges:rules",
        "titan_video.distributed.context_parallel": "titan_video.distributed.context_parallel:rules",
        "titan_video.distributed.expert_parallel": "titan_video.distributed.expert_parallel:rules",
        "titan_video.distributed.pipeline_parallel": "titan_video.distributed.pipeline_parallel:rules",
        "titan_video.kernels.attention_backends": "titan_video.kernels.attention_backends:rules",
        "titan_video.planner": "titan_video.planner.report.comparison:rules",
        "titan_video.training.profiling": "titan_video.training.profiling:rules",
        "titan_video.training.wandb_sink": "titan_video.training.wandb_sink:rules",
        "titan_video.training.faults": "titan_video.training.faults.guard:rules",
        "titan_video.training.expert_balance": "titan_video.training.expert_balance:rules",
        "titan_video.training.gradient_check": "titan_video.training.gradient_check:rules",
        "titan_video.optim.by_name": "titan_video.optim.by_name:rules",
        "titan_video.optim.in_backward": "titan_video.optim.in_backward:rules",
        "titan_video.optim.mixed": "titan_video.optim.mixed:rules",
        "titan_video.optim.mup": "titan_video.optim.mup.parametrization:rules",
        "titan_video.tasks.validation": "titan_video.tasks.validation:rules",
        "titan_video.lora": "titan_video.lora.adapters:rules",
        "titan_video.weights.export": "titan_video.weights.export.interim:rules",
        "titan_video.online": "titan_video.online.setup:rules",
        "titan_video.ingest.cache.remote_cache": "titan_video.ingest.cache.remote_cache:rules",
    }
)
# Of what the run reads.
FILE_RULES = ("titan_video.ingest.files.sources:rules", "titan_video.config.folders:file_rules")


def check(config: JobConfig, world_size: int, files: bool = True) -> None:
    """Raises ConfigError with every rule that `config` breaks on `world_size` ranks, one line each: field, value, fix.

    files: also check that the files and folders which the run reads exist.
    """
    assert world_size >= 1
    errors = list(missing_parts(config))
    if errors:  # rules beside code that needs a missing part cannot be loaded
        raise ConfigError("\n".join(errors))
    parts = installed_parts(config)
    targets = [*RULES, *(rules for part, rules in PART_RULES.items() if part in parts), *(FILE_RULES if files else ())]
    for target in targets:
        if find_module(target.partition(":")[0]):  # folders such as ingest can be deleted
            errors += islice(resolve(target, "config.check")(config, world_size), MAX_MISTAKES + 1)
    if errors:
        raise ConfigError(listed(errors))
