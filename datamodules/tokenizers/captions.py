"""Captions of DGM4: cleaning, tokens, and which tokens belong to which manipulated words (official ``pre_caption``,
``text_input_adjust``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BertTokenizerFast

from models.batch import IGNORE_INDEX
from models.captions import clean_caption
from models.encoders.weights import find_weights
from models.errors import UserError
from models.io import stable_hash


class TokenisedCaptions(NamedTuple):
    """``input_ids`` and ``mask`` (B, L) with [CLS] and without [SEP]; ``labels`` (B, L-1) of the tokens behind [CLS]: 1
    manipulated, 0 not, -100 padding. ``words``: for each caption the word number of each of its tokens behind [CLS], counted
    as the alignment does (see :class:`CaptionTokenizer`); ``spans`` their places in the cleaned caption."""

    input_ids: Tensor
    mask: Tensor
    labels: Tensor
    words: list[list[int]]
    spans: list[list[tuple[int, int]]]


def word_mask(positions: Collection[int], max_words: int = 50) -> Tensor:
    """(max_words,) float, 1 at manipulated words."""
    mask = torch.zeros(max_words)
    mask[[p for p in positions if p < max_words]] = 1
    return mask


class CaptionTokenizer:
    """BERT's WordPiece tokens of cleaned captions, and the labels of tokens from positions of manipulated words.

    ``fake_text_pos`` counts the words between white space of the *raw* caption.

    Args:
        vocabulary: folder with a ``vocab.txt``, the file itself, or ``package://<import name>/<path>``.
        max_words, max_length: in words of the cleaned caption and in tokens with [CLS] and [SEP]; the rest is cut.
        shifted_labels: True counts words as the official code does, by the pieces its tokeniser splits the *cleaned* caption
            into: a hyphen, a lone symbol or a ``&`` moves all later labels. Published figures are of that, in training and
            in evaluation. False follows each word through cleaning and tokenisation.
    """

    def __init__(self, vocabulary: str, max_words: int = 50, max_length: int = 128, shifted_labels: bool = False):
        path = Path(find_weights("BERT's vocabulary", None, vocabulary, "datamodule.tokenizer.vocabulary"))
        file = path / "vocab.txt" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"datamodule.tokenizer.vocabulary: there is no vocab.txt in {path}.")
        words = file.read_text(encoding="utf-8").splitlines()
        self._tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)
        self.vocab_size = len(words)
        self.max_words, self.max_length, self.shifted_labels = max_words, max_length, shifted_labels
        self.identity = {"vocabulary": stable_hash(words), "max_words": max_words, "max_length": max_length}
        self.identity["shifted_labels"] = shifted_labels

    def clean(self, text: str) -> str:
        return clean_caption(text, self.max_words)

    def __call__(self, texts: Sequence[str], positions: Sequence[Collection[int]] | None = None) -> TokenisedCaptions:
        """``texts`` raw captions; ``positions`` their manipulated words (default: none), both of length B."""
        positions = positions or [()] * len(texts)
        captions = [self.clean(text) for text in texts]
        encoded = self._tokenizer(
            captions, max_length=self.max_length, truncation=True, return_offsets_mapping=True, return_attention_mask=False
        )
        length = max(len(ids) for ids in encoded["input_ids"]) - 1
        input_ids, mask = (torch.zeros(len(texts), length, dtype=torch.int64) for _ in range(2))
        labels = torch.full((len(texts), length - 1), IGNORE_INDEX)
        all_words, all_spans = [], []
        for row, ids in enumerate(encoded["input_ids"]):
            kept = len(ids) - 1  # without [SEP]
            input_ids[row, :kept], mask[row, :kept] = torch.tensor(ids[:-1]), 1
            spans = [tuple(span) for span in encoded["offset_mapping"][row][1:-1]]
            if self.shifted_labels:
                words = list(encoded.word_ids(row)[1:-1])
            else:
                words = raw_words(texts[row], captions[row], spans)
            wanted = {p for p in positions[row] if p < self.max_words} if self.shifted_labels else set(positions[row])
            labels[row, : kept - 1] = torch.tensor([int(word in wanted) for word in words], dtype=torch.int64)
            all_words.append(words)
            all_spans.append(spans)
        return TokenisedCaptions(input_ids, mask, labels, all_words, all_spans)


def raw_words(raw: str, cleaned: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each span of the cleaned caption the number of the raw word, between white space, that it comes from."""
    owner, cursor = [-1] * len(cleaned), 0
    for number, word in enumerate(raw.split()):
        for piece in clean_caption(word, len(word)).split():
            start = cleaned.find(piece, cursor)
            if start < 0:
                break  # cut off by max_words
            cursor = start + len(piece)
            owner[start:cursor] = [number] * len(piece)
    return [owner[start] if start < end else -1 for start, end in spans]
