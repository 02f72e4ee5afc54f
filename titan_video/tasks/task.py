"""The contract between the trainer and what a step trains on.

    batch -- prepare --> inputs -- model(**inputs.kwargs) --> prediction -- loss --> [B]
    loss of the step = sum of these / num_loss_elements of all ranks

The trainer knows nothing of the objective: gradient accumulation, pipelines, validation and the log call these methods.
Denoising (denoising.py) is the default; another task trains under the same loop, parallelism and checkpoints.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from titan_video.data.batch import Batch


@dataclass(frozen=True)
class ModelInputs:
    """One forward of one micro-batch on this rank. A task's own class adds what its loss needs.

    kwargs: arguments of the model, on the device: this rank's tokens, positions, times, text, StepLayout, conditioning.
    """

    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BatchInfo:
    """What a micro-batch is, for the log.

    num_tokens, num_frames: tokens and pixel frames of one clip. flops: of a forward of all its clips, on all ranks that
    share them. label: the clips' size, such as "81x480x832".
    """

    num_clips: int
    num_tokens: int
    num_frames: int
    flops: float
    label: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: numbers by name, and clips that were sampled into `folder`.

    clips: (prompt, uint8 frames [F, H, W, 3]), on rank 0.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    clips: list[tuple[str, Tensor]] = field(default_factory=list)
    folder: str = ""


class Task(Protocol):
    """What a step trains on."""

    def prepare(self, batch: Batch) -> ModelInputs:
        """A micro-batch, from the host, as the model takes it, on the device.

        All randomness is a function of (seed, sample ids), so that every layout of ranks draws the same.
        """

    def loss(self, prediction: Tensor, inputs: ModelInputs) -> Tensor:
        """The loss of each sample, summed over the elements that this rank has of it: [B], float32."""

    def num_loss_elements(self, batch: Batch) -> int:
        """Elements of a micro-batch that count in the loss, on all ranks that share it: the loss is divided by them."""

    def describe(self, batch: Batch) -> BatchInfo:
        """What a micro-batch is, for the log."""

    def evaluate(self, step: int) -> Evaluation:
        """Measure the model as it is. All ranks call it together."""
