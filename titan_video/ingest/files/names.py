"""Files by names that another system wrote: backslashes, drives, %20, other Unicode forms, case, blanks at the end.

A name is taken as it stands where there is such a file. Otherwise the files that it may mean are looked for, and taken
if there is exactly one.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from titan_video.tools.bounded import short

MAX_FOUND = 8  # files that one name may mean, which are looked at
_DRIVE = re.compile(r"[A-Za-z]:")


def fold(name: str) -> str:
    """What names share that differ in case, in the Unicode form of their letters, and in blanks and dots at the end:
    systems differ in whether these are the same.
    """
    return unicodedata.normalize("NFC", name.casefold()).strip().rstrip(". ")


def quoted(name: str) -> str:
    """A name for a message: as it is written, if that can be printed."""
    return short(f"'{name}'" if name.isprintable() else repr(name), 300)


@dataclass(frozen=True)
class Found:
    """path: the file; "" with the `advice` to a user where there is none, or more than one."""

    path: str = ""
    advice: str = ""


class FileNames:
    """Finds the files of names that are relative to `folder`. It remembers what the folders hold."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.prefix = str(folder / "x")[:-1]
        self.entries: dict[Path, dict[str, list[str]]] = {}

    def join(self, name: str) -> str:
        """The path of a name below the folder, as pathlib writes it."""
        is_plain = name[0] not in "./" and name[-1] != "/" and "//" not in name and "/." not in name
        return f"{self.prefix}{name}" if is_plain else str(self.folder / name)

    def find(self, written: str) -> Found:
        exact = str(self.folder / written)
        if os.path.lexists(exact):
            return Found(exact)
        relative, anywhere = self._candidates(written)
        found = relative or anywhere
        if len(found) == 1:
            return Found(str(next(iter(found))))
        names = " and ".join(self._shown(path) for path in list(found)[:3])
        if found:
            return Found(advice=f"it may mean {names}; write the one that is meant")
        parts = _readings(written)[-1]
        if near := self._tails(parts[1:]):  # relative names are not cut by themselves
            name = self._shown(next(iter(near)))
            return Found(advice=f"names are relative to the file that holds them: {name} is there")
        if "\\" in written:
            return Found(advice=f"with / for its backslashes, {'/'.join(parts)}, there is none either; add the file")
        return Found(advice="correct the name, or add the file")

    def _candidates(self, written: str) -> tuple[dict[Path, None], dict[Path, None]]:
        """(files that a relative name means, files by the last parts of the name of a drive or of the root)."""
        relative, anywhere = {}, {}
        for parts in _readings(written):
            if _DRIVE.match(parts[0]) or parts[0] == "":
                anywhere |= self._tails(parts[1:] if parts[0] in ("", parts[0][:2]) else [parts[0][2:], *parts[1:]])
            else:
                relative |= dict.fromkeys(self._below(parts))
        return relative, anywhere

    def _tails(self, parts: list[str]) -> dict[Path, None]:
        """The files of the last parts of a name, however many: where its folder was is not known."""
        parts = [part for part in parts if part]
        return {path: None for i in range(len(parts)) for path in self._below(parts[i:])}

    def _below(self, parts: Iterable[str]) -> list[Path]:
        """The files below the folder whose parts differ from these in their `fold` at most."""
        found = [self.folder]
        for part in parts:
            found = [entry for folder in found for entry in self._named(folder, part)][:MAX_FOUND]
        return found

    def _named(self, folder: Path, part: str) -> list[Path]:
        if part in ("", "."):
            return [folder]
        if part == ".." or os.path.lexists(folder / part):
            return [folder / part]
        if folder not in self.entries:
            held: dict[str, list[str]] = {}
            with suppress(OSError):  # no folder, or one that may not be read
                for name in sorted(os.listdir(folder)):
                    held.setdefault(fold(name), []).append(name)
            self.entries[folder] = held
        return [folder / name for name in self.entries[folder].get(fold(part), ())]

    def _shown(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)


def _readings(written: str) -> list[list[str]]:
    """The parts of a name in each way to read it: as it stands, without %20 and the like; with / for backslashes."""
    texts = [form for text in (written, written.replace("\\", "/")) for form in (text, unquote(text))]
    return [text.split("/") for text in dict.fromkeys(t for t in texts if "\0" not in t)]
