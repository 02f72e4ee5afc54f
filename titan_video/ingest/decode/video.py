"""Reading video: what is in a file (`probe`), which of its frames a clip takes (`frame_indices`), and those frames
(`decode`).

A frame is named by its presentation time in ticks of the stream's time base. So the plan, which only reads packets,
and the decoder mean the same frame, whatever the codec's order or delay. Images, folders of images, and videos that are
not opened because their metadata is trusted, name frames by number. Files may come from anywhere (media.py), so every
way in which one can be broken becomes an `UnusableClip` with its reason.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.ingest.bucketing import cover
from titan_video.ingest.decode.colour import (
    NEWEST_RULES,
    Converter,
    DecoderName,
    MediaPolicy,
    container_tags,
    describe,
    facts,
    settle,
)
from titan_video.ingest.decode.containers import (
    cut_matroska,
    decoded_frames,
    decoded_times,
    is_avi,
    open_video,
    packet_times,
    shown_size,
)
from titan_video.ingest.decode.images import MICROSECONDS, UnusableClip, check_count, check_pixels, images, probe_images
from titan_video.ingest.decode.worker import alloc_shared
from titan_video.ingest.files import media
from titan_video.ingest.files.media import DEFAULT_LIMITS, DecodeLimits

TOLERANCE = 0.0005  # seconds; containers round times to as coarse as a millisecond
# By which the frames of a file may have more pixels than its plan says: pixels that are not square, padding.
PIXEL_SLACK, SMALL_FRAME = 16, 1 << 24
SEEK_FROM = 2.0  # seconds; a clip that starts later is reached by seeking, not by decoding
TORCHCODEC_BATCH = 8  # frames of one call

DEFAULT_POLICY = MediaPolicy()


@dataclass(frozen=True)
class Probe:
    """Content of a video file. width, height: as shown, after rotation and for square pixels. pts: presentation times
    of the frames in ticks of `time_base` seconds, ascending; `end`: when the last one ends. colour: what is not plain
    SDR about it (colour.py, images.py). formerly: how rules 1 would take it for cut. With a `reason` the rest means
    nothing."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    time_base: str = "1"
    pts: tuple[int, ...] = ()
    end: int = 0
    reason: str = ""
    colour: str = ""
    formerly: str = ""

    def seconds(self) -> tuple[list[float], float]:
        """Times of the frames and the end of the last."""
        up, down = Fraction(self.time_base).as_integer_ratio()
        return [t * up / down for t in self.pts], self.end * up / down  # rounded once, as a Fraction's float is

    @property
    def fps(self) -> float:
        duration = (self.end - self.pts[0]) * Fraction(self.time_base) if self.pts else 0
        return float(len(self.pts) / duration) if duration else 0.0


def too_many_frames(times: Sequence[float], end: float, fps: float, max_frames: int) -> str:
    """A reason if `frame_indices` would give more frames: a file may state any times. "" otherwise."""
    count = (end - times[0]) * fps if times else 0.0
    if count <= max_frames:
        return ""
    return f"too long: {count:.6g} frames at {fps:g} fps, more than data.max_frames = {max_frames}"


def frame_indices(times: Sequence[float], end: float, fps: float) -> list[int]:
    """Source frames of a clip resampled to `fps`; every frame count in the program comes from here.

    times: presentation times in seconds, ascending, at any spacing; end: when the last frame ends. The resampled frame
    at k / fps after the first shows the last source frame that has begun by then.
    """
    if not times:
        return []
    k = np.arange(max(math.ceil((end - times[0]) * fps), 0) + 2)
    at = times[0] + k / fps
    at = at[(at < end - TOLERANCE) | (k == 0)]
    return (np.searchsorted(times, at + TOLERANCE, side="right") - 1).tolist()


def probe(path: str, limits: DecodeLimits = DEFAULT_LIMITS) -> Probe:
    """Read a file's packets and first frame; the other frames are not decoded. A bad file is a `reason`, not an error.

    The frames of an image and of a folder of images last one tick of a second each; those of an animation have their
    own times.
    """
    try:
        sha256, size = media.sha256(path)
        if not size:
            raise UnusableClip("corrupt: the file is empty")
        if media.kind(path) != "video":
            (width, height), pts, end, colour = probe_images(path, limits.max_pixels, limits.max_frames)
            is_animated = len(pts) > 1 and media.kind(path) == "image"
            return Probe(sha256, width, height, f"1/{MICROSECONDS}" if is_animated else "1", pts, end, colour=colour)
        cut = cut_matroska(path, size)
        with open_video(path, limits.max_pixels) as (container, stream):
            time_base = stream.time_base
            frames, formerly = packet_times(container, stream, limits.max_frames, cut)
        pts, end = frames or decoded_times(path, limits)
        with open_video(path, limits.max_pixels) as (container, stream):
            tags, frame = container_tags(stream), next(container.decode(stream), None)
            (width, height), colour = shown_size(stream, frame), facts(stream, frame, tags)
    except UnusableClip as e:
        return Probe(reason=str(e))
    except OSError as e:
        return Probe(reason=f"unreadable: {e.strerror or e}")
    return Probe(sha256, width, height, str(time_base), pts, end, colour=colour, formerly=formerly)


def by_policy(found: Probe, path: str, policy: MediaPolicy, limits: DecodeLimits) -> tuple[Probe, str]:
    """(a probe as [data] wants the file to be read, with the reason if it is not to be; the conversion of its colour).

    The probe may be an earlier one, within other limits.
    """
    if policy.rules < 2:
        reason = found.reason or (f"corrupt: {found.formerly}" if found.formerly else "")
        found = replace(found, reason=reason, colour="")
        if media.kind(path) == "image" and found.pts:  # of an animation only the first frame was seen
            found = replace(found, pts=(0,), end=1, time_base="1")
    conversion, refused = settle(found.colour, found.width, found.height, policy)
    try:
        check_pixels(found.width, found.height, limits.max_pixels)
        check_count(len(found.pts), limits.max_frames)
    except UnusableClip as e:
        refused = str(e)
    return replace(found, reason=found.reason or refused), conversion


def read_image(
    path: str, bucket: Bucket, limits: DecodeLimits = DEFAULT_LIMITS, conversion: str | None = None
) -> Tensor:
    """An image, or the first frame of a clip, resized and cropped like a clip of the bucket: uint8 RGB [3, 1, H, W].

    conversion: of its colour, where a plan has settled it; None: by the defaults of [data]. Raises UnusableClip.
    """
    found, reason = probe(path, limits), ""
    if conversion is None:
        conversion, reason = settle(found.colour, found.width, found.height, DEFAULT_POLICY)
    if reason := found.reason or reason:
        raise UnusableClip(f"unusable image: {path}: {reason}")
    return decode(path, found.pts[:1], found.width, found.height, bucket, Reading(conversion=conversion))


@dataclass(frozen=True)
class Reading:
    """How `decode` reads a file.

    by_index: frames are named by number. rate: by metadata, of a file that was not probed; it is compared with the
    file's. conversion: of its colour (colour.py); it is by PyAV's frames. rules: as in MediaPolicy.
    """

    by_index: bool = False
    rate: float = 0.0
    decoder: DecoderName = "pyav"
    conversion: str = ""
    rules: int = NEWEST_RULES


def decode(
    path: str, pts: Sequence[int], width: int, height: int, bucket: Bucket, reading: Reading | None = None
) -> Tensor:
    """The frames shown at `pts` (ticks, or numbers with by_index; ascending, may repeat), resized to cover the bucket
    and cropped to its centre.

    width, height: of the probe. Returns uint8 RGB [3, F, H, W], in memory as decoded: colours innermost.
    UnusableClip: a frame is missing or damaged.
    """
    reading = reading or Reading()
    target_slots: dict[int, list[int]] = {}
    for i, time in enumerate(pts):
        target_slots.setdefault(time, []).append(i)
    shape = len(pts), *bucket[1:], 3
    frames_FHWC = alloc_shared(math.prod(shape)).view(shape)
    target = FrameTarget(frames_FHWC.numpy(), target_slots, width, height, bucket, reading.conversion)
    max_pixels = max(SMALL_FRAME, PIXEL_SLACK * width * height)
    if media.kind(path) != "video":
        is_probed = not reading.rate or reading.rules < 2
        missing = copy_frames(images(path, max_pixels, reading.conversion, is_probed), target)
    else:
        missing = _copy_video(path, target, max_pixels, reading)
    if missing:
        raise UnusableClip(f"corrupt: {missing} of {len(target_slots)} frames do not decode")
    return frames_FHWC.permute(3, 0, 1, 2)


def _copy_video(path: str, target: "FrameTarget", max_pixels: int, reading: Reading) -> int:
    """As `copy_frames`, of a video file."""
    by_index, decoder, times = reading.by_index, reading.decoder, list(target.target_slots)
    with open_video(path, max_pixels) as (container, stream):
        if reading.rate:
            _compare(stream, target.width, target.height, reading.rate)
        tick = stream.time_base or Fraction(0)
        if is_avi(container):  # has no times, which torchcodec needs
            by_index, decoder = True, "pyav"
        seek = decoder == "pyav" and not by_index and (times[0] - (stream.start_time or 0)) * tick > SEEK_FROM
        if seek:
            container.seek(times[0], stream=stream)
        frames = decoded_frames(container, stream, by_index)
        if reading.rate and reading.rules > 1:
            frames = _compare_colour(frames, stream, reading.conversion)
        if decoder == "pyav":
            missing = copy_frames(frames, target)
        elif reading.rate:
            next(frames, None)  # looks at its colour
    if decoder == "torchcodec":
        return copy_frames(_torchcodec_frames(path, times, tick, by_index), target)
    if seek and missing:  # the index of the file is wrong
        with open_video(path, max_pixels) as (container, stream):
            return copy_frames(decoded_frames(container, stream), target)
    return missing


def require(decoder: DecoderName) -> None:
    """ValueError, with the fix, when this decoder cannot be used here."""
    if decoder == "torchcodec":
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as e:
            why = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
            raise ValueError(
                "data.decoder is torchcodec, which cannot be imported here: install the torchcodec that goes "
                "with this torch, and "
                f"FFmpeg's shared libraries, or set pyav\n{why}"
            ) from e


def _torchcodec_frames(path: str, times: Sequence[int], tick: Fraction, by_index: bool) -> Iterator:
    """(time, frame) of the frames that the file has at these times, by torchcodec, which turns rotated frames
    upright.
    """
    import av
    from torchcodec.decoders import VideoDecoder

    try:
        source = path if os.path.isfile(path) else media.open_binary(path)
        decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)  # the workers are the parallelism
        for some in (times[i : i + TORCHCODEC_BATCH] for i in range(0, len(times), TORCHCODEC_BATCH)):
            if by_index:
                batch = decoder.get_frames_at(indices=list(some))
            else:
                batch = decoder.get_frames_played_at(seconds=[float((time + Fraction(1, 2)) * tick) for time in some])
            for time, pixels_HWC, seconds in zip(some, batch.data.numpy(), batch.pts_seconds.tolist(), strict=True):
                if by_index or abs(seconds - float(time * tick)) < float(tick) / 2:
                    yield time, av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
    except (RuntimeError, ValueError, IndexError, OSError, EOFError) as e:
        raise UnusableClip(f"corrupt: {str(e).strip() or type(e).__name__}") from e


def _compare(stream, width: int, height: int, rate: float) -> None:
    context, found = stream.codec_context, float(stream.average_rate or 0)
    if {context.width, context.height} != {width, height} or abs(found - rate) > 0.01 * rate:
        raise UnusableClip(
            f"wrong metadata: {width} x {height} at {rate:g} fps are declared, the file has "
            f"{context.width} x {context.height} at {found:g} fps"
        )


def _compare_colour(frames: Iterator, stream, conversion: str) -> Iterator:
    """The frames of a file that was not probed, if by their tags they need no conversion but this."""
    tags = container_tags(stream)
    for number, (time, frame) in enumerate(frames):
        if number == 0:
            policy = MediaPolicy(bt709_lines=0)  # which lets the size of untagged video decide nothing
            needed, refused = settle(facts(stream, frame, tags), frame.width, frame.height, policy)
            if (needed and needed != conversion) or refused:
                colour = describe(needed) or refused
                raise UnusableClip(
                    f"wrong metadata: with trust_metadata its colour is not read ({colour}); set that to false for its "
                    "source"
                )
        yield time, frame


def interpolation(width: int, new_width: int) -> str:
    """The filter of a resize, as PyAV names it: areas are averaged when a frame shrinks, which does not alias."""
    return "AREA" if new_width < width else "BICUBIC"


@dataclass(frozen=True)
class FrameTarget:
    """Where decoded frames go: uint8 frames_FHWC at the bucket's size. target_slots: {time: frames of it}.

    width, height: of the source. conversion: of its colour.
    """

    frames_FHWC: np.ndarray
    target_slots: Mapping[int, Sequence[int]]
    width: int
    height: int
    bucket: Bucket
    conversion: str = ""


def copy_frames(frames: Iterator, target: FrameTarget) -> int:
    """Copy the frames at the times of `target`, resized and cropped. Returns how many are not found."""
    frames_FHWC, slots = target.frames_FHWC, target.target_slots
    _, bucket_height, bucket_width = target.bucket
    new_width, new_height, left, top = cover(target.width, target.height, target.bucket)
    method = interpolation(target.width, new_width)
    found: set[int] = set()
    last = max(slots)
    convert = Converter(target.conversion)
    for time, frame in frames:
        if time in slots:
            if frame.is_corrupt:
                raise UnusableClip(f"corrupt: the frame at {float(time * (frame.time_base or 1)):.2f} s is damaged")
            turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90
            stored_width, stored_height = (new_height, new_width) if turns % 2 else (new_width, new_height)
            image_HWC = np.rot90(convert(frame, stored_width, stored_height, method), turns)
            first, *others = slots[time]
            frames_FHWC[first] = image_HWC[top : top + bucket_height, left : left + bucket_width]
            for i in others:
                frames_FHWC[i] = frames_FHWC[first]
            found.add(time)
        if len(found) == len(slots) or time > last:
            break
    return len(slots) - len(found)
