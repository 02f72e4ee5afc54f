"""A folder of clips as people have them on a phone goes from the plan to weights in diffusers by the commands of the
recipe alone, and the plan says what became of every file.
"""

import json
import shlex
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from tests.integration_tests.test_docs import clone, losses, one_command, run_forked  # noqa: F401 - a fixture
from tests.unit_tests.data_clips import flat_frames, write_clip, write_patches

SIZE = {"count": 40, "fps": 30, "width": 96, "height": 54}
WAVES, GULL = "2024-07 Urlaub/VID 1 Grüße 🌊.mp4", "2024-07 Urlaub/Möwe.mp4"
SMALL = " --training.steps 4 --validation.num_videos 1 --validation.sample_steps 1"  # behind the recipe's command
BT2020 = 0.2627, 0.0593

# File: its caption, source frames, size as shown, frames of its bucket.
KEPT = {
    "IMG_0001.MOV": ("a beach,\nthe camera pans", 10, (96, 54), 5),
    "IMG_0002.MOV": ("a child runs", 40, (54, 96), 5),
    WAVES: ("waves 🌊", 40, (96, 54), 5),
    GULL: ("a gull flies", 40, (96, 54), 5),
    "2024-07 Urlaub/utf16.mp4": ("eine Möwe", 40, (96, 54), 5),
    "IMG_0005.JPG": ("a still", 1, (54, 96), 1),
    "IMG_0007.MOV": ("a Live Photo", 40, (96, 54), 5),
    "IMG_0008.JPG": ("both halves", 1, (96, 54), 1),
    "IMG_0008.MOV": ("both halves", 40, (96, 54), 5),
    "sticker.webp": ("a sticker blinks", 30, (96, 54), 5),
}
DROPPED = {
    "no caption.mp4": "no caption: no caption.txt is missing",
    "latin.mp4": "unreadable caption: latin.txt is not UTF-8 (line 1, byte 6 is 0xF6); save it as UTF-8",
    "short.mp4": "would be a still: 1 frame at 8 fps, the shortest bucket of more than one frame takes 5",
    "cut.mp4": "corrupt: it cannot be opened as a video, as it was cut off, is damaged, or is something else: ",
    "streamed.mp4": "corrupt: broken off after ",
    "IMG_0009.MP4": "corrupt: the file is empty",
    "IMG_0007.HEIC": "not read: files of the suffix .heic are not read; convert it: heif-convert 'IMG_0007.HEIC' ",
    "raw.dng": "not read: files of the suffix .dng are not read; convert it: darktable-cli 'raw.dng' 'raw.png'",
    "lonely.txt": "caption without a clip: no video or image has this name",
}
NOTES = (
    "1 names are spelled in another way: 'Möwe.txt' is taken for ",
    "1 captions belong to several clips: IMG_0008.txt of IMG_0008.JPG and IMG_0008.MOV",
    "3 names in phone_clips begin with a dot, and are not looked at: .DS_Store, ._IMG_0001.MOV, .trashed-1.mp4",
    "3 files in phone_clips are neither clips nor captions, and not read: IMG_0007.AAE, Thumbs.db, notes.csv",
)


def write_hlg(path):
    """HEVC of 10 bits with the tags of a phone's HDR."""
    tags = "log-level=none:colormatrix=9:colorprim=9:transfer=18"
    options = {"x265-params": tags, "preset": "ultrafast"}
    signals = (0.5, 0.3, 0.2), (0.3, 0.5, 0.4)
    write_patches(path, signals, BT2020, "yuv420p10le", (9, 9, 18, 1), "libx265", width=96, height=54, options=options)


def write_captions(folder):
    texts = {name: caption.encode() for name, (caption, *_) in KEPT.items()}
    texts |= dict.fromkeys(DROPPED.keys() - {"no caption.mp4", "IMG_0007.HEIC", "raw.dng"}, b"a clip")
    texts["IMG_0001.MOV"] = b"\xef\xbb\xbfa beach,\r\nthe camera pans\r\n"
    texts["2024-07 Urlaub/utf16.mp4"] = "eine Möwe".encode("utf-16")
    texts["latin.mp4"] = "eine Möwe".encode("latin-1")
    del texts[GULL]
    for name, text in texts.items():
        (folder / name).with_suffix(".txt").write_bytes(text)
    (folder / GULL).with_name(unicodedata.normalize("NFD", "Möwe.txt")).write_text("a gull flies")  # as a Mac writes it


def write_phone_clips(folder):
    (folder / "2024-07 Urlaub").mkdir(parents=True)
    write_hlg(folder / "IMG_0001.MOV")
    write_clip(folder / "IMG_0002.MOV", rotation=-90, **SIZE)
    write_clip(folder / WAVES, times=[33 * k + 7 * (k % 3) for k in range(40)], **SIZE)
    plain = (GULL, "2024-07 Urlaub/utf16.mp4", "IMG_0007.MOV", "IMG_0008.MOV", "no caption.mp4", "latin.mp4")
    for name in (*plain, ".trashed-1.mp4", "cut.mp4"):
        write_clip(folder / name, **SIZE)
    write_clip(folder / "streamed.mp4", options={"movflags": "faststart"}, **SIZE)
    write_clip(folder / "short.mp4", **{**SIZE, "count": 3})
    for name, share in (("cut.mp4", 0.5), ("streamed.mp4", 0.7)):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])
    (folder / "IMG_0009.MP4").write_bytes(b"")
    images = [Image.fromarray(image) for image in flat_frames(30, 96, 54)]
    images[0].save(folder / "sticker.webp", save_all=True, append_images=images[1:], duration=33)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    images[0].save(folder / "IMG_0005.JPG", exif=exif)
    images[0].save(folder / "IMG_0008.JPG")
    for name in ("IMG_0007.HEIC", "raw.dng", "IMG_0007.AAE", "Thumbs.db", ".DS_Store", "._IMG_0001.MOV"):
        (folder / name).write_bytes(b"\0\1 not looked into")
    (folder / "notes.csv").write_text("date,place\n2024-07-01,Sylt\n")
    write_captions(folder)


def check_every_file(folder, rows, output):
    """Each file is in a row, is the caption of a clip of a row, or is named in a note."""
    stems = {Path(row["path"]).with_suffix("") for row in rows}
    notes = unicodedata.normalize("NFC", "".join(line for line in output.splitlines() if line.startswith("  note: ")))
    for file in folder.rglob("*"):
        name = Path(unicodedata.normalize("NFC", str(file.relative_to(folder))))
        is_known = folder.name / name in {Path(row["path"]) for row in rows}
        is_caption = file.suffix == ".txt" and folder.name / name.with_suffix("") in stems
        assert file.is_dir() or is_known or is_caption or file.name in notes, f"not a word of {name}"


@pytest.mark.timeout(300)
def test_from_a_phone_to_diffusers(clone, monkeypatch, capsys):  # noqa: F811
    page, folder = "docs/recipe.md", clone / "phone_clips"
    write_phone_clips(folder)

    output = run_forked(one_command(page, "python -m titan_video.data plan train_configs/debug.toml"), clone)
    rows = [json.loads(line) for line in (clone / "outputs/phone/data_plan.jsonl").read_text().splitlines()]
    found = {str(Path(row["path"]).relative_to("phone_clips")): row for row in rows}
    assert found.keys() == KEPT.keys() | DROPPED.keys()
    for name, (caption, count, size, frames) in KEPT.items():
        row = found[name]
        assert row["kept"] and row["captions"] == [caption], (name, row["reason"])
        assert (row["source_frames"], (row["width"], row["height"]), row["bucket"][0]) == (count, size, frames), name
        is_upright = row["bucket"][1] > row["bucket"][2]
        assert is_upright == (size[1] > size[0]) or frames == 1, name
    for name, reason in DROPPED.items():
        assert not found[name]["kept"] and found[name]["reason"].startswith(reason), (name, found[name]["reason"])
        assert found[name]["reason"].partition(": ")[2] in output
    converted = [name for name, row in found.items() if row["conversion"]]
    assert converted == ["IMG_0001.MOV"]
    assert "converted, HDR (HLG, bt2020) tone-mapped to SDR: 1 file\n    phone_clips/IMG_0001.MOV" in output
    assert "bucket 1 x 64 x 64 (frames, height, width): 2 clips" in output
    for note in NOTES:
        assert note in unicodedata.normalize("NFC", output), output
    check_every_file(folder, rows, output)

    command = one_command(page, "CONFIG_FILE=train_configs/debug.toml ./run_train.sh --data.path phone")
    output = run_forked(command + SMALL, clone)
    assert "19 found, 10 kept, 9 dropped" in output and "of 10 clips are held out" in output
    assert len(losses(clone / "outputs/phone")) == 4
    python, c, code = shlex.split(one_command(page, 'python -c "from diffusers'))
    assert (python, c) == ("python", "-c")
    monkeypatch.chdir(clone)
    capsys.readouterr()
    exec(code, {})
    assert "1226944 parameters" in capsys.readouterr().out
