"""VQA's answers: normal form, vocabulary and soft scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

MIN_COUNT = 9  # of an answer in the vocabulary (officially: 3,129 answers of the training and validation questions)
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # of an answer that 0, 1, 2, 3, or more of ten people gave

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_DIGITS_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the official code passes a flag of this value as the number of replacements
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Written without their apostrophes, these words get them back.
_WITHOUT_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll
ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're
why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
# Word -> misspellings of it.
_MISSPELT = {
    "couldn't've": "couldn'tve couldnt've", "hadn't've": "hadnt've hadn'tve", "he'd've": "hed've he'dve",
    "it'd've": "itd've it'dve", "mightn't've": "mightnt've mightn'tve", "'ow's'at": "ow's'at 'ows'at 'ow'sat",
    "she'd've": "shed've she'dve", "shouldn't've": "shouldnt've shouldn'tve", "somebodyd": "somebody'd",
    "somebody'd've": "somebodyd've somebody'dve", "someone'd've": "someoned've someone'dve",
    "something'd've": "somethingd've something'dve", "there'd've": "thered've there'dve", "they'd've": "theyd've they'dve",
    "we'd've": "wed've we'dve", "who'd've": "whod've who'dve", "wouldn't've": "wouldnt've wouldn'tve",
    "y'all'll": "yall'll y'allll", "y'all'd've": "yall'd've y'alld've y'all'dve", "you'd've": "youd've you'dve",
}  # fmt: skip
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHES}
_CONTRACTIONS |= {wrong: word for word, misspelt in _MISSPELT.items() for wrong in misspelt.split()}


def normalise_answer(answer: str) -> str:
    """The form in which answers are compared (VQA's evaluation code, with the quirks of the official training code)."""
    text = answer
    joined = _DIGITS_COMMA.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or joined else " ")
    text = _PERIOD.sub("", text, count=_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    words = (_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(words).replace(",", "")


def answer_vocabulary(answers: Iterable[str], min_count: int = MIN_COUNT) -> list[str]:
    """Normal forms that occur at least ``min_count`` times, in the order of their first appearance."""
    counts = Counter(normalise_answer(answer) for answer in answers)
    return [answer for answer, count in counts.items() if count >= min_count]


def score_of(count: int) -> float:
    """Soft score of an answer that ``count`` people gave."""
    return SCORES[min(count, len(SCORES) - 1)]


def soft_scores(answers: Sequence[str], numbers: dict[str, int], normalise: bool = True) -> dict[int, float]:
    """Scores by number in the vocabulary, in the order of the answers.

    Args:
        answers: what people gave, usually ten.
        numbers: of the answers in the vocabulary.
        normalise: False compares answers as they stand, as ViLT and METER do.
    """
    counts = Counter(normalise_answer(answer) if normalise else answer for answer in answers)
    return {numbers[answer]: score_of(count) for answer, count in counts.items() if answer in numbers}
