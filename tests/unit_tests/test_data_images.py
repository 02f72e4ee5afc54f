"""Every mode of Pillow to RGB, by pixels; animations as clips with their own times."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from titan_video.config.job_config import Source
from titan_video.ingest.decode.colour import MediaPolicy
from titan_video.ingest.decode.images import rgb
from titan_video.ingest.decode.video import probe, read_image
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import read_frames

RED, GREEN = (200, 50, 25), (30, 140, 70)
LEFT, RIGHT = (12, 8), (12, 24)  # pixels of the two halves of a picture


def two(left, right, mode="RGB"):
    image = Image.new(mode, (32, 24), left)
    image.paste(right, (16, 0, 32, 24))
    return image


def halves(image):
    pixels, traits = rgb(image)
    assert pixels.shape == (24, 32, 3) and pixels.dtype == np.uint8
    return [tuple(int(v) for v in pixels[at]) for at in (LEFT, RIGHT)], traits


def grey16(left, right, kind="<u2"):
    pixels = np.full((24, 32), left, kind)
    pixels[:, 16:] = right
    return pixels


def over_white(colour, alpha):
    return tuple(round(255 + (c - 255) * alpha / 255) for c in colour)


def lab_pixels():
    """CIE L*a*b* of the two colours, by littlecms from sRGB."""
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(two(RED, GREEN), ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    del image.info["icc_profile"]
    return image


def named_transparent(image, value):
    image.info["transparency"] = value
    return image


def palette_with_alpha():
    image = Image.frombytes("PA", (32, 24), (bytes([0, 128]) * 16 + bytes([1, 255]) * 16) * 24)
    image.putpalette([*RED, *GREEN])
    return image


HALF = over_white(RED, 128)
CASES = {
    "1": (two(0, 1, "1"), [(0,) * 3, (255,) * 3], []),
    "L": (two(50, 200, "L"), [(50,) * 3, (200,) * 3], []),
    "P": (two(RED, GREEN).quantize(4), [RED, GREEN], []),
    "RGB": (two(RED, GREEN), [RED, GREEN], []),
    "RGBX": (two((*RED, 0), (*GREEN, 9), "RGBX"), [RED, GREEN], []),
    "CMYK": (two(RED, GREEN).convert("CMYK"), [RED, GREEN], []),
    "YCbCr": (two(RED, GREEN).convert("YCbCr"), [RED, GREEN], []),
    "HSV": (two(RED, GREEN).convert("HSV"), [RED, GREEN], []),
    "LAB": (lab_pixels(), [RED, GREEN], ["lab"]),
    "LA": (two((50, 128), (200, 255), "LA"), [over_white((50,) * 3, 128), (200,) * 3], ["alpha"]),
    "La": (two((50, 128), (200, 255), "LA").convert("La"), [over_white((50,) * 3, 128), (200,) * 3], ["alpha"]),
    "PA": (palette_with_alpha(), [HALF, GREEN], ["alpha"]),
    "RGBA": (two((*RED, 128), (*GREEN, 255), "RGBA"), [HALF, GREEN], ["alpha"]),
    "RGBa": (two((*RED, 128), (*GREEN, 255), "RGBA").convert("RGBa"), [HALF, GREEN], ["alpha"]),
    "RGBA, opaque": (two((*RED, 255), (*GREEN, 255), "RGBA"), [RED, GREEN], []),
    "L with a transparent value": (named_transparent(two(50, 200, "L"), 50), [(255,) * 3, (200,) * 3], ["alpha"]),
    "RGB with a transparent value": (named_transparent(two(RED, GREEN), RED), [(255,) * 3, GREEN], ["alpha"]),
    "I;16": (Image.fromarray(grey16(10000, 51400)), [(39,) * 3, (200,) * 3], ["depth=16"]),
    "I;16B": (Image.fromarray(grey16(10000, 51400, ">u2")), [(39,) * 3, (200,) * 3], ["depth=16"]),
    "I;16 with a transparent value": (
        named_transparent(Image.fromarray(grey16(10000, 51400)), 10000),
        [(255,) * 3, (200,) * 3],
        ["depth=16", "alpha"],
    ),
    "I": (Image.fromarray(grey16(10000, 51400, "<i4")), [(39,) * 3, (200,) * 3], ["depth=16"]),
    "F": (Image.fromarray(grey16(0.2, 0.5, "<f4")), [(51,) * 3, (128,) * 3], ["depth=16"]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mode_has_one_conversion(name):
    image, expected, traits = CASES[name]
    found, found_traits = halves(image)
    assert abs(np.array(found) - expected).max() <= (3 if name == "LAB" else 2), found  # L*a*b* of 8 bits
    assert found_traits == traits


def test_a_palette_with_transparency():
    image = two((*RED, 0), (*GREEN, 255), "RGBA").quantize(4)
    found, traits = halves(image)
    assert image.mode == "P" and traits == ["alpha"]
    assert abs(np.array(found) - [(255,) * 3, GREEN]).max() <= 2


def wide_profile():
    """Of a display with the primaries of BT.2020 and a gamma of 2.2: an sRGB profile with other values in it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.find(b"rXYZ"), profile.find(b"gXYZ")
    for tag, other in ((red, green), (green, red)):  # the offsets in the table of tags: red and green are exchanged
        profile[tag : tag + 4] = b"gXYZ" if other == green else b"rXYZ"
    return bytes(profile)


def test_a_colour_profile_is_applied():
    image = two(RED, GREEN)
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert halves(image) == ([RED, GREEN], [])  # to pass through sRGB's own would cost a level here and there
    image.info["icc_profile"] = wide_profile()
    exchanged, traits = halves(image)
    assert traits == ["icc=srgb"]
    assert exchanged[0][1] > exchanged[0][0] and exchanged[1][0] > exchanged[1][1]
    image.info["icc_profile"] = b"no profile"
    assert halves(image) == ([RED, GREEN], [])


def write(folder, name, image, **kwargs):
    image.save(folder / name, **kwargs)
    (folder / name).with_suffix(".txt").write_text("a picture")
    return folder / name


def plan_in(folder, **policy):
    return make_plan(folder, [(1, 24, 32), (5, 24, 32)], 10, 0, folder / "cache", policy=MediaPolicy(**policy))


def shown(entry, frame=0):
    pixels = read_frames(entry)[:, frame].permute(1, 2, 0).numpy()
    return [tuple(int(v) for v in pixels[at]) for at in (LEFT, RIGHT)]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp"])
def test_all_formats_give_the_same(tmp_path, name):
    options = {"lossless": True} if name == "a.webp" else {}
    write(tmp_path, name, two((*RED, 128), (*GREEN, 255), "RGBA"), **options)
    (entry,) = plan_in(tmp_path).kept
    if name != "a.bmp":  # Pillow reads its fourth channel as padding
        assert entry.conversion == "alpha"
        assert abs(np.array(shown(entry)) - [HALF, GREEN]).max() <= 1
    (before,) = plan_in(tmp_path, rules=1).kept
    assert before.conversion == "" and (before.content != entry.content) == (name != "a.bmp")


def test_16_bit_png_is_scaled_and_not_clipped(tmp_path):
    path = write(tmp_path, "a.png", Image.fromarray(grey16(10000, 51400)))
    plan = plan_in(tmp_path)
    assert shown(plan.kept[0]) == [(39,) * 3, (200,) * 3]
    assert "converted, 16 bits scaled to 8: 1 file" in plan.summary()
    assert read_image(str(path), (1, 24, 32))[:, 0, 12, 8].tolist() == [39] * 3
    assert shown(plan_in(tmp_path, rules=1).kept[0])[1] == (255,) * 3


def test_plain_images_keep_their_identity(tmp_path):
    write(tmp_path, "a.png", two(RED, GREEN))
    write(tmp_path, "b.png", two((*RED, 255), (*GREEN, 255), "RGBA"))
    write(tmp_path, "c.jpg", two(RED, GREEN).convert("CMYK"))
    now, before = plan_in(tmp_path), plan_in(tmp_path, rules=1)
    assert [e.content for e in now.kept] == [e.content for e in before.kept] and len(now.kept) == 3


def test_the_orientation_comes_first(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    write(tmp_path, "a.png", two((*RED, 128), (*GREEN, 255), "RGBA"), exif=exif)
    found = probe(str(tmp_path / "a.png"))
    assert (found.width, found.height, found.colour) == (24, 32, "alpha")


def test_trusted_metadata_does_not_hide_the_mode(tmp_path):
    write(tmp_path, "a.png", two((*RED, 128), (*GREEN, 255), "RGBA"))
    write(tmp_path, "b.png", two(RED, GREEN))
    animation(tmp_path, "c.webp")
    rows = ["file_name,caption,width,height,num_frames,fps", *(f"{n},two,32,24,1,10" for n in ("a.png", "b.png"))]
    (tmp_path / "list.csv").write_text("\n".join([*rows, "c.webp,four,32,24,3,10"]) + "\n")
    source = Source(path=str(tmp_path / "list.csv"), trust_metadata=True)
    one, other, clip = make_plan([source], [(1, 24, 32), (3, 24, 32)], 10, 0, tmp_path / "cache").kept
    with pytest.raises(ValueError, match="wrong metadata: with trust_metadata its colour is not read"):
        read_frames(one)
    assert shown(other) == [RED, GREEN] and shown(clip, 2)[0] == COLOURS[2][:3]


# ---- animations ----

DURATIONS = [100, 300, 200, 400]
COLOURS = [(200, 50, 25, 255), (30, 140, 70, 255), (20, 20, 200, 255), (0, 0, 0, 0)]


def animation(folder, name, durations=tuple(DURATIONS), **kwargs):
    frames = [Image.new("RGBA", (32, 24), c) for c in COLOURS[: len(durations)]]
    options = {"lossless": True} if name.endswith("webp") else {}
    return write(
        folder, name, frames[0], save_all=True, append_images=frames[1:], duration=list(durations), **options, **kwargs
    )


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif"])
def test_an_animation_is_a_clip_with_its_own_times(tmp_path, name):
    path = animation(tmp_path, name, disposal=2) if name == "a.gif" else animation(tmp_path, name)
    times, end = probe(str(path)).seconds()
    assert times == pytest.approx([0, 0.1, 0.4, 0.6]) and end == pytest.approx(1.0)
    (entry,) = plan_in(tmp_path).kept
    assert (entry.num_frames, entry.source_frames, entry.bucket[0]) == (10, 4, 5)
    expected = [COLOURS[0][:3], *[COLOURS[1][:3]] * 3, COLOURS[2][:3]]
    assert abs(np.array([shown(entry, k)[0] for k in range(5)]) - expected).max() <= 4
    last = make_plan(tmp_path, [(9, 24, 32)], 10, 0, tmp_path / "cache").kept[0]
    if name != "a.gif":  # in which Pillow writes no frame that is empty
        assert shown(last, 8) == [(255,) * 3] * 2  # transparent, so white
    still = plan_in(tmp_path, rules=1).kept[0]
    assert still.bucket[0] == (5 if name == "a.gif" else 1)  # FFmpeg has always read GIF


def test_an_apng_with_a_picture_for_other_readers(tmp_path):
    animation(tmp_path, "a.png", default_image=True)
    (entry,) = plan_in(tmp_path).kept
    assert entry.source_frames == 3 and shown(entry)[0] == COLOURS[1][:3]  # the first is not of the animation


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_an_animation_of_one_frame_is_a_still(tmp_path, name):
    animation(tmp_path, name, DURATIONS[:1])
    (entry,) = plan_in(tmp_path).kept
    assert entry.bucket[0] == 1 and entry.pts == (0,)


def test_a_short_animation_is_no_still(tmp_path):
    animation(tmp_path, "a.webp", DURATIONS[:2])
    write(tmp_path, "b.png", two(RED, GREEN))
    assert [e.reason.partition(":")[0] for e in plan_in(tmp_path).entries] == ["would be a still", ""]


def test_transparent_parts_of_a_gif_are_white(tmp_path):
    frames = [two((*RED, 255), (0, 0, 0, 0), "RGBA") for _ in range(6)]
    for k, frame in enumerate(frames):
        frame.paste((*GREEN, 255), (0, 0, 1 + k, 3))
    write(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:], duration=100, disposal=2)
    (entry,) = plan_in(tmp_path).kept
    assert entry.conversion == "" and [shown(entry, k) for k in range(5)] == [[RED, (255,) * 3]] * 5


def test_a_jpeg_with_several_pictures_is_a_still(tmp_path):
    write(tmp_path, "a.jpg", two(RED, GREEN), format="MPO", save_all=True, append_images=[two(GREEN, RED)])
    (entry,) = plan_in(tmp_path).kept
    assert entry.bucket[0] == 1 and abs(np.array(shown(entry)) - [RED, GREEN]).max() < 12


def test_frames_without_a_time_last_a_tenth_of_a_second(tmp_path):
    """As browsers show them."""
    animation(tmp_path, "a.webp", [0, 10, 20])
    times, end = probe(str(tmp_path / "a.webp")).seconds()
    assert times == pytest.approx([0, 0.1, 0.2]) and end == pytest.approx(0.22)


def test_a_cut_animation_is_corrupt(tmp_path):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)) for _ in range(6)]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {})):
        buffer = io.BytesIO()
        form = name[2:].upper()
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=100, **options)
        (tmp_path / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 6 // 10])
        assert probe(str(tmp_path / name)).reason.startswith("corrupt: "), name
