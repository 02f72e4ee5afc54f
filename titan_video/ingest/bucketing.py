"""Which training size a clip goes to, the resize and crop that take it there, and which clips a file gives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from titan_video.data.batching import Bucket


@dataclass(frozen=True)
class ClipChoice:
    """Which clips a file gives: from its head, chunks one after the other, overlapping ones every `stride` frames,
    `count` of them evenly spread, or its full length."""

    mode: str = "head"
    count: int = 1
    stride: int = 1


def starts(num_frames: int, clip_frames: int, choice: ClipChoice) -> list[int]:
    """First frames, of `num_frames` after resampling, of a file's clips; at least one, none twice."""
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
    """The bucket for a clip of `num_frames` after resampling: the most frames it can fill, then the nearest aspect
    ratio (as a ratio: twice as wide is as far as half as wide), then the larger area. None if it fills no bucket.

    whole: only sizes come from the buckets, frames are the clip's, cut to 4k+1 and to the most that any bucket has.
    """
    if whole and buckets:
        frames = min((num_frames - 1) // 4 * 4 + 1, max(b[0] for b in buckets))
        num_frames, buckets = (
            frames,
            sorted({(frames, b[1], b[2]) for b in buckets} if frames >= min(b[0] for b in buckets) else buckets),
        )
    fitting = [b for b in buckets if b[0] <= num_frames]
    if not fitting:
        return None

    def order(bucket: Bucket):
        frames, h, w = bucket
        stretch = abs(math.log(width / height) - math.log(w / h))
        return -frames, round(stretch, 6), -h * w, bucket

    return min(fitting, key=order)


def cover(width: int, height: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """(width, height, left, top):

    resize to this size, which keeps the aspect ratio and covers the bucket; crop from this corner.
    """
    _, h, w = bucket
    scale = max(w / width, h / height)
    new_width, new_height = max(w, round(width * scale)), max(h, round(height * scale))
    return new_width, new_height, (new_width - w) // 2, (new_height - h) // 2


def is_upscaled(width: int, height: int, bucket: Bucket) -> bool:
    return width < bucket[2] or height < bucket[1]
