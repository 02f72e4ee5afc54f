"""Writes frames as mp4 and GIF. PyAV and Pillow are imported by the functions that need them."""

import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from titan_video.tools.files import atomic_write

HD_LINES = 720  # players take files without a tag for BT.709 from here on, smaller ones for BT.601
MP4_QUALITY = "12"  # x264's constant rate factor; visually lossless


def write_mp4(path: str | os.PathLike, frames_FHWC: np.ndarray, fps: float, what: str = "clip") -> None:
    """Write uint8 RGB frames [F, H, W, 3] as H.264 (yuv420p, which all players support), atomically.

    ValueError: another type or shape, an odd height or width, or a rate that is not positive.
    StorageError, what: see tools.files.writing.
    """
    import av

    path = Path(path)
    _check(frames_FHWC, fps)
    _, height, width, _ = frames_FHWC.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: H.264 needs an even height and width, got {height} x {width}")
    file = io.BytesIO()  # not on disk, where the library would take a full one for a fault of its own
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without mbtree: x264's gives other bits for the same frames from one process to the next.
        stream.options = {"crf": MP4_QUALITY, "preset": "veryfast", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1  # clips are short, and the bytes are the same on every machine
        matrix, tag = ("ITU709", 1) if min(height, width) >= HD_LINES else ("ITU601", 2)  # 2: none
        for name in ("colorspace", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, tag)
        for frame_HWC in frames_FHWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    atomic_write(path, file.getvalue(), what)


def write_gif_bytes(frames_FHWC: np.ndarray, fps: float) -> bytes:
    """Uint8 RGB frames [F, H, W, 3] as a GIF that repeats for ever."""
    from PIL import Image

    _check(frames_FHWC, fps)
    first, *rest = [Image.fromarray(frame) for frame in np.ascontiguousarray(frames_FHWC)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _check(frames_FHWC: np.ndarray, fps: float) -> None:
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or len(frames_FHWC) == 0:
        raise ValueError(
            f"frames must be uint8 [F, H, W, 3] with F >= 1, got {frames_FHWC.dtype} {list(frames_FHWC.shape)}"
        )
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
