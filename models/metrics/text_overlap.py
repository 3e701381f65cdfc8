"""Overlap of generated texts with references: BLEU (Papineni et al., 2002) and ROUGE-L (Lin, 2004)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchmetrics.functional.text import bleu_score


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def bleu(generated: Sequence[str], references: Sequence[str], order: int = 4) -> float:
    """Corpus BLEU in [0, 1] of N texts with one reference each, without smoothing: 0 where no ``order``-gram is met.

    Args:
        generated, references: N texts.
        order: longest n-grams.
    """
    texts, wanted = ([" ".join(words(text)) for text in side] for side in (generated, references))
    return float(bleu_score(texts, [[text] for text in wanted], n_gram=order))


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 in [0, 1] of the longest common subsequence of words; 0 where one of the texts is empty."""
    scores = []
    for text, reference in zip(generated, references, strict=True):
        tokens, wanted = words(text), words(reference)
        common = _longest_common(tokens, wanted)
        scores.append(2 * common / (len(tokens) + len(wanted)) if common else 0.0)
    return sum(scores) / max(len(scores), 1)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for place, other in enumerate(b, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
