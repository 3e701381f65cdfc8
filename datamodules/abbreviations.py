"""Abbreviations that a text defines: "magnetic resonance imaging (MRI)", by the algorithm of Schwartz and Hearst (PSB 2003)."""

from __future__ import annotations

import re

_BRACKETS = re.compile(r"\(([^()]+)\)")
_SENTENCE_END = re.compile(r"[.;:!?]\s")
_CUT = re.compile(r"[;,]\s")


def abbreviations(text: str) -> dict[str, str]:
    """The short forms that a text defines in brackets, with their long forms; the first definition of each counts.

    A short form has 2 to 10 characters in at most two words, begins with a letter or digit and holds a letter. Brackets with
    more hold the long form of the word before them.
    """
    pairs: dict[str, str] = {}
    for match in _BRACKETS.finditer(text):
        inside, before = _CUT.split(match[1])[0].strip(), _SENTENCE_END.split(text[: match.start()])[-1].split()
        if not before:
            continue
        if _is_short(inside):
            short, words = inside, before[-min(len(inside) + 5, 2 * len(inside)) :]
        else:
            short, words = before[-1], inside.split()
        long = long_form(short, " ".join(words)) if _is_short(short) else None
        if long is not None:
            pairs.setdefault(short, long)
    return pairs


def long_form(short: str, text: str) -> str | None:
    """The end of ``text`` that ``short`` abbreviates, or None.

    From right to left each letter and digit of ``short`` is found in ``text``, the first one at the beginning of a word.
    """
    place = len(text)
    for number in range(len(short) - 1, -1, -1):
        letter = short[number].lower()
        if not letter.isalnum():
            continue
        place -= 1
        while place >= 0 and (text[place].lower() != letter or (number == 0 and place > 0 and text[place - 1].isalnum())):
            place -= 1
        if place < 0:
            return None
    long = text[text.rfind(" ", 0, place) + 1 :]
    most = min(len(short) + 5, 2 * len(short))
    return None if len(long) <= len(short) or short in long.split() or len(long.split()) > most else long


def _is_short(text: str) -> bool:
    return 2 <= len(text) <= 10 and len(text.split()) <= 2 and text[0].isalnum() and any(map(str.isalpha, text))
