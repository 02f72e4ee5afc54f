"""Reading video: what is in a file (`probe`), which of its frames a clip takes (`frame_indices`), and those frames
(`decode`).

A frame is named by its presentation time in ticks of the stream's time base. So the plan, which only reads packets,
and the decoder mean the same frame, whatever the codec's order or delay. Images, folders of images, and videos that are
not opened because their metadata is trusted, name frames by number. Files may come from anywhere (media.py), so every
way in which one can be broken becomes an `UnusableClip` with its reason.
"""

import bisect
import errno
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.ingest import media
from titan_video.ingest.bucketing import cover
from titan_video.ingest.images import MAX_SIDE, OUT_OF_MEMORY, UnusableClip, check_pixels, images
from titan_video.ingest.media import DEFAULT_LIMITS, DecodeLimits
from titan_video.ingest.worker import alloc_shared

TOLERANCE = 0.0005  # seconds; containers round times to as coarse as a millisecond
MISSING_TAIL = 0.1  # seconds by which the packets may end before the declared end
# A file's kind follows from its content, not from its name, and some kinds open other files: playlists, lists of files.
DEMUXERS = "mov,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,nut,mxf,dv,wtv,webp,apng"
# By which the frames of a file may have more pixels than its plan says: pixels that are not square, padding.
PIXEL_SLACK, SMALL_FRAME = 16, 1 << 24
SEEK_FROM = 2.0  # seconds; a clip that starts later is reached by seeking, not by decoding
TORCHCODEC_BATCH = 8  # frames of one call

DecoderName = Literal["pyav", "torchcodec"]


@dataclass(frozen=True)
class Probe:
    """Content of a video file. width, height: as shown, after rotation and for square pixels. pts: presentation times
    of the frames in ticks of `time_base` seconds, ascending; `end`: when the last one ends. With a `reason` the rest
    means nothing."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    time_base: str = "1"
    pts: tuple[int, ...] = ()
    end: int = 0
    reason: str = ""

    def seconds(self) -> tuple[list[float], float]:
        """Times of the frames and the end of the last."""
        tick = Fraction(self.time_base)
        return [float(t * tick) for t in self.pts], float(self.end * tick)

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
    indices, k = [], 0
    while (t := times[0] + k / fps) < end - TOLERANCE or k == 0:
        indices.append(bisect.bisect_right(times, t + TOLERANCE) - 1)
        k += 1
    return indices


@contextmanager
def _open(path: str, max_pixels: int) -> Iterator:
    """(container, first video stream). An error of libav inside becomes an UnusableClip."""
    import av

    # The decoder itself refuses larger frames: a stream may change its size at any frame.
    options = {"max_pixels": str(min(max_pixels, 2**31 - 1))}
    only = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:
        source = f"file:{path}" if os.path.isfile(path) else media.open_binary(path)
        with av.open(source, metadata_errors="replace", options=options, container_options=only) as container:
            if not container.streams.video:
                raise UnusableClip("not a video: no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UnusableClip("corrupt: no decoder for this stream")
            check_pixels(stream.codec_context.width, stream.codec_context.height, max_pixels)
            stream.codec_context.thread_count = 1  # the workers are the parallelism
            stream.codec_context.options = options
            yield container, stream
    except UnusableClip:
        raise
    except MemoryError as e:
        raise UnusableClip(OUT_OF_MEMORY) from e
    except (av.FFmpegError, OSError, EOFError, ValueError, ArithmeticError) as e:
        # libav says no more than this of a frame that is larger than max_pixels.
        size = f", or frames of more than {max_pixels} pixels" if getattr(e, "errno", 0) == errno.EINVAL else ""
        raise UnusableClip(f"corrupt: {getattr(e, 'strerror', None) or e or type(e).__name__}{size}") from e


def probe(path: str, limits: DecodeLimits = DEFAULT_LIMITS) -> Probe:
    """Read a file's packets and first frame; the other frames are not decoded. A bad file is a `reason`, not an error.

    The frames of an image and of a folder of images last one tick of a second each.
    """
    try:
        sha256, size = media.sha256(path)
        if not size:
            raise UnusableClip("corrupt: the file is empty")
        if media.kind(path) != "video":
            return _probe_images(path, sha256, limits)
        with _open(path, limits.max_pixels) as (container, stream):
            time_base = stream.time_base
            frames = _packet_times(container, stream, limits.max_frames)
        pts, end = frames or _decoded_times(path, limits)
        with _open(path, limits.max_pixels) as (container, stream):
            width, height = _shown_size(stream, next(container.decode(stream), None))
    except UnusableClip as e:
        return Probe(reason=str(e))
    except OSError as e:
        return Probe(reason=f"unreadable: {e.strerror or e}")
    return Probe(sha256, width, height, str(time_base), pts, end)


def _probe_images(path: str, sha256: str, limits: DecodeLimits) -> Probe:
    sizes = {(frame.width, frame.height) for _, frame in images(path, limits.max_pixels)}
    if len(sizes) > 1:
        raise UnusableClip(
            f"corrupt: the frames differ in size: {', '.join(f'{w} x {h}' for w, h in sorted(sizes)[:4])}"
        )
    (width, height), count = sizes.pop(), 1 if media.kind(path) == "image" else len(media.frame_files(path))
    check_count(count, limits.max_frames)
    return Probe(sha256, width, height, "1", tuple(range(count)), count)


def read_image(path: str, bucket: Bucket, limits: DecodeLimits = DEFAULT_LIMITS) -> Tensor:
    """An image, or the first frame of a clip, resized and cropped like a clip of the bucket: uint8 RGB [3, 1, H, W].

    Raises UnusableClip.
    """
    found = probe(path, limits)
    if found.reason:
        raise UnusableClip(f"unusable image: {path}: {found.reason}")
    return decode(path, found.pts[:1], found.width, found.height, bucket)


def _packet_times(container, stream, max_frames: int) -> tuple[tuple[int, ...], int] | None:
    """(pts, end) from packets. None: packets lack times, or are of a codec with packets that are never shown."""
    declared_end = ((container.start_time or 0) + container.duration) / 1_000_000 if container.duration else 0.0
    if not stream.time_base:
        raise UnusableClip("corrupt: no time base")
    durations, last_end = {}, 0.0
    is_complete = stream.codec_context.name != "vp8" and not _is_avi(container)
    for packet in container.demux():
        if not packet.size:  # the end of a stream
            continue
        start = packet.pts if packet.pts is not None else packet.dts
        if start is not None:
            last_end = max(last_end, float((start + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            raise UnusableClip(f"corrupt: broken off after {last_end:.2f} s")
        is_complete &= packet.pts is not None
        if packet.pts is not None and not packet.is_discard:
            durations[packet.pts] = packet.duration or 0
            check_count(len(durations), max_frames)
    if last_end < declared_end - MISSING_TAIL:
        raise UnusableClip(f"corrupt: broken off at {last_end:.2f} s of {declared_end:.2f} s")
    return frame_times(durations) if is_complete and durations else None


def check_count(count: int, max_frames: int) -> None:
    if count > max_frames:
        raise UnusableClip(f"too long: more frames in the file than data.max_frames = {max_frames}")


def _decoded_times(path: str, limits: DecodeLimits) -> tuple[tuple[int, ...], int]:
    durations: dict[int, int] = {}
    with _open(path, limits.max_pixels) as (container, stream):
        for pts, frame in _frames(container, stream):
            durations[pts] = frame.duration or 0
            check_count(len(durations), limits.max_frames)
    if not durations:
        raise UnusableClip("corrupt: no frame has a presentation time")
    return frame_times(durations)


def _is_avi(container) -> bool:
    """AVI stores the order of decoding and no presentation times; its frames are evenly spaced, one tick each."""
    return container.format.name == "avi"


def _frames(container, stream, by_index: bool = False) -> Iterator:
    """(presentation time in ticks, or number, decoded frame), in order."""
    by_index |= _is_avi(container)
    for count, frame in enumerate(container.decode(stream)):
        if by_index or frame.pts is not None:
            yield count if by_index else frame.pts, frame


def frame_times(durations: dict[int, int]) -> tuple[tuple[int, ...], int]:
    """(ascending pts, end of the last frame), in ticks, from {pts: duration, 0 if unknown}."""
    pts = tuple(sorted(durations))
    gaps = sorted(b - a for a, b in zip(pts, pts[1:], strict=False))
    last = durations[pts[-1]] or (gaps[len(gaps) // 2] if gaps else 1)
    return pts, pts[-1] + last


def _shown_size(stream, frame) -> tuple[int, int]:
    if frame is None:
        raise UnusableClip("corrupt: no frame can be decoded")
    aspect = stream.sample_aspect_ratio or 1  # of one pixel
    width, height = max(1, round(frame.width * aspect)), frame.height
    if max(width, height) > MAX_SIDE:  # by pixels that are not square
        raise UnusableClip(f"too large: {width} x {height}, more than {MAX_SIDE} a side")
    return (height, width) if frame.rotation % 180 else (width, height)


def decode(
    path: str,
    pts: Sequence[int],
    width: int,
    height: int,
    bucket: Bucket,
    by_index: bool = False,
    rate: float = 0.0,
    decoder: DecoderName = "pyav",
) -> Tensor:
    """The frames shown at `pts` (ticks, or numbers with by_index; ascending, may repeat), resized to cover the bucket
    and cropped to its centre.

    width, height: of the probe. rate: by metadata, of a file that was not probed; it is compared with the file's.
    Returns uint8 RGB [3, F, H, W], in memory as decoded: colours innermost.
    UnusableClip: a frame is missing or damaged.
    """
    target_slots: dict[int, list[int]] = {}
    for i, time in enumerate(pts):
        target_slots.setdefault(time, []).append(i)
    shape = len(pts), *bucket[1:], 3
    frames_FHWC = alloc_shared(math.prod(shape)).view(shape)
    target = FrameTarget(frames_FHWC.numpy(), target_slots, width, height, bucket)
    max_pixels = max(SMALL_FRAME, PIXEL_SLACK * width * height)
    if media.kind(path) != "video":
        missing = copy_frames(images(path, max_pixels), target)
    else:
        with _open(path, max_pixels) as (container, stream):
            if rate:
                _compare(stream, width, height, rate)
            tick = stream.time_base or Fraction(0)
            if _is_avi(container):  # has no times, which torchcodec needs
                by_index, decoder = True, "pyav"
            seek = decoder == "pyav" and not by_index and (pts[0] - (stream.start_time or 0)) * tick > SEEK_FROM
            if seek:
                container.seek(pts[0], stream=stream)
            if decoder == "pyav":
                missing = copy_frames(_frames(container, stream, by_index), target)
        if decoder == "torchcodec":
            missing = copy_frames(_torchcodec_frames(path, list(target_slots), tick, by_index), target)
        elif seek and missing:  # the index of the file is wrong
            with _open(path, max_pixels) as (container, stream):
                missing = copy_frames(_frames(container, stream), target)
    if missing:
        raise UnusableClip(f"corrupt: {missing} of {len(target_slots)} frames do not decode")
    return frames_FHWC.permute(3, 0, 1, 2)


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


def interpolation(width: int, new_width: int) -> str:
    """The filter of a resize, as PyAV names it: areas are averaged when a frame shrinks, which does not alias."""
    return "AREA" if new_width < width else "BICUBIC"


@dataclass(frozen=True)
class FrameTarget:
    """Where decoded frames go: uint8 frames_FHWC at the bucket's size. target_slots: {time: frames of it}.

    width, height: of the source.
    """

    frames_FHWC: np.ndarray
    target_slots: Mapping[int, Sequence[int]]
    width: int
    height: int
    bucket: Bucket


def copy_frames(frames: Iterator, target: FrameTarget) -> int:
    """Copy the frames at the times of `target`, resized and cropped. Returns how many are not found."""
    from av.video.reformatter import VideoReformatter

    frames_FHWC, slots = target.frames_FHWC, target.target_slots
    _, bucket_height, bucket_width = target.bucket
    new_width, new_height, left, top = cover(target.width, target.height, target.bucket)
    method = interpolation(target.width, new_width)
    found: set[int] = set()
    last = max(slots)
    scaler = VideoReformatter()  # one for all frames: it keeps its tables
    for time, frame in frames:
        if time in slots:
            if frame.is_corrupt:
                raise UnusableClip(f"corrupt: the frame at {float(time * (frame.time_base or 1)):.2f} s is damaged")
            turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90
            stored_width, stored_height = (new_height, new_width) if turns % 2 else (new_width, new_height)
            scaled = scaler.reformat(frame, stored_width, stored_height, format="rgb24", interpolation=method)
            image_HWC = np.rot90(scaled.to_ndarray(), turns)
            first, *others = slots[time]
            frames_FHWC[first] = image_HWC[top : top + bucket_height, left : left + bucket_width]
            for i in others:
                frames_FHWC[i] = frames_FHWC[first]
            found.add(time)
        if len(found) == len(slots) or time > last:
            break
    return len(slots) - len(found)
