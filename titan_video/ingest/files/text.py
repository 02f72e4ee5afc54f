"""Text that others wrote: captions, tables of clips, prompts. One policy for all of it:

    encoding      by the byte-order mark (UTF-8, UTF-16, UTF-32), which is removed; without one UTF-8, strictly
    line ends     LF, CR LF and CR are one: LF. No other character ends a line
    refused       what is not UTF-8, NUL, control characters but the tab, marks inside the text, half characters
    white space   is removed at both ends of a caption, prompt or name, and kept inside

No encoding is guessed: a fault names its line and byte. What follows is the caller's: a caption's fault is a reason to
drop its clip, that of a line of a .jsonl file its row; a .csv or .json file or prompts are one text, and it stops.
"""

import codecs
import errno
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from titan_video.tools.bounded import open_regular

MAX_TEXT_BYTES, MAX_PROMPT_BYTES = 1 << 20, 64 << 20
MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_REFUSED = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


class TextFault(ValueError):
    """A text that is refused. The message says what it is, where, and the fix; it goes on from the file's name."""


def fault(text: str, first_line: int = 1) -> str:
    """Why a text is refused, with the line and the byte in it (from 0), or "". Bytes that are no UTF-8 are escaped
    (`surrogateescape`).
    """
    found = _REFUSED.search(text)
    if not found:
        return ""
    line = first_line + text.count("\n", 0, found.start())
    before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
    where, code = f"line {line}, byte {len(before.encode('utf-8', 'surrogatepass'))}", ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"is not UTF-8 ({where} is 0x{code & 0xFF:02X}); save it as UTF-8"
    if 0xD800 <= code <= 0xDFFF:
        return f"holds half a character (a lone surrogate; {where}); write the text anew"
    if code == 0:
        return f"holds a NUL ({where}): UTF-16 without its byte-order mark, or no text; save it as UTF-8"
    if code == 0xFEFF:
        return f"holds a byte-order mark inside ({where}), as joined files do; remove it"
    return f"holds a control character (U+{code:04X}; {where}); remove it"


def decode(data: bytes) -> str:
    """The text of bytes. Raises TextFault."""
    mark, encoding = _encoding(data)
    try:
        text = unix_line_ends(data[len(mark) :].decode(encoding, _errors(encoding)))
    except UnicodeDecodeError as e:
        raise TextFault(f"is not {encoding.upper()}, which its mark says (byte {e.start}); save it as UTF-8") from None
    if found := fault(text):
        raise TextFault(found)
    return text


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file. OSError: it is no regular file, cannot be read, or is larger. Raises TextFault."""
    with open_regular(path) as f:
        data = f.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes >> 20} MiB")
    return decode(data)


def read_lines(f: BinaryIO) -> Iterator[tuple[int, str]]:
    """(number from 1 on, line without its end) of a file that may be long. A line may have a `fault`; of one of more
    than MAX_TEXT_BYTES characters only the beginning comes. Raises TextFault.
    """
    mark, encoding = _encoding(f.read(4))
    f.seek(len(mark))
    number = 0
    with io.TextIOWrapper(f, encoding, _errors(encoding), newline=None) as text:
        try:
            while line := text.readline(MAX_TEXT_BYTES + 2):
                rest, number = line, number + 1
                while not rest.endswith("\n") and (rest := text.readline(MAX_TEXT_BYTES)):
                    pass
                yield number, line.removesuffix("\n")
        except UnicodeDecodeError:
            where = f"after line {number}"
            raise TextFault(f"is not {encoding.upper()}, which its mark says ({where}); save it as UTF-8") from None


def read_prompts(path: str | Path, option: str) -> list[str]:
    """The prompts of a file, one a line; blank lines are none. ValueError, which names the option, the file and the
    line: it cannot be read as text, or holds none.
    """
    try:
        text = read_text(Path(path), MAX_PROMPT_BYTES)
    except TextFault as e:
        raise ValueError(f"{option}: {path} {e}") from None
    except OSError as e:
        raise ValueError(f"{option}: {path}: {e.strerror or e}; give a text file with one prompt a line") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{option}: {path} holds no prompt; write one a line, or leave the option empty")
    return prompts


def unix_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(data: bytes) -> tuple[bytes, str]:
    """(byte-order mark, encoding) of a text by its first bytes."""
    return next((found for found in MARKS if data.startswith(found[0])), (b"", "utf-8"))


def _errors(encoding: str) -> str:
    return "surrogateescape" if encoding == "utf-8" else "strict"
