"""Retrieval in several languages by a model that was trained on one (XTD10, arXiv 2012.05107; freeze-align)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from datamodules.readers.benchmarks import each_image
from datamodules.readers.text import read_text
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.errors import UserError
from models.io import stable_hash
from models.metrics.retrieval import chance_recall_at, recall_at, retrieval_ranks

NAMES, CAPTIONS = "test_image_names.txt", "test_1kcaptions_{}.txt"
LAYOUT = f"""XTD10 is a folder with {NAMES}, an image's file name per line (COCO's), and {CAPTIONS.format("<language>")},
one caption per line in the same order, for each language."""


def multilingual_retrieval(
    split: EmbeddedSplit,
    root: str | None = None,
    images: str | None = None,
    languages: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> SuiteResult:
    """Recall at ``ks`` in percent, both ways, for the captions of each language, and over the languages on average.

    Args:
        root: XTD10's folder of lists.
        images: folder of the images, or of ``train2014/`` and ``val2014/``.
        languages: as in the files' names (es, it, ko, ...); None: all that are there.

    Left out with a note without ``root``. Raises UserError for a missing file or lists of unequal length.
    """
    if root is None or images is None:
        note = "multilingual retrieval left out: give XTD10, evaluation.multilingual.root=DIR and .images=DIR."
        return SuiteResult(notes=[note])
    files = [_find(Path(images), name) for name in _lines(Path(root) / NAMES)]
    captions = {language: _lines(Path(root) / CAPTIONS.format(language)) for language in languages or _languages(Path(root))}
    for language, texts in captions.items():
        if len(texts) != len(files):
            raise UserError(
                f"{Path(root) / CAPTIONS.format(language)} has {len(texts)} captions for {len(files)} images of {NAMES}."
            )
    image = split.encoders.embed_images(each_image(files))
    metrics: dict[str, float] = {}
    owner = torch.arange(len(files))
    for language, texts in captions.items():
        for name, ranks in zip(("i2t", "t2i"), retrieval_ranks(image, split.encode_text(texts), owner), strict=True):
            metrics |= {f"multilingual/{language}/{name}_recall@{k}": recall_at(ranks, k) for k in ks}
    for name in (f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in ks):
        metrics[f"multilingual/average/{name}"] = sum(
            metrics[f"multilingual/{language}/{name}"] for language in captions
        ) / len(captions)
    chance = {name: chance_recall_at(int(name.rpartition("@")[2]), len(files), 1) for name in metrics}
    hashes = {**split.hashes, "split": stable_hash([[path.name for path in files], captions]), "prompts": stable_hash("{}")}
    return SuiteResult(metrics, {"chance": chance}, hashes)


def _languages(root: Path) -> list[str]:
    before, after = CAPTIONS.split("{}")
    languages = sorted(path.name.removeprefix(before).removesuffix(after) for path in root.glob(CAPTIONS.format("*")))
    if not languages:
        raise UserError(f"{root} holds no {CAPTIONS.format('<language>')}. {LAYOUT}")
    return languages


def _lines(path: Path) -> list[str]:
    """The lines of a list; a blank one in its middle would move every caption behind it, and is an error."""
    if not path.is_file():
        raise UserError(f"there is no {path}. {LAYOUT}")
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if "" in lines:
        raise UserError(f"{path}, line {lines.index('') + 1}: is blank. {LAYOUT}")
    return lines


def _find(folder: Path, name: str) -> Path:
    for place in ("", "train2014", "val2014"):
        if (folder / place / name).is_file():
            return folder / place / name
    raise UserError(f"there is no {name} in {folder}, nor in its train2014/ and val2014/. {LAYOUT}")
