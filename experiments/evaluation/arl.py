"""What ARL is judged on beyond the two-tower models: questions about new entities, entities that are predicted, and figures."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from datamodules.readers.image_annotations.sample import Span
from experiments.evaluation import pretraining as generic
from experiments.evaluation import two_tower
from experiments.evaluation.base import SuiteResult, TrainedSplit, spread
from experiments.figures import arl as figures
from experiments.figures import two_tower as two_tower_figures
from models import batch as keys
from models.arl.batch import entity_keys
from models.arl.graph import NO_ENTITY
from models.batch import IGNORE_INDEX
from models.metrics.answers import percent
from models.two_tower.attention import patch_attention
from models.two_tower.objectives import masked_language

EXAMPLES = 6  # maps that are drawn
LINES = 12  # captions that are drawn


def questions(split: TrainedSplit) -> SuiteResult:
    """:func:`~experiments.evaluation.two_tower.questions`, and ``answer/new_entity_accuracy``: of the questions that name an
    entity which no training question names."""
    result = two_tower.questions(split)
    links = split.data.linked.links
    asked = {span[2] for sample in split.data.splits["train"].samples for span in links[sample.question]}
    rows = split.rows("answer_predicted")
    samples = [split.dataset.samples[row] for row in rows["index"].tolist()]
    new = torch.tensor([any(span[2] not in asked for span in links[sample.question]) for sample in samples])
    if bool(new.any()):
        result.metrics["answer/new_entity_accuracy"] = percent((rows["answer_predicted"] == rows["answer_labels"])[new])
    result.figures |= _figures(split)
    return result


def pretraining(split: TrainedSplit) -> SuiteResult:
    """:func:`~experiments.evaluation.pretraining.pretraining`, and how well entities are told from one modality alone."""
    result = generic.pretraining(split)
    metrics = split.module.validation_metrics(split.rows())
    result.metrics |= {name: value for name, value in metrics.items() if name.startswith("align/")}
    result.figures |= _figures(split)
    return result


def _figures(split: TrainedSplit) -> dict[str, Any]:
    """Linked texts; where the entities look in the image; masked words and what the model put there."""
    links = split.data.linked.links
    chosen = [split.dataset.samples[row] for row in spread(LINES, len(split.dataset.samples))]
    drawn: dict[str, Any] = {
        "linked_texts": partial(figures.captions, [_linked(s.texts[0], links[s.texts[0]]) for s in chosen])
    }
    batch = next(split.batches())
    read = next((name for name in ("question", "caption") if entity_keys(name)[0] in batch), None)
    if read and split.module.reason:
        drawn["entity_attention"] = partial(two_tower_figures.attention, _attended(split, batch, read))
    if "mlm" in split.module.tasks:
        drawn["masked_words"] = partial(figures.captions, _restored(split, batch))
    return drawn


def _linked(text: str, spans: list[Span]) -> list[tuple[str, str]]:
    parts, place = [], 0
    for start, end, _ in spans:
        parts += [(text[place:start].strip(), "plain"), (text[start:end], "entity")]
        place = end
    return [part for part in (*parts, (text[place:].strip(), "plain")) if part[0]]


def _attended(split: TrainedSplit, batch: dict, read: str) -> list[dict]:
    """The first entity of some texts, and its attention to the patches in the last layer."""
    model, encodings = split.module.model, split.module.encodings(batch)
    layer = model.cross_modal_text_layers[-1].knowledge_crossattention
    maps = patch_attention(model, layer, encodings(read), encodings("image")).cpu()
    first, rows = batch[entity_keys(read)[0]][:, 0].tolist(), batch[keys.INDEX].tolist()
    names = split.data.linked.graph.names
    display, samples = split.dataset.display, split.dataset.samples
    return [
        {"image": display(row)[0], "text": samples[row].texts[0], "said": names[entity], "map": of_row}
        for row, entity, of_row in zip(rows, first, maps[:, 0], strict=True)
        if entity != NO_ENTITY
    ][:EXAMPLES]


def _restored(split: TrainedSplit, batch: dict) -> list[list[tuple[str, str]]]:
    """Captions with the model's words in the place of masked ones."""
    encodings, labels = split.module.encodings(batch), batch[keys.MASKED_LABELS]
    _, logits = masked_language(split.module.model, encodings("masked"), encodings("image"), labels)
    predicted = labels.clone()
    predicted[labels != IGNORE_INDEX] = logits.argmax(dim=-1)
    tokenizer, lines = split.data.words.tokenizer, []
    for ids, of_text, put in zip(batch[keys.TOKEN_IDS].tolist(), labels.tolist(), predicted.tolist(), strict=True):
        line = []
        for token, label, guess in zip(ids, of_text, put, strict=True):
            if label != IGNORE_INDEX:
                line.append((tokenizer.decode([guess]).strip(), "right" if guess == label else "wrong"))
            elif token not in tokenizer.all_special_ids:
                line.append((tokenizer.decode([token]).strip(), "plain"))
        lines.append(line)
    return lines[:LINES]
