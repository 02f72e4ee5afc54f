"""What [validation] leaves to the model: shift, guidance and negative prompt as in the models' own code.

Families that are not here have the values of `SamplingDefaults`.
"""

from dataclasses import dataclass, replace
from typing import Any

from titan_video.config.job_config import JobConfig, Validation

OFFICIAL = "official"  # validation.negative_prompt
MAX_480P = 600_000  # pixels of a frame: 480 x 832 is sampled with a smaller shift than 720 x 1280
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NO_SHAKING, NO_CUT = "镜头晃动，", "镜头切换，"  # of the camera, before the others
HUNYUAN_NEGATIVE = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)
HUNYUAN_I2V_NEGATIVE = "deformation, a poor composition and deformed video, bad teeth, bad eyes, bad limbs"


@dataclass(frozen=True)
class SamplingDefaults:
    """shift: of the schedule. guidance_scale: classifier-free, 1: none; low: of the expert for low noise.
    negative_prompt: what guidance moves away from.
    """

    shift: float = 3.0
    guidance_scale: float = 5.0
    low_guidance_scale: float = 5.0
    negative_prompt: str = ""


def wan(args: Any, size: tuple[int, ...]) -> SamplingDefaults:
    """generate.py and wan/configs of Wan-Video/Wan2.1 and Wan2.2. Text-to-video at 480p as diffusers advises: the code
    has 5 for every size, its README 8 to 12 for 1.3B.
    """
    negative, has_images = WAN_NEGATIVE, args.in_channels > args.out_channels
    if args.image_len:  # Wan 2.1
        negative = (NO_CUT if args.image_positions else "") + NO_SHAKING + negative
    if args.boundary or (has_images and not args.image_len):  # A14B
        shift, high, low = (5.0, 3.5, 3.5) if has_images else (12.0, 4.0, 3.0)
        return SamplingDefaults(shift, high, low, negative)
    if args.image_positions:  # first and last frame
        return SamplingDefaults(shift=16.0, negative_prompt=negative)
    is_small = size[1] * size[2] <= MAX_480P and args.out_channels == 16  # TI2V-5B has 48
    return SamplingDefaults(shift=3.0 if is_small else 5.0, negative_prompt=negative)


def hunyuan_video(args: Any, size: tuple[int, ...]) -> SamplingDefaults:
    """hyvideo/config.py and constants.py of Tencent-Hunyuan/HunyuanVideo and HunyuanVideo-I2V. The models have learned
    guidance; the negative prompt is for runs that set a classifier-free one nevertheless.
    """
    negative = HUNYUAN_I2V_NEGATIVE if args.image_condition else HUNYUAN_NEGATIVE
    return SamplingDefaults(shift=7.0, guidance_scale=1.0, low_guidance_scale=1.0, negative_prompt=negative)


FAMILIES = {"wan": wan, "hunyuan_video": hunyuan_video}


def sampling_defaults(config: JobConfig, args: Any, size: tuple[int, ...]) -> SamplingDefaults:
    """Of the model of a run. args: the model's. size: [frames, height, width] of the clips in pixels.

    The debug encoders know no language: with them the negative prompt is empty.
    """
    family = FAMILIES.get(config.model.name)
    own = family(args, size) if family else SamplingDefaults()
    return replace(own, negative_prompt="") if config.encoder.name.startswith("debug") else own


def sampling_section(config: JobConfig, args: Any, size: tuple[int, ...]) -> Validation:
    """[validation] with the model's own values where it leaves them to the model. Arguments: see sampling_defaults.

    Without guidance the negative prompt is empty, as it is not used.
    """
    v, own = config.validation, sampling_defaults(config, args, size)
    scale = v.guidance_scale or (own.low_guidance_scale if config.model.expert == "low" else own.guidance_scale)
    negative = own.negative_prompt if v.negative_prompt == OFFICIAL else v.negative_prompt
    return replace(
        v,
        guidance_scale=scale,
        negative_prompt=negative if scale != 1 else "",
        sample_shift=v.sample_shift or own.shift,
    )
