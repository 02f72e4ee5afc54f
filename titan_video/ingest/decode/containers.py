"""Opening a video file, and the times of its frames: from its packets where these tell, else by decoding.

A container is whole when its packets reach the end that it declares. Most declare a length, which counts from the first
packet. Matroska has a Duration, in which mkvmerge stores the length and FFmpeg the absolute end, so either may be
reached; that nothing is cut off, the size of its Segment tells (RFC 9559).
"""

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from titan_video.ingest.decode.images import MAX_SIDE, OUT_OF_MEMORY, UnusableClip, check_count, check_pixels
from titan_video.ingest.files import media
from titan_video.ingest.files.media import DecodeLimits

MISSING_TAIL = 0.1  # seconds by which the packets may end before the declared end
# A file's kind follows from its content, not from its name, and some kinds open other files: playlists, lists of files.
DEMUXERS = "mov,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,nut,mxf,dv,wtv,webp,apng"
EBML_HEADER, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
EBML_HEAD = 12  # bytes of an element's number and size


@contextmanager
def open_video(path: str, max_pixels: int) -> Iterator:
    """(container, first video stream). An error of libav inside becomes an UnusableClip."""
    import av

    # The decoder itself refuses larger frames: a stream may change its size at any frame.
    options = {"max_pixels": str(min(max_pixels, 2**31 - 1))}
    only = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    what = "it cannot be opened as a video, as it was cut off, is damaged, or is something else: "
    try:
        source = f"file:{path}" if os.path.isfile(path) else media.open_binary(path)
        with av.open(source, metadata_errors="replace", options=options, container_options=only) as container:
            what = ""
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
        if reason := media.unreadable(e):
            raise UnusableClip(reason) from e
        # libav says no more than this of a frame that is larger than max_pixels.
        size = f", or frames of more than {max_pixels} pixels" if getattr(e, "errno", 0) == errno.EINVAL else ""
        raise UnusableClip(f"corrupt: {what}{getattr(e, 'strerror', None) or e or type(e).__name__}{size}") from e


def packet_times(container, stream, max_frames: int, cut: str = "") -> tuple[tuple[tuple[int, ...], int] | None, str]:
    """((pts, end) from packets, or None: packets lack times, or are of a codec with packets that are never shown;
    "", or how the file would be cut if its container declared a length).

    cut: why the container is not whole, by its structure.
    """
    if not stream.time_base:
        raise UnusableClip("corrupt: no time base")
    durations, last_end, is_seen = {}, 0.0, False
    is_complete = stream.codec_context.name != "vp8" and not is_avi(container)
    for packet in container.demux():
        if not packet.size:  # the end of a stream
            continue
        start = packet.pts if packet.pts is not None else packet.dts
        if start is not None:
            end = float((start + (packet.duration or 0)) * packet.time_base)
            last_end, is_seen = max(last_end, end) if is_seen else end, True
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            raise UnusableClip(f"corrupt: broken off after {last_end:.2f} s")
        is_complete &= packet.pts is not None
        if packet.pts is not None and not packet.is_discard:
            durations[packet.pts] = packet.duration or 0
            check_count(len(durations), max_frames)
    frames = frame_times(durations) if durations else None
    if frames and not durations[frames[0][-1]]:  # nothing says how long the last one is shown
        last_end = max(last_end, float(frames[1] * stream.time_base))
    declared = _declared_ends(container)
    if cut or last_end < min(declared) - MISSING_TAIL:
        raise UnusableClip(f"corrupt: {cut or _broken_off(last_end, min(declared))}")
    formerly = _broken_off(last_end, declared[0]) if last_end < declared[0] - MISSING_TAIL else ""
    return (frames if is_complete else None), formerly


def _broken_off(last_end: float, declared_end: float) -> str:
    return f"broken off at {last_end:.2f} s of {declared_end:.2f} s"


def _declared_ends(container) -> list[float]:
    """The times in seconds at which a whole file may end: by a length that counts from the start; in Matroska by an
    absolute end as well. Minus infinity: nothing is declared.
    """
    if not container.duration:
        return [-math.inf]
    start, duration = (container.start_time or 0) / 1_000_000, container.duration / 1_000_000
    is_absolute = "matroska" in container.format.name and duration > start > 0
    return [start + duration] + [duration] * is_absolute


def cut_matroska(path: str, size: int) -> str:
    """How a Matroska file of `size` bytes is cut off, by the size of its Segment; "" for whole ones and other kinds.

    Of one that was written as a stream, without that size, the elements inside are looked at; a cut between two of
    them leaves no trace.
    """
    with media.open_binary(path) as f:
        at = 0
        while at < size:
            f.seek(at)
            head = f.read(EBML_HEAD)
            if at == 0 and not head.startswith(EBML_HEADER):
                return ""
            _, content = _ebml_number(head, 0)
            length, content = _ebml_number(head, content)
            if content > len(head):
                return f"broken off at {size:,} bytes, inside an element" if at else ""
            at += content + (length or 0)
            if head.startswith(SEGMENT) and length is not None:
                break
    return f"broken off after {size:,} of at least {at:,} bytes" if size < at else ""


def _ebml_number(data: bytes, at: int) -> tuple[int | None, int]:
    """(value, position behind it) of an EBML number of 1 to 8 bytes (RFC 8794, section 4); None: unknown, all ones."""
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    ones = (1 << 7 * width) - 1
    value = int.from_bytes(data[at : at + width], "big") & ones
    return None if value == ones else value, at + width


def decoded_times(path: str, limits: DecodeLimits) -> tuple[tuple[int, ...], int]:
    """(pts, end) of a file whose packets do not tell. UnusableClip: no frame has a time."""
    durations: dict[int, int] = {}
    with open_video(path, limits.max_pixels) as (container, stream):
        for pts, frame in decoded_frames(container, stream):
            durations[pts] = frame.duration or 0
            check_count(len(durations), limits.max_frames)
    if not durations:
        raise UnusableClip("corrupt: no frame has a presentation time")
    return frame_times(durations)


def is_avi(container) -> bool:
    """AVI stores the order of decoding and no presentation times; its frames are evenly spaced, one tick each."""
    return container.format.name == "avi"


def decoded_frames(container, stream, by_index: bool = False) -> Iterator:
    """(presentation time in ticks, or number, decoded frame), in order."""
    by_index |= is_avi(container)
    for count, frame in enumerate(container.decode(stream)):
        if by_index or frame.pts is not None:
            yield count if by_index else frame.pts, frame


def frame_times(durations: dict[int, int]) -> tuple[tuple[int, ...], int]:
    """(ascending pts, end of the last frame), in ticks, from {pts: duration, 0 if unknown}."""
    pts = tuple(sorted(durations))
    gaps = sorted(b - a for a, b in zip(pts, pts[1:], strict=False))
    last = durations[pts[-1]] or (gaps[len(gaps) // 2] if gaps else 1)
    return pts, pts[-1] + last


def shown_size(stream, frame) -> tuple[int, int]:
    """(width, height) as shown: with square pixels, upright. UnusableClip: no frame, or beyond MAX_SIDE."""
    if frame is None:
        raise UnusableClip("corrupt: no frame can be decoded")
    aspect = stream.sample_aspect_ratio or 1  # of one pixel
    width, height = max(1, round(frame.width * aspect)), frame.height
    if max(width, height) > MAX_SIDE:  # by pixels that are not square
        raise UnusableClip(f"too large: {width} x {height}, more than {MAX_SIDE} a side")
    return (height, width) if frame.rotation % 180 else (width, height)
