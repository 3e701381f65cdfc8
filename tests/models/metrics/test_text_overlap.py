"""BLEU of the words alone, ROUGE-L by hand."""

import pytest
from torchmetrics.functional.text import bleu_score

from models.metrics.text_overlap import bleu, rouge_l

GENERATED = ["the heart is not enlarged and there is no effusion", "there is a small nodule in the left upper lung"]
REFERENCES = ["the heart is enlarged and there is no effusion seen", "a nodule is in the left upper lung"]


def test_bleu_is_that_of_words_without_case_and_punctuation():
    expected = bleu_score(GENERATED, [[reference] for reference in REFERENCES]).item()
    shouted = [text.upper().replace(" is", ", is") + "." for text in GENERATED]
    assert 0 < expected < 1 and bleu(shouted, REFERENCES) == pytest.approx(expected)
    assert bleu([""], ["a b c d"]) == 0 and bleu(REFERENCES, REFERENCES) == pytest.approx(1)


def test_rouge_l_is_the_longest_common_subsequence():
    assert rouge_l(["A b, c d."], ["a c d e"]) == pytest.approx(2 * 3 / 8)
    assert rouge_l(["a", ""], ["b", "c"]) == 0 and rouge_l(REFERENCES, REFERENCES) == 1
