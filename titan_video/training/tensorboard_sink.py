"""TensorBoard: scalars under torchtitan's tag names, the resolved TOML and tables as text, options as hyperparameters,
sampled clips as animated images.

The page sorts groups of charts by name, and a group is what precedes the first slash of a tag. So no other slash is in
a tag, and the two losses that one looks at first are written once more in a group whose capital letter comes first.
"""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import load
from titan_video.tools.files import writing
from titan_video.tools.video import write_gif_bytes

FIRST = {"loss_metrics/global_avg_loss": "Loss/training", "validation/loss": "Loss/held_out"}
METRICS = ("loss_metrics/global_avg_loss", "validation/loss")  # beside the hyperparameters
MAX_TITLE = 80


class TensorboardSink:
    """The run's event file. folder: the run's, with config.toml. first_step: points of an earlier run from there on are
    hidden.
    """

    def __init__(self, folder: Path, tb_folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Its thread prints what the next `add_scalar` raises, where it is a warning.
        threading.excepthook = lambda a: "board" in type(a.thread).__module__ or threading.__excepthook__(a)
        with writing("TensorBoard events", tb_folder):
            self.writer = SummaryWriter(str(tb_folder), purge_step=first_step, flush_secs=10)
        self.session_end, path = None, folder / "config.toml"
        if path.exists():
            self.writer.add_text("config", f"```toml\n{path.read_text(encoding='utf-8')}\n```", first_step)
            self._add_hparams(changed_options(load(path)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)
        if name in FIRST:
            self.writer.add_scalar(FIRST[name], value, step)

    def add_table(self, name: str, numbers: dict[str, float], step: int) -> None:
        """Numbers of one moment, for which a chart would have a single point."""
        texts = {key.replace("|", "/"): f"{v:,}" if isinstance(v, int) else f"{v:,.6g}" for key, v in numbers.items()}
        rows = "".join(f"| {key} | {text} |\n" for key, text in texts.items())
        self.writer.add_text(name, f"| {name} | |\n|---|---:|\n{rows}", step)

    def add_clip(self, tag: str, frames_FHWC: np.ndarray, fps: float, step: int) -> None:
        """A clip, uint8 RGB, as an animated image: SummaryWriter.add_video needs an old version of moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, height, width, _ = frames_FHWC.shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=write_gif_bytes(frames_FHWC, fps)
        )
        title = " ".join(tag.split())
        title = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 3]}..."
        value = Summary.Value(tag=title, image=image)
        self.writer._get_file_writer().add_summary(Summary(value=[value]), step)
        self.writer.flush()

    def close(self) -> None:
        if self.session_end:
            self.writer._get_file_writer().add_summary(self.session_end)
        self.writer.close()

    def _add_hparams(self, options: dict[str, Any]) -> None:
        """As SummaryWriter.add_hparams, which would make a second run folder."""
        from torch.utils.tensorboard.summary import hparams

        experiment, start, self.session_end = hparams(options, dict.fromkeys(METRICS, 0.0))
        self.writer._get_file_writer().add_summary(experiment)
        self.writer._get_file_writer().add_summary(start)


def changed_options(config: JobConfig) -> dict[str, Any]:
    """{section.field: value} of the options that are not at their defaults, without [job]. Lists are text."""
    found, defaults = {}, asdict(JobConfig())
    for section, values in asdict(config).items():
        for name, value in values.items():
            if section != "job" and value != defaults[section][name]:
                found[f"{section}.{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
