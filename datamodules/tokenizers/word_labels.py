"""Labels of words as labels of tokens: DGM4's manipulated words (official ``pre_caption``, ``text_input_adjust``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.tokenizers.base import load_tokenizer
from models.batch import IGNORE_INDEX
from models.captions import clean_caption
from models.io import stable_hash


class TokenisedCaptions(NamedTuple):
    """Tokens of B captions, with [CLS] and without [SEP].

    Attributes:
        input_ids: (B, L) int64.
        mask: (B, L) int64, 1 at tokens.
        labels: (B, L-1) int64 of the tokens behind [CLS]: 1 manipulated, 0 not, IGNORE_INDEX padding.
        words: for each caption the number of the word of each of its tokens behind [CLS], see :class:`CaptionTokenizer`.
        spans: for each caption the places of these tokens in the cleaned caption.
    """

    input_ids: Tensor
    mask: Tensor
    labels: Tensor
    words: list[list[int]]
    spans: list[list[tuple[int, int]]]


class CaptionTokenizer:
    """BERT's WordPiece tokens of cleaned captions, and the labels of tokens from positions of manipulated words.

    ``fake_text_pos`` counts the words between white space of the *raw* caption.

    Args:
        vocabulary: see :func:`~datamodules.tokenizers.base.load_tokenizer`.
        max_words: of the cleaned caption; the rest is cut.
        max_length: tokens with [CLS] and [SEP]; the rest is cut.
        shifted_labels: True counts words as the official code does, by the pieces its tokeniser splits the *cleaned* caption
            into: a hyphen, a lone symbol or a ``&`` moves all later labels. Published results are of that, in training and
            in evaluation. False follows each word through cleaning and tokenisation.
    """

    def __init__(self, vocabulary: str, max_words: int = 50, max_length: int = 128, shifted_labels: bool = False):
        self._tokenizer = load_tokenizer(vocabulary, "datamodule.tokenizer.vocabulary")
        self.vocab_size = len(self._tokenizer)
        self.max_words, self.max_length, self.shifted_labels = max_words, max_length, shifted_labels
        pieces = self._tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        self.identity = {"vocabulary": stable_hash(pieces), "max_words": max_words, "max_length": max_length}
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
            real = len(ids) - 1  # without [SEP]
            input_ids[row, :real], mask[row, :real] = torch.tensor(ids[:-1]), 1
            spans = [tuple(span) for span in encoded["offset_mapping"][row][1:-1]]
            if self.shifted_labels:
                words = list(encoded.word_ids(row)[1:-1])
            else:
                words = raw_words(texts[row], captions[row], spans)
            marked = {p for p in positions[row] if p < self.max_words} if self.shifted_labels else set(positions[row])
            labels[row, : real - 1] = torch.tensor([int(word in marked) for word in words], dtype=torch.int64)
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
