"""Names that another system wrote, files that no row or caption names, and suffixes that are not read."""

import json
import os
import unicodedata

import pytest

from tests.unit_tests.data_clips import captioned, number, write_clip
from titan_video.config.job_config import Data, JobConfig, Source
from titan_video.ingest.files import media
from titan_video.ingest.files.metadata import UNREAD_SUFFIXES
from titan_video.ingest.files.sources import remarks, rules, scan
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import read_frames

CAFE = unicodedata.normalize("NFC", "café")


@pytest.fixture
def folder(tmp_path):
    for name in (f"sub/{CAFE}.mp4", "sub/a b.mp4", "Top.MP4", "100%.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def scan_names(folder, *names):
    lines = [json.dumps({"file": name, "text": "x"}, ensure_ascii=False) for name in names]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return scan(folder / "rows.jsonl")


FOUND = [
    (r"sub\a b.mp4", "sub/a b.mp4"),
    (r".\SUB\A B.mp4", "sub/a b.mp4"),
    (r"C:\Users\me\clips\sub\a b.mp4", "sub/a b.mp4"),
    ("D:/sub/a b.mp4", "sub/a b.mp4"),
    (r"\\server\share\sub\a b.mp4", "sub/a b.mp4"),
    ("/home/me/sub/a b.mp4", "sub/a b.mp4"),
    ("sub/a%20b.mp4", "sub/a b.mp4"),
    (r"sub\a%20b.mp4", "sub/a b.mp4"),
    (f"sub/{unicodedata.normalize('NFD', CAFE)}.mp4", f"sub/{CAFE}.mp4"),
    (f"sub/{CAFE.upper()}.MP4", f"sub/{CAFE}.mp4"),
    ("top.mp4", "Top.MP4"),
    ("sub /a b.mp4", "sub/a b.mp4"),
]


@pytest.mark.parametrize("name, file", FOUND)
def test_names_of_other_systems_are_found(folder, name, file):
    (record,) = scan_names(folder, name)
    assert (os.path.normpath(record.path), record.reason, record.written) == (str(folder / file), "", name)
    (line,) = [line for line in remarks([str(folder / "rows.jsonl")], [record]) if "spelled" in line]
    assert line.startswith("1 names are spelled in another way: ") and name in line and file in line


def test_a_name_that_is_right_stays(folder):
    for name in ("100%.mp4", "Top.MP4", f"sub/{CAFE}.mp4", " Top.MP4 "):
        (record,) = scan_names(folder, name)
        assert (record.reason, record.written) == ("", "")


def test_names_that_are_not_found_say_what_to_do(folder):
    backslash, other, beside = scan_names(folder, r"sub\gone.mp4", "gone.mp4", "clips/Top.MP4")
    where = folder / "rows.jsonl"
    assert backslash.reason.startswith(
        rf"missing file: named in {where}:1 as 'sub\gone.mp4'; with / for its backslashes"
    )
    assert other.reason == f"missing file: named in {where}:2 as 'gone.mp4'; correct the name, or add the file"
    assert "Top.MP4 is there" in beside.reason


def test_names_that_mean_two_files(folder):
    (folder / "tOP.mp4").write_bytes(b"x")
    (record,) = scan_names(folder, "top.mp4")
    assert "it may mean Top.MP4 and tOP.mp4; write the one that is meant" in record.reason


def test_two_names_that_mean_one_file(folder):
    first, second, third = scan_names(folder, r"C:\one\Top.MP4", r"C:\two\Top.MP4", "100%.mp4")
    assert first.reason.startswith("ambiguous name: ") and second.reason.startswith("ambiguous name: ")
    assert third.reason == ""


def test_the_image_of_a_row_is_found_too(folder):
    (folder / "sub" / "i.png").write_bytes(b"x")
    (folder / "rows.csv").write_text("file,text,image\nTop.MP4,x,sub\\I.png\nTop.MP4,y,gone.png\n")
    good, bad = scan(folder / "rows.csv")
    assert good.image == str(folder / "sub" / "i.png") and bad.reason.startswith("missing image: ")


class Rows:
    """As much of a table of pyarrow as is asked for."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def select(self, names):
        return Rows([{name: row[name] for name in names} for row in self.rows])

    def to_pylist(self):
        return self.rows


def test_paths_of_a_table(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.mp4", "b.mpg"):
        (tmp_path / name).write_bytes(b"x")
    names = ["sub\\a.mp4", "gone.mp4", "b.mpg", "", "a\0.mp4", "sub/a.mp4"]
    rows = [{"file": name, "text": text} for name, text in zip(names, ["one\r\ntwo", *"abcd", "\x07"], strict=True)]
    monkeypatch.setattr(media, "row_groups", lambda file: [Rows(rows)])
    monkeypatch.setattr(media, "stored_names", lambda table, clip: [(row[clip], False) for row in table.rows])
    (tmp_path / "t.parquet").write_bytes(b"")
    good, *bad = scan(tmp_path / "t.parquet")
    assert (good.path, good.caption, good.written) == (str(tmp_path / "sub" / "a.mp4"), "one\ntwo", names[0])
    assert "as 'gone.mp4'; correct the name" in bad[0].reason
    kinds = ["missing file", "not read", "no clip named", "no clip named", "unreadable caption"]
    assert [r.reason.partition(":")[0] for r in bad] == kinds


# ---- captions of a folder ----


def test_captions_by_other_spellings(tmp_path):
    clips = ["Walk.mp4", f"{CAFE}.mp4", "b.mp4", "c.mp4", "two.mp4", "Two.mp4", "d.mp4"]
    texts = ["walk.txt", f"{unicodedata.normalize('NFD', CAFE)}.txt", "b.caption", "c.mp4.txt", "TWO.txt", "d.txt"]
    for name in (*clips, *texts, "d.caption"):
        (tmp_path / name).write_text(name)
    records = {os.path.basename(r.path): r for r in scan(tmp_path)}
    found = {name: r.caption for name, r in records.items() if not r.reason}
    assert found == dict(
        zip(("Walk.mp4", f"{CAFE}.mp4", "b.mp4", "c.mp4", "d.mp4"), (*texts[:4], "d.txt"), strict=True)
    )
    assert records["two.mp4"].reason.startswith("no caption") and records["Two.mp4"].reason.startswith("no caption")
    assert records["TWO.txt"].reason.startswith("caption without a clip")
    lines = remarks([str(tmp_path)], list(records.values()))
    assert any(line.startswith("2 names are spelled") for line in lines)
    assert any("are not read, as .txt files of the same names are there: d.caption" in line for line in lines)


# ---- what lies beside ----


def test_files_that_metadata_does_not_list(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.mp4", "c.png", "a.txt", "notes.pdf", ".hidden.mp4", "d.mpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text("file,text\na.mp4,one\n")
    for path in (tmp_path, tmp_path / "metadata.csv"):
        lines = remarks([str(path)], scan(path))
        assert len(lines) == 4
        assert any("1 names in" in line and "not looked at: .hidden.mp4" in line for line in lines)
        (line,) = [line for line in lines if "not listed in metadata.csv" in line]
        assert line.startswith("3 files in ") and line.endswith("and not used: c.png, d.mpg, sub/b.mp4")
        assert any("as captions are in metadata.csv: a.txt" in line for line in lines)
        assert any("neither clips nor captions, and not read: notes.pdf" in line for line in lines)
    (tmp_path / "rest.csv").write_text("file,text\nc.png,x\nd.mpg,x\nsub/b.mp4,y\n")
    both = [str(tmp_path / name) for name in ("metadata.csv", "rest.csv")]
    assert not any("not listed" in line for line in remarks(both, [r for p in both for r in scan(p)]))


def test_names_that_begin_with_a_dot(tmp_path):
    for name in ("a.mp4", ".b.mp4", "sub/.c", ".trash/d.mp4", ".trash/e/f.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (line,) = remarks([str(tmp_path)], scan(tmp_path))
    assert line == f"3 names in {tmp_path} begin with a dot, and are not looked at: .b.mp4, .trash, sub/.c"


def test_captions_of_several_clips(tmp_path):
    for name in ("a.jpg", "a.mov", "a.txt", "b.mp4", "b.mov", "b.mp4.txt", "b.txt", "c.mp4", "c.txt", "d.tif", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    (line,) = remarks([str(tmp_path)], scan(tmp_path))
    assert line == "2 captions belong to several clips: a.txt of a.jpg and a.mov, b.txt of b.mov and b.mp4"


@pytest.mark.parametrize("name, text", [("metadata.json", '{"title": "album"}'), ("Metadata.csv", "date,place\n1,2\n")])
def test_metadata_of_something_else(tmp_path, name, text):
    """As albums have. The file may be given itself, and is then what it is."""
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / name).write_text(text)
    hint = "a file of this name is taken for the list of the folder's clips: rename it if it is none"
    with pytest.raises(ValueError, match=rf"{name}: .*; {hint}"):
        scan(tmp_path)
    with pytest.raises(ValueError) as error:
        scan(tmp_path / name)
    assert hint not in str(error.value)


def test_metadata_by_another_case(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "Metadata.CSV").write_text("file,text\na.mp4,one\n")
    assert [r.caption for r in scan(tmp_path)] == ["one"]


def test_a_path_that_is_spelled_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "my" / "clips").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = JobConfig(data=Data(path="my\\Clips"))
    (line,) = rules(config, 1)
    assert (
        line == "data.path: my\\Clips does not exist; my/clips does, a name that is spelled in another way; give that"
    )


def test_names_that_are_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.pdf")).write_bytes(b"x")
    (line,) = remarks([str(tmp_path)], [])
    line.encode()


def test_the_plan_says_what_lies_beside(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    captioned(folder / "a.mp4", count=8, fps=8)
    for k in range(7):
        (folder / f"list{k}.csv").write_text("x")
    plan = make_plan(folder, [[5, 32, 32]], 8, 0, tmp_path / "cache")
    (line,) = plan.summary().splitlines()[-1:]
    assert line == (
        f"  note: 7 files in {folder} are neither clips nor captions, and not read: "
        "list0.csv, list1.csv, list2.csv, list3.csv, list4.csv and 2 more"
    )


# ---- suffixes ----


@pytest.mark.parametrize("suffix, codec", [("ts", "libx264"), ("flv", "flv"), ("wmv", "wmv2"), ("3gp", "libx264")])
def test_more_suffixes_are_read(tmp_path, suffix, codec):
    write_clip(tmp_path / f"a.{suffix}", count=20, fps=25, codec=codec)
    (tmp_path / "a.txt").write_text("x")
    source = Source(path=str(tmp_path), frame_extraction="uniform")
    (entry,) = make_plan([source], [[9, 48, 64]], 25, 0, tmp_path / "cache").kept
    assert entry.num_frames == 20
    frames = read_frames(entry).permute(1, 2, 3, 0).numpy()
    assert [number(f) for f in frames] == list(range(entry.start, entry.start + 9))


def test_suffixes_that_are_not_read(tmp_path):
    for name in ("a.mpg", "a.txt", "b.TIF", "b.txt", "c.xyz", "c.txt", "d.ogv", "e.txt", "f.HEIF", "d.svg", "g's.cr2"):
        (tmp_path / name).write_text("x")
    reasons = {os.path.basename(r.path): r.reason for r in scan(tmp_path)}
    how = "convert it: ffmpeg -i 'a.mpg' -c:v libx264 -crf 12 'a.mp4'"
    assert reasons == {
        "a.mpg": f"not read: files of the suffix .mpg are not read; {how}",
        "b.TIF": "not read: files of the suffix .tif are not read; convert it: ffmpeg -i 'b.TIF' 'b.png'",
        "f.HEIF": "not read: files of the suffix .heif are not read; convert it: heif-convert 'f.HEIF' 'f.png'",
        "d.svg": "not read: files of the suffix .svg are not read; convert it: rsvg-convert -o 'd.png' 'd.svg'",
        "g's.cr2": r"not read: files of the suffix .cr2 are not read; convert it: "
        r"darktable-cli 'g'\''s.cr2' 'g'\''s.png'",
        "d.ogv": reasons["d.ogv"],
        "c.txt": "caption without a clip: c.xyz has a suffix that is not read",
        "e.txt": "caption without a clip: no video or image has this name",
    }
    (tmp_path / "rows.jsonl").write_text('{"file": "a.mpg", "text": "x"}')
    assert scan(tmp_path / "rows.jsonl")[0].reason == reasons["a.mpg"]
    assert len(set(UNREAD_SUFFIXES)) == len(UNREAD_SUFFIXES) and ".mp4" in media.MEDIA_SUFFIXES
