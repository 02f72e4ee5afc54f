"""Reading images, of which a clip may consist, within bounds: every mode of Pillow to RGB by one rule, whatever the
format, and animations as the frames that they show.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from titan_video.ingest.files import media
from titan_video.tools.bounded import short

MAX_SIDE = 16384
# By content, whatever the file's name is. Pillow runs a program for others, as Ghostscript for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
ANIMATED = ("PNG", "WEBP", "GIF")  # further pictures in a JPEG are previews, depth, the other eye
OUT_OF_MEMORY = "too large: decoding takes more memory than data.decode_memory_gib, or than there is"
ALPHA_MODES = ("LA", "PA", "La", "RGBA", "RGBa")
MICROSECONDS = 1_000_000  # ticks of an animation
SHORTEST, INSTEAD = 0.0101, 0.1  # seconds: browsers show a frame of up to 10 ms for 100 ms
NEAR = 2  # levels by which a colour profile may differ from sRGB and be taken for it


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


def check_count(count: int, max_frames: int) -> None:
    if count > max_frames:
        raise UnusableClip(f"too long: more frames in the file than data.max_frames = {max_frames}")


def images(path: str, max_pixels: int, colour: str = "", is_probed: bool = True) -> Iterator:
    """(time, frame) of an image, an animation, or a folder of images: 0; microseconds; numbers.

    The size is known before an image is decoded. colour: of the probe; "": pixels as Pillow's own `convert("RGB")`
    gives them, which is right for the images that the probe finds nothing about. With is_probed off such images are
    compared, and refused where it is not; frames have numbers.
    """
    import av

    for number, (time, _, image) in enumerate(_opened(path, max_pixels)):
        pixels_HWC = rgb(image)[0] if colour or not is_probed else np.asarray(image.convert("RGB"))
        if not is_probed and not _is_plain(image, pixels_HWC):
            raise UnusableClip(
                "wrong metadata: with trust_metadata its colour is not read (transparency, 16 bits or a profile); set "
                "that to false for its source"
            )
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
        yield (time if is_probed else number), frame


def probe_images(path: str, max_pixels: int, max_frames: int) -> tuple[tuple[int, int], tuple[int, ...], int, str]:
    """((width, height), times and end of the frames, what the conversion to RGB has to see to)."""
    sizes, times, end, found = set(), [], 0, set()
    for time, seconds, image in _opened(path, max_pixels):
        check_count(len(times) + 1, max_frames)
        sizes.add(image.size)
        times.append(time)
        end = time + (round(seconds * MICROSECONDS) if seconds else 1)
        pixels_HWC, traits = rgb(image)
        if traits and not _is_plain(image, pixels_HWC):
            found |= set(traits)
    if len(sizes) > 1:
        listed = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:4])
        raise UnusableClip(f"corrupt: the frames differ in size: {listed}")
    return sizes.pop(), tuple(times), end, " ".join(sorted(found))


def _is_plain(image: Any, pixels_HWC: np.ndarray) -> bool:
    """Whether Pillow's own conversion gives these pixels. It has none for some modes."""
    try:
        return np.array_equal(np.asarray(image.convert("RGB")), pixels_HWC)
    except ValueError:
        return False


def _opened(path: str, max_pixels: int) -> Iterator[tuple[int, float, Any]]:
    """(time, seconds shown or 0, upright image) of each frame, in ticks as of `images`. An error is an UnusableClip."""
    files = [path] if media.kind(path) == "image" else media.frame_files(path)
    for number, file in enumerate(files):
        try:
            with media.open_binary(str(file)) as f, _image(f) as image:
                check_pixels(image.width, image.height, max_pixels)
                for time, seconds in _frames(image, is_alone=media.kind(path) == "image"):
                    yield (time if seconds else number), seconds, _upright(image)
        except UnusableClip as e:
            raise UnusableClip(f"{e}{'' if len(files) == 1 else f' ({file.name})'}") from e
        except MemoryError as e:
            raise UnusableClip(OUT_OF_MEMORY) from e
        except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, struct.error) as e:
            if reason := media.unreadable(e):
                raise UnusableClip(f"{reason}{'' if len(files) == 1 else f' ({file.name})'}") from e
            text = f"{'' if len(files) == 1 else f'{file.name}: '}{e or type(e).__name__}"
            raise UnusableClip(f"corrupt: {short(text, 200)}") from e


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


def _frames(image: Any, is_alone: bool) -> Iterator[tuple[int, float]]:
    """(time in microseconds, seconds shown) of each frame of an animation, to which the image is moved; (0, 0.0) of a
    still, and of the first frame of an animation in a folder of frames.
    """
    first = 1 if getattr(image, "default_image", False) else 0  # of an APNG: for readers that cannot animate
    last = getattr(image, "n_frames", 1) if image.format in ANIMATED and is_alone else 1
    if last - first < 2:
        yield 0, 0.0
        return
    time = 0
    for number in range(first, last):
        image.seek(number)
        image.load()
        seconds = float(image.info.get("duration") or 0) / 1000
        seconds = seconds if seconds > SHORTEST else INSTEAD
        yield time, seconds
        time += round(seconds * MICROSECONDS)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


# ---- modes ----


def rgb(image: Any) -> tuple[np.ndarray, list[str]]:
    """An image of any mode as uint8 RGB [H, W, 3], and which of these rules it needed, in this order:

    depth=16   16 bits (I, I;16 and its variants) are divided by 257 and rounded; F is 0 to 1
    icc=srgb   the pixels go through the file's colour profile to sRGB, unless that is sRGB to within 2 levels, does
               not fit the mode or cannot be read
    lab        CIE L*a*b* of white D50 becomes sRGB
    alpha      what is transparent (LA, PA, La, RGBA, RGBa, a colour of 1, L, P, RGB or I;16 that is named so) is laid
               over white, in sRGB values, as FFmpeg does for GIF

    Everything else (1, L, P, RGB, RGBX, CMYK without a profile, YCbCr, HSV) is Pillow's conversion. PNG's gAMA, cHRM
    and cICP are not read. Of PNGs with 16 bits per colour Pillow reads the upper 8.
    """
    traits, alpha_HW = [], None
    if image.mode == "F" or image.mode.startswith("I"):
        traits.append("depth=16")
        grey_HW, key = np.asarray(image), image.info.get("transparency")
        if isinstance(key, int):
            alpha_HW = (grey_HW != key).astype(np.float32)
        grey_HW = grey_HW.astype(np.float32) * (255 if image.mode == "F" else 1 / 257)
        pixels_HWC = np.repeat(np.clip(np.rint(np.nan_to_num(grey_HW)), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    else:
        palette_mode = image.palette.mode if image.mode == "P" and image.palette else ""
        if image.mode in ALPHA_MODES or "transparency" in image.info or palette_mode == "RGBA":
            straight = image.convert("LA") if image.mode == "La" else image
            image, icc = straight.convert("RGBA"), image.info.get("icc_profile")
            alpha_HW = np.asarray(image.getchannel("A"), np.float32) / 255
            image = image.convert("RGB")
            image.info["icc_profile"] = icc
        converted = _by_profile(image)
        if converted is not None:
            traits.append("icc=srgb")
        elif image.mode == "LAB":
            traits.append("lab")
            converted = _from_lab(image)
        pixels_HWC = np.asarray(converted or image.convert("RGB"))
    if alpha_HW is not None and alpha_HW.min(initial=1.0) < 1:
        traits.append("alpha")
        pixels_HWC = over_white(pixels_HWC, alpha_HW)
    return pixels_HWC, traits


def over_white(pixels_HWC: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    """Pixels of any unsigned type, whose largest value is white, over white. alpha_HW: 0 to 1."""
    white = np.iinfo(pixels_HWC.dtype).max
    mixed_HWC = white + (pixels_HWC.astype(np.float32) - white) * alpha_HW[..., None]
    return np.rint(mixed_HWC).astype(pixels_HWC.dtype)


def _from_lab(image: Any) -> Any:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")


def _by_profile(image: Any) -> Any | None:
    """The image in sRGB by the colour profile in its file, relative colorimetric; None: it needs or has none."""
    from PIL import Image, ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return None
    image = image.convert("RGB") if image.mode in ("P", "1", "RGBX", "HSV", "YCbCr") else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, srgb, image.mode, "RGB", renderingIntent=intent)
        if image.mode in ("L", "RGB"):
            steps = np.linspace(0, 255, 9).round().astype(np.uint8)
            grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
            sample = Image.fromarray(grid).convert(image.mode)
            plain, shown = sample.convert("RGB"), ImageCms.applyTransform(sample, transform)
            if abs(np.asarray(plain, int) - np.asarray(shown, int)).max() <= NEAR:
                return None
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
