"""Cleaning captions as ALBEF and its descendants do (official ``pre_caption`` of HAMMER and freeze-align)."""

from __future__ import annotations

import re

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower case, without punctuation, hyphens and slashes as spaces, at most ``max_words`` words between spaces."""
    text = _DELETED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])
