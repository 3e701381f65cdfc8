"""Texts to token ids of a fixed length, with any tokenizer of transformers: BERT's word pieces, RoBERTa's byte pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast, RobertaTokenizerFast

from datamodules.readers.text import read_lines
from models.encoders.weights import find_weights
from models.errors import UserError
from models.io import stable_hash

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(vocabulary: str, option: str) -> PreTrainedTokenizerFast:
    """A tokenizer from its vocabulary alone.

    Args:
        vocabulary: ``vocab.txt`` of BERT (uncased), or a folder with it, or a folder with RoBERTa's ``vocab.json`` and
            ``merges.txt``; a path or ``package://<import name>/<path>``.
        option: setting that error messages name.

    Raises:
        UserError: there is no vocabulary.
    """
    path = Path(find_weights("the tokenizer's vocabulary", None, vocabulary, option))
    if (path / "merges.txt").is_file():
        try:
            return RobertaTokenizerFast(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"))
        except Exception as error:  # the tokenizers' own exceptions have no common base
            raise UserError(f"{option}: vocab.json and merges.txt in {path} cannot be used ({error}).") from error
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{option}: there is neither a vocab.txt nor a vocab.json with merges.txt in {path}.")
    words = {word: number for number, word in enumerate(read_lines(file))}
    if missing := [word for word in BERT_SPECIALS if word not in words]:
        raise UserError(f"{option}: {file} lacks {', '.join(missing)}: it is no vocabulary of BERT.")
    return BertTokenizerFast(vocab=words, do_lower_case=True)


class TextTokenizer:
    """``texts -> ids, mask`` of a fixed length: start token, text, end token, padding.

    Args:
        vocabulary: see :func:`load_tokenizer`.
        length: tokens of every text; longer texts are cut on the right, as officially.
        keep_tail: last tokens that a text that is too long keeps; the cut then falls before them. 0 is official, with which
            five-option prompts can lose their answer and become identical.

    Attributes:
        continues: (vocabulary size,) bool: pieces that continue the word of the piece before. RoBERTa has none.
        identity: hash of all that decides on the ids.
    """

    def __init__(self, vocabulary: str, length: int = 40, keep_tail: int = 0):
        if length < 3 or not 0 <= keep_tail <= length - 2:
            raise UserError(f"datamodule.text_length={length} and keep_tail={keep_tail} leave no room for a text.")
        self.tokenizer = load_tokenizer(vocabulary, "datamodule.vocabulary")
        self.length, self.keep_tail = length, keep_tail
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.continues = np.array([piece.startswith("##") for piece in pieces])
        self.identity = stable_hash([len(pieces), pieces[-1], length, keep_tail])

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """n texts to ids and mask (n, length) int64."""
        ids, mask, _ = self._encoded(texts, offsets=False)
        return ids, mask

    def with_offsets(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        """The same, and (n, length, 2) the first character of each token and the one behind its last; equal where a token has
        none."""
        return self._encoded(texts, offsets=True)

    def _encoded(self, texts: Sequence[str], offsets: bool) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        inner = self.length - 2
        ids = np.full((len(texts), self.length), self.tokenizer.pad_token_id)
        mask, places = np.zeros_like(ids), np.zeros((*ids.shape, 2), dtype=np.int64)
        options = {"add_special_tokens": False, "return_offsets_mapping": offsets}
        encoded = self.tokenizer(list(texts), **options) if len(texts) else {"input_ids": []}
        for row, pieces in enumerate(encoded["input_ids"]):
            shown = np.arange(min(len(pieces), inner))
            if len(pieces) > inner and self.keep_tail:
                shown[-self.keep_tail :] += len(pieces) - inner
            end = len(shown) + 1
            ids[row, 0], ids[row, 1:end], ids[row, end] = (
                self.tokenizer.cls_token_id, np.array(pieces, dtype=np.int64)[shown], self.tokenizer.sep_token_id,
            )  # fmt: skip
            mask[row, : end + 1] = 1
            if offsets and end > 1:
                places[row, 1:end] = np.array(encoded["offset_mapping"][row])[shown]
        return torch.from_numpy(ids), torch.from_numpy(mask), places
