"""Captions and prompts that are longer than the text encoder takes."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

from titan_video.encoders.spec import Encoders
from titan_video.ingest.plan.entries import Plan
from titan_video.tools.bounded import short

NAMES_SHOWN, BATCH = 5, 1000
MARGIN = 8  # tokens that an encoder adds to a text; no text has more tokens than bytes


def with_cut_captions(plan: Plan, encoders: Encoders) -> Plan:
    """The plan with a remark about captions that the encoder cuts."""
    remark = cut_captions(plan, encoders)
    return replace(plan, remarks=(*plan.remarks, remark)) if remark else plan


def cut_captions(plan: Plan, encoders: Encoders) -> str:
    """A remark about captions that the encoder cuts, or ""."""
    seen: set[int] = set()  # hashes, as there may be millions
    paths, texts, cut, count = [], [], [], 0

    def look() -> None:
        nonlocal count
        path_of = dict(zip(texts, paths, strict=True))
        for text, tokens in _long_texts(texts, encoders):
            count += 1
            cut.extend([f"{path_of[text]} ({tokens} tokens)"] * (len(cut) < NAMES_SHOWN))
        texts.clear(), paths.clear()

    for e in plan.entries:
        for caption in e.captions if e.kept else ():
            if _may_be_cut(caption, encoders) and hash(caption) not in seen:
                seen.add(hash(caption))
                texts.append(caption), paths.append(e.path)
        if len(texts) >= BATCH:
            look()
    look()
    return _remark("captions", cut, count, encoders) if cut else ""


def cut_prompts(prompts: Sequence[str], encoders: Encoders) -> str:
    """A remark about prompts that the encoder cuts, or ""."""
    cut = [f"'{short(text, 40)}' ({count} tokens)" for text, count in _long_texts(prompts, encoders)]
    return _remark("prompts", cut, len(cut), encoders) if cut else ""


def lost_words(texts: Sequence[str], encoders: Encoders) -> list[str]:
    """A line for each text that the encoder cuts, with what is lost: all from the first word that is not read whole."""
    lines, limit = [], encoders.max_text_length
    for text, count in _long_texts(list(dict.fromkeys(texts)), encoders):
        ends: Sequence[int] = [word.end() for word in re.finditer(r"\S+", text)]
        if not ends or encoders.num_tokens([text[: ends[0]]])[0] > limit:  # a script without spaces, or one long word
            ends = range(1, len(text) + 1)
        num_read = bisect_right(ends, limit, key=lambda end, text=text: encoders.num_tokens([text[:end]])[0])
        lost = text[ends[num_read - 1] if num_read else 0 :].strip()
        lines.append(
            f"'{short(text, 40)}' has {count} tokens and is cut to encoder.max_text_length = {limit}; not read: "
            f"'{short(lost, 200)}'"
        )
    return lines


def _remark(what: str, cut: list[str], count: int, encoders: Encoders) -> str:
    names = ", ".join(cut[:NAMES_SHOWN]) + (f" and {count - NAMES_SHOWN} more" if count > NAMES_SHOWN else "")
    return f"{count} {what} are cut to encoder.max_text_length = {encoders.max_text_length}: {names}"


def _long_texts(texts: Sequence[str], encoders: Encoders) -> Iterator[tuple[str, int]]:
    """(text, its tokens) of those that the encoder cuts, in order. The tokenizer decides."""
    limit = encoders.max_text_length
    long = [text for text in texts if _may_be_cut(text, encoders)]
    for start in range(0, len(long), BATCH):
        some = long[start : start + BATCH]
        yield from ((t, n) for t, n in zip(some, encoders.num_tokens(some), strict=True) if n > limit)


def _may_be_cut(text: str, encoders: Encoders) -> bool:
    return len(text.encode("utf-8", "surrogatepass")) + MARGIN > encoders.max_text_length
