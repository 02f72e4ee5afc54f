"""`python -m titan_video.data plan|encode CONFIG.toml [--section.field value ...]`: look at the data of a run, or encode it beforehand.

`encode` also runs under torchrun: `torchrun --nproc_per_node 8 -m titan_video.data encode CONFIG.toml`.
"""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from titan_video.components.encoding import encode_plan
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import main_guard, parse_args
from titan_video.data.dataset import Plan, plan_of
from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.utils import broadcast_from_zero, init_distributed
from titan_video.encoders import build_encoders
from titan_video.flow.conditions import Conditions
from titan_video.models import get_args, get_spec
from titan_video.tools.device import get_device

USAGE = "usage: python -m titan_video.data plan|encode CONFIG.toml [--section.field VALUE] ..."


def conditions(config: JobConfig) -> Conditions:
    """What the model is given beside the text."""
    return get_args(get_spec(config.model.name), config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length).conditions


def plan(config: JobConfig) -> tuple[Plan, Path]:
    """Print the plan of data.path and write data_plan.jsonl; return it and the cache folder."""
    cache_folder = Path(config.data.cache_folder or Path(config.job.dump_folder) / "cache")
    made = plan_of(config.data, cache_folder)
    made = made.without_stills() if conditions(config).num_given else made
    report = Path(config.job.dump_folder) / "data_plan.jsonl"
    made.write_jsonl(report)
    print(f"{made.summary()}\n  every clip: {report}")
    return made, cache_folder


def encode(config: JobConfig) -> None:
    """Fill the latent cache with all ranks; a later run with the same sections [data] and [encoder] and the same model finds everything there."""
    init_distributed(torch.device("cpu"), timeout_seconds=24 * 3600)  # an idle rank waits for the others' encoding
    try:
        made, cache_folder = broadcast_from_zero(lambda: plan(config))
        encoders = build_encoders(config.encoder, config.model.hf_assets_path, get_device(int(os.environ.get("LOCAL_RANK", 0))))
        given = conditions(config)
        ids = broadcast_from_zero(lambda: (encoders.video_id(), encoders.text_id(), encoders.image_id() if given.image_tokens else ""))
        cache = LatentCache(cache_folder, *ids, given)
        clips = encode_plan(made, Path(config.job.dump_folder) / "data_plan.jsonl", encoders, cache, None, config.data.num_workers)
        if dist.get_rank() == 0:
            print(f"{len(clips)} clips in {cache_folder}")
    finally:
        dist.destroy_process_group()


def main(argv: list[str]) -> None:
    if len(argv) < 2 or argv[0] not in ("plan", "encode") or argv[1].startswith("--"):
        sys.exit(USAGE)
    who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    logging.basicConfig(level=logging.INFO, format=f"{who}%(message)s")
    with main_guard():
        config = parse_args(["--job.config_file", argv[1], *argv[2:]])
    try:
        (plan if argv[0] == "plan" else encode)(config)
    except ValueError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
