"""Weights & Biases: the scalars that TensorBoard gets, under the same names. `pip install wandb`; `wandb login`.

[metrics] enable_wandb

The project is WANDB_PROJECT, or `titan_video`; the package reads its other variables itself (WANDB_ENTITY, WANDB_NAME,
WANDB_MODE=offline, ...). A run that resumes from a checkpoint keeps its id, from the file `wandb_run_id` in
job.dump_folder. The service keeps what it has of the steps that such a run repeats.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import read_file
from titan_video.tools.files import atomic_write
from titan_video.tools.parts import find_module

RUN_ID = "wandb_run_id"


class WandbSink:
    """Used like tensorboard_sink.TensorboardSink.

    folder: the run's; the package writes its own files in `wandb` there. is_resumed: continue the run of that folder.
    ValueError: the service does not let the run start, for example without a login.
    """

    def __init__(self, folder: Path, is_resumed: bool):
        import wandb

        path, config = folder / RUN_ID, folder / "config.toml"
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "titan_video"),
                dir=str(folder),
                config=read_file(config) if config.exists() else None,
                id=path.read_text() if is_resumed and path.exists() else None,
                resume="allow",
            )
        except wandb.Error as e:
            raise ValueError(f"metrics.enable_wandb: {e}; run `wandb login`, or set WANDB_MODE=offline") from e
        atomic_write(path, self.run.id)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Steps must not decrease. The package gathers the scalars of a step and sends them with the next one."""
        self.run.log({name: value}, step=step)

    def add_table(self, name: str, numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            self.add_scalar(f"{name}/{key}", value, step)

    def add_clip(self, tag: str, frames_FHWC: np.ndarray, fps: float, step: int) -> None:
        """Nothing: clips stay here."""

    def close(self) -> None:
        self.run.finish()


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about Weights & Biases, one line per mistake."""
    spec = find_module("wandb")
    if spec is None or spec.origin is None:  # without origin: a folder of that name, as the package itself makes them
        yield "metrics.enable_wandb: needs the package wandb; pip install wandb"
