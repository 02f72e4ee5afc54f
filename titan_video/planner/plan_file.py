"""A plan as a TOML that the trainer loads, and the candidate that a TOML already is.

What a plan chooses replaces those values of the job's TOML; all else in it stays, but for its comments.
"""

import hashlib
import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from types import MappingProxyType
from typing import Any

import tomli_w

from titan_video.config.job_config import ActivationCheckpoint, JobConfig
from titan_video.data.batching import gradient_accumulation
from titan_video.distributed.activation_checkpoint import sections_by_block
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.planner.candidate import FULL, NONE, Candidate, Checkpointing, Range

SAVE = ("attention", "down", "exchange", "matmul")  # the order of the option's values
PLACEMENT_FIELDS = MappingProxyType({"queue_depth": "separate", "offload_policy": "colocated"})  # of [encoder]
Tables = dict[str, dict[str, Any]]


def to_tables(candidate: Candidate, num_blocks: int) -> Tables:
    """{section: {field: value}} that the candidate sets."""
    c = candidate
    is_unified = c.ring > 1 and c.ulysses > 1
    training: dict[str, Any] = {"enable_cpu_offload": c.enable_cpu_offload}
    data: dict[str, Any] = {}
    if c.tokens_per_microbatch:
        data["tokens_per_microbatch"] = c.tokens_per_microbatch
        data["global_micro_batches"] = c.microbatches * c.dp
        training |= {"local_batch_size": 1, "global_batch_size": -1}  # the budget replaces both
    else:
        training["local_batch_size"] = c.local_batch_size
        training["global_batch_size"] = c.local_batch_size * c.microbatches * c.dp
    encoder: dict[str, Any] = {"placement": c.placement, "num_ranks": c.encoder_ranks}
    return {
        "encoder": encoder,
        "data": data,
        "training": training,
        "optimizer": {"name": c.optimizer},
        "parallelism": {
            "data_parallel_replicate_degree": c.dp_replicate,
            "data_parallel_shard_degree": c.dp_shard,
            "fsdp_reshard_after_forward": "always" if c.reshard else "never",
            "tensor_parallel_degree": c.tp,
            "expert_parallel_degree": c.ep,
            "context_parallel_degree": c.cp,
            "context_parallel_method": "unified" if is_unified else "ring" if c.ring > 1 else "ulysses",
            "context_parallel_ulysses_degree": c.ulysses if is_unified else 1,
            "pipeline_parallel_degree": c.pp,
            "pipeline_parallel_schedule": c.schedule,
            "pipeline_parallel_microbatch_size": c.local_batch_size if c.pp > 1 else 1,
            "pipeline_parallel_split": list(c.split),
        },
        "activation_checkpoint": _checkpoint_table(c.ranges, num_blocks),
    }


def _checkpoint_table(ranges: Iterable[Range], num_blocks: int) -> dict[str, Any]:
    """[activation_checkpoint] of one mode for all blocks, or with a range for each mode."""
    ranges = merged(ranges) or (Range(0, num_blocks),)
    defaults = {"layers": [], "range": []}
    if len(ranges) == 1:
        return {**_mode_table(ranges[0].checkpointing), **defaults}
    tables = []
    for r in ranges:
        layers = f"{r.first}-{r.last - 1}" if r.last - r.first > 1 else f"{r.first}"
        tables.append({"layers": layers, **_mode_table(r.checkpointing)})
    return {"mode": "none", "offload": False, **defaults, "range": tables}


def _mode_table(checkpointing: Checkpointing) -> dict[str, Any]:
    table: dict[str, Any] = {"mode": checkpointing.mode, "offload": checkpointing.offload}
    if checkpointing.mode == "selective":
        table["save"] = list(checkpointing.save)
    return table


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """With equal neighbours as one range."""
    found: list[Range] = []
    for r in ranges:
        if found and found[-1].checkpointing == r.checkpointing and found[-1].last == r.first:
            found[-1] = replace(found[-1], last=r.last)
        else:
            found.append(r)
    return tuple(found)


def plan_tables(raw: Tables, candidate: Candidate, num_blocks: int) -> Tables:
    """The tables of a job's TOML, with the candidate's values; those that equal the defaults are left out.

    raw: as tomllib reads the TOML, with current names of fields.
    """
    defaults = asdict(JobConfig())
    tables = {section: dict(values) for section, values in raw.items()}
    for section, values in to_tables(candidate, num_blocks).items():
        table = tables.setdefault(section, {})
        for name, value in values.items():
            default = defaults[section].get(name, [])
            if value == (list(default) if isinstance(default, tuple | list) else default):
                table.pop(name, None)
            else:
                table[name] = value
    for name, placement in PLACEMENT_FIELDS.items():
        if candidate.placement != placement:
            tables.get("encoder", {}).pop(name, None)
    if candidate.tp == 1:
        tables.get("parallelism", {}).pop("enable_async_tensor_parallel", None)
    checkpoint = tables.get("activation_checkpoint", {})
    if checkpoint.get("mode", "none") != "selective" or checkpoint.get("range"):
        checkpoint.pop("save", None)
    return {section: table for section, table in tables.items() if table}


def write_toml(tables: Tables, comment: Iterable[str]) -> str:
    """TOML with lists on one line, as people write them."""
    lines = []
    for line in comment:
        indent = " " * (len(line) - len(line.lstrip()) + 2) if line.startswith(" ") else ""
        lines += textwrap.wrap(line, 117, subsequent_indent=indent, drop_whitespace=True) or [""]
    text = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    for section, table in tables.items():
        text += "\n" + _table_text(section, table)
    return text


def _table_text(name: str, table: dict[str, Any]) -> str:
    """A table, and after it the tables inside it."""
    text, inner = f"[{name}]\n", ""
    for key, value in table.items():
        if isinstance(value, dict):
            inner += "\n" + _table_text(f"{name}.{key}", value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            inner += "".join(
                "\n" + _table_text(f"{name}.{key}", row).replace("[", "[[", 1).replace("]", "]]", 1) for row in value
            )
        else:
            text += f"{key} = {_value_text(value)}\n"
    return (text if text.count("\n") > 1 or not inner else "") + inner.removeprefix(
        "" if text.count("\n") > 1 else "\n"
    )


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_text, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def hash_of(assumptions: Any) -> str:
    """Of the numbers that a prediction rests on: the job, the cluster and what else JSON can hold."""
    return hashlib.sha256(json.dumps(assumptions, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---- from a configuration ----


def to_candidate(config: JobConfig, world_size: int, num_blocks: int, clips: int = 0) -> Candidate:
    """The candidate that a configuration is on `world_size` ranks.

    clips: of a micro-batch of the longest clips, with a token budget.
    ConfigError: its degrees or its batch size do not fit so many ranks.
    """
    p, t = config.parallelism, config.training
    dims = ParallelDims.of(p, config.encoder.num_training_ranks(world_size))
    microbatches = gradient_accumulation(config, dims.dp)
    local, budget = clips or t.local_batch_size, config.data.tokens_per_microbatch
    if dims.pp > 1 and p.pipeline_parallel_microbatch_size < local:
        parts = local // p.pipeline_parallel_microbatch_size
        microbatches, budget = microbatches * parts, budget // parts
        local = p.pipeline_parallel_microbatch_size
    sharded = dims.dp_shard * dims.cp > 1
    reshard = {"always": True, "never": False, "default": sharded}[p.fsdp_reshard_after_forward]
    return Candidate(
        **{f.name: getattr(dims, f.name) for f in fields(dims)},
        local_batch_size=local,
        microbatches=microbatches,
        tokens_per_microbatch=budget,
        reshard=reshard and sharded,
        schedule=p.pipeline_parallel_schedule if dims.pp > 1 else "1F1B",
        ranges=_ranges(config.activation_checkpoint, num_blocks),
        split=tuple(p.pipeline_parallel_split),
        optimizer=config.optimizer.name,
        enable_cpu_offload=t.enable_cpu_offload,
        placement=config.encoder.placement,
        encoder_ranks=config.encoder.num_ranks if config.encoder.placement == "separate" else 0,
    )


def _ranges(section: ActivationCheckpoint, num_blocks: int) -> tuple[Range, ...]:
    """ValueError: a memory budget, which leaves to the compiler what is saved; a block that the model does not have."""
    sections = sections_by_block(section, num_blocks)
    if any(s.mode == "memory_budget" for s in sections):
        raise ValueError(
            "activation_checkpoint.mode: memory_budget lets the compiler choose what is saved, which no plan predicts; "
            "set another mode"
        )
    return merged(Range(i, i + 1, _checkpointing(s.mode, s.save, s.offload)) for i, s in enumerate(sections))


def _checkpointing(mode: str, save: Iterable[str], offload: bool) -> Checkpointing:
    if mode == "none":
        return NONE
    kinds = set(save)
    return Checkpointing(mode, tuple(kind for kind in SAVE if kind in kinds) if mode == "selective" else (), offload)


assert FULL == _checkpointing("full", (), False)
