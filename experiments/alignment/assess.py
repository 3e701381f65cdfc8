"""Stage ``assess``: which vision and which text encoder, and which layers of them, are worth aligning?

Every encoder embeds the same sample of pairs once. Every pair of encoders, and every pair of their layers, is then scored
by linear CKA (from covariances), mutual k-NN (one top-k per layer) and alignment probing. The result is a ranked table, the
heat-maps and the metrics of the best pairs.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from datamodules.features.encoding import ImageBatches, encoding_loader
from experiments.config.instantiation import build
from experiments.figures import alignment
from experiments.run import parts, screen
from experiments.run.directory import Run
from experiments.run.progress import Progress
from experiments.stages import Facts, stage
from models.batch import IMAGE, INDEX, SKIPPED
from models.encoders.base import FrozenEncoder
from models.encoders.weights import WeightsUnavailable
from models.errors import UserError
from models.io import atomic_write
from models.metrics.neighbourhoods import LayerPairs
from models.metrics.probing import AlignmentProbe

log = logging.getLogger("run")
Encoded = tuple[Sequence[Tensor], np.ndarray]  # layers (n, D), and the rows of the split they belong to
SCORES = ("cka", "mutual_knn", "probe")


@stage()
def assess(run: Run) -> Facts:
    """Score all pairs of ``assess.vision`` and ``assess.text``; what has no weights at hand is noted and left out."""
    config = run.cfg.assess
    dataset = parts.datamodule(run).splits[config.split]
    count = min(config.samples, len(dataset))
    rows = np.sort(np.random.default_rng(run.cfg.seed).choice(len(dataset), count, replace=False))
    vision = _encode_all(run, "vision", config.vision, partial(_image_layers, run, dataset, rows))
    text = _encode_all(run, "text", config.text, partial(_caption_layers, run, dataset, rows))
    usable = sorted(set.intersection(*(set(encoded[1]) for encoded in (*vision.values(), *text.values()))))
    if len(usable) < 20:
        raise UserError(f"assess: only {len(usable)} samples could be encoded by every encoder; at least 20 are needed.")
    order = np.random.default_rng(run.cfg.seed).permutation(len(usable))
    layers = {name: _aligned_rows(encoded, [usable[i] for i in order]) for name, encoded in (vision | text).items()}
    table = [_score(a, b, layers[a], layers[b], config) for a in vision for b in text]
    table.sort(key=lambda row: -row["best"][config.rank_by])
    with atomic_write(run.dir / "assessment.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1))
    drawn = _draw(table, list(vision), list(text), run.dir / "figures")
    _print(table, config.rank_by)
    best = table[0]
    run.note(
        f"ASSESSED: of {len(vision)} x {len(text)} encoders on {len(usable)} pairs of {config.split}, {best['vision']} and "
        f"{best['text']} agree best by {config.rank_by}, at layers {best['layers'][0]} and {best['layers'][1]}."
    )
    metrics = {f"{row['vision']}+{row['text']}/{name}": row["best"][name] for row in table for name in SCORES}
    return {"metrics": metrics, "figures": drawn}


def _encode_all(run: Run, modality: str, nodes: Any, encode: Any) -> dict[str, Encoded]:
    """The layers of each encoder that can be had, by its name; one is in memory at a time."""
    encoded = {}
    for name, node in nodes.items():
        if not node:
            continue
        try:
            encoder = build(node)
        except WeightsUnavailable as error:
            run.note(f"NOT ASSESSED: {modality} encoder {name}: {str(error).splitlines()[0]}")
            continue
        encoder = encoder.to(parts.device(run)).eval()
        encoded[name] = encode(name, encoder)
        del encoder
        gc.collect()
    if not encoded:
        raise UserError(f"assess.{modality}: the weights of none of {sorted(nodes)} are here.")
    return encoded


@torch.inference_mode()
def _image_layers(run: Run, dataset: Any, rows: np.ndarray, name: str, encoder: FrozenEncoder) -> Encoded:
    batches = ImageBatches(dataset, encoder.preprocess, run.cfg.encoder.batch_size)
    batches.batches = np.split(rows, range(run.cfg.encoder.batch_size, len(rows), run.cfg.encoder.batch_size))
    device = next(encoder.parameters()).device
    vectors, encoded_rows = [], []
    with Progress(f"encode images by {name}", len(rows)) as progress:
        for batch in encoding_loader(batches, parts.datamodule(run).workers()):
            parts.datamodule(run).report_skipped(run.cfg.assess.split, batch[SKIPPED])
            if len(batch[INDEX]):
                vectors.append(_layers(encoder(batch[IMAGE].to(device))))
                encoded_rows.append(batch[INDEX].numpy())
            progress.advance(len(batch[INDEX]) + len(batch[SKIPPED]))
    return torch.cat(vectors).unbind(dim=1), np.concatenate(encoded_rows)


@torch.inference_mode()
def _caption_layers(run: Run, dataset: Any, rows: np.ndarray, name: str, encoder: FrozenEncoder) -> Encoded:
    """First captions, sorted by length so that a batch pads little."""
    captions = {int(row): dataset.captions(int(row))[0] for row in rows}
    order = sorted(captions, key=lambda row: len(captions[row]))
    device = next(encoder.parameters()).device
    vectors, size = [], run.cfg.encoder.batch_size
    with Progress(f"encode captions by {name}", len(order)) as progress:
        for first in range(0, len(order), size):
            chunk = order[first : first + size]
            tokens = encoder.tokenize([captions[row] for row in chunk])
            vectors.append(_layers(encoder({key: value.to(device) for key, value in tokens.items()})))
            progress.advance(len(chunk))
    return torch.cat(vectors).unbind(dim=1), np.array(order)


def _layers(features: Any) -> Tensor:
    """(B, layers, D) half precision; an encoder without layers has one, its pooled output."""
    layers = features.pooled[:, None] if features.layers is None else features.layers
    return layers.half().cpu()


def _aligned_rows(encoded: Encoded, rows: list[int]) -> list[Tensor]:
    layers, encoded_rows = encoded
    place = {int(row): position for position, row in enumerate(encoded_rows)}
    order = torch.tensor([place[row] for row in rows])
    return [layer[order].float() for layer in layers]


def _score(vision_name: str, text_name: str, vision: list[Tensor], text: list[Tensor], config: Any) -> dict[str, Any]:
    pairs = LayerPairs(vision, text, k=config.k)
    # CKA of the raw features, as freeze-align takes it; neighbours of the normalised ones, as STRUCTURE does.
    grids = {
        "cka": LayerPairs(vision, text, k=config.k, normalise=False).scores("cka"),
        "mutual_knn": pairs.scores("mutual_knn"),
        "probe": AlignmentProbe(vision, text).scores(),
    }
    i, j = divmod(int(grids[config.rank_by].argmax()), len(text))
    return {
        "vision": vision_name,
        "text": text_name,
        "layers": [i, j],
        "best": {name: float(grid[i, j]) for name, grid in grids.items()},
        "last": {name: float(grid[-1, -1]) for name, grid in grids.items()},
        "scores": {name: grid.tolist() for name, grid in grids.items()},
    }


def _draw(table: list[dict], vision: list[str], text: list[str], folder: Path) -> dict[str, str]:
    drawn = {"encoder_pairs": alignment.encoder_pairs(table, vision, text, SCORES, folder / "encoder_pairs.png")}
    for row in table[:6]:
        name = f"layers_{row['vision']}_{row['text']}"
        drawn[name] = alignment.layer_pairs(row, SCORES, folder / f"{name}.png")
    return {name: path.name for name, path in drawn.items()}


def _print(table: list[dict], rank_by: str) -> None:
    shown = Table(title=f"encoder pairs, ranked by {rank_by} at their best layers (in brackets: at the last layers)")
    for column in ("vision", "text", "layers", "CKA", "mutual k-NN", "probe R@5 %"):
        shown.add_column(column)
    for row in table:
        cells = [f"{row['best'][name]:.3f} ({row['last'][name]:.3f})" for name in SCORES]
        shown.add_row(row["vision"], row["text"], f"{row['layers'][0]}, {row['layers'][1]}", *cells)
    screen.console().print(shown)
