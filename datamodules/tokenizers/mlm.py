"""Which tokens are masked for masked language modelling: whole words (BERT) or tokens (RoBERTa)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datamodules.tokenizers.base import TextTokenizer
from models.batch import IGNORE_INDEX


def mask_words(
    ids: NDArray[np.int64],
    words: TextTokenizer,
    rng: np.random.Generator,
    share: float = 0.15,
    mask_padding: bool = False,
    continues: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask one text (L,), whole words at a time: its masked ids and its labels (L,), IGNORE_INDEX where nothing is masked.

    Words are shuffled and taken while they fit into the budget, max(1, round(share * tokens)). Of the chosen tokens 80 % become
    the mask token, 10 % a random token, 10 % stay.

    Args:
        ids: from :class:`~datamodules.tokenizers.base.TextTokenizer`.
        words: the tokenizer.
        rng: decides on all draws.
        share: of the tokens that are masked.
        mask_padding: padding counts in the budget and competes for it (official in All-in-One: texts are padded first, so that
            about 6 of 38 real tokens are chosen whatever the length, and short texts may get none). Else only words count.
        continues: (L,) positions that belong to the group of the position before, where groups are not the tokenizer's words
            (named entities).
    """
    tokenizer = words.tokenizer
    pad = tokenizer.pad_token_id
    specials = {tokenizer.cls_token_id, tokenizer.sep_token_id} | (set() if mask_padding else {pad})
    continues = words.continues[ids] if continues is None else continues
    groups: list[list[int]] = []
    for place, token in enumerate(ids.tolist()):
        if token in specials:
            continue
        if groups and continues[place]:
            groups[-1].append(place)
        else:
            groups.append([place])
    tokens = len(ids) if mask_padding else int((ids != pad).sum())
    budget = max(1, round(share * tokens))
    chosen: list[int] = []
    for group in rng.permutation(len(groups)):
        if len(chosen) + len(groups[group]) <= budget:
            chosen += groups[group]
    places = np.array([place for place in chosen if ids[place] != pad], dtype=np.int64)
    return _masked(ids, places, words, rng)


def mask_tokens(
    ids: NDArray[np.int64], words: TextTokenizer, rng: np.random.Generator, share: float = 0.15
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As :func:`mask_words`, where every token that is not special is chosen on its own with probability ``share``.

    A text may get no mask at all (RoBERTa's and BridgeTower's masking).
    """
    tokenizer = words.tokenizer
    special = np.isin(ids, [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])
    return _masked(ids, np.flatnonzero(~special & (rng.random(len(ids)) < share)), words, rng)


def _masked(
    ids: NDArray[np.int64], places: NDArray[np.int64], words: TextTokenizer, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    masked, labels = ids.copy(), np.full_like(ids, IGNORE_INDEX)
    labels[places] = ids[places]
    fate = rng.random(len(places))
    random = rng.integers(0, len(words), len(places))
    masked[places] = np.where(fate < 0.8, words.tokenizer.mask_token_id, np.where(fate < 0.9, random, ids[places]))
    return masked, labels
