"""Stage ``evaluate``: the trained method on the test split, then the variants it is compared with.

A recipe with ``features`` is judged by its embeddings (:class:`EmbeddedSplit`), any other by its trained module and its
data (:class:`TrainedSplit`).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from hydra import compose

from experiments.alignment import parts
from experiments.config.instantiation import build
from experiments.evaluation.base import EmbeddedSplit, SuiteResult, TrainedSplit
from experiments.run.directory import Run, variant_of
from experiments.stages import run_stages
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.dual_encoder import DualEncoder
from models.io import stable_hash

log = logging.getLogger("run")


def evaluate(run: Run) -> dict[str, Any]:
    """Run every suite of the configuration; keeps metrics, baselines and hashes, and draws the figures."""
    split = "test" if "test" in parts.datamodule(run).splits else "val"
    if split != "test":
        run.note("EVALUATED ON VAL: the data has no test split.")
    facts: dict[str, Any] = {"split": split, "metrics": {}, "baselines": {}, "hashes": {}, "figures": {}}
    subject = None
    for name, suite in (run.cfg.evaluation or {}).items():
        if suite is None:  # a recipe does without a suite of the one it inherits
            continue
        subject = subject or (embed_split(run, split) if run.cfg.get("features") else trained_split(run, split))
        with torch.inference_mode():
            result: SuiteResult = build(suite)(subject)
        facts["metrics"] |= {f"{split}/{key}": value for key, value in result.metrics.items()}
        for column, values in result.baselines.items():
            facts["baselines"].setdefault(column, {}).update({f"{split}/{key}": value for key, value in values.items()})
        facts["hashes"][name] = result.hashes
        for figure, draw in result.figures.items():
            path = run.dir / "figures" / f"{figure}.png"
            path.parent.mkdir(exist_ok=True)
            draw(path)
            facts["figures"][figure] = path.name
        for note in result.notes:
            run.note(note)
    parts.note_skipped(run)
    facts["compare"] = {name: variant.facts("evaluate") for name, variant in compared(run).items()}
    log.info("evaluate: %d metrics of the split %s", len(facts["metrics"]), split)
    return facts


def compared(run: Run) -> dict[str, Run]:
    """The runs of ``compare``: this recipe with a few overrides each, run in subdirectories of this run."""
    found = {}
    for name, overrides in (run.cfg.compare or {}).items():
        # Without the command line's checkpoint and stages, which speak of the main run.
        mine = [o for o in run.overrides if o.split("=")[0] not in ("checkpoint", "stages", "resume")]
        combined = [*mine, *overrides, "stages=[prepare,encode,fit,evaluate]"]
        log.info("compare with %s: %s", name, " ".join(overrides))
        cfg = compose("config", overrides=combined)
        cfg.compare = {}
        found[name] = variant_of(run, name, cfg, combined)
        run_stages(found[name])
        found[name].set_status("finished")
    return found


def trained_split(run: Run, split: str) -> TrainedSplit:
    """The trained module and the data of a recipe without frozen features."""
    data = parts.datamodule(run)
    return TrainedSplit(parts.trained_module(run, data.facts()), data, split)


@torch.inference_mode()
def embed_split(run: Run, split: str) -> EmbeddedSplit:
    """All images and captions of a split through the trained head."""
    dataset, features = parts.datamodule(run).splits[split], parts.features(run, split)
    module = parts.trained_module(run, features.facts())
    rows = features.rows
    image = _embed(module.embed_image, features.read_images, rows, module.device)
    counts = features.caption_counts(rows)
    owner = np.repeat(np.arange(len(rows)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    text_rows = np.repeat(features.texts.offsets[rows], counts) + np.arange(len(owner)) - first
    text = _embed(module.embed_text, features.read_texts, text_rows, module.device)
    labels = torch.from_numpy(np.asarray(dataset.labels[rows])) if dataset.class_names else None
    manifests = {modality: next(iter(parts.manifests_of(run, split, modality).values())) for modality in ("vision", "text")}

    @functools.cache
    def encoders() -> DualEncoder:  # only when a suite has raw texts or images: data may come encoded, without an encoder
        layers = (features.image_layer, features.text_layer)
        return DualEncoder(parts.encoder(run, "vision"), parts.encoder(run, "text"), module.head, layers)

    def labelled_features(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        other, stored = parts.datamodule(run).splits[name], parts.features(run, name)
        return next(iter(stored.read_images(stored.rows).values())), torch.from_numpy(np.asarray(other.labels[stored.rows]))

    def frozen() -> tuple[torch.Tensor, torch.Tensor]:
        return features.read_images(rows)[IMAGE_FEATURES], features.read_texts(text_rows)[TEXT_FEATURES]

    return EmbeddedSplit(
        image=image,
        text=text,
        owner=torch.from_numpy(owner),
        captions=[caption for row in rows for caption in dataset.captions(int(row))],
        encode_text=lambda texts: encoders().embed_texts(texts),
        load_image=lambda row: dataset.image(int(rows[row])),
        labels=labels,
        class_names=dataset.class_names,
        name=split,
        load_encoders=encoders,
        labelled_features=labelled_features if dataset.class_names else None,
        frozen=None if module.head.takes_tokens else frozen,
        hashes={
            "split": stable_hash([dataset.fingerprint, len(rows)]),
            "preprocessing": stable_hash(manifests["vision"]["encoder"].get("preprocessing")),
            "encoders": stable_hash([manifest["encoder"] for manifest in manifests.values()]),
        },
    )


def _embed(embed: Any, read: Any, rows: np.ndarray, device: torch.device, chunk: int = 2048) -> torch.Tensor:
    vectors = []
    for first in range(0, len(rows), chunk):
        batch = {key: value.to(device) for key, value in read(rows[first : first + chunk]).items()}
        vectors.append(embed(batch).vector.float().cpu())
    return torch.cat(vectors)
