"""Data set TOMLs of other trainers: each key is mapped or named, and what comes out can be planned."""

import json

import pytest
from PIL import Image

from tests.unit_tests.data_clips import captioned
from titan_video.config.check import check
from titan_video.config.job_config import Source
from titan_video.config.manager import parse
from titan_video.config.values import tomllib
from titan_video.ingest import __main__ as command
from titan_video.ingest.importers import UNSUPPORTED, import_file, toml_text
from titan_video.ingest.plan.build import build_plan

DIFFUSION_PIPE = """
resolutions = [64, [128, 32]]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 3
frame_buckets = [1, 10]
cache_shuffle_num = 3
cache_shuffle_delimiter = ", "
shuffle_tags = true
shuffle_metadata = false
online_captions = true
subsample_ratio = 0.5
skip_empty_caption = false
micro_batch_size_per_gpu = 4
image_micro_batch_size_per_gpu = 8
video_clip_mode = "single_middle"
caption_prefix = "film, "
frame_bucket = [1]
[[directory]]
path = "{0}/a"
num_repeats = 2.5
mask_path = "masks"
default_mask_file = "mask.png"
control_path = "control"
[[directory]]
path = "{0}/b"
caption_prefix = "drawing, "
num_repeat = 3
"""
MUSUBI_TUNER = """
[general]
resolution = [64, 40]
caption_extension = ".txt"
batch_size = 2
num_repeats = 3
enable_bucket = false
bucket_no_upscale = true
skip_corrupted_cache = true
[[datasets]]
video_directory = "{0}/a"
cache_directory = "{0}/cache"
control_directory = "{0}/control"
target_frames = [1, 11]
frame_extraction = "slide"
frame_stride = 6
frame_sample = 3
max_frames = 100
source_fps = 24.0
fp_latent_window_size = 9
[[datasets]]
image_jsonl_file = "{0}/rows.jsonl"
resolution = 128
enable_bucket = true
num_repeats = 1
batch_size = 4
multiple_target = false
fp_1f_clean_indices = [0]
fp_1f_target_index = 9
fp_1f_no_post = false
no_resize_control = true
control_resolution = [64, 64]
flux_kontext_no_resize_control = true
qwen_image_edit_no_resize_control = true
qwen_image_edit_control_resolution = 64
debug_dataset = true
audio = true
"""


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        captioned(tmp_path / name / "clip.mp4", "a clip", count=30, fps=16)
    Image.new("RGB", (60, 60)).save(tmp_path / "image.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image_path": "image.png", "caption": "an image"}))
    return tmp_path


def write(folder, text):
    file = folder / "other.toml"
    file.write_text(text.replace("{0}", str(folder)))
    return file


def imported(folder, text):
    made, lines = import_file(write(folder, text))
    config = parse(made)
    check(config, 1, files=False)
    return config, lines


def has_line(lines, *words):
    return any(all(word in line for word in words) for line in lines)


def test_diffusion_pipe(folder):
    config, lines = imported(folder, DIFFUSION_PIPE)
    d = config.data
    assert (d.resolutions, d.frame_buckets, d.min_ar, d.max_ar, d.num_ar_buckets, d.buckets) == (
        (64, 64),
        (1, 9),
        0.5,
        2.0,
        3,
        (),
    )
    assert d.source == (
        Source(f"{folder}/a", num_repeats=2, caption_prefix="film, "),
        Source(f"{folder}/b", caption_prefix="drawing, "),
    )
    assert (d.frame_extraction, d.uniform_clips, config.training.local_batch_size) == ("uniform", 1, 4)
    kept = build_plan(d, folder / "cache", temporal_stride=4).kept
    assert [(e.caption, e.bucket[0], e.start, e.repeats) for e in kept] == [
        ("film, a clip", 9, 10, 2),
        ("drawing, a clip", 9, 10, 1),
    ]
    assert has_line(lines, "frame_bucket:", "unknown key") and has_line(
        lines, "[[directory]] 2: num_repeat: an unknown key"
    )
    assert (
        has_line(lines, "num_repeats", "2.5 becomes 2")
        and has_line(lines, "10 becomes 9")
        and has_line(lines, "skip_empty_caption")
    )
    for key in (
        "mask_path",
        "default_mask_file",
        "control_path",
        "cache_shuffle_num",
        "cache_shuffle_delimiter",
        "shuffle_tags",
        "online_captions",
        "shuffle_metadata",
        "subsample_ratio",
        "image_micro_batch_size_per_gpu",
    ):
        assert has_line(lines, f"{key}: not supported: {UNSUPPORTED[key]}"), key


def test_musubi_tuner(folder):
    config, lines = imported(folder, MUSUBI_TUNER)
    d = config.data
    assert (
        d.buckets[:2] == ((1, 32, 64), (9, 32, 64))
        and {b[0] for b in d.buckets} == {1, 9}
        and (1, 128, 128) in d.buckets
    )
    assert d.source == (
        Source(f"{folder}/a", num_repeats=3, frame_extraction="slide", source_fps=24.0),
        Source(f"{folder}/rows.jsonl"),
    )
    assert (d.slide_stride, d.uniform_clips, config.training.local_batch_size) == (6, 4, 2)
    kept = build_plan(d, folder / "cache", temporal_stride=4).kept
    assert [(e.caption, e.bucket, e.start, e.repeats) for e in kept] == [
        *(("a clip", (9, 32, 64), start, 3) for start in (0, 6, 12, 18)),
        ("an image", (1, 128, 128), 0, 1),
    ]
    assert has_line(lines, "resolution", "64 x 40 becomes 64 x 32")
    assert (
        has_line(lines, "audio: an unknown key")
        and has_line(lines, "batch_size", "one for all")
        and has_line(lines, "11 becomes 9")
    )
    for key in (
        "bucket_no_upscale",
        "skip_corrupted_cache",
        "cache_directory",
        "control_directory",
        "multiple_target",
        "fp_latent_window_size",
        "fp_1f_clean_indices",
        "fp_1f_target_index",
        "fp_1f_no_post",
        "no_resize_control",
        "control_resolution",
        "debug_dataset",
        "flux_kontext_no_resize_control",
        "qwen_image_edit_no_resize_control",
        "qwen_image_edit_control_resolution",
    ):
        assert has_line(lines, f"{key}: not supported: {UNSUPPORTED[key]}"), key


def test_other_forms(folder):
    sizes = 'size_buckets = [[64, 32, 9], [30, 64, 1], [64, 32, 7]]\n[[directory]]\npath = "{0}/a"\n'
    assert imported(folder, sizes)[0].data.buckets == ((9, 32, 64), (1, 64, 32), (5, 32, 64))
    ratios = (
        "resolutions = [128]\nenable_ar_bucket = true\nar_buckets = [[64, 32], [64, 64]]\n[[directory]]\npath = "
        '"{0}/a"\n'
    )
    assert imported(folder, ratios)[0].data.buckets == ((1, 96, 192), (1, 128, 128))
    square = (
        'resolutions = [[192, 96]]\n[[directory]]\npath = "{0}/a"\n[[directory]]\npath = "{0}/b"\nresolutions = '
        "[64]\nframe_buckets = [5]\n"
    )
    config, lines = imported(folder, square)
    assert config.data.buckets == ((1, 128, 128), (1, 64, 64), (5, 64, 64)) and has_line(
        lines, "each source had its own"
    )
    full = (
        '[[datasets]]\nvideo_directory = "{0}/a"\nframe_extraction = "full"\nmax_frames = '
        '40\n[[datasets]]\nvideo_directory = "{0}/b"\n'
        'frame_extraction = "uniform"\nframe_sample = 2\ntarget_frames = [5]\n'
    )
    config, lines = imported(folder, full)
    assert config.data.buckets == ((1, 544, 960), (37, 544, 960), (5, 544, 960)) and config.data.uniform_clips == 2
    assert [e.bucket[0] for e in build_plan(config.data, folder / "cache", temporal_stride=4).kept] == [
        29,
        5,
        5,
    ] and has_line(lines, "every frame was taken")


WRONG = [
    ('dataset = "data.toml"', "it names one: data.toml"),
    ("[[directory]]\npath = 3\nresolutions = [512]", "path: given 3"),
    ("resolutions = [512]\n[[directory]]\nnum_repeats = 2", "without a path"),
    ('[[directory]]\npath = "x"', "neither resolutions nor size_buckets"),
    ("[[datasets]]\ntarget_frames = [1]", "must have one of video_directory"),
    ("[[datasets", "not valid TOML"),
    ('[[datasets]]\nvideo_directory = "x"\nframe_extraction = "tail"', "must be head, chunk"),
    ('[[directory]]\npath = "x"\nresolutions = [8]', "data.resolutions"),
    ('video_clip_mode = "tail"\nresolutions = [64]\n[[directory]]\npath = "x"', "must be single_beginning"),
]


@pytest.mark.parametrize("text, words", WRONG)
def test_what_cannot_be_imported(tmp_path, text, words):
    (tmp_path / "other.toml").write_text(text)
    with pytest.raises(ValueError) as e:
        import_file(tmp_path / "other.toml")
    assert words in str(e.value)


def test_the_command(folder, capsys):
    (folder / "other.toml").write_text(DIFFUSION_PIPE.replace("{0}", str(folder)))
    command.main(["import", str(folder / "other.toml")])
    printed = capsys.readouterr()
    assert parse(printed.out).data.source[0].path == f"{folder}/a" and "mask_path: not supported" in printed.err
    command.main(["import", str(folder / "other.toml"), str(folder / "ours.toml")])
    assert (folder / "ours.toml").read_text() == printed.out
    command.main(
        [
            "plan",
            str(folder / "ours.toml"),
            "--job.dump_folder",
            str(folder / "out"),
            "--encoder.name",
            "debug",
            "--encoder.max_text_length",
            "16",
        ]
    )
    assert "2 kept" in capsys.readouterr().out
    (folder / "run.toml").write_text('[data]\npath = "embedded:shapes-9"\n[encoder]\nname = "debug"\n')
    files = [str(folder / "run.toml"), "--data.file", str(folder / "ours.toml")]
    command.main(["plan", *files, "--job.dump_folder", str(folder / "out"), "--encoder.max_text_length", "16"])
    assert "2 kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*no such file"):
        command.main(["import", str(folder / "gone.toml")])
    with pytest.raises(SystemExit, match="nowhere/ours.toml: cannot write the configuration"):
        command.main(["import", str(folder / "other.toml"), str(folder / "nowhere" / "ours.toml")])
    with pytest.raises(SystemExit, match="error: more: import takes one file"):
        command.main(["import", str(folder / "other.toml"), str(folder / "ours.toml"), "more"])


def test_an_array_is_one_line(folder):
    text = import_file(write(folder, MUSUBI_TUNER))[0]
    assert "buckets = [[1, 32, 64], [9, 32, 64], " in text and text.count("[[data.source]]") == 2
    names = {"data": {"path": 'a "b" \\c é\x7f', "source": [], "x": [True, 1.5, ["a,b", 1e-05]]}}
    assert tomllib.loads(toml_text(names)) == names
    for line in text.splitlines():
        assert line == "" or line.startswith("[") or " = " in line
