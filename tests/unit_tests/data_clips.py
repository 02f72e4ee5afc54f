"""Small video files of every kind the data tests need.

Frame k of a clip has brightness `level(k)`, so a decoded frame names itself.
"""

import random
from fractions import Fraction

import numpy as np


def level(k):
    return 16 + 7 * (k % 32)


def number(image):
    """The k (mod 32) of a decoded frame, from its middle."""
    h, w = image.shape[:2]
    return round((float(image[h // 4 : -h // 4, w // 4 : -w // 4].mean()) - 16) / 7)


def colour(k):
    """Of frame k of a clip of at most 256: another one each."""
    return 16 + 14 * (k % 16), 16 + 14 * (k // 16), 128


def number_by_colour(image):
    """The k of a decoded frame of one `colour`, from its middle."""
    h, w = image.shape[:2]
    low, high, _ = (image[h // 4 : -h // 4, w // 4 : -w // 4].reshape(-1, 3).mean(0) - 16) / 14
    return round(float(low)) + 16 * round(float(high))


def flat_frames(count, width, height):
    return [np.full((height, width, 3), level(k), np.uint8) for k in range(count)]


def write_clip(
    path,
    count=40,
    fps=25,
    width=64,
    height=48,
    codec="libx264",
    times=None,
    rotation=0,
    pix_fmt="yuv420p",
    frames=None,
    options=None,
    audio=False,
):
    """times: presentation times in milliseconds (variable rate) instead of `fps`.

    rotation: of the display, in degrees counter-clockwise.
    """
    import av

    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        stream.bit_rate = 4_000_000
        if codec == "libx264":
            stream.options = {"crf": "10", "bf": "2", "g": "12"}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for k, image in enumerate(frames if frames is not None else flat_frames(count, width, height)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            _silence(container, sound)
    return path


def write_sound(path):
    """A second of silence, and no picture."""
    import av

    with av.open(str(path), "w") as container:
        _silence(container, container.add_stream("aac", rate=16000))
    return path


def _silence(container, sound):
    import av

    silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
    silence.sample_rate = 16000
    container.mux(sound.encode(silence))
    container.mux(sound.encode(None))


def damaged(data, count):
    """`count` copies of a file's bytes; each has 1, 8 or 64 random bytes changed."""
    rng = random.Random(0)
    for _ in range(count):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 8, 64])):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        yield bytes(broken)


def captioned(path, caption="a clip", **kwargs):
    write_clip(path, **kwargs)
    path.with_suffix(".txt").write_text(caption)
    return path


def write_patches(path, signals, luma, pix_fmt="yuv420p", tags=(2, 2, 2, 0), codec="ffv1", **kwargs):
    """Ten frames, of which the left and the right half have one R'G'B' each, in 0 to 1.

    luma: (Kr, Kb) of the matrix. tags: matrix, primaries, transfer, range (2: full) as numbers of H.273. kwargs: width,
    height, and options of the encoder.
    """
    import av

    width, height = kwargs.get("width", 64), kwargs.get("height", 48)
    bits = int("".join(c for c in pix_fmt.split("p", 1)[1] if c.isdigit()) or 8)
    matrix, primaries, transfer, color_range = tags
    with av.open(str(path), "w", options=kwargs.get("container", {})) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, pix_fmt, kwargs.get("options", {})
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = tags
        frame = av.VideoFrame(width, height, pix_fmt)
        for component, plane in zip(range(3), frame.planes, strict=True):
            values = [round(v) for v in (_yuv(s, luma, bits, color_range == 2)[component] for s in signals)]
            rows = np.empty((plane.height, plane.line_size // (1 + (bits > 8))), np.uint8 if bits == 8 else "<u2")
            rows[:, : plane.width // 2], rows[:, plane.width // 2 :] = values
            plane.update(rows.tobytes())
        frame.colorspace, frame.color_range = matrix, color_range
        frame.color_primaries, frame.color_trc = primaries, transfer
        for k in range(10):
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.with_suffix(".txt").write_text("two patches")
    return path


def _yuv(signal, luma, bits, is_full):
    """Y'CbCr of BT.709, table 4, as numbers of `bits` bits."""
    (kr, kb), (r, g, b), one = luma, signal, 1 << bits - 8
    y = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    if is_full:
        top = (1 << bits) - 1
        return y * top, *(c * top + (top + 1) / 2 for c in chroma)
    return (16 + 219 * y) * one, *((128 + 224 * c) * one for c in chroma)
