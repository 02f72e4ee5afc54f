"""Colour of videos, by two patches whose sRGB is known: as coded in every way, they come out within some levels."""

import numpy as np
import pytest

from tests.unit_tests.data_clips import write_clip, write_patches
from titan_video.config.job_config import Data, Source
from titan_video.ingest.decode.colour import MediaPolicy, describe, linear, matrix_to_bt709, settle, tone
from titan_video.ingest.decode.video import Reading, decode, probe
from titan_video.ingest.plan.build import build_plan, make_plan
from titan_video.ingest.plan.entries import read_frames

SRGB = np.array([(200, 50, 25), (30, 140, 70)])
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
# ITU-R BT.2087, and SMPTE EG 432-1 with sRGB's white: linear BT.709 to the wider primaries.
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9105]])


def srgb_light(levels):
    v = np.asarray(levels) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def pq(nits):
    y = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light):
    high = 0.17883277 * np.log(12 * np.maximum(light, 1 / 12) - 0.28466892) + 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), high)


def light709(levels):
    v = np.asarray(levels) / 255
    return np.where(v < 0.081, v / 4.5, ((v + 0.099) / 1.099) ** (1 / 0.45))


def patches(plan):
    """The colours of the left and the right half of the middle frame, of a plan's only clip."""
    (entry,) = plan.kept
    frame = read_frames(entry)[:, 2].permute(1, 2, 0).numpy().astype(int)
    h, w = frame.shape[:2]
    return np.stack([frame[h // 2, w // 4], frame[h // 2, 3 * w // 4]])


def plan_in(path, **policy):
    return make_plan(path.parent, [(5, 48, 64)], 10, 0, path.parent / "cache", policy=MediaPolicy(**policy))


def assert_near(found, expected=SRGB, levels=4):
    assert abs(found - expected).max() <= levels, found.tolist()


# ---- HDR ----


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p10le", "yuv444p12le", "yuv420p12le"])
@pytest.mark.parametrize("curve", ["PQ", "HLG"])
def test_hdr_is_tone_mapped(tmp_path, curve, pix_fmt):
    light = srgb_light(SRGB) @ TO_2020.T
    signals, transfer = (pq(light * 203), 16) if curve == "PQ" else (hlg(light * 0.265), 18)
    plan = plan_in(write_patches(tmp_path / "a.mkv", signals, BT2020, pix_fmt, tags=(9, 9, transfer, 1)))
    assert_near(patches(plan))
    assert f"converted, HDR ({curve}, bt2020) tone-mapped to SDR: 1 file\n    {tmp_path / 'a.mkv'}" in plan.summary()
    with pytest.raises(ValueError, match=rf"(?s)dropped, HDR: 1\n.*a.mkv: transfer function {curve}"):
        plan_in(tmp_path / "a.mkv", hdr="drop")


@pytest.mark.parametrize("curve", ["PQ", "HLG"])
def test_white_and_highlights_of_hdr(tmp_path, curve):
    """The white of SDR loses at most 8 levels; what is brighter stays brighter, up to 1000 nit."""
    light = np.array([[1.0] * 3, [2.5] * 3])
    signals, transfer = (pq(light * 203), 16) if curve == "PQ" else (hlg(light * 0.265), 18)
    white, highlight = patches(
        plan_in(write_patches(tmp_path / "a.mkv", signals, BT2020, "yuv444p10le", (9, 9, transfer, 1)))
    )
    assert 247 <= white.min() and white.max() <= 249 and 251 <= highlight.min() and highlight.max() <= 254


def test_hdr_of_a_phone(tmp_path):
    """HEVC in mp4: with tags in the bitstream, and in the container alone, which libavcodec forgets."""
    light = srgb_light(SRGB) @ TO_2020.T
    options = {"x265-params": "log-level=none", "crf": "4", "preset": "ultrafast"}
    kwargs = {"codec": "libx265", "options": options}
    for name, tags in (("both", (9, 9, 18, 1)), ("none", (2, 2, 2, 0))):
        (tmp_path / name).mkdir()
        write_patches(tmp_path / name / "a.mp4", hlg(light * 0.265), BT2020, "yuv420p10le", tags, **kwargs)
    assert_near(patches(plan_in(tmp_path / "both" / "a.mp4")), levels=6)
    remux_with_tags(tmp_path / "none" / "a.mp4", (9, 9, 18))
    plan = plan_in(tmp_path / "none" / "a.mp4")
    assert plan.kept[0].conversion == "matrix=bt2020nc transfer=arib-std-b67 primaries=bt2020"
    assert_near(patches(plan), levels=6)


def remux_with_tags(path, tags):
    import av

    other = path.with_name("other.mp4")
    with av.open(str(path)) as source, av.open(str(other), "w", options={"movflags": "write_colr"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = tags
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    other.replace(path)


def test_the_tone_curve_keeps_what_sdr_can_show():
    """Identity up to 0.9, continuous slope, 1 at 1000 nit; white within 8 levels."""
    light = np.linspace(0, 1000 / 203, 100_000)
    shown = tone(light)
    assert np.array_equal(shown[light <= 0.9], light[light <= 0.9]) and shown[-1] == pytest.approx(1, abs=1e-4)
    slope = np.diff(shown) / np.diff(light)
    assert slope.min() > 0 and abs(np.diff(slope)).max() < 0.01
    assert srgb_light(247) < tone(np.array([1.0]))[0] < 1


def test_curves_at_their_published_points():
    assert linear(np.array([pq(203.0), pq(1000.0), 1.0]), "smpte2084") == pytest.approx([1, 1000 / 203, 10_000 / 203])
    assert linear(np.array([0, 0.5, 0.75, 1.0]), "arib-std-b67") == pytest.approx([0, 0.3145, 1, 3.774], rel=1e-3)
    assert np.linalg.inv(matrix_to_bt709("bt2020")) == pytest.approx(TO_2020, abs=2e-4)
    assert np.linalg.inv(matrix_to_bt709("smpte432")) == pytest.approx(TO_P3, abs=2e-4)
    for primaries in ("bt470m", "smpte431"):
        assert matrix_to_bt709(primaries).sum(1) == pytest.approx(np.ones(3), abs=1e-6)  # white stays white


# ---- SDR ----


@pytest.mark.parametrize("transfer", [14, 1, 13])
@pytest.mark.parametrize("primaries, to, luma, matrix", [(9, TO_2020, BT2020, 9), (12, TO_P3, BT709, 1)])
def test_wide_gamuts(tmp_path, primaries, to, luma, matrix, transfer):
    wide = (srgb_light(SRGB) if transfer == 13 else light709(SRGB)) @ to.T
    as_srgb = np.where(wide <= 0.0031308, 12.92 * wide, 1.055 * wide ** (1 / 2.4) - 0.055)
    as_709 = np.where(wide < 0.018, 4.5 * wide, 1.099 * wide**0.45 - 0.099)
    signals = as_srgb if transfer == 13 else as_709
    plan = plan_in(write_patches(tmp_path / "a.mkv", signals, luma, "yuv444p10le", (matrix, primaries, transfer, 1)))
    assert_near(patches(plan))
    assert "converted to BT.709: 1 file" in plan.summary()


@pytest.mark.parametrize(
    "luma, tags",
    [(BT709, (1, 1, 1, 1)), (BT709, (1, 1, 1, 2)), (BT601, (5, 5, 6, 1)), (BT601, (6, 6, 6, 2)), (BT601, (2, 2, 2, 0))],
)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p10le"])
def test_plain_video_is_left_to_libswscale(tmp_path, luma, tags, pix_fmt):
    """Matrices and ranges as tagged; nothing is added to the identity of such clips."""
    plan = plan_in(write_patches(tmp_path / "a.mkv", SRGB / 255, luma, pix_fmt, tags))
    assert_near(patches(plan))
    assert plan.kept[0].conversion == "" and "converted" not in plan.summary()
    assert plan.kept[0].content == plan_in(tmp_path / "a.mkv", rules=1).kept[0].content


def test_plain_pixels_are_those_of_libswscale_alone(tmp_path):
    import av
    from av.video.reformatter import VideoReformatter

    path = write_clip(tmp_path / "a.mp4", count=5)
    found = probe(str(path))
    frames = decode(str(path), found.pts, found.width, found.height, (5, 32, 40))
    with av.open(str(path)) as container:
        for k, frame in enumerate(container.decode(video=0)):
            whole = VideoReformatter().reformat(frame, 43, 32, format="rgb24", interpolation="AREA").to_ndarray()
            assert np.array_equal(frames[:, k].permute(1, 2, 0).numpy(), whole[:, 1:41])


@pytest.mark.parametrize(
    "width, height, policy, is_hd",
    [
        (1280, 720, {}, True),
        (720, 1280, {}, True),  # portrait: the shorter side counts
        (960, 540, {}, False),
        (1280, 704, {}, False),
        (960, 540, {"bt709_lines": 540}, True),
        (1280, 720, {"bt709_lines": 0}, False),
        (1280, 720, {"rules": 1}, False),
    ],
)
def test_untagged_video_is_bt709_from_some_lines_on(width, height, policy, is_hd):
    assert settle("untagged", width, height, MediaPolicy(**policy)) == ("untagged=bt709" if is_hd else "", "")


def test_untagged_hd(tmp_path):
    path = write_patches(tmp_path / "a.mkv", SRGB / 255, BT709, width=1280, height=720)
    plan = plan_in(path)
    assert_near(patches(plan))
    assert "converted, untagged video of HD size read as BT.709: 1 file" in plan.summary()
    before = plan_in(path, rules=1)
    assert abs(patches(before) - SRGB).max() > 10 and before.kept[0].content != plan.kept[0].content
    rotated = write_clip(tmp_path / "r.mp4", count=3, width=1280, height=720, rotation=90)
    found = probe(str(rotated))
    assert (found.width, found.height, found.colour) == (720, 1280, "untagged")


@pytest.mark.parametrize("tags, name", [((8, 1, 1, 1), "matrix ycgco"), ((1, 8, 1, 1), "primaries film")])
def test_what_cannot_be_read_is_named(tmp_path, tags, name):
    with pytest.raises(ValueError, match=f"(?s)dropped, colour: 1.*the {name} .*is|are not read"):
        plan_in(write_patches(tmp_path / "a.mkv", SRGB / 255, BT709, tags=tags))


def test_grey_of_limited_range(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx265", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray"
        stream.options = {"x265-params": "log-level=none", "crf": "4"}
        for k in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64), 125, np.uint8), format="gray")
            frame.pts, frame.color_range = k, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "a.txt").write_text("grey")
    assert_near(patches(plan_in(tmp_path / "a.mkv")), np.full((2, 3), round((125 - 16) / 219 * 255)), levels=2)


def test_transparent_video_is_laid_over_white(tmp_path):
    import av

    image = np.zeros((48, 64, 4), np.uint8)
    image[:, :32] = 200, 50, 25, 255
    image[:, 32:] = 0, 0, 0, 128
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        for k in range(10):
            frame = av.VideoFrame.from_ndarray(image, format="rgba")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "a.txt").write_text("half there")
    plan = plan_in(tmp_path / "a.mov")
    assert_near(patches(plan), np.array([(200, 50, 25), (127, 127, 127)]), levels=2)
    assert "transparency laid over white: 1 file" in plan.summary()
    assert_near(patches(plan_in(tmp_path / "a.mov", rules=1)), np.array([(200, 50, 25), (0, 0, 0)]), levels=2)


@pytest.mark.parametrize("fourth, alpha", [(0, ""), (128, "alpha")])
def test_the_fourth_byte_of_an_avi_may_be_padding(tmp_path, fourth, alpha):
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgra"
        for k in range(10):
            image = np.full((48, 64, 4), (200, 50, 25, fourth), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgba")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "a.txt").write_text("one colour")
    plan = plan_in(tmp_path / "a.avi")
    assert plan.kept[0].conversion == alpha
    assert_near(patches(plan)[:1], np.array([(227, 152, 140) if alpha else SRGB[0]]), levels=2)


# ---- options ----


def test_trusted_metadata_does_not_hide_colour(tmp_path):
    light = srgb_light(SRGB) @ TO_2020.T
    write_patches(tmp_path / "a.mkv", pq(light * 203), BT2020, "yuv420p10le", tags=(9, 9, 16, 1))
    rows = "video,caption,width,height,num_frames,fps\na.mkv,two patches,64,48,10,10\n"
    (tmp_path / "list.csv").write_text(rows)
    source = Source(path=str(tmp_path / "list.csv"), trust_metadata=True)
    (entry,) = make_plan([source], [(5, 48, 64)], 10, 0, tmp_path / "cache").kept
    with pytest.raises(ValueError, match="wrong metadata: with trust_metadata its colour is not read .*HDR .PQ"):
        read_frames(entry)


def test_torchcodec_leaves_conversions_to_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr("titan_video.ingest.plan.build.require", lambda decoder: None)
    light = srgb_light(SRGB) @ TO_2020.T
    path = write_patches(tmp_path / "a.mkv", pq(light * 203), BT2020, "yuv420p10le", tags=(9, 9, 16, 1))
    plan = plan_in(path, decoder="torchcodec")
    assert plan.kept[0].decoder == "pyav"
    assert_near(patches(plan))


def test_the_options_of_data_reach_the_plan(tmp_path):
    write_patches(tmp_path / "a.mkv", SRGB / 255, BT709, width=640, height=360)
    section = Data(path=str(tmp_path), buckets=((5, 48, 64),), fps=10, num_workers=0, bt709_lines=360)
    assert build_plan(section, tmp_path / "cache", 4).kept[0].conversion == "untagged=bt709"


def test_a_conversion_is_used_only_where_frames_say_nothing(tmp_path):
    """The rest of a file whose metadata is trusted keeps its own tags."""
    path = write_patches(tmp_path / "a.mkv", SRGB / 255, BT601, tags=(5, 5, 6, 1))
    frames = decode(str(path), [0], 64, 48, (1, 48, 64), Reading(by_index=True, conversion="untagged=bt709"))
    assert abs(frames[:, 0, 24, 16].numpy().astype(int) - SRGB[0]).max() <= 4


def test_descriptions():
    assert describe("transfer=smpte2084 primaries=bt2020") == "HDR (PQ, bt2020) tone-mapped to SDR"
    assert describe("matrix=bt709 primaries=smpte432") == (
        "primaries smpte432 converted to BT.709; matrix bt709, which only the container or the primaries tell"
    )
