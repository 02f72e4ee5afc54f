"""[validation]: held-out loss and sampled clips."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt


@dataclass(frozen=True)
class Validation:
    enable: bool = opt(
        False, "Measure the loss of held-out clips and sample clips: at step 0, every freq steps and at the end."
    )
    freq: int = opt(500, "Steps between validations.", ge=1)
    path: str = opt(
        "", "Held-out clips, in any form that data.path accepts. Empty: hold out `holdout` of the training clips."
    )
    holdout: float = opt(
        0.05, "Fraction of the training clips held out if path is empty, chosen by content; at least one.", ge=0, lt=1
    )
    max_clips: int = opt(64, "Maximum number of held-out clips measured.", ge=1)
    timesteps: tuple[float, ...] = opt(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        "Sigmas at which the held-out loss is measured, as fractions of the trained interval. The interval is 0 to 1, "
        "that of the expert, or flow.min_t to flow.max_t.",
        gt=0,
        le=1,
    )
    prompts_path: str = opt(
        "",
        "Text file with one prompt per line. Empty: captions of held-out clips (of training clips if none are held "
        "out). Image-to-video uses those captions with the first frames of their clips.",
    )
    num_videos: int = opt(2, "Clips sampled at each validation; 0: none.", ge=0)
    num_scored: int = opt(0, "Of embedded:shapes: clips sampled and scored at each validation after step 0.", ge=0)
    solver: Literal["euler", "unipc"] = opt("euler", "Solver of the sampler; unipc is that of Wan's own code.")
    sample_steps: int = opt(30, "Steps of the sampler.", ge=1)
    guidance_scale: float = opt(0.0, "Classifier-free guidance; 1: off; 0: that of the model's own code.", ge=0)
    negative_prompt: str = opt(
        "official",
        "What classifier-free guidance moves away from: a text, empty for the empty prompt, or `official`: that of the "
        "model's own code (none with the debug encoders). A run started before the option keeps the empty prompt.",
    )
    embedded_guidance: float = opt(
        6.0,
        "Guidance scale that models with a guidance input receive in sampling. Set guidance_scale to 1 for these.",
        gt=0,
    )
    sample_shift: float = opt(0.0, "Time shift of the sampler's schedule; 0: that of the model's own code.", ge=0)
    use_ema: bool = opt(True, "Use the EMA weights if ema.enable is true.")
