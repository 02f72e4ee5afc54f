"""Which bucket a clip goes to, how it is resized and cropped, and which clips are taken from a file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_video.config.job_config import Data, JobConfig, Training
from titan_video.config.values import nearest_multiples
from titan_video.data.batching import Bucket
from titan_video.models import get_args, get_spec
from titan_video.models.spec import LatentGeometry

DEFAULT_GEOMETRY = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=8)
DEFAULT_PATCH = (1, 2, 2)
SPATIAL_MULTIPLE = DEFAULT_GEOMETRY.spatial_stride * DEFAULT_PATCH[1]


@dataclass(frozen=True)
class ClipChoice:
    """Which clips are taken from a file (data.frame_extraction).

    mode: "head", the first frames; "chunk", one clip after the other; "slide", a clip every `stride` frames; "uniform",
    `count` clips evenly spread; "full", the whole length, cut to k temporal strides of the VAE plus one frame.
    """

    mode: str = "head"
    count: int = 1
    stride: int = 1
    temporal_stride: int = DEFAULT_GEOMETRY.temporal_stride


def whole_latents(num_frames: int, temporal_stride: int) -> int:
    """The most of `num_frames` frames that fill whole latent frames: k temporal strides and the first frame."""
    return max(1, (num_frames - 1) // temporal_stride * temporal_stride + 1)


HEAD = ClipChoice()


def starts(num_frames: int, clip_frames: int, choice: ClipChoice) -> list[int]:
    """The first frame of each clip of a file with `num_frames` frames after resampling: at least one, none twice."""
    last = num_frames - clip_frames
    if choice.mode == "chunk":
        return list(range(0, last + 1, clip_frames))
    if choice.mode == "slide":
        return list(range(0, last + 1, choice.stride))
    if choice.mode == "uniform":
        count = choice.count
        return sorted(
            {round(last * (i + 0.5) / count) if count == 1 else round(last * i / (count - 1)) for i in range(count)}
        )
    return [0]


def choose(
    num_frames: int, width: int, height: int, buckets: Sequence[Bucket], choice: ClipChoice = HEAD
) -> Bucket | None:
    """The bucket for a clip of `num_frames` frames after resampling: the most frames that it can fill, then the nearest
    aspect ratio (by logarithm: twice as wide is as far as half as wide), then the larger area. None: it fills none.

    choice: with mode "full" the buckets give only sizes; the frames are the clip's, cut to whole latents and to the
        most that any bucket has.
    """
    if choice.mode == "full" and buckets:
        frames = min(whole_latents(num_frames, choice.temporal_stride), max(b[0] for b in buckets))
        num_frames = frames
        if frames >= min(b[0] for b in buckets):
            buckets = sorted({(frames, b[1], b[2]) for b in buckets})
    fitting = [b for b in buckets if b[0] <= num_frames]
    if not fitting:
        return None

    def order(bucket: Bucket):
        frames, h, w = bucket
        stretch = abs(math.log(width / height) - math.log(w / h))
        return -frames, round(stretch, 6), -h * w, bucket

    return min(fitting, key=order)


def too_short(
    num_frames: int,
    fps: float,
    buckets: Sequence[Bucket],
    chosen: Bucket | None,
    choice: ClipChoice,
    may_be_still: bool,
) -> str:
    """Why a clip of `num_frames` frames at `fps` is not trained on, or "". chosen: its bucket.

    may_be_still: it may fall to a bucket of one frame though there are longer ones.
    """
    count = f"{num_frames} frame{'s' * (num_frames != 1)} at {fps:g} fps"
    if chosen is None:
        fix = "; a bucket of one frame would take it" if may_be_still else ""
        return f"too short: {count}, the shortest bucket takes {min(b[0] for b in buckets)}{fix}"
    longer = [b[0] for b in buckets if b[0] > 1]
    if chosen[0] > 1 or not longer or may_be_still:
        return ""
    needed = choice.temporal_stride + 1 if choice.mode == "full" else min(longer)
    return (
        f"would be a still: {count}, the shortest bucket of more than one frame takes {needed}; add a shorter bucket, "
        f"or set data.video_as_image = true"
    )


def cover(width: int, height: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """(width, height, left, top): resize to width x height, which keeps the aspect ratio and covers the bucket, then
    crop from this corner.
    """
    _, h, w = bucket
    scale = max(w / width, h / height)
    new_width, new_height = max(w, round(width * scale)), max(h, round(height * scale))
    return new_width, new_height, (new_width - w) // 2, (new_height - h) // 2


def share_kept(width: int, height: int, bucket: Bucket) -> float:
    """Of the pixels of a frame, those that the crop leaves."""
    resized_width, resized_height, _, _ = cover(width, height, bucket)
    return bucket[1] * bucket[2] / (resized_width * resized_height)


def is_upscaled(width: int, height: int, bucket: Bucket) -> bool:
    return width < bucket[2] or height < bucket[1]


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about the sizes that clips are brought to and the passes over them, one line per
    mistake.
    """
    t = config.training
    if t.epochs and t.steps != Training.steps:
        yield (
            f"training.epochs: given {t.epochs}, and training.steps {t.steps} too; remove one of them "
            f"(--training.steps {Training.steps}, the default, takes back what a TOML says)"
        )
    geometry, patch = _geometry(config)
    yield from _bucket_rules(config.data, geometry, patch)
    for name in ("hdr", "bt709_lines", "video_as_image"):
        value = getattr(config.data, name)
        if config.data.media_rules == 1 and value != getattr(Data, name):
            yield f"data.{name}: given {value!r}, without effect under data.media_rules = 1; set that to 2, or leave it"


def _geometry(config: JobConfig) -> tuple[LatentGeometry, tuple[int, int, int]]:
    """The model's latent space and patch; the defaults where its arguments cannot be resolved."""
    model = config.model
    try:
        spec = get_spec(model.name)
        args = get_args(spec, model.flavor, model.hf_assets_path, config.encoder.max_text_length)
        return spec.geometry(args), args.patch
    except (ValueError, OSError):  # other rules, or the program itself, name the mistake
        return DEFAULT_GEOMETRY, DEFAULT_PATCH


def _bucket_rules(data: Data, geometry: LatentGeometry, patch: tuple[int, int, int]) -> Iterator[str]:
    if not data.buckets and not data.resolutions:
        yield (
            "data.buckets: empty; give at least one [frames, height, width], such as [[81, 480, 832]], or derive "
            "them with data.resolutions"
        )
    if data.buckets and data.resolutions:
        yield (
            f"data.resolutions: given {list(data.resolutions)}, which derives the buckets, but data.buckets lists "
            f"them; set buckets to [], or leave this []"
        )
    if data.min_ar > data.max_ar:
        yield f"data.min_ar: given {data.min_ar}; legal: at most data.max_ar, which is {data.max_ar}"
    if data.resolutions and not data.frame_buckets:
        yield "data.frame_buckets: empty; give at least one number of frames, such as [81]"
    stride = geometry.temporal_stride
    for frames in data.frame_buckets:
        if (frames - 1) % stride:
            nearest = nearest_multiples(frames, stride, 1)
            yield f"data.frame_buckets: given {frames}; legal: {stride}k+1; nearest: {nearest}"
    seen = set()
    for i, bucket in enumerate(data.buckets):
        where = f"data.buckets: item {i}, {list(bucket)}"
        if bucket in seen:
            yield f"{where}, appears twice; remove one"
        seen.add(bucket)
        yield from (f"{where}: {problem}" for problem in bucket_errors(bucket, geometry, patch))


def bucket_errors(
    bucket: tuple[int, ...], geometry: LatentGeometry = DEFAULT_GEOMETRY, patch: tuple[int, int, int] = DEFAULT_PATCH
) -> Iterator[str]:
    """What is wrong with a size [frames, height, width] for a model of this latent space and patch."""
    if len(bucket) != 3:
        yield f"it has {len(bucket)} numbers; legal: [frames, height, width]"
        return
    stride = geometry.temporal_stride
    if (bucket[0] - 1) % stride:
        yield f"frames must be {stride}k+1; nearest: {nearest_multiples(bucket[0], stride, 1)}"
    for side, size, side_patch in zip(("height", "width"), bucket[1:], patch[1:], strict=True):
        multiple = geometry.spatial_stride * side_patch
        if size % multiple:
            yield f"{side} must be a multiple of {multiple}; nearest: {nearest_multiples(size, multiple)}"
