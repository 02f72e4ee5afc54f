"""Which training size a clip goes to, and the resize and crop that take it there."""

import math
from collections.abc import Sequence

Bucket = tuple[int, int, int]  # frames (4k+1), height, width


def choose(num_frames: int, width: int, height: int, buckets: Sequence[Bucket]) -> Bucket | None:
    """The bucket for a clip of `num_frames` after resampling: the most frames it can fill, then the nearest aspect ratio
    (as a ratio: twice as wide is as far as half as wide), then the larger area. None if it fills no bucket."""
    fitting = [b for b in buckets if b[0] <= num_frames]
    if not fitting:
        return None

    def order(bucket: Bucket):
        frames, h, w = bucket
        stretch = abs(math.log(width / height) - math.log(w / h))
        return -frames, round(stretch, 6), -h * w, bucket

    return min(fitting, key=order)


def cover(width: int, height: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """(width, height, left, top): resize to this size, which keeps the aspect ratio and covers the bucket; crop from this corner."""
    _, h, w = bucket
    scale = max(w / width, h / height)
    new_width, new_height = max(w, round(width * scale)), max(h, round(height * scale))
    return new_width, new_height, (new_width - w) // 2, (new_height - h) // 2


def is_upscaled(width: int, height: int, bucket: Bucket) -> bool:
    return width < bucket[2] or height < bucket[1]
