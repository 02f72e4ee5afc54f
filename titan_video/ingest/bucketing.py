"""Which bucket a clip goes to, how it is resized and cropped, and which clips are taken from a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from titan_video.data.batching import Bucket


@dataclass(frozen=True)
class ClipChoice:
    """Which clips are taken from a file (data.frame_extraction).

    mode: "head", the first frames; "chunk", one clip after the other; "slide", a clip every `stride` frames; "uniform",
    `count` clips evenly spread; "full", the whole length.
    """

    mode: str = "head"
    count: int = 1
    stride: int = 1


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


def choose(num_frames: int, width: int, height: int, buckets: Sequence[Bucket], whole: bool = False) -> Bucket | None:
    """The bucket for a clip of `num_frames` frames after resampling: the most frames that it can fill, then the nearest
    aspect ratio (by logarithm: twice as wide is as far as half as wide), then the larger area. None: it fills none.

    whole: the buckets give only sizes; the frames are the clip's, cut to 4k+1 and to the most that any bucket has.
    """
    if whole and buckets:
        frames = min((num_frames - 1) // 4 * 4 + 1, max(b[0] for b in buckets))
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


def cover(width: int, height: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """(width, height, left, top): resize to width x height, which keeps the aspect ratio and covers the bucket, then
    crop from this corner.
    """
    _, h, w = bucket
    scale = max(w / width, h / height)
    new_width, new_height = max(w, round(width * scale)), max(h, round(height * scale))
    return new_width, new_height, (new_width - w) // 2, (new_height - h) // 2


def is_upscaled(width: int, height: int, bucket: Bucket) -> bool:
    return width < bucket[2] or height < bucket[1]
