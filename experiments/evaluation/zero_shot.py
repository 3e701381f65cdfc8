"""Zero-shot classification with an ensemble of prompts (CLIP, arXiv 2103.00020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments import pictures
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.errors import UserError
from models.io import stable_hash
from models.metrics.classification import (
    balanced_accuracy,
    class_vectors,
    confusion_matrix,
    top_k_accuracy,
    zero_shot_logits,
)


def zero_shot(split: EmbeddedSplit, templates: Sequence[str], templates_file: str | None = None) -> SuiteResult:
    """Top-1, top-5 and balanced accuracy in percent; skipped with a note where the data has no classes.

    Args:
        templates: prompts with ``{}`` for the class name. templates_file: a text file of such lines instead.
    """
    if templates_file is not None:
        templates = _read_templates(Path(templates_file))
    bad = [template for template in templates if template.count("{}") != 1]
    if bad or not templates:
        raise UserError(f"a prompt template needs exactly one {{}} for the class name: {bad or 'there are no templates'}")
    labelled = split.labels is not None and bool((split.labels >= 0).any())
    if not labelled or not split.class_names:
        note = "zero-shot classification left out: the data has no classes (classes.txt and a label in KEY.json)."
        return SuiteResult(notes=[note])
    names = split.class_names
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = class_vectors(split.encode_text(prompts).unflatten(0, (len(names), len(templates))))
    known = split.labels >= 0
    labels, logits = split.labels[known], zero_shot_logits(split.image[known], vectors)
    predicted = logits.argmax(dim=1)
    metrics = {f"zeroshot/top{k}": top_k_accuracy(logits, labels, k) for k in (1, 5) if k < len(names)}
    metrics["zeroshot/balanced"] = balanced_accuracy(predicted, labels, len(names))
    chance = {f"zeroshot/top{k}": 100 * k / len(names) for k in (1, 5) if k < len(names)}
    chance["zeroshot/balanced"] = 100 / len(names)
    hashes = {"prompts": stable_hash(prompts), **split.hashes}
    drawn = {"confusion": partial(pictures.confusion, confusion_matrix(predicted, labels, len(names)), names)}
    return SuiteResult(metrics, {"chance": chance}, hashes, pictures=drawn)


def _read_templates(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"templates_file {path} cannot be read as text: {error}") from error
    return [line.strip() for line in lines if line.strip()]
