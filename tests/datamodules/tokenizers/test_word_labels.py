from pathlib import Path

import pytest

from datamodules.tokenizers.word_labels import CaptionTokenizer, clean_caption
from models.errors import UserError

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a well known man woman wins u k uk the cup & $ person won ##s".split()


@pytest.fixture
def vocabulary(tmp_path) -> str:
    Path(tmp_path, "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return str(tmp_path)


def marked(tokenizer, text, positions):
    found = tokenizer([text], [positions])
    ids, labels = found.input_ids[0, 1:].tolist(), found.labels[0].tolist()
    return [WORDS[i] for i, label in zip(ids, labels, strict=True) if label == 1]


def test_cleaning():
    assert clean_caption("<person> WON: the well-known 'cup'!\n") == "person won the well known cup"
    assert clean_caption("a b  c d", max_words=3) == "a b c"


@pytest.mark.parametrize(
    "text, position, official, own",
    [
        ("a well-known man wins", 2, ["known"], ["man"]),  # the hyphen makes one word two
        ("a well-known man wins", 1, ["well"], ["well", "known"]),
        ("! the cup", 1, ["cup"], ["the"]),  # a word of nothing but deleted signs
        ("the $ & cup", 3, ["cup"], ["cup"]),
        ("the & cup", 2, ["cup"], ["cup"]),
        ("U.K. wins", 0, ["uk"], ["uk"]),
        ("mans wins", 0, ["man", "##s"], ["man", "##s"]),
    ],
)
def test_which_tokens_belong_to_a_word(vocabulary, text, position, official, own):
    assert marked(CaptionTokenizer(vocabulary, shifted_labels=True), text, [position]) == official
    assert marked(CaptionTokenizer(vocabulary), text, [position]) == own


def test_padding_and_the_last_token(vocabulary):
    found = CaptionTokenizer(vocabulary)(["a man", "the cup won"])
    assert found.input_ids.tolist() == [[2, 5, 8, 0], [2, 14, 15, 19]]  # [CLS] first, no [SEP]
    assert found.mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert found.labels.tolist() == [[0, 0, -100], [0, 0, 0]]


def test_long_captions_are_cut(vocabulary):
    found = CaptionTokenizer(vocabulary, max_length=4)(["a man wins the cup"], [[0, 4]])
    assert found.input_ids.tolist() == [[2, 5, 8]]
    assert found.labels.tolist() == [[1, 0]]
    assert CaptionTokenizer(vocabulary, max_words=2)(["a man wins"]).input_ids.tolist() == [[2, 5, 8]]


def test_missing_vocabulary(tmp_path):
    with pytest.raises(UserError, match="vocab"):
        CaptionTokenizer(str(tmp_path))
