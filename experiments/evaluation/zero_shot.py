"""Zero-shot classification with ensembles of prompts (CLIP, arXiv 2103.00020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from datamodules.readers.text import read_json, read_names
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from experiments.figures import canvas
from models.errors import UserError
from models.io import stable_hash
from models.metrics.classification import (
    balanced_accuracy,
    confusion_matrix,
    descriptive_class_vectors,
    macro_f1,
    top_k_accuracy,
    zero_shot_logits,
)

Statistics = Literal["own", "clip"]  # of pixels: those of training, or CLIP's


def zero_shot(
    split: EmbeddedSplit,
    templates: Sequence[str] = (),
    templates_file: str | None = None,
    template_sets: Mapping[str, str] | None = None,
    descriptions_file: str | None = None,
    descriptions_order: Literal["names", "file"] = "names",
    descriptions_pad_to: int = 0,
    descriptions_normalise: bool = True,
    statistics: Statistics = "own",
) -> SuiteResult:
    """Top-1, top-5 and balanced accuracy and macro F1 in percent; skipped with a note where the data has no classes.

    Args:
        templates: prompts with ``{}`` for the class name. templates_file: a text file of such lines instead; ``{c}``,
            as CLIP_benchmark's files have it, is taken too.
        template_sets: name -> file of further sets, each reported as ``zeroshot_<name>/...`` beside the first.
        descriptions_file: JSON of class name -> list of whole prompts that describe it, reported as
            ``zeroshot_descriptions/...``. Every class of the data needs an entry; classes may differ in their number.
        descriptions_order: 'names' finds a class's prompts by its name. Official (freeze-align): 'file', the n-th entry is
            class n whatever its name, such as a WordNet id.
        descriptions_pad_to: fill shorter lists up to this many prompts with copies of their first one. Official: 19, so that
            a class's first prompt counts up to 17 times.
        descriptions_normalise: normalise class vectors again after averaging the prompts. Official: False, so that classes
            whose prompts agree have longer vectors, and are preferred.
        statistics: of the pixels. Official (freeze-align): 'clip', although the backbone is DINOv2; the images are then
            encoded anew. 'own' are those of training.
    """
    labelled = split.labels is not None and bool((split.labels >= 0).any())
    sets = {"zeroshot": read_templates(templates, templates_file)}
    sets |= {f"zeroshot_{name}": read_templates((), file) for name, file in (template_sets or {}).items()}
    if not labelled or not split.class_names:
        note = "zero-shot classification left out: the data has no classes (classes.txt and a label in KEY.json)."
        return SuiteResult(notes=[note])
    names, result = split.class_names, SuiteResult(hashes=dict(split.hashes))
    if statistics != "own":
        images = (split.load_image(row) for row in range(len(split.image)))
        split = replace(split, image=embed_images(split, images, statistics))
        result.hashes["preprocessing"] = preprocessing_hash(split, statistics)
    prompts = {key: [fill(chosen, [name]) for name in names] for key, chosen in sets.items()}
    rules = dict.fromkeys(prompts, class_vectors_of)
    if descriptions_file is not None:
        key = "zeroshot_descriptions"
        prompts[key] = read_descriptions(descriptions_file, names, descriptions_order)
        rules[key] = partial(class_vectors_of, pad_to=descriptions_pad_to, normalise=descriptions_normalise)
    for key, of_class in prompts.items():
        _judge(split, key, rules[key](split, of_class), result)
        # One set is 'prompts', as in every suite; further ones are told apart by their names.
        result.hashes["prompts" + key.removeprefix("zeroshot")] = stable_hash([p for one in of_class for p in one])
    return result


def embed_images(split: EmbeddedSplit, images: Iterable[Image.Image], statistics: Statistics) -> Tensor:
    """Embeddings (N, D) of images whose pixels are normalised by the statistics of training, or by CLIP's."""
    encoders = split.encoders
    clip = replace(encoders.preprocess, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD) if statistics == "clip" else None
    return encoders.embed_images(images, preprocess=clip)


def preprocessing_hash(split: EmbeddedSplit, statistics: Statistics) -> str | None:
    """The hash of a split's preprocessing, with other pixel statistics if such are taken."""
    trained = split.hashes.get("preprocessing")
    return trained if statistics == "own" else stable_hash([trained, statistics])


def _judge(split: EmbeddedSplit, key: str, classes: Tensor, result: SuiteResult) -> None:
    known, names = split.labels >= 0, split.class_names
    labels, logits = split.labels[known], zero_shot_logits(split.image[known], classes)
    predicted = logits.argmax(dim=1)
    ks = [k for k in (1, 5) if k < len(names)]
    result.metrics |= {f"{key}/top{k}": top_k_accuracy(logits, labels, k) for k in ks}
    result.metrics[f"{key}/balanced"] = balanced_accuracy(predicted, labels, len(names))
    result.metrics[f"{key}/macro_f1"] = macro_f1(predicted, labels, len(names))
    result.baselines.setdefault("most frequent class", {}).update(_most_frequent(key, labels, names, ks))
    chance = result.baselines.setdefault("chance", {})
    chance |= {f"{key}/top{k}": 100 * k / len(names) for k in ks} | {f"{key}/balanced": 100 / len(names)}
    figure = "confusion" + key.removeprefix("zeroshot")
    result.figures[figure] = partial(canvas.confusion, confusion_matrix(predicted, labels, len(names)), names)


def _most_frequent(key: str, labels: Tensor, names: Sequence[str], ks: Sequence[int]) -> dict[str, float]:
    """What naming the most frequent classes of the split every time reaches: the same ranking of classes for all images."""
    counts = torch.bincount(labels, minlength=len(names))
    logits, predicted = counts.double().expand(len(labels), -1), counts.argmax().expand(len(labels))
    metrics = {f"{key}/top{k}": top_k_accuracy(logits, labels, k) for k in ks}
    metrics[f"{key}/balanced"] = balanced_accuracy(predicted, labels, len(names))
    return metrics | {f"{key}/macro_f1": macro_f1(predicted, labels, len(names))}


def class_vectors_of(split: EmbeddedSplit, prompts: list[list[str]], pad_to: int = 0, normalise: bool = True) -> Tensor:
    """Class vectors (D, C) of one list of prompts per class, see ``descriptive_class_vectors``."""
    embedded = split.encode_text([prompt for one in prompts for prompt in one])
    return descriptive_class_vectors(embedded, [len(one) for one in prompts], pad_to, normalise)


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Every template for the first name, then for the second, and so on."""
    return [template.replace("{}", name) for name in names for template in templates]


def read_templates(templates: Sequence[str], file: str | None) -> list[str]:
    """The lines of ``file``, or ``templates``. Raises UserError for one without exactly one slot, and for none at all."""
    if file is not None:
        templates = [line.replace("{c}", "{}") for line in read_names(file)]
    bad = [template for template in templates if template.count("{}") != 1]
    if bad or not templates:
        raise UserError(f"a prompt template needs exactly one {{}} for the class name: {bad or 'there are no templates'}")
    return list(templates)


def read_descriptions(file: str, names: Sequence[str], order: Literal["names", "file"] = "names") -> list[list[str]]:
    """The prompts of each class, found by ``names`` or in the order of the file. Raises UserError for another form, a missing
    class, or, in the order of the file, another number of classes."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(
        isinstance(p, list) and p and all(isinstance(x, str) for x in p) for p in content.values()
    ):
        raise UserError(f"{file} must map each class name to a list of prompts that is not empty.")
    if order == "file":
        if len(content) != len(names):
            raise UserError(
                f"{file} describes {len(content)} classes, but the data has {len(names)}: with descriptions_order=file the "
                "n-th entry is class n."
            )
        return list(content.values())
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"{file} describes {len(content)} classes, but not {missing[:5]}{' ...' if len(missing) > 5 else ''}.")
    return [content[name] for name in names]
