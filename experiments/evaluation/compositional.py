"""Winoground and MMVP-VLM: can the model tell apart what differs in word order, or in what CLIP does not see?"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from datamodules.readers.benchmarks import each_image, read_mmvp, read_winoground
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.io import stable_hash
from models.metrics.compositional import mmvp_accuracy, winoground_correct

MMVP_PROMPT = "a photo of {}"


def winoground(split: EmbeddedSplit, root: str | None) -> SuiteResult:
    """Text, image and group score in percent (arXiv 2204.03162). Left out with a note without ``root``, its folder."""
    if root is None:
        return SuiteResult(notes=["Winoground left out: give its folder, evaluation.winoground.root=DIR."])
    examples = read_winoground(root)
    image = split.encoders.embed_images(each_image([image for example in examples for image in example.images]))
    text = split.encoders.embed_texts([caption for example in examples for caption in example.captions])
    image, text = (F.normalize(x, dim=-1).unflatten(0, (len(examples), 2)) for x in (image, text))
    share = 100 * winoground_correct(text @ image.transpose(1, 2)).double().mean(dim=0)
    metrics = dict(zip(("winoground/text", "winoground/image", "winoground/group"), share.tolist(), strict=True))
    # A random order of scores: both comparisons of two right pairs, and all four at once (the paper's 16.67).
    chance = {"winoground/text": 25.0, "winoground/image": 25.0, "winoground/group": 100 / 6}
    return SuiteResult(metrics, {"chance": chance}, _hashes(split, [[e.id, e.captions] for e in examples], "{}"))


def mmvp(split: EmbeddedSplit, root: str | None, pairs_per_category: int = 15) -> SuiteResult:
    """Share of pairs with both statements matched, per visual pattern and on average, in percent (arXiv 2401.06209)."""
    if root is None:
        return SuiteResult(notes=["MMVP left out: give its folder, evaluation.mmvp.root=DIR."])
    pairs = read_mmvp(root)
    image = split.encoders.embed_images(each_image([path for pair in pairs for path in pair.images]))
    text = split.encoders.embed_texts([MMVP_PROMPT.format(statement) for pair in pairs for statement in pair.statements])
    image, text = (F.normalize(x, dim=-1).unflatten(0, (len(pairs), 2)) for x in (image, text))
    logits = split.encoders.logit_scale.detach().cpu().exp() * (text @ image.transpose(1, 2))
    accuracy = mmvp_accuracy(logits, torch.tensor([pair.ids for pair in pairs]), pairs_per_category)
    names = [re.sub(r"\W+", "_", pairs[start].type.lower()) for start in range(0, len(pairs), pairs_per_category)]
    metrics = {"mmvp/average": accuracy.mean().item()}
    metrics |= {f"mmvp/{name}": value for name, value in zip(names, accuracy.tolist(), strict=True)}
    chance = {name: 25.0 for name in metrics}
    return SuiteResult(metrics, {"chance": chance}, _hashes(split, [[p.ids, p.statements] for p in pairs], MMVP_PROMPT))


def _hashes(split: EmbeddedSplit, questions: list, prompt: str) -> dict[str, str]:
    """The split is the data of the suite; preprocessing and encoders are the model's."""
    return {**split.hashes, "split": stable_hash(questions), "prompts": stable_hash(prompt)}
