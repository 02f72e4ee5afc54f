"""How fast the planner searches: candidates and seconds on 1,024 GPUs.

    python benchmarks/planner_search.py [--config wan2.1_t2v_14b_720p_64gpu] [--flavor moe-14B-shared] [--gpus 1024]
                                        [--rounds 5] [--json FILE]

A round plans the job anew: every layout's bound, and the best ones exactly. Tracing the model's blocks, which depends
on neither cluster nor batch, is timed apart. One process on one core; seconds are those of that core.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video.config.manager import load
from titan_video.planner import cluster
from titan_video.planner.cost.model import CostModel
from titan_video.planner.plan import Job, make_own_plan

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(description="Candidates and seconds of the planner's search.", allow_abbrev=False)
    parser.add_argument("--config", default="wan2.1_t2v_14b_720p_64gpu", help="TOML in train_configs, without .toml")
    parser.add_argument("--flavor", default="", help="instead of the TOML's, of the same family")
    parser.add_argument("--cluster", default="h100x512", help="TOML in train_configs/clusters, without .toml")
    parser.add_argument("--gpus", type=int, default=1024)
    parser.add_argument("--clips", type=int, default=128, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    config = load(ROOT / "train_configs" / f"{options.config}.toml")
    config = replace(config, training=replace(config.training, global_batch_size=options.clips))
    if options.flavor:
        model, eager = replace(config.model, flavor=options.flavor), replace(config.compile, enable=False)
        config = replace(config, model=model, compile=eager)  # divided experts are not compiled
    machine = cluster.load(ROOT / "train_configs" / "clusters" / f"{options.cluster}.toml")
    job = Job(config, replace(machine, gpus=options.gpus))
    start, traced = time.process_time(), CostModel(config, job.cluster)
    planned = make_own_plan(job, traced)
    first = time.process_time() - start
    seconds = []
    for _ in range(options.rounds):
        model = CostModel(config, job.cluster)
        model.tracer, model.sizes = traced.tracer, traced.sizes
        start = time.process_time()
        planned = make_own_plan(job, model)
        seconds.append(time.process_time() - start)
    result = planned.result
    figures = {
        "candidates": result.num_candidates,
        "solved exactly": len(result.plans),
        "seconds": sorted(seconds),
        "first, with tracing": first,
        "step": result.chosen.seconds if result.chosen else None,
    }
    middle, flavor = sorted(seconds)[len(seconds) // 2], f" as {options.flavor}" if options.flavor else ""
    print(
        f"{options.config}{flavor} on {options.gpus} GPUs, {options.clips} clips a step: "
        f"{result.num_candidates:,} candidates, {len(result.plans)} solved exactly, in {min(seconds):.2f} s "
        f"(median {middle:.2f}); the first search, with tracing, {first:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
