"""The dry run's peak against torch's own counter of an FSDP2 step, FSDPMemTracker, on five jobs.

    python benchmarks/planner_memtracker.py

Both run the same forward and backward of one micro-batch on fake tensors. torch's counter knows weights, gathered
weights, gradients, their reduction, activations and temporaries. It does not know optimizer state, which the dry run
adds by itself, nor what a kernel of a GPU needs inside an attention backward; both are left out of the comparison.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown
from benchmarks.planner_memory import few_blocks
from titan_video.config.job_config import JobConfig
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models import get_args, get_spec
from titan_video.planner.dry_run import fake
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.dry_run.run import RankStep, dry_run, get_step_size
from titan_video.planner.dry_run.step_tracker import StepTracker

FLAVOR = "planner-memtracker"


@dataclass(frozen=True)
class Job:
    """blocks: of each type. options: {section: {field: value}}."""

    family: str
    flavor: str
    ranks: int
    bucket: tuple[int, int, int]
    options: dict
    blocks: int = 4

    @property
    def config(self) -> JobConfig:
        spec, config = get_spec(self.family), JobConfig()
        args = spec.flavors[self.flavor]
        spec.flavors[FLAVOR] = few_blocks(args, self.blocks)
        config = replace(
            config,
            model=replace(config.model, name=self.family, flavor=FLAVOR),
            encoder=replace(config.encoder, max_text_length=512 if self.family == "wan" else 256),
            data=replace(config.data, buckets=(self.bucket,)),
        )
        for section, values in self.options.items():
            config = replace(config, **{section: replace(getattr(config, section), **values)})
        return config

    def __str__(self) -> str:
        values = [f"{name} {value}" for section in self.options.values() for name, value in section.items()]
        return f"{self.flavor}, {self.blocks} blocks, {self.ranks} ranks, {', '.join(values) or 'FSDP'}"


FULL = {"activation_checkpoint": {"mode": "full"}}
JOBS = (
    Job("wan", "t2v-14B", 64, (81, 480, 832), {"parallelism": {"context_parallel_degree": 4}}),
    Job("wan", "t2v-14B", 64, (81, 480, 832), {**FULL, "parallelism": {"context_parallel_degree": 4}}),
    Job(
        "wan",
        "t2v-14B",
        64,
        (81, 480, 832),
        {
            "activation_checkpoint": {"mode": "selective", "save": ("attention",)},
            "parallelism": {"context_parallel_degree": 4, "data_parallel_replicate_degree": 4},
        },
    ),
    Job("wan", "t2v-1.3B", 8, (33, 480, 832), {**FULL, "parallelism": {"fsdp_reshard_after_forward": "never"}}, 8),
    Job("wan", "ti2v-5B", 8, (81, 480, 832), FULL),
)


def by_torch(job: Job) -> int:
    """Bytes at the peak by FSDPMemTracker."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    config = job.config
    spec = get_spec(config.model.name)
    args = get_args(spec, FLAVOR, "", config.encoder.max_text_length)
    dims = ParallelDims.of(config.parallelism, job.ranks)
    size = get_step_size(config, spec, args, dims)
    with fake.fake_ranks(job.ranks, 0):
        step = RankStep(config, spec, args, dims.build_mesh("cpu"), size)
        with FakeTensorMode(allow_non_fake_inputs=True), fake.gpu_operators(config.model.kernels):
            step.model.to_empty(device="cpu")
            latent = spec.geometry(args).latent_shape(size.bucket)
            batch = fake.empty_batch(args, latent, size.num_clips, torch.bfloat16)
            inputs = step.prepare(batch)
            tracker = FSDPMemTracker(step.model)
            tracker.track_inputs((*batch.streams.values(), batch.text_BLD, inputs.target_BLP, inputs.kwargs["x_BLP"]))
            with tracker:
                prediction = step.model(**inputs.kwargs)
                loss = step.task.loss(prediction, inputs).sum() / step.task.num_loss_elements(batch)
                del prediction
                loss.backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


def by_dry_run(job: Job) -> int:
    """Without optimizer state and the workspace of a GPU's attention."""
    with patch.object(StepTracker, "add_workspace", lambda self, size: None):
        report = dry_run(job.config, job.ranks)
    return report.total - report.at_peak.get("optimizer", 0)


def rows() -> list[list[str]]:
    found = []
    for job in JOBS:
        ours, theirs = by_dry_run(job), by_torch(job)
        found.append([str(job), f"{ours / GIB:.3f}", f"{theirs / GIB:.3f}", f"{ours / theirs - 1:+.1%}"])
        print(found[-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    print(markdown(["job", "dry run, GiB", "FSDPMemTracker, GiB", "difference"], rows()))
