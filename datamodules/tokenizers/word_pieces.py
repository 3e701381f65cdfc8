"""Texts to BERT word pieces, and which of them are masked for masked language modelling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertTokenizerFast

from models.encoders.weights import find_weights
from models.io import stable_hash

IGNORED = -100  # label of a token that is not to be predicted


class WordPieces:
    """BERT's uncased tokenizer with a fixed length: [CLS] ... [SEP], then padding.

    Args:
        vocabulary: ``vocab.txt``, a path or ``package://<package>/<path>``.
        length: in tokens; longer texts are cut on the right (official).
        keep_tail: of how many last tokens a text that is too long keeps; the cut then falls before them. 0 is official, with
            which five-option prompts can lose their answer and become identical.
    """

    def __init__(self, vocabulary: str, length: int = 40, keep_tail: int = 0):
        path = find_weights("BERT's word pieces", None, vocabulary, "datamodule.vocabulary")
        self.tokenizer = BertTokenizerFast(vocab=str(path), do_lower_case=True)
        self.length, self.keep_tail = length, keep_tail
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.continues = np.array([piece.startswith("##") for piece in pieces])
        self.identity = stable_hash([len(pieces), pieces[-1], length, keep_tail])

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """n texts to ids and mask (n, length) int64."""
        inner = self.length - 2
        ids = np.full((len(texts), self.length), self.tokenizer.pad_token_id)
        mask = np.zeros_like(ids)
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
        for row, pieces in enumerate(encoded):
            if len(pieces) > inner and self.keep_tail:
                pieces = pieces[: inner - self.keep_tail] + pieces[-self.keep_tail :]
            pieces = [self.tokenizer.cls_token_id, *pieces[:inner], self.tokenizer.sep_token_id]
            ids[row, : len(pieces)], mask[row, : len(pieces)] = pieces, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def mask_words(
        self, ids: NDArray[np.int64], rng: np.random.Generator, share: float = 0.15, mask_padding: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One text (length,) to its masked form and its labels (length,), whole words at a time.

        Words are shuffled and taken while they fit into the budget, max(1, round(share * tokens)). Of the chosen tokens 80 %
        become [MASK], 10 % a random piece, 10 % stay.

        Args:
            mask_padding: padding counts in the budget and competes for it (official: texts are padded first, so that about
                6 of 38 real tokens are chosen whatever the length, and short texts may get none). Else only words count.
        """
        cls_, sep, pad = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id
        words: list[list[int]] = []
        for place, piece in enumerate(ids.tolist()):
            if piece in (cls_, sep) or (piece == pad and not mask_padding):
                continue
            if words and self.continues[piece]:
                words[-1].append(place)
            else:
                words.append([place])
        tokens = len(ids) if mask_padding else int((ids != pad).sum())
        budget, chosen = max(1, round(share * tokens)), []
        for word in rng.permutation(len(words)):
            if len(chosen) + len(words[word]) <= budget:
                chosen += words[word]
        places = np.array([place for place in chosen if ids[place] != pad], dtype=np.int64)
        masked, labels = ids.copy(), np.full_like(ids, IGNORED)
        labels[places] = ids[places]
        fate = rng.random(len(places))
        random = rng.integers(0, len(self), len(places))
        masked[places] = np.where(fate < 0.8, self.tokenizer.mask_token_id, np.where(fate < 0.9, random, ids[places]))
        return masked, labels
