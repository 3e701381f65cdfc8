"""What does a trained LLaVA with managers say about your images? The stage ``predict`` of the family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from datamodules.readers.base import BadSample
from datamodules.readers.images import open_rgb
from experiments.evaluation.llava_manager import said
from experiments.figures import llava_manager as figures
from experiments.prediction.base import write
from experiments.run import parts
from experiments.run.directory import Run
from models.errors import UserError

DRAWN = 12  # answers of the figure


@torch.inference_mode()
def answers(run: Run, images: Sequence[str] = (), questions: Sequence[str] = (), longest: int = 128) -> dict[str, Any]:
    """Answers every question about every image, greedily: a table, ``predictions.json`` and ``answers.png``.

    Args:
        run: the run.
        images: files.
        questions: texts. A model of the prompt plain describes the image, whatever the question.
        longest: tokens of an answer.
    """
    if not images or not questions:
        raise UserError('predict needs images and questions: predict.images=[a.jpg,b.png] predict.questions=["what is shown?"]')
    data = parts.datamodule(run)
    module = parts.trained_module(run, data.facts())
    table, predictions, drawn = Table(Column("image", overflow="fold"), *questions), [], []
    for name in images:
        try:
            image = open_rgb(Path(name))
            ask = partial(data.asked, image)
            told = [said(module, data.words, ask(question), longest) for question in questions]
        except BadSample as error:
            raise UserError(f"predict.images: {name} cannot be used ({error}).") from error
        table.add_row(name, *told)
        predictions.append({"image": name, "answers": dict(zip(questions, told, strict=True))})
        drawn += [{"image": image, "question": question, "said": text} for question, text in zip(questions, told, strict=True)]
    write(run, predictions, table)
    figures.answers(drawn[:DRAWN], run.dir / "answers.png")
    return {"images": len(images), "questions": len(questions)}
