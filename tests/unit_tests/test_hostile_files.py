"""Files that others made: what leads out of a folder is not followed, what is no file is not opened, and what is too
large, too deep or absurd ends with a reason.
"""

import json
import os
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.fuzz_cases import EPS, PLAYLIST, _png
from tests.unit_tests.data_clips import captioned, write_clip
from titan_video.config import values
from titan_video.config.manager import ConfigError, parse, parse_args
from titan_video.data.latent_cache import LatentCache
from titan_video.encoders.folders import read_config, weight_files
from titan_video.ingest.decode.images import images
from titan_video.ingest.decode.video import UnusableClip, decode, probe
from titan_video.ingest.files import metadata
from titan_video.ingest.files.media import DecodeLimits, expand
from titan_video.ingest.files.sources import scan
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import read_frames
from titan_video.lora.names import read_adapters
from titan_video.models import get_args, get_spec
from titan_video.tools import bounded
from titan_video.weights.export.pipeline_folder import complete_pipeline
from titan_video.weights.formats import find_weights
from titan_video.weights.safetensors_io import read_header

DEEP = "[" * 100_000


# ---- a pipeline folder, an index, headers ----


def pipeline(folder, **more):
    """A diffusers folder with a transformer, a vae, and further parts in its index."""
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    parts = {"transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"], **more}
    (folder / "model_index.json").write_text(json.dumps(parts))
    return folder


@pytest.mark.parametrize("name", ["../victim", "/tmp", "..", ".", "a/b", "a\\b", "", "a\0b"])
def test_names_of_parts_stay_in_the_folder(tmp_path, caplog, name):
    source = pipeline(tmp_path / "source", **{name: ["diffusers", "Z"]})
    victim = tmp_path / "out" / "victim"
    victim.mkdir(parents=True)
    (victim / "config.json").write_text("mine")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "config.json").write_text("theirs")
    complete_pipeline(source, tmp_path / "out" / "hf", "transformer")
    assert (victim / "config.json").read_text() == "mine" and not (tmp_path / "out" / "hf").exists()
    assert "it lacks a folder of the name" in caplog.text and "will hold the weights only" in caplog.text


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, caplog, what):
    source = pipeline(tmp_path / "source", scheduler=["diffusers", "Z"])
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    if what == "file":
        (source / "scheduler").mkdir()
        (source / "scheduler" / "config.json").symlink_to(tmp_path / "private" / "key")
    else:
        (source / "scheduler").symlink_to(tmp_path / "private")
    complete_pipeline(source, tmp_path / "hf", "transformer")
    assert not (tmp_path / "hf").exists()
    assert "source/scheduler" in caplog.text and f"is a link to {tmp_path / 'private'}" in caplog.text


def test_links_inside_and_into_the_blobs_of_a_cache_are(tmp_path):
    repository = tmp_path / "models--org--name"
    source = pipeline(repository / "snapshots" / "0123", scheduler=["diffusers", "Z"])
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("blob")
    (source / "scheduler").mkdir()
    (source / "scheduler" / "a.json").symlink_to("../../../blobs/abc")
    (source / "scheduler" / "b.json").symlink_to("../vae/config.json")
    complete_pipeline(source, tmp_path / "hf", "transformer")
    assert (tmp_path / "hf/scheduler/a.json").read_text() == "blob"
    assert (tmp_path / "hf/scheduler/b.json").read_text() == "{}" and (tmp_path / "hf/model_index.json").is_file()
    other = pipeline(tmp_path / "mine" / "snapshots" / "0123", scheduler=["diffusers", "Z"])  # no repository's name
    (tmp_path / "mine" / "blobs").mkdir()
    (tmp_path / "mine" / "blobs" / "abc").write_text("blob")
    (other / "scheduler").mkdir()
    (other / "scheduler" / "a.json").symlink_to("../../../blobs/abc")
    complete_pipeline(other, tmp_path / "hf2", "transformer")
    assert not (tmp_path / "hf2").exists()


INDEXES = [
    ('{"weight_map": {"a": "../outside.safetensors"}}', "names files outside its folder: ../outside.safetensors"),
    ('{"weight_map": {"a": ".."}}', "names files outside its folder"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "names files outside its folder"),
    ('{"weight_map": {"a": ["b"]}}', "names files outside its folder"),
    ('{"weight_map": 5}', "is no index of safetensors files"),
    ('{"weight_map": ' + DEEP, "is no index of safetensors files .*nested more than 32 deep"),
    ('{"weight_map": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 deep"),
    ("[]", "is no index of safetensors files"),
    ("\udcff", "is no index of safetensors files"),
]


@pytest.mark.parametrize("text, message", INDEXES)
def test_indexes(tmp_path, text, message):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=message) as error:
        find_weights(tmp_path, "transformer")
    assert str(index) in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(ValueError, match=message):
        weight_files(tmp_path, "diffusion_pytorch_model")


def test_a_json_file_is_bounded_and_is_a_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps("x" * 100))
    assert bounded.read_json(path, max_bytes=102) == "x" * 100
    with pytest.raises(ValueError, match="x.json is larger than 0 MiB"):
        bounded.read_json(path, max_bytes=101)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo cannot be read: it is a fifo and no file"):
        bounded.read_json(tmp_path / "fifo")
    with pytest.raises(ValueError, match="zero cannot be read: it is a device and no file"):
        bounded.read_json(bounded.Path("/dev/zero"))


@pytest.mark.parametrize("length, header", [(1 << 40, b"{"), (100_000, DEEP.encode()), (2, b"[]"), (1 << 63, b"")])
def test_headers_of_safetensors(tmp_path, length, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header)
    with pytest.raises(ValueError, match=r"x.safetensors is missing, incomplete or damaged: .*header") as error:
        read_header(path)
    assert len(str(error.value)) < 500
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="it is a fifo"):
        read_header(path)


def wan_config(**changes):
    return {**get_spec("wan").args_to_hf(get_spec("wan").flavors["debug"]), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 10**9}, "config.json: num_layers = 1000000000; legal: int from 1 to 1,024"),
        ({"ffn_dim": 10**9}, "config.json: ffn_dim = 1000000000; legal"),
        ({"ffn_dim": -1}, "config.json: ffn_dim = -1; legal: int from 1"),
        ({"num_attention_heads": 0}, "config.json: dim = 0; legal"),
        ({"num_attention_heads": 60000, "attention_head_dim": 60000}, "config.json: dim = 3600000000; legal"),
        ({"text_dim": "wide"}, "config.json: text_dim = 'wide'; legal: int"),
        ({"patch_size": [1, 0, 2]}, r"config.json: patch = \(1, 0, 2\); legal: int from 1"),
        ({"patch_size": 5}, "config.json: "),
        ({"eps": float("nan")}, "config.json: eps = nan; legal"),
        ({"eps": float("inf")}, "config.json: eps = inf; legal"),
    ],
)
def test_absurd_numbers_of_a_config(tmp_path, changes, message):
    (tmp_path / "transformer").mkdir()
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(wan_config()))
    assert get_args(get_spec("wan"), "hf", str(tmp_path), 16).dim == get_spec("wan").flavors["debug"].dim
    path.write_text(json.dumps(wan_config(**changes)))
    with pytest.raises(ValueError, match=message):
        get_args(get_spec("wan"), "hf", str(tmp_path), 16)


def test_a_config_that_is_no_table(tmp_path):
    deep = '{"a": ' + "[" * 20 + "1e9" + "]" * 20 + "}"
    for text, message in (("[1]", "holds no table"), (DEEP, "nested"), (deep, "a = 1000000000.0; legal")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("note", ["[", DEEP, "[]", '{"r": 0}', '{"lora_alpha": "x"}', '{"r": 1e400}'])
def test_notes_of_an_adapter_file(tmp_path, note):
    path = tmp_path / "x.safetensors"
    tensors = {"transformer.a.lora_A.weight": torch.zeros(1, 2), "transformer.a.lora_B.weight": torch.zeros(2, 1)}
    save_file(tensors, path, metadata={"lora_adapter_metadata": note})
    with pytest.raises(ValueError, match=r"x.safetensors: its lora_adapter_metadata") as error:
        read_adapters(path)
    assert len(str(error.value)) < 500


def test_a_shard_of_a_cache_that_promises_more_than_it_holds(tmp_path):
    cache = LatentCache(tmp_path, "v", "t")
    cache.write("video", "k", torch.zeros(4), {"of": ""})
    cache.flush()
    (path,) = (tmp_path / "shards").glob("*.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["video/k"]["data_offsets"] = [0, 1 << 45]  # 32 TiB
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match=f"{path.name}: video/k is damaged"):
        LatentCache(tmp_path, "v", "t").read("video", "k")


@pytest.mark.parametrize("entries", ["5", "[[1]]", '[{"a": 1}]', "null", DEEP])
def test_a_manifest_of_a_cache_is_only_a_copy(tmp_path, entries):
    cache = LatentCache(tmp_path, "v", "t")
    cache.write("video", "k", torch.zeros(4), {"of": ""})
    cache.flush()
    (path,) = (tmp_path / "shards").glob("*.safetensors")
    row = f'{{"shard": "{path.name}", "bytes": {path.stat().st_size}, "entries": {entries}}}\n'
    (tmp_path / "manifest.jsonl").write_text(row)
    assert LatentCache(tmp_path, "v", "t").has("video", "k")


# ---- clips and captions ----


def special(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.name)


@pytest.fixture
def nothing_special_is_opened(monkeypatch):
    """To open a fifo waits for ever, and the end of /dev/zero never comes."""
    real = open

    def checked(path, *args, **kwargs):
        assert isinstance(path, int) or not os.path.exists(path) or os.path.isfile(path), f"{path} is opened"
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", checked)


@pytest.mark.parametrize(
    "kind, why", [(k, f"it is a {k}") for k in ("fifo", "socket", "device")] + [("loop", "Too many")]
)
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, kind, why, nothing_special_is_opened):
    folder = tmp_path / "s"
    folder.mkdir()
    monkeypatch.chdir(folder)  # names of sockets are short
    captioned(folder / "good.mp4", count=8, fps=8)
    special(folder / "clip.mp4", kind)
    (folder / "clip.txt").write_text("a clip")
    captioned(folder / "text.mp4", count=8, fps=8)
    (folder / "text.txt").unlink()
    special(folder / "text.txt", kind)
    (folder / "frames").mkdir()
    special(folder / "frames" / "0.png", kind)
    (folder / "frames.txt").write_text("a folder of frames")
    plan = make_plan(folder, [(5, 32, 32)], 8, 0, tmp_path / "cache")
    reasons = {os.path.basename(e.path): e.reason for e in plan.entries if not e.kept}
    assert [os.path.basename(e.path) for e in plan.kept] == ["good.mp4"] and len(reasons) == 3
    assert reasons["clip.mp4"].startswith(f"not a file: {why}")
    assert reasons["text.mp4"].startswith("unreadable caption: text.txt: ") and why in reasons["text.mp4"]
    assert reasons["frames"].startswith("unreadable: ") and why in reasons["frames"]
    rows = [{"file_name": name, "text": "x"} for name in ("good.mp4", "clip.mp4")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    good, bad = scan(folder / "rows.jsonl")
    assert not good.reason and bad.reason.startswith(f"not a file: {why}")


def test_a_far_timestamp_gives_no_millions_of_frames(tmp_path):
    path = captioned(tmp_path / "a.mkv", count=3, times=[0, 40, 1_900_000_000])
    assert path.stat().st_size < 5000
    with pytest.raises(
        ValueError, match=r"(?s)too long.*3.04e\+07 frames at 16 fps, more than data.max_frames = 500000"
    ):
        make_plan(tmp_path, [(5, 32, 32)], 16, 0, tmp_path / "cache")


def test_max_frames(tmp_path):
    path = captioned(tmp_path / "a.mp4", count=24, fps=8)

    def reason(**limits):
        return probe(str(path), DecodeLimits(**limits)).reason

    assert (
        reason(max_frames=24) == ""
        and reason(max_frames=23) == "too long: more frames in the file than data.max_frames = 23"
    )
    for most, kept in ((48, True), (47, False)):  # 24 frames at 8 fps are 48 at 16
        limits = DecodeLimits(max_frames=most)
        if kept:
            assert make_plan(tmp_path, [(5, 32, 32)], 16, 0, tmp_path / "cache", limits=limits).kept
        else:
            with pytest.raises(ValueError, match="too long: 48 frames|dropped, too long: 1"):
                make_plan(tmp_path, [(5, 32, 32)], 16, 0, tmp_path / "cache", limits=limits)


def test_max_decoded_pixels_is_looked_at_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(_png(13000, 13000))
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("it is decoded"))
    reason = probe(str(path)).reason
    assert (
        reason == "too large: frames of 13000 x 13000, 169,000,000 pixels, more than data.max_decoded_pixels = 67108864"
    )
    monkeypatch.undo()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)
    assert probe(str(path), DecodeLimits(max_pixels=1200)).reason == ""
    assert probe(str(path), DecodeLimits(max_pixels=1199)).reason.startswith("too large: frames of 40 x 30")


def test_max_decoded_pixels_of_videos(tmp_path):
    path = write_clip(tmp_path / "a.mp4", count=8, width=64, height=48)
    assert probe(str(path), DecodeLimits(max_pixels=64 * 48)).reason == ""
    assert probe(str(path), DecodeLimits(max_pixels=64 * 48 - 1)).reason.startswith("too large: frames of 64 x 48")


def test_limits_of_the_decoder_at_their_largest(tmp_path):
    """libav takes no larger number than 2^31 - 1, and 16 times the pixels of the plan are allowed."""
    path = write_clip(tmp_path / "a.mp4", count=8, width=64, height=48)
    assert probe(str(path), DecodeLimits(max_pixels=1 << 30)).reason == ""
    assert decode(str(path), [0], 16384, 16384, (1, 32, 32)).shape == (3, 1, 32, 32)


def test_limits_apply_to_probes_that_are_kept(tmp_path):
    captioned(tmp_path / "a.mp4", count=8, fps=8, width=64, height=48)
    captioned(tmp_path / "b.mp4", count=8, fps=8, width=32, height=32)
    all_kept = make_plan(tmp_path, [(5, 32, 32)], 8, 0, tmp_path / "cache")
    small = make_plan(tmp_path, [(5, 32, 32)], 8, 0, tmp_path / "cache", limits=DecodeLimits(max_pixels=2000))
    again = make_plan(tmp_path, [(5, 32, 32)], 8, 0, tmp_path / "cache")
    assert [len(p.kept) for p in (all_kept, small, again)] == [2, 1, 2] and again == all_kept


def test_a_stream_that_grows_is_not_decoded(tmp_path):
    """The plan saw small frames; the limit is the decoder's own, so it holds for each frame."""
    path = write_clip(tmp_path / "a.mp4", count=8, width=5120, height=4096, codec="mjpeg", pix_fmt="yuvj420p")
    with pytest.raises(UnusableClip, match="frames of 5120 x 4096|or frames of more than 16777216 pixels"):
        decode(str(path), [0], 32, 32, (1, 32, 32))


@pytest.mark.parametrize(
    "name, data", [("a.mp4", PLAYLIST), ("a.mp4", b"ffconcat version 1.0\nfile OUTSIDE\n"), ("a.png", EPS)]
)
def test_files_that_open_others_or_run_programs(tmp_path, name, data, monkeypatch):
    other = write_clip(tmp_path / "other.mp4", count=8)
    (tmp_path / name).write_bytes(data.replace(b"OUTSIDE", b"other.mp4" if b"concat" in data else bytes(other)))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("a program is started"))
    reason = probe(str(tmp_path / name)).reason
    assert reason.startswith("corrupt: ")


def test_a_name_that_is_also_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "b.mp4", count=8)
    (tmp_path / "b.mp4").rename(tmp_path / "concat:b.mp4")
    found = probe("concat:b.mp4")
    assert found.reason == "" and decode("concat:b.mp4", found.pts[:1], 64, 48, (1, 32, 32)).shape == (3, 1, 32, 32)


def test_captions_have_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "MAX_TEXT_BYTES", 100)
    for name, text in (("a", "x" * 100), ("b", "x" * 101)):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text(text)
    good, bad = scan(tmp_path)
    assert not good.reason and bad.reason == "unreadable caption: b.txt: it is larger than 0 MiB"
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"file": f"{n}.mp4", "text": "x" * k}) for n, k in (("a", 9), ("b", 99)))
    )
    good, bad = scan(tmp_path / "rows.jsonl")
    assert not good.reason and bad.reason == "bad line: longer than 0 MiB"


ROWS = [
    ("jsonl", '{"file": "a.mp4", "text": "\\ud800"}', "unreadable caption: .*half a character"),
    ("jsonl", '{"file": "\\ud800.mp4", "text": "x"}', "no clip named: "),
    ("jsonl", '{"file": "a\\u0000.mp4", "text": "x"}', "no clip named: "),
    ("jsonl", '{"file": "' + "x" * 100_000 + '", "text": "x"}', "no clip named: "),
    ("jsonl", '{"file": "a.mp4", "text": ' + json.dumps(["x", {"y": "z" * 10_000}]) + "}", "no caption: "),
    ("jsonl", '{"file": "a.mp4", "text": "x", "image": "' + "i" * 10_000 + '"}', "missing image: "),
    ("jsonl", '{"file": "a.mp4", "text": ' + DEEP, "bad line: .*nested more than 32 deep"),
]


@pytest.mark.parametrize("suffix, row, reason", ROWS)
def test_rows(tmp_path, suffix, row, reason):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / f"rows.{suffix}").write_text('{"file": "a.mp4", "text": "good"}\n' + row)
    good, bad = scan(tmp_path / f"rows.{suffix}")
    assert not good.reason and len(bad.reason) < 500
    assert pytest.importorskip("re").match(reason, bad.reason)


def test_tables_of_rows_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    wide = tmp_path / "wide.csv"
    wide.write_text("file,text," + ",".join(f"c{i}" for i in range(1000)) + "\na.mp4,x\n")
    with pytest.raises(ValueError, match="wide.csv: is not CSV .*more than 1,000 columns"):
        scan(wide)
    monkeypatch.setattr(metadata, "MAX_ROWS", 2)
    for count in (2, 3):
        (tmp_path / "rows.csv").write_text("file,text\n" + "a.mp4,x\n" * count)
        if count == 2:
            assert len(scan(tmp_path / "rows.csv")) == 2
    with pytest.raises(ValueError, match="rows.csv: holds more than 2 rows"):
        scan(tmp_path / "rows.csv")


def test_braces_of_a_path_are_bounded():
    assert expand("a{1..3}{x,y}.tar") == ["a1x.tar", "a1y.tar", "a2x.tar", "a2y.tar", "a3x.tar", "a3y.tar"]
    assert expand("a{3..1}.tar") == []
    for path in ("a{0..999999999999}.tar", "{0..9999}{0..9999}.tar", "{a,b}" * 40):
        with pytest.raises(ValueError, match="its braces give more than 1,000,000 names"):
            expand(path)


# ---- configurations ----


@pytest.mark.parametrize(
    "text",
    [
        "k" * 1_000_000 + " = 1",
        "[" + "k" * 1_000_000 + "]",
        "[training]\n" + "k" * 1_000_000 + " = 1",
        "a." * 500_000 + "b = 1",
        "x = {" + "a." * 500_000 + "b = 1}",
        "x = " + "[" * 1_000_000,
        "x = " + "[" * 300 + "]" * 300,
        "[training]\nsteps." + "a." * 900 + "b = 1",
        "[training]\n" + "\n".join(f"k{i} = 1" for i in range(20_000)),
    ],
)
def test_large_keys_cost_little_and_have_short_messages(text, monkeypatch):
    compared = []
    real = values._likeness
    monkeypatch.setattr(values, "SequenceMatcher", lambda _, a, b: compared.append(len(a)) or Matcher())
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert len(str(error.value)) < 10_000 and max(map(len, str(error.value).splitlines())) < 500
    assert len(compared) < 60 * 2 * len(values.options()) and max(compared, default=0) <= 80 and real


class Matcher:
    def ratio(self):
        return 0.5


@pytest.mark.parametrize("words", [["--" + "k" * 1_000_000], ["k" * 1_000_000], ["x"] * 100_000])
def test_large_command_lines_have_short_messages(words):
    with pytest.raises(ConfigError) as error:
        parse_args(words)
    assert len(str(error.value)) < 10_000


def test_the_configuration_file_is_bounded(tmp_path):
    with pytest.raises(ConfigError, match="/dev/zero: not valid TOML: it has more than 4 MiB"):
        parse_args(["--job.config_file", "/dev/zero"])
    assert parse("[job]\ndescription = '" + "." * 1000 + "'").job.description == "." * 1000
    with pytest.raises(ConfigError, match=r"more than 1000 dots \(at line 2\)"):
        parse("[job]\ndescription = '" + "." * 1001 + "'")


def test_refused_pickles_do_not_advise_to_switch_the_check_off(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"module": os.system}, path)
    with pytest.raises(
        ValueError, match=r"weights.pt is no state dict of tensors: it asks for (posix|os)\.system, which was not run$"
    ):
        read_header(path)


def test_limits_travel_with_the_entry(tmp_path):
    captioned(tmp_path / "a.mp4", count=8, fps=8)
    limits = DecodeLimits(max_pixels=5000, seconds=7.0)
    (entry,) = make_plan(tmp_path, [(5, 32, 32)], 8, 0, tmp_path / "cache", limits=limits).kept
    assert entry.limits == limits and read_frames(entry).shape == (3, 5, 32, 32)
    assert entry.content == replace(entry, limits=DecodeLimits()).content
    assert list(images(str(_image(tmp_path)), 5000))


def _image(folder):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "i.png")
    return folder / "i.png"
