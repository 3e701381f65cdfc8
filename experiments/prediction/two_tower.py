"""What does a trained two-tower model say about your images? The stage ``predict`` of the family, and VQA's submission file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor

from datamodules.readers.base import BadSample
from datamodules.readers.images import open_rgb
from experiments.figures import two_tower as figures
from experiments.prediction.base import write
from experiments.run import parts
from experiments.run.directory import Run
from models.errors import UserError
from models.io import atomic_write
from models.two_tower import objectives
from models.two_tower.attention import image_attention
from models.two_tower.model import Encoded

log = logging.getLogger("run")
HEADS = {"answer": objectives.answer_logits, "entail": objectives.entailment_logits}


@torch.inference_mode()
def images_with_texts(run: Run, images: Sequence[str] = (), texts: Sequence[str] = (), draw: bool = True) -> dict[str, Any]:
    """Answers every question about every image, or scores every text for it, as a table and ``predictions.json``.

    A model of questions answers by name, one of hypotheses says how each relates to the image, one of image pairs whether each
    sentence is true of ``images`` two by two; a model of retrieval gives the probability of a match, or cosines.

    Args:
        run: the run.
        images: files.
        texts: questions, sentences or captions.
        draw: also draw where in the image each text's token 0 looked, as ``attention.png``.
    """
    if not images or not texts:
        raise UserError('predict needs images and texts: predict.images=[a.jpg,b.png] predict.texts=["what is shown?"]')
    data = parts.datamodule(run)
    module = parts.trained_module(run, data.facts())
    if "reason" in module.tasks and len(images) % 2:
        raise UserError("predict.images: this model judges pairs of images; give an even number of them.")
    pixels = torch.stack([_open(name, data) for name in images]).to(module.device)
    batch = {name: part.to(module.device) for name, part in data.questions(list(texts)).items()}
    text = module.encodings(batch)("question")
    step = 2 if "reason" in module.tasks else 1
    table = Table(Column("image", overflow="fold"), *texts)
    predictions, drawn = [], []
    for first in range(0, len(images), step):
        cells = _judge(module, data, text, pixels[first : first + step], len(texts))
        name = " + ".join(images[first : first + step])
        table.add_row(name, *map(str, cells))
        predictions.append({"image": name, "texts": dict(zip(texts, cells, strict=True))})
        if draw and step == 1:
            image = _repeated(module.model.encode_image(pixels[first : first + 1]), len(texts))
            maps = image_attention(module.model, text, image)
            for cell, label, attention in zip(cells, texts, maps, strict=True):
                shown = displayed(pixels[first].cpu(), data)
                drawn.append({"image": shown, "text": label, "said": str(cell), "map": attention.cpu()})
    write(run, predictions, table)
    if drawn:
        figures.attention(drawn[:12], run.dir / "attention.png")
    return {"images": len(images), "texts": len(texts)}


def _judge(module: Any, data: Any, text: Encoded, pixels: Tensor, count: int) -> list[Any]:
    """One cell per text about one image, or one pair."""
    model, tasks = module.model, module.tasks
    image = _repeated(model.encode_image(pixels[:1]), count)
    for task, logits_of in HEADS.items():
        if task in tasks:
            module.check_trained(task)
            return _named(logits_of(model, text, image), data.label_names)
    if "reason" in tasks:
        module.check_trained("reason")
        second = _repeated(model.encode_image(pixels[1:], kind=2), count)
        return _named(objectives.pair_logits(model, text, image, second), data.label_names)
    if "match" in tasks:
        module.check_trained("match")
        logits = model.itm_score.fc(model.fuse(text, image, read="first").pooled)
        return [round(value, 4) for value in logits.softmax(dim=1)[:, 1].tolist()]
    if "contrastive" in tasks:
        module.check_trained("contrastive")
        return [round(value, 4) for value in (model.embed_text(text) * model.embed_image(image)).sum(dim=1).tolist()]
    raise UserError(f"predict has no use for a model of the tasks {list(tasks)}.")


def _named(logits: Tensor, names: Sequence[str]) -> list[str]:
    return [names[i] if i < len(names) else f"class {i}" for i in logits.argmax(dim=1).tolist()]


def _repeated(image: Encoded, count: int) -> Encoded:
    return image.rows(torch.zeros(count, dtype=torch.int64, device=image.feature.device))


def displayed(pixels: Tensor, data: Any) -> Any:
    """(h, w, 3) in [0, 1] of a normalised image."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in data.transform.normalisation)
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _open(name: str, data: Any) -> Tensor:
    try:
        return data.transform(open_rgb(Path(name)), None)
    except BadSample as error:
        raise UserError(f"predict.images: {name} cannot be used ({error}).") from error


@torch.inference_mode()
def submission(run: Run) -> dict[str, Any]:
    """Answers to all questions of the test split as ``vqa_submission.json``: question_id and answer (VQA's server)."""
    data = parts.datamodule(run)
    split = parts.trained_split(run, "test")
    rows = split.rows("answer_predicted")
    names, samples = data.label_names, split.dataset.samples
    answers = [
        {"question_id": samples[row].number, "answer": names[answer]}
        for row, answer in zip(rows["index"].tolist(), rows["answer_predicted"].tolist(), strict=True)
    ]
    path = run.dir / "vqa_submission.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(answers))
    log.info("%d answers are in %s", len(answers), path)
    return {"questions": len(answers)}
