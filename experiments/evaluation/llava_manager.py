"""Conversations about images: which answers are said exactly, and how likely the right ones are."""

from __future__ import annotations

import textwrap
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from datamodules.readers.base import BadSample
from datamodules.readers.conversations import Conversation
from experiments.evaluation.base import SuiteResult, TrainedSplit, spread
from experiments.evaluation.errors import WORST, ErrorRow, strip
from experiments.figures import clips
from lightning_modules.llava_manager import conversation_metrics

EXAMPLES = 6  # conversations that are drawn
SHOWN = 60  # characters of a text in the figure


def conversations(split: TrainedSplit, longest: int = 64) -> SuiteResult:
    """See :func:`~lightning_modules.llava_manager.conversation_metrics`; where the data names kinds of questions, the exact
    answers of each kind as well, beside two baselines.

    ``majority`` always gives the commonest training answer of the kind of question, ``question alone`` the commonest one to
    this very question, which is what a model of the text alone would learn.

    Args:
        split: a trained module and its conversations.
        longest: tokens of an answer that is shown in the figure and in the table of errors.
    """
    rows = split.rows("answers_exact")
    indices = rows["index"].tolist()
    samples = [split.dataset.samples[row] for row in indices]
    metrics, baselines = conversation_metrics(rows), {}
    kinds = [sample.group for sample in samples]
    names = sorted(set(kinds) - {""})
    if names:
        for name in names:
            of_kind = torch.tensor([kind == name for kind in kinds])
            metrics[f"answer/{name}_exact"] = _share(rows["answers_exact"][of_kind], rows["answers"][of_kind])
        baselines = _baselines(split.data.splits.get("train", split.dataset).samples, samples, names)
    drawn = [_example(split, indices[i], samples[i], longest) for i in spread(EXAMPLES, len(samples))]
    wrong = (rows["answers_exact"] < rows["answers"]).nonzero().flatten().tolist()
    errors = [_error(split, indices[wrong[i]], samples[wrong[i]], longest) for i in spread(WORST, len(wrong))]
    figures = {"answers": partial(clips.answered, drawn, split.dataset.display)}
    return SuiteResult(metrics, baselines, split.hashes, figures=figures, errors={"answers": errors})


def _share(exact: Tensor, answers: Tensor) -> float:
    return 100 * int(exact.sum()) / max(int(answers.sum()), 1)


def _baselines(train: Any, samples: list[Conversation], names: list[str]) -> dict[str, dict[str, float]]:
    """Of conversations of one question each; the first question of longer ones counts."""
    of_kind: dict[str, Counter[str]] = {}
    of_question: dict[str, Counter[str]] = {}
    for row in range(len(train)):
        with suppress(BadSample):
            sample = train[row]
            of_kind.setdefault(sample.group, Counter())[sample.answer] += 1
            of_question.setdefault(sample.question, Counter())[sample.answer] += 1
    every = sum(of_kind.values(), Counter())
    majority = [of_kind.get(sample.group, every).most_common(1)[0][0] for sample in samples]
    alone = [of_question.get(sample.question, every).most_common(1)[0][0] for sample in samples]
    columns = {}
    for column, said in (("majority", majority), ("question alone", alone)):
        right = torch.tensor([answer == sample.answer for answer, sample in zip(said, samples, strict=True)])
        columns[column] = {"answer/exact": 100 * float(right.double().mean())}
        for name in names:
            chosen = torch.tensor([sample.group == name for sample in samples])
            columns[column][f"answer/{name}_exact"] = 100 * float(right[chosen].double().mean())
    return columns


def _example(split: TrainedSplit, row: int, sample: Conversation, longest: int) -> dict:
    said, right = (textwrap.shorten(text, SHOWN) for text in (_said(split, row, longest), sample.answer))
    return {"row": row, "text": textwrap.shorten(sample.question, SHOWN), "right": right, "predicted": said}


def _error(split: TrainedSplit, row: int, sample: Conversation, longest: int) -> ErrorRow:
    return {
        "question": sample.question,
        "predicted": _said(split, row, longest),
        "right": sample.answer,
        "image": lambda: strip(split.dataset.display(row)),
    }


def _said(split: TrainedSplit, row: int, longest: int) -> str:
    """The model's first answer of a conversation."""
    batch = split.dataset.batch_of([split.dataset.question(row)])
    return said(split.module, split.data.words, batch, longest)


def said(module: Any, words: Any, batch: dict, longest: int) -> str:
    """What the model says, greedily, behind the one question of a batch.

    Args:
        module: a trained :class:`~lightning_modules.llava_manager.LlavaManagerModule`.
        words: the :class:`~datamodules.tokenizers.chat.ChatTokenizer` of its data.
        batch: of :meth:`~datamodules.conversations.ConversationDataModule.asked`.
        longest: most tokens of the answer.
    """
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    return words.decode(module.say(batch, words.end_id, words.padding_id, longest)[0].tolist()).strip()
