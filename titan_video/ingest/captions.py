"""Captions and prompts that are longer than the text encoder takes."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

from titan_video.encoders.spec import Encoders
from titan_video.ingest.plan import Plan
from titan_video.tools.bounded import short

NAMES_SHOWN, BATCH = 5, 1000
MARGIN = 8  # tokens that an encoder adds to a text; no text has more tokens than bytes


def with_cut_captions(plan: Plan, encoders: Encoders) -> Plan:
    """The plan with a remark about captions that the encoder cuts."""
    first: dict[str, str] = {}
    for e in plan.kept:
        for caption in e.captions:
            first.setdefault(caption, e.path)
    cut = [f"{first[text]} ({count} tokens)" for text, count in _long_texts(list(first), encoders)]
    return replace(plan, remarks=(*plan.remarks, _remark("captions", cut, encoders))) if cut else plan


def cut_prompts(prompts: Sequence[str], encoders: Encoders) -> str:
    """A remark about prompts that the encoder cuts, or ""."""
    cut = [f"'{short(text, 40)}' ({count} tokens)" for text, count in _long_texts(prompts, encoders)]
    return _remark("prompts", cut, encoders) if cut else ""


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


def _remark(what: str, cut: list[str], encoders: Encoders) -> str:
    names = ", ".join(cut[:NAMES_SHOWN]) + (f" and {len(cut) - NAMES_SHOWN} more" if len(cut) > NAMES_SHOWN else "")
    return f"{len(cut)} {what} are cut to encoder.max_text_length = {encoders.max_text_length}: {names}"


def _long_texts(texts: Sequence[str], encoders: Encoders) -> Iterator[tuple[str, int]]:
    """(text, its tokens) of those that the encoder cuts, in order. The tokenizer decides."""
    limit = encoders.max_text_length
    long = [text for text in texts if len(text.encode("utf-8", "surrogatepass")) + MARGIN > limit]
    for start in range(0, len(long), BATCH):
        some = long[start : start + BATCH]
        yield from ((t, n) for t, n in zip(some, encoders.num_tokens(some), strict=True) if n > limit)
