"""What the model itself takes where the host computes (CPUs), and what its parts alone do not show. For machine.py.

Products, attention and collectives of a table run hot and one after the other. A step's operators find their inputs out
of the cache and their outputs' memory not mapped yet, ranks reach a collective at different moments, and FSDP copies
what it sends. So forward, backward and update of a cut of the model run as a trainer runs them, and what the cost model
does not explain by the tables becomes the machine's:

    efficiency.model      of one rank: what products, attention and launches leave, for the bytes of all else
    links.unit_wait_us    sharded over all ranks: what is beyond one rank's computing and FSDP's messages, for each
    host.tensor_us        clipping and update of the shards: what is beyond their bytes, for each weight

The cut has as many blocks as MAX_WEIGHTS allows, and clips of a data-parallel rank, fewer and shorter where the budget
is exceeded.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_video import kernels
from titan_video.config.job_config import JobConfig
from titan_video.distributed.fsdp import apply_fsdp
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clip_grad_norm, to_local
from titan_video.flow.matching import FlowMatching
from titan_video.kernels import attention
from titan_video.models.layers import cast_params
from titan_video.models.spec import RankGroup
from titan_video.optim.optimizer import build_optimizer
from titan_video.planner.candidate import Candidate
from titan_video.planner.cluster import Cluster
from titan_video.planner.cost.model import BucketWork, CostModel
from titan_video.planner.dry_run import fake
from titan_video.planner.profile.stopwatch import Stopwatch
from titan_video.planner.trace.tracer import Tracer
from titan_video.planner.trace.traces import BlockTrace, EndsTrace
from titan_video.tasks.denoising import Denoising

MAX_WEIGHTS = 2**28  # of the cut, but for one block of each type
SHORTEST = 64  # tokens
ALONE = RankGroup("", 0, 1)


@dataclass(frozen=True)
class Cut:
    """A part of a model that can run here.

    model: the architecture, on the meta device. traces: of one rank, by which the cost model knows it.
    """

    config: JobConfig
    model: nn.Module
    traces: tuple[dict[str, BlockTrace], EndsTrace]


def cut(config: JobConfig, spec: Any, args: Any) -> Cut:
    """No process group may exist: see trace/tracer.py. The machine is measured with all weights trained, eagerly."""
    usual = JobConfig()
    optimizer = usual.optimizer if "." in config.optimizer.name else config.optimizer  # whose state is not known
    ema = replace(usual.ema, enable=False)
    config = replace(config, lora=usual.lora, compile=usual.compile, float8=usual.float8, optimizer=optimizer, ema=ema)
    tracer = Tracer(config, spec, args)
    traces, model = tracer.trace(1, 1, 1), tracer.model
    for path in spec.plan.blocks:
        container = model.get_submodule(path)
        weights = sum(p.numel() for p in container["0"].parameters())
        for key in list(container)[max(1, MAX_WEIGHTS // (weights * len(spec.plan.blocks))) :]:
            del container[key]
            for params in map(model.get_submodule, spec.plan.per_block_params):
                if key in params:
                    del params[key]
    return Cut(config, model, traces)


class ModelProfile:
    """clips, tokens: of a data-parallel rank. flops: that forward and backward should not exceed."""

    def __init__(self, watch: Stopwatch, part: Cut, cluster: Cluster, clips: int, tokens: int, flops: float):
        self.watch, self.part, self.config, self.tokens = watch, part, part.config, tokens
        cost = self._cost(cluster)
        self.spec, self.args = spec, args = cost.spec, cost.args
        while tokens > SHORTEST and 3 * args.flops(tokens, 1) > flops:
            tokens //= 2
        self.tokens, self.clips = tokens, max(1, min(clips, int(flops / (3 * args.flops(tokens, 1)))))
        t, device = self.config.training, watch.device
        flow = FlowMatching(self.config.flow, t.loss, t.huber_c)
        shard = SequenceShard(ALONE, ring=ALONE, ulysses=ALONE)
        self.task = Denoising(spec, args, flow, shard, device, guidance_scale=t.guidance)
        self.inputs = self._inputs()
        dtype = getattr(torch, t.mixed_precision_param)
        attention.set_backend(self.config.model.attention, device, dtype, args.head_dim)
        kernels.set_backend(kernels.resolve_backend(self.config.model.kernels, device))

    def _cost(self, cluster: Cluster) -> CostModel:
        """Of the cut."""
        cost = CostModel(self.config, cluster)
        cost.tracer.model = cost.sizes.model = self.part.model
        cost.tracer.add(self.part.traces)
        cost.workload = (BucketWork((1, 1, 1), self.tokens, 1.0),)
        return cost

    def _inputs(self) -> Any:
        args, device = self.args, self.watch.device
        f, h, w = args.patch
        channels = self.spec.geometry(args).channels
        latent, text = (channels, f, h, w * self.tokens), getattr(torch, self.config.encoder.dtype)
        batch = fake.empty_batch(args, latent, self.clips, text).to(device)
        for x in (batch.streams["video"], batch.text_BLD, *batch.cond.values()):
            x.normal_()
        batch.text_mask_BL.fill_(True)
        noise = torch.randn_like(batch.streams["video"])
        half = torch.full((self.clips,), 0.5, device=device)
        return self.task.add_noise(batch, noise, sigma_B=half, weight_B=half)

    def _build(self, meshes: Any = None) -> nn.Module:
        """The cut with weights; sharded over `meshes`."""
        t, plan = self.config.training, self.spec.plan
        param, reduce = getattr(torch, t.mixed_precision_param), getattr(torch, t.mixed_precision_reduce)
        model = copy.deepcopy(self.part.model)
        if meshes is None:
            cast_params(model, plan.fp32, param)
        else:
            apply_fsdp(model, plan, meshes, param, reduce, "always")
        model.to_empty(device=self.watch.device)
        with torch.no_grad():
            for p in model.parameters():
                to_local(p).normal_(std=0.02)
        return model

    def _step(self, model: nn.Module) -> Callable[[], None]:
        """Forward and backward of a micro-batch, the first of a step."""
        parameters = list(model.parameters())

        def run() -> None:
            for p in parameters:
                p.grad = None
            self.task.loss(model(**self.inputs.kwargs), self.inputs).sum().backward()

        return run

    def _predicted(self, cluster: Cluster, candidate: Candidate) -> tuple[float, dict[str, float]]:
        """(seconds of a micro-batch, the same by part)"""
        (stage,) = self._cost(cluster).clock.stages(replace(candidate, local_batch_size=self.clips))
        return stage.total, stage.parts

    def efficiency(self, cluster: Cluster) -> float:
        """efficiency.model; at most 1, the bandwidth of a copy. cluster: without it."""
        measured = self.watch.compute_seconds(self._step(self._build()))
        total, parts = self._predicted(cluster, Candidate())
        moving = parts["memory-bound"]
        left = measured - (total - moving)
        return cluster.efficiency.copy * moving / max(left, moving * cluster.efficiency.copy)

    def seconds(self, cluster: Cluster) -> float:
        """Predicted, of forward and backward on one rank."""
        return self._predicted(cluster, Candidate())[0]

    def sharded(self, cluster: Cluster) -> tuple[float, float]:
        """(links.unit_wait_us, host.tensor_us) on all ranks of the default group.

        cluster: with `efficiency`, and without what is measured here.
        """
        candidate = Candidate(dp_shard=dist.get_world_size())
        meshes = ParallelDims(dp_shard=candidate.dp_shard).build_mesh(self.watch.device.type)
        model = self._build(meshes)
        measured, total = self.watch.seconds(self._step(model)), self._predicted(cluster, candidate)[0]
        one = replace(cluster, links=replace(cluster.links, unit_wait_us=1.0))
        each = self._predicted(one, candidate)[0] - total  # seconds of one microsecond for each message
        return max(0.0, (measured - total) / (each * 1e6)) * 1e6, self._tensor_seconds(model, cluster, candidate) * 1e6

    def alone(self, cluster: Cluster) -> float:
        """host.tensor_us on one rank."""
        model = self._build()
        self._step(model)()
        return self._tensor_seconds(model, cluster, Candidate()) * 1e6

    def _tensor_seconds(self, model: nn.Module, cluster: Cluster, candidate: Candidate) -> float:
        t = self.config.training
        optimizer = build_optimizer(model, self.config.optimizer, self.spec.plan.blocks, self.config.debug.seed)
        candidate = replace(candidate, optimizer=self.config.optimizer.name, local_batch_size=self.clips)

        def update() -> None:
            clip_grad_norm(model, t.max_norm)
            optimizer.step()

        def predicted(tensor_us: float) -> float:
            machine = replace(cluster, host=replace(cluster.host, tensor_us=tensor_us))
            return self._cost(machine).clock.fixed(candidate).parts["optimizer"]

        moved = predicted(0.0)
        number = (predicted(1.0) - moved) / 1e-6
        return max(0.0, self.watch.seconds(update) - moved) / number
