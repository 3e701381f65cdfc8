"""Open-ended questions: accuracy over a vocabulary of answers, beside the commonest answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from experiments.evaluation.base import Question, SuiteResult, TrainedSplit, spread
from experiments.evaluation.errors import WORST, ErrorRow, strip
from experiments.figures import clips
from models.batch import IGNORE_INDEX
from models.metrics.answers import answer_metrics, percent

EXAMPLES = 6  # questions that are drawn


def question_answering(split: TrainedSplit) -> SuiteResult:
    """Accuracy in percent, by kind of question too where the data has several; see
    :func:`~models.metrics.answers.answer_metrics`.

    The baseline always gives the commonest training answer of the kind of question.
    """
    rows = split.rows("answer_predicted")
    samples = [split.dataset.samples[row] for row in rows["index"].tolist()]
    kinds = [sample.group for sample in samples]
    metrics, majority = answer_metrics(rows), {}
    if "answer_labels" in rows:
        guesses = _commonest(split.data.splits.get("train", split.dataset).samples, kinds)
        majority = answer_metrics({"answer_predicted": guesses, "answer_labels": rows["answer_labels"]})
        names = sorted(set(kinds) - {""})
        for name in names if len(names) > 1 else []:
            of_kind = torch.tensor([kind == name for kind in kinds])
            labels = rows["answer_labels"][of_kind]
            metrics[f"answer/{name}_accuracy"] = percent(rows["answer_predicted"][of_kind] == labels)
            majority[f"answer/{name}_accuracy"] = percent(guesses[of_kind] == labels)
    figures, errors = {}, {}
    if split.dataset.answers and "answer_labels" in rows:
        drawn = [_example(rows, samples, split.dataset.answers, i) for i in spread(EXAMPLES, len(samples))]
        figures["answers"] = partial(clips.answered, drawn, split.dataset.display)
        wrong = (rows["answer_predicted"] != rows["answer_labels"]).nonzero().flatten().tolist()
        picked = (_example(rows, samples, split.dataset.answers, wrong[i]) for i in spread(WORST, len(wrong)))
        errors["answers"] = [_error(example, split.dataset.display) for example in picked]
    return SuiteResult(metrics, {"majority": majority}, split.hashes, figures=figures, errors=errors)


def _commonest(samples: Sequence[Question], kinds: Sequence[str]) -> Tensor:
    """The commonest training answer of each kind, and of all for a kind that training does not have."""
    counts: dict[str, Counter[int]] = {"": Counter()}
    for sample in samples:
        for kind in {"", sample.group}:
            counts.setdefault(kind, Counter())[sample.answer] += 1
    commonest = {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}
    return torch.tensor([commonest.get(kind, commonest[""]) for kind in kinds])


def _example(rows: dict[str, Tensor], samples: Sequence[Question], answers: Sequence[str], i: int) -> dict:
    predicted, label = int(rows["answer_predicted"][i]), int(rows["answer_labels"][i])
    return {
        "row": int(rows["index"][i]),
        "text": samples[i].texts[0],
        "right": "(not in the vocabulary)" if label == IGNORE_INDEX else answers[label],
        "predicted": answers[predicted] if predicted < len(answers) else "(spare class)",
    }


def _error(example: dict, display: clips.LoadFrames) -> ErrorRow:
    return {
        "question": example["text"],
        "predicted": example["predicted"],
        "right": example["right"],
        "image": lambda: strip(display(example["row"])),
    }
