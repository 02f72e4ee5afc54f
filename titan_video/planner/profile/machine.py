"""Measures the machine that it runs on, for the planner; writes a cluster TOML (planner/cluster.py).

    torchrun --nproc_per_node N -m titan_video.planner.profile --out FILE.toml [--config CONFIG.toml] [--seconds 0.2]

It runs on GPUs with NCCL, on CPUs with gloo, and alone, without torchrun. Rates are those of all ranks at once, as
training has them: where ranks share cores, a file holds for as many ranks as it was made with. Shapes of products and
attention are those of the configuration's model at its largest bucket. What is not measured has its default and is
named at the top of the file: the encoders' rates, and the network where all ranks are on one node.
"""

import argparse
import math
import os
import platform
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed as dist
from torch import nn

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import load, main_guard
from titan_video.distributed.utils import init_distributed
from titan_video.models import get_args, get_spec
from titan_video.models.layers import token_shape
from titan_video.planner import cluster
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.profile import compute, links
from titan_video.planner.profile.links import KINDS
from titan_video.planner.profile.model import Cut, ModelProfile, cut
from titan_video.planner.profile.pipeline import pipeline_slowdown
from titan_video.planner.profile.stopwatch import Stopwatch
from titan_video.tools.device import get_device, peak_flops
from titan_video.tools.files import atomic_write

STEPS = 25  # times the budget of a single figure, for those of the model: a step is much longer than an operator
NUM_LENGTHS, SHORTEST = 4, 64  # of attention: each half of the one before, down to so many tokens


class Profile:
    """One measurement of this machine. seconds: budget of each single figure. largest: bytes of the largest message.

    part: of the model, where the host computes; None on GPUs. See `cut_of`.
    """

    def __init__(self, config: JobConfig, device: torch.device, seconds: float, largest: int, part: Cut | None):
        self.config, self.device, self.largest, self.part = config, device, largest, part
        self.watch = Stopwatch(device, seconds)
        self.world_size = dist.get_world_size()
        self.per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.dtype = getattr(torch, config.training.mixed_precision_param)
        self.spec = get_spec(config.model.name)
        assets, length = config.model.hf_assets_path, config.encoder.max_text_length
        self.args = get_args(self.spec, config.model.flavor, assets, length)
        shape = self.spec.geometry(self.args).latent_shape
        lengths = [token_shape(shape(b)[1:], self.args.patch).num_tokens for b in config.data.sizes]
        self.tokens = max(lengths)
        self.groups = links.build_groups(self.world_size, self.per_node)

    def run(self) -> dict[str, Any]:
        """The tables of a cluster TOML, the same on every rank."""
        compute.measure_sharing(self.watch, (256, 256, 256), self.dtype)
        samples, peak = self._products()
        tables = self._attention(peak)
        messages = self._messages()
        gpu, efficiency = self._gpu(peak, samples, tables, messages)
        name = f"{self.world_size} x {gpu['name']}, measured"
        found = {"name": name, "gpus": self.world_size, "gpus_per_node": self.per_node, "gpu": gpu}
        found |= {"efficiency": efficiency, "links": self._links(messages), "host": self._host()}
        found |= {"product": samples, "attention": tables} | messages
        if self.part is not None:
            self._add_model(self.part, found, peak)
        return found

    def _add_model(self, part: Cut, found: dict[str, Any], peak: float) -> None:
        """What only the model shows; see model.py. Each figure is measured with those before it."""
        clips = max(1, self.config.training.local_batch_size // self.world_size)
        watch = Stopwatch(self.device, STEPS * self.watch.budget)
        watch.sharing = self.watch.sharing
        flops = peak * watch.budget
        model = ModelProfile(watch, part, cluster.parse(found, "measured"), clips, self.tokens, flops)
        found["efficiency"]["model"] = model.efficiency(cluster.parse(found, "measured"))
        if not self.groups:
            found["host"]["tensor_us"] = model.alone(cluster.parse(found, "measured"))
            return
        wait, tensor = model.sharded(cluster.parse(found, "measured"))
        found["links"]["unit_wait_us"], found["host"]["tensor_us"] = wait, tensor
        group = max(self.groups, key=lambda g: g.ranks)
        state = clips * self.tokens * self.args.dim * self.dtype.itemsize
        wait = links.wait_seconds(watch, group, min(state, self.largest), self.dtype)
        found["links"]["wait_us"] = wait * 1e6
        here, size = cluster.parse(found, "measured"), min(state, self.largest) // (2 * self.world_size)
        stage, send = model.seconds(here) / (2 * self.world_size), here.send_seconds(size, self.per_node > 1) + wait
        found["links"]["pipeline_slowdown"] = pipeline_slowdown(watch, stage, size, send, self.dtype)

    def _products(self) -> tuple[list[dict[str, Any]], float]:
        """(rows of [[product]], peak FLOP/s: of the data sheet, or on a CPU the best of them)"""
        with torch.device("meta"):
            model = self.spec.build(self.args)
        blocks = nn.ModuleList(next(iter(model.get_submodule(path).values())) for path in self.spec.plan.blocks)
        clips = self.config.training.local_batch_size
        spreads = sorted({1, self.world_size} | {n for n in (2, 4, 8) if self.world_size % n == 0})
        rows = [max(1, clips * self.tokens // n) for n in spreads]
        shapes = compute.product_shapes(blocks, rows, clips * self.args.text_len)
        samples = compute.product_samples(self.watch, shapes, self.dtype)
        best = max(s["tflops"] for s in samples) * 1e12
        peak = peak_flops(self.device) if self.device.type == "cuda" else None
        return samples, max(best, peak or 0.0)

    def _attention(self, peak: float) -> list[dict[str, Any]]:
        lengths = [self.tokens]
        while len(lengths) < NUM_LENGTHS and lengths[-1] // 2 >= SHORTEST:
            lengths.append(lengths[-1] // 2)
        flops = 5 * peak * self.watch.budget
        heads = self.config.training.local_batch_size, self.args.num_heads, self.args.head_dim
        return list(compute.attention_samples(self.watch, lengths, heads, self.dtype, flops))

    def _messages(self) -> dict[str, list[dict[str, Any]]]:
        if self.world_size == 1:
            return {}
        found = {kind: links.collective_samples(self.watch, kind, self.groups, self.largest) for kind in KINDS}
        return found | {"send": links.send_samples(self.watch, self.world_size, self.per_node, self.largest)}

    def _gpu(
        self, peak: float, samples: list[dict], tables: list[dict], messages: dict[str, list[dict]]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """[gpu] and [efficiency]: shares of the peaks that the measured rates have, the median of each table."""
        shape = (self.config.training.local_batch_size * self.tokens, self.args.dim)
        copied = compute.copy_rate(self.watch, shape, self.dtype)
        elementwise = compute.elementwise_rate(self.watch, shape, self.dtype)
        memory = max(copied, elementwise)

        def share(rows: list[dict], name: str) -> float:
            rates = sorted(row[name] for row in rows)
            return min(1.0, rates[len(rates) // 2] * 1e12 / peak) if rates else 0.5

        gpu = {
            "name": device_name(self.device),
            "memory_gib": memory_bytes(self.device, self.per_node) / GIB,
            "peak_tflops": peak / 1e12,
            "hbm_gb_per_s": memory / 1e9,
        }
        efficiency = {
            "product": share(samples, "tflops"),
            "attention_forward": share(tables, "forward_tflops"),
            "attention_backward": share(tables, "backward_tflops"),
            "copy": elementwise / memory,
        }
        return gpu, efficiency

    def _links(self, messages: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
        copy = compute.host_copy_rate(self.watch, self.largest) / 1e9
        if not messages:  # a rank alone sends nothing; the figures only have to be legal
            return {"node_gb_per_s": copy, "network_gb_per_s": copy, "host_gb_per_s": copy}
        near = [row for row in messages["all_gather"] if row["ranks"] <= row["ranks_per_node"]]
        far = [row for row in messages["all_gather"] if row["ranks"] > row["ranks_per_node"]]
        rates = {"node": link_rate(near or far), "network": link_rate(far or near)}
        small = min(row["seconds"] for row in messages["all_gather"])
        group = max(self.groups, key=lambda g: g.ranks)
        return {
            "node_gb_per_s": rates["node"] / 1e9,
            "network_gb_per_s": rates["network"] / 1e9,
            "host_gb_per_s": copy,
            "launch_latency_us": small * 1e6,
            "node_latency_us": 0.0,  # part of the measured launch
            "network_latency_us": 0.0,
            "overlap_slowdown": links.overlap_slowdown(self.watch, group, self.largest, self.dtype),
        }

    def _host(self) -> dict[str, float]:
        operator = compute.operator_seconds(self.watch)
        on_gpu = self.device.type == "cuda"
        found = {"operator_us": operator * 1e6, "synchronous": not on_gpu}
        if on_gpu:
            found["compiled_us"] = compute.compiled_seconds(self.watch) * 1e6
        if on_gpu and self.groups:
            found["collective_us"] = compute.fsdp_seconds(self.watch) * 1e6
        return found | {
            "memory_gib": memory_bytes(torch.device("cpu"), self.per_node) / GIB,
            "memory_gb_per_s": compute.host_memory_rate(self.watch, self.largest) / 1e9,
            "read_gb_per_s": compute.read_rate(self.watch) / 1e9,
        }


def cut_of(config: JobConfig) -> Cut | None:
    """The part of the configuration's model that is measured where the host computes; None of a mixture of experts,
    for which no time is predicted yet. No process group may exist.
    """
    spec, m = get_spec(config.model.name), config.model
    args = get_args(spec, m.flavor, m.hf_assets_path, config.encoder.max_text_length)
    return None if getattr(args, "experts", None) else cut(config, spec, args)


def link_rate(rows: list[dict[str, Any]]) -> float:
    """Bytes per second and rank at the largest message, on the best group."""
    largest = max(row["bytes"] for row in rows)
    return max(
        row["bytes"] * (row["ranks"] - 1) / row["ranks"] / row["seconds"] for row in rows if row["bytes"] == largest
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads a rank"


def memory_bytes(device: torch.device, per_node: int) -> float:
    """Of one rank: all of its GPU, or its share of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node


def header(profile: Profile) -> str:
    """What the numbers do not say, as comments."""
    backend = "NCCL" if profile.device.type == "cuda" else "gloo"
    unmeasured = ["[encoders]", "host.step_us"]
    if profile.part is None:
        unmeasured += ["efficiency.model", "links.wait_us", "links.unit_wait_us", "links.pipeline_slowdown"]
        unmeasured.append("host.tensor_us")
    if profile.device.type == "cpu":
        unmeasured += ["host.compiled_us", "host.collective_us (part of the messages' times)"]
    if profile.world_size <= profile.per_node:
        unmeasured.append("the network between nodes")
    lines = [
        f"Measured by `python -m titan_video.planner.profile`: {profile.world_size} ranks, {backend}, torch "
        f"{torch.__version__}, {str(profile.dtype).removeprefix('torch.')}, model {profile.config.model.name} "
        f"{profile.config.model.flavor}, {profile.tokens} tokens a clip.",
        f"Rates are of all ranks at once: each has a core for 1 / {profile.watch.sharing:.2f} of the time.",
        f"Not measured, so at their defaults: {', '.join(unmeasured)}.",
    ]
    return "".join(f"# {line}\n" for line in lines) + "\n"


def write(profile: Profile, found: dict[str, Any], path: Path) -> None:
    """Check, and write on rank 0."""
    cluster.parse(found, str(path))
    if dist.get_rank() == 0:
        atomic_write(path, header(profile) + tomli_w.dumps(found), "profile")


def main(argv: list[str]) -> None:
    about = "Measure this machine for the planner, under torchrun or alone."
    parser = argparse.ArgumentParser(
        prog="python -m titan_video.planner profile", description=about, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="the cluster TOML to write")
    parser.add_argument("--config", type=Path, help="TOML of the run whose model and sizes are measured")
    parser.add_argument("--seconds", type=float, default=0.2, help="budget of each figure")
    parser.add_argument("--largest", type=int, help="MiB of the largest message; default: 512 on GPUs, 16 on CPUs")
    options = parser.parse_args(argv)
    with main_guard():
        if not 0 < options.seconds < math.inf:
            raise ValueError(f"--seconds: given {options.seconds}; legal: more than 0")
        if options.largest is not None and options.largest < 1:
            raise ValueError(f"--largest: given {options.largest}; legal: at least 1")
        config = load(options.config) if options.config else JobConfig()
        device = get_device(int(os.environ.get("LOCAL_RANK", 0)))
        part = cut_of(config) if device.type == "cpu" else None  # before there are process groups
        init_distributed(device, timeout_seconds=1800)
        try:
            largest = options.largest or (512 if device.type == "cuda" else 16)
            profile = Profile(config, device, options.seconds, largest * 2**20, part)
            write(profile, profile.run(), options.out)
            if dist.get_rank() == 0:
                print(f"saved in {options.out}")
        finally:
            dist.destroy_process_group()
