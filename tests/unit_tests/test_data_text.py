"""The one policy for text: encodings, line ends, what is refused; tables whose rows do not take others with them."""

import json
import tarfile

import pytest

from titan_video.ingest.files.sources import scan
from titan_video.ingest.files.text import TextFault, decode, fault, read_lines, read_prompts

TEXT = "a café, 猫\nand more"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"]


def encoded(text, encoding):
    return (b"\xfe\xff" if encoding == "utf-16-be" else b"") + text.encode(encoding)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_marks_and_line_ends(tmp_path, encoding, line_end):
    data = encoded(TEXT.replace("\n", line_end), encoding)
    assert decode(data) == TEXT
    path = tmp_path / "x"
    path.write_bytes(data)
    with path.open("rb") as f:
        assert list(read_lines(f)) == list(enumerate(TEXT.split("\n"), 1))
    path.write_bytes(encoded(f" one {line_end}{line_end}two\u2028three{line_end}", encoding))
    assert read_prompts(path, "o") == ["one", "two\u2028three"]


REFUSED = [
    ("a\ncaf\xe9".encode("latin-1"), "is not UTF-8 (line 2, byte 3 is 0xE9); save it as UTF-8"),
    ("跑步".encode("gbk"), "is not UTF-8 (line 1, byte 0 is 0xC5)"),
    ("it’s".encode("cp1252"), "is not UTF-8 (line 1, byte 2 is 0x92)"),
    ("ab".encode("utf-16-le"), "holds a NUL (line 1, byte 1)"),
    (b"a\0b", "holds a NUL"),
    (b"ok\r\n\x07", "holds a control character (U+0007; line 2, byte 0); remove it"),
    ("a\x85b".encode(), "U+0085"),
    ("a\ufeffb".encode(), "holds a byte-order mark inside (line 1, byte 1)"),
    ("\ufeff\ufeffb".encode(), "holds a byte-order mark inside"),
    (b"\xff\xfea", "is not UTF-16-LE, which its mark says"),
    (b"\xed\xa0\x80", "is not UTF-8"),
]


@pytest.mark.parametrize("data, words", REFUSED)
def test_what_is_refused(tmp_path, data, words):
    with pytest.raises(TextFault) as error:
        decode(data)
    assert words in str(error.value)
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(ValueError, match="validation.prompts_path: .*p.txt (is not|holds)"):
        read_prompts(tmp_path / "p.txt", "validation.prompts_path")
    assert fault("tabs\tand\nlines é 猫 \u200d") == ""


def test_prompts_that_are_none(tmp_path):
    (tmp_path / "p.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="o: .*p.txt holds no prompt"):
        read_prompts(tmp_path / "p.txt", "o")
    with pytest.raises(ValueError, match="o: .*gone.txt: No such file"):
        read_prompts(tmp_path / "gone.txt", "o")


# ---- every source reads by it ----


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_sources_read_all_encodings(tmp_path, encoding):
    (tmp_path / "a.mp4").write_bytes(b"x")
    rows = {
        "rows.csv": f'file,text\r\na.mp4,"{TEXT}"\r\n',
        "rows.tsv": f'file\ttext\ra.mp4\t"{TEXT}"\r',
        "rows.jsonl": json.dumps({"file": "a.mp4", "text": TEXT.replace("\n", "\r\n")}, ensure_ascii=False) + "\r\n",
        "rows.json": json.dumps([{"file": "a.mp4", "text": TEXT}], ensure_ascii=False),
    }
    for name, text in rows.items():
        (tmp_path / name).write_bytes(encoded(text, encoding))
        (record,) = scan(tmp_path / name)
        assert (record.captions, record.reason) == ((TEXT,), ""), name
    (tmp_path / "a.txt").write_bytes(encoded(TEXT.replace("\n", "\r\n") + " \r\n", encoding))
    assert [r.captions for r in scan(tmp_path)] == [(TEXT,)]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.mp4", "a.txt"):
            tar.add(tmp_path / name, name)
    assert [r.captions for r in scan(tmp_path / "s.tar")] == [(TEXT,)]


def test_one_bad_caption_takes_no_other_with_it(tmp_path):
    for name, data in (("a", b"fine"), ("b", b"caf\xe9"), ("c", b"x\0y"), ("d", b"fine too")):
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_bytes(data)
    a, b, c, d = scan(tmp_path)
    assert (a.caption, d.caption) == ("fine", "fine too")
    assert b.reason == "unreadable caption: b.txt is not UTF-8 (line 1, byte 3 is 0xE9); save it as UTF-8"
    assert c.reason.startswith("unreadable caption: c.txt holds a NUL (line 1, byte 1)")


def rows_of(tmp_path, text, name="rows.csv"):
    for clip in "abc":
        (tmp_path / f"{clip}.mp4").write_bytes(b"x")
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return scan(tmp_path / name)


HEAD = "file,text\n"
OPEN = [
    HEAD + 'a.mp4,"one\nb.mp4,two\nc.mp4,three\n',  # to the end of the file
    HEAD + 'a.mp4,"one\nb.mp4,"two"\nc.mp4,three\n',  # to the next quote
    HEAD + 'a.mp4,"one\nb.mp4,two"\nc.mp4,three\n',  # a legal field, which holds a row
    HEAD + 'a.mp4,"one\nb.mp4,two""\nc.mp4,three"\n',
]


@pytest.mark.parametrize("text", OPEN)
def test_an_open_quote_stops_with_its_line(tmp_path, text):
    with pytest.raises(
        ValueError, match="rows.csv: is not CSV: a quoted field begins in line 2 and is not closed"
    ) as e:
        rows_of(tmp_path, text)
    assert "close it" in str(e.value)


def test_quotes_that_are_wrong_in_one_line(tmp_path):
    a, b, c = rows_of(tmp_path, HEAD + 'a.mp4,"a "big" cat"\nb.mp4,a 5" disk\nc.mp4,"open at the end')
    assert a.reason.startswith("bad line: ") and "double the quotes" in a.reason and a.path.endswith("rows.csv:2")
    assert b.caption == 'a 5" disk'
    assert c.reason.startswith("bad line: unexpected end of data") and c.path.endswith("rows.csv:4")


def test_a_caption_of_several_lines_is_whole(tmp_path):
    a, b = rows_of(tmp_path, HEAD + 'a.mp4,"a ""big"" cat,\r\nasleep\n\nat home"\nb.mp4,two, three\n')
    assert a.caption == 'a "big" cat,\nasleep\n\nat home'
    assert "more fields" in b.reason and b.path.endswith("rows.csv:6")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters(tmp_path, delimiter):
    text = f' file {delimiter}"text"\na.mp4{delimiter}"one, two; three\tfour"\nb.mp4{delimiter}five\n'
    a, b = rows_of(tmp_path, text)
    assert (a.caption, b.caption) == ("one, two; three\tfour", "five")
    a, b = rows_of(tmp_path, text, "rows.tsv")
    assert (a.caption, b.caption) == ("one, two; three\tfour", "five")


STOPS = [
    (HEAD.encode() + b"a.mp4,one\nb.mp4,caf\xe9\n", r"rows.csv: is not UTF-8 \(line 3, byte 9 is 0xE9\); save it"),
    ((HEAD + "a.mp4,one\n").encode("utf-16-le"), "rows.csv: holds a NUL .*UTF-16 without its byte-order mark"),
    ("file,text,text\na.mp4,one,two\n", "rows.csv: two columns are named 'text'"),
    ("file;words\na.mp4;one\n", "rows.csv: no column names the caption; found file, words"),
    ("", "rows.csv: holds no rows"),
    (HEAD, "rows.csv: holds no rows"),
    ('file,"text\na.mp4,one\n', "rows.csv: is not CSV: "),
    (HEAD + "a.mp4" + ",x" * 600_000, "rows.csv: line 2 is longer than 1 MiB"),
    ("file," + "x" * 200_000 + "\na.mp4,one\n", "rows.csv: is not CSV: line 1: field larger than field limit"),
]


@pytest.mark.parametrize("text, words", STOPS)
def test_tables_that_stop(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        rows_of(tmp_path, text)


def test_a_column_twice_that_is_not_read(tmp_path):
    assert [r.caption for r in rows_of(tmp_path, "file,text,id,id,,\na.mp4,one,1,2,,\n")] == ["one"]


LINES = [
    (b'{"file": "b.mp4", "text": "caf\xe9"}', "bad line: it is not UTF-8 (line 2, byte 30 is 0xE9)"),
    (b'{"file": "b.mp4", "text": "x"', "bad line: not JSON "),
    (b'{"file": "b.mp4", "text": "x", "text": "y"}', "'text' is there twice in one object"),
    (b'\xef\xbb\xbf{"file": "b.mp4", "text": "x"}', "bad line: it holds a byte-order mark inside (line 2"),
    (b'{"file": "b.mp4", "text": "\\u0007"}', "unreadable caption: column 'text' of "),
    (b'{"file": "b.mp4", "text": "\\u0000"}', "holds a NUL"),
]


@pytest.mark.parametrize("line, words", LINES)
def test_a_line_of_json_takes_no_other_with_it(tmp_path, line, words):
    good = b'{"file": "a.mp4", "text": "one"}\n'
    first, bad, last = rows_of(tmp_path, good + line + b"\n" + good, "rows.jsonl")
    assert first.caption == last.caption == "one" and words in bad.reason
    assert bad.path.endswith(("rows.jsonl:2", "b.mp4"))


def test_a_json_file_is_one_text(tmp_path):
    for data, words in (
        (b'[{"file": "a.mp4", "text": "caf\xe9"}]', r"rows.json: is not UTF-8 \(line 1"),
        (b'[{"file": "a.mp4",\n "text": }]', "rows.json is no JSON in UTF-8 .*line 2"),
        (b'[{"file": "a.mp4", "file": "b.mp4"}]', "'file' is there twice"),
    ):
        with pytest.raises(ValueError, match=words):
            rows_of(tmp_path, data, "rows.json")
