"""Reading images, of which a clip may consist, within bounds."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from titan_video.ingest import media
from titan_video.tools.bounded import short

MAX_SIDE = 16384
# By content, whatever the file's name is. Pillow runs a program for others, as Ghostscript for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
OUT_OF_MEMORY = "too large: decoding takes more memory than data.decode_memory_gib, or than there is"


class UnusableClip(ValueError):
    """A file that gives no clip. The message is `category: detail`."""


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """UnusableClip: too many pixels, or a side beyond MAX_SIDE."""
    if width * height > max_pixels:
        raise UnusableClip(
            f"too large: frames of {width} x {height}, {width * height:,} pixels, more than "
            f"data.max_decoded_pixels = {max_pixels}"
        )
    if max(width, height) > MAX_SIDE:
        raise UnusableClip(f"too large: {width} x {height}, more than {MAX_SIDE} a side")


def images(path: str, max_pixels: int) -> Iterator:
    """(number, frame) of an image, or of a folder of images. The size is known before an image is decoded."""
    import av
    from PIL import ImageOps

    files = [path] if media.kind(path) == "image" else media.frame_files(path)
    for number, file in enumerate(files):
        try:
            with media.open_binary(str(file)) as f, _image(f) as image:
                check_pixels(image.width, image.height, max_pixels)
                pixels_HWC = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except UnusableClip as e:
            raise UnusableClip(f"{e}{'' if len(files) == 1 else f' ({file.name})'}") from e
        except MemoryError as e:
            raise UnusableClip(OUT_OF_MEMORY) from e
        except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, struct.error) as e:
            text = f"{'' if len(files) == 1 else f'{file.name}: '}{e or type(e).__name__}"
            raise UnusableClip(f"corrupt: {short(text, 200)}") from e
        yield number, av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")


@contextmanager
def _image(f: BinaryIO) -> Iterator:
    """An image whose pixels are not decoded yet."""
    from PIL import Image

    theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `check_pixels` is the limit
    try:
        with Image.open(f, formats=FORMATS) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = theirs
