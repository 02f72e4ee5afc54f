"""What an out-of-memory error says: what was being allocated, and which options need less memory, cheapest first.

`python -m titan_video.planner.ladder CONFIG --world-size N --out DUMP_FOLDER` saves a table of what each option needs;
where a run finds it in its folder, the error quotes it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from titan_video.config.job_config import JobConfig

TABLE = "memory_ladder.json"  # in the dump folder: {overrides of the command line: GiB of the fullest rank}


def ladder(config: JobConfig) -> Iterator[tuple[str, str]]:
    """(overrides of the command line, what they cost), in the order in which to try them.

    Only options that this configuration does not use yet.
    """
    a, o, t, p = config.activation_checkpoint, config.optimizer, config.training, config.parallelism
    lora = config.lora
    if config.encoder.placement == "colocated" and config.encoder.offload_policy == "keep":
        yield "--encoder.offload_policy offload", "the encoders are copied at each use"
    modes, every_block = {a.mode, *(r.mode for r in a.range)}, "--activation_checkpoint.range [] " * bool(a.range)
    every_block += "--activation_checkpoint.mode"
    if modes & {"none", "memory_budget"}:
        yield f"{every_block} selective", "all but attention is recomputed: about a quarter more time"
    if modes != {"full"}:
        yield f"{every_block} full", "blocks are recomputed: about a third more time than none"
    if not a.offload or a.range:
        yield (
            f"{every_block} full --activation_checkpoint.offload",
            "block inputs move to host memory, overlapped with compute",
        )
    if lora.enable and lora.base_dtype == "compute":
        yield "--lora.base_dtype int8", "frozen weights in one byte: an error of half a percent to one"
    if lora.enable and not t.swap_blocks and p.model_parallel_degree == 1:
        yield "--training.swap_blocks 16", "on one rank: frozen weights of 16 blocks in host memory, copied in time"
    if t.local_batch_size > 1 and not config.data.tokens_per_microbatch:
        half = t.local_batch_size // 2
        yield f"--training.local_batch_size {half}", "more micro-batches; keep training.global_batch_size"
    if p.data_parallel_replicate_degree > 1:
        yield "--parallelism.data_parallel_replicate_degree 1", "weights are sharded over all nodes: more communication"
    if o.name == "AdamW":
        yield "--optimizer.name AdamW8bit", "moments in 8 bits: 2.1 instead of 8 bytes a parameter"
    yield (
        f"--parallelism.context_parallel_degree {2 * p.context_parallel_degree}",
        "a clip's tokens on twice as many ranks: activations halve, so does the number of clips at a time",
    )
    if not (t.enable_cpu_offload or t.swap_blocks):
        yield "--training.enable_cpu_offload", "weights, gradients and optimizer state in host memory: much slower"


def explain(error: torch.OutOfMemoryError, config: JobConfig, step: int, bucket: str) -> str:
    """The message for the user. bucket: sizes of the clips of the step."""
    reason = str(error).splitlines()[0] if str(error) else "no further words from the allocator"
    lines = [f"out of memory in step {step}, clips of {bucket}: {reason}", "What needs less memory, cheapest first:"]
    table = read_table(Path(config.job.dump_folder))
    for overrides, cost in ladder(config):
        gib = f"  {table[overrides]:.1f} GiB by the dry run;" if overrides in table else ""
        lines.append(f"  {overrides} {gib} ({cost})")
    if not table:
        lines.append(
            f"`python -m titan_video.planner.ladder CONFIG --world-size N --out {config.job.dump_folder}` says "
            f"beforehand what each of them needs."
        )
    return "\n".join(lines)


def read_table(folder: Path) -> dict[str, float]:
    """{overrides: GiB}; {} where none was saved."""
    try:
        return json.loads((folder / TABLE).read_text())
    except (OSError, ValueError):
        return {}
