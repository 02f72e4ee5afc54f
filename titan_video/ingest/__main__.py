"""`python -m titan_video.data plan|encode CONFIG.toml [--section.field value ...]`: look at the data of a run, or
encode it beforehand. `python -m titan_video.data import FILE.toml`: the section [data] for a data set TOML of
diffusion-pipe or musubi-tuner.

`encode` also runs under torchrun: `torchrun --nproc_per_node 8 -m titan_video.data encode CONFIG.toml`.
"""

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import main_guard, parse_args
from titan_video.data.batching import Batching, Bucket, Work, batch_size_errors, gradient_accumulation
from titan_video.distributed.utils import broadcast_from_rank0, init_distributed
from titan_video.encoders import build_encoders
from titan_video.ingest.importers import import_file
from titan_video.ingest.plan import Plan, build_plan
from titan_video.ingest.prepare import encode_plan, open_cache
from titan_video.ingest.report import decode_all, export, report
from titan_video.models import get_args, get_spec
from titan_video.models.layers import latent_shape, num_clip_tokens
from titan_video.tools.device import get_device

USAGE = """usage: python -m titan_video.data plan CONFIG.toml [--export N] [--ranks N] [--decode] [--section.field VALUE] ...
       python -m titan_video.data encode CONFIG.toml [--section.field VALUE] ...
       python -m titan_video.data import FILE.toml [OUT.toml]"""


def model_args(config: JobConfig) -> Any:
    return get_args(
        get_spec(config.model.name), config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length
    )


def plan(config: JobConfig) -> tuple[Plan, Path]:
    """Print the plan of data.path and write data_plan.jsonl; return it and the cache folder."""
    cache_folder = Path(config.data.cache_folder or Path(config.job.dump_folder) / "cache")
    made = build_plan(config.data, cache_folder)
    made = made.without_single_frames() if model_args(config).conditioning.num_cond_frames else made
    report = Path(config.job.dump_folder) / "data_plan.jsonl"
    made.write_jsonl(report)
    print(f"{made.summary()}\n  every clip: {report}")
    return made, cache_folder


def show(config: JobConfig, ranks: int, num_exported: int, decode: bool) -> None:
    """Print the plan and what it means for a training on so many data-parallel ranks (0:

    8, or as many as the step can be dealt to).
    """
    made, _ = plan(config)
    folder = Path(config.job.dump_folder)
    if decode:
        frames, start = sum(e.bucket[0] for e in made.kept), time.perf_counter()
        made = decode_all(made, config.data.num_workers)
        made.write_jsonl(folder / "data_plan.jsonl")
        print(
            f"after decoding every clip, {frames / (time.perf_counter() - start):,.0f} frames a "
            f"second:\n{made.summary()}"
        )
        made.require_clips()
    args = model_args(config)
    ranks = ranks or next((n for n in (8, 4, 2) if not any(batch_size_errors(config, n))), 1)
    batching = Batching.of(
        config.data, config.training, config.parallelism, gradient_accumulation(config, ranks) * ranks
    )
    text_bytes = args.text_len * args.text_dim * (2 if config.encoder.dtype == "bfloat16" else 4)
    works = partial(get_work, args)
    print(report(made, batching, ranks, works, partial(latent_shape, args=args), text_bytes, config.debug.seed))
    for path in export(made, num_exported, folder / "plan_clips"):
        print(f"  written: {path}")


def get_work(args: Any, bucket: Bucket) -> Work:
    tokens = num_clip_tokens(bucket, args)
    return Work(tokens, args.flops(tokens))


def options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those of `plan` alone, and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=USAGE)
    parser.add_argument("--export", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--decode", action="store_true")
    return parser.parse_known_args(argv)


def encode(config: JobConfig) -> None:
    """Fill the latent cache with all ranks; a later run with the same sections [data] and [encoder] and the same model
    finds everything there.
    """
    init_distributed(torch.device("cpu"), timeout_seconds=24 * 3600)  # an idle rank waits for the others' encoding
    try:
        made, cache_folder = broadcast_from_rank0(lambda: plan(config))
        encoders = build_encoders(
            config.encoder, config.model.hf_assets_path, get_device(int(os.environ.get("LOCAL_RANK", 0)))
        )
        cache = open_cache(cache_folder, encoders, model_args(config).conditioning, None)
        clips, _ = encode_plan(
            made, Path(config.job.dump_folder) / "data_plan.jsonl", encoders, cache, None, config.data.num_workers
        )
        if dist.get_rank() == 0:
            print(f"{len(clips)} clips in {cache_folder}")
    finally:
        dist.destroy_process_group()


def convert(file: str, out: str = "") -> None:
    """Print our TOML for another trainer's, or write it to `out`; what is not as there goes to stderr."""
    text, lines = import_file(file)
    if lines:
        print("\n  ".join([f"{file}: what is not as it was there:", *lines]), file=sys.stderr)
    if not out:
        print(text, end="")
        return
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ValueError(f"{out}: cannot be written ({e.strerror})") from e


def main(argv: list[str]) -> None:
    if len(argv) < 2 or argv[0] not in ("plan", "encode", "import") or argv[1].startswith("--"):
        sys.exit(USAGE)
    if argv[0] == "import":
        if len(argv) > 3:
            sys.exit(f"error: {' '.join(argv[3:])}: import takes one file, and the name of one to write\n{USAGE}")
        try:
            return convert(*argv[1:])
        except ValueError as e:
            sys.exit(f"error: {e}")
    who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    logging.basicConfig(level=logging.INFO, format=f"{who}%(message)s")
    chosen, rest = options(argv[2:]) if argv[0] == "plan" else (None, argv[2:])
    with main_guard():
        config = parse_args(["--job.config_file", argv[1], *rest])
    try:
        if chosen:
            show(config, chosen.ranks, chosen.export, chosen.decode)
        else:
            encode(config)
    except ValueError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
