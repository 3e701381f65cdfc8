"""Which pairs are trained on: what the config group ``subset`` names. Functions of the run and its encoded training pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from datamodules.features.curation import best_captions, select_balanced
from datamodules.features.pairs import PairedFeatures
from datamodules.readers.text import read_names
from experiments.alignment import pipeline
from experiments.run import parts
from experiments.run.directory import Run
from models.errors import UserError

log = logging.getLogger("run")
CHUNK = 8192


def few_pairs(run: Run, features: PairedFeatures, pairs: int, seed: int = 42) -> np.ndarray:
    """``pairs`` of the usable rows, drawn by ``seed`` without replacement (STRUCTURE's few-sample protocol)."""
    if not 0 < pairs <= len(features.rows):
        raise UserError(f"subset.pairs={pairs}: there are {len(features.rows)} training pairs.")
    return np.sort(np.random.default_rng(seed).permutation(features.rows)[:pairs])


def concept_balanced(
    run: Run,
    features: PairedFeatures,
    per_concept: int,
    keep: int,
    concepts: Sequence[str] = (),
    concepts_file: str | None = None,
    template: str = "a photo of a {}",
) -> np.ndarray:
    """Equally many pairs for each concept, by the nearness of their first captions to it (freeze-align, section 3.3).

    Args:
        per_concept, keep: pairs taken for a concept, out of so many nearest (official: 2,000 of 50,000).
        concepts: names; concepts_file: a text file of them, one a line, instead. Without both: the data's class names.
        template: makes the caption of a concept, whose text features are its prototype. (Official prototypes are CLIP
            image features: :func:`datamodules.features.curation.prototypes_from_images`.)
    """
    names = _concepts(run, concepts, concepts_file)
    encoder = pipeline.encoder(run, "text")
    device = next(encoder.parameters()).device
    store = features.text_stores.get("pooled")
    if store is None:
        raise UserError("subset=concept_balanced needs pooled text features: add pooled to encoder.keep.text.")
    prototypes = []
    with torch.inference_mode():
        for first in range(0, len(names), 256):
            tokens = encoder.tokenize([template.replace("{}", name) for name in names[first : first + 256]])
            prototypes.append(encoder({k: v.to(device) for k, v in tokens.items()}).pooled.float().cpu())
    rows = features.rows

    def pool() -> Iterator[torch.Tensor]:
        for first in range(0, len(rows), CHUNK):
            part = rows[first : first + CHUNK]
            yield store.read(features.caption_rows(part, np.zeros(len(part), np.int64)))

    best = best_captions(pool(), torch.cat(prototypes), min(keep, len(rows)), device)
    chosen = select_balanced(best, per_concept, len(rows))
    counts = np.bincount(chosen.concepts, minlength=len(names))
    log.info(
        "subset: %d of %d pairs for %d concepts, %d to %d each",
        len(chosen.rows), len(rows), len(names), counts.min(), counts.max(),
    )  # fmt: skip
    if not len(chosen.rows):
        raise UserError("subset: no pair was chosen; raise subset.keep and subset.per_concept.")
    return rows[chosen.rows]


def _concepts(run: Run, concepts: Sequence[str], concepts_file: str | None) -> list[str]:
    if concepts_file is not None:
        concepts = read_names(concepts_file)
    names = list(concepts) or list(parts.datamodule(run).splits["train"].class_names or ())
    if not names:
        raise UserError("subset: there are no concepts. Give subset.concepts or subset.concepts_file; the data has no classes.")
    return names
