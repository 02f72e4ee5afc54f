"""The predicted step of a configuration as it is, for the dry run."""

from dataclasses import replace

from titan_video.config.job_config import JobConfig
from titan_video.planner import cluster
from titan_video.planner.candidate import PARTS, Prediction
from titan_video.planner.plan import Job, as_it_is
from titan_video.planner.search.fastest import Plan


def describe_step(config: JobConfig, world_size: int, cluster_name: str) -> str:
    """Lines: the step on `world_size` GPUs of the cluster, by part, or why there is no prediction.

    ValueError: the cluster's TOML cannot be read.
    """
    machine = cluster.load(cluster_name)
    per_node = min(machine.gpus_per_node, world_size)
    job = Job(config, replace(machine, gpus=world_size, gpus_per_node=per_node))
    try:
        found = as_it_is(job, job.build(config, job.cluster, None))
    except ValueError as e:  # the memory of a dry run is known all the same
        return f"no prediction: {e}"
    if not isinstance(found, Plan):
        return f"predicted on {machine.name}: {found}"
    return "\n".join(step_lines(found.prediction, machine.name))


def step_lines(prediction: Prediction, name: str) -> list[str]:
    total = prediction.step_seconds
    lines = [f"predicted on {name}: {total:.3f} s a step, MFU {prediction.mfu:.1%}"]
    shown = [(part, prediction.seconds.get(part, 0.0)) for part in PARTS]
    return lines + [f"  {part:<18}{seconds:>9.3f} s{seconds / total:>8.1%}" for part, seconds in shown if seconds > 0]
