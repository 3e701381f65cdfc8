"""Which of your texts fits which of your images? The stage ``predict`` of dual encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Column, Table

from datamodules.readers.images import open_required
from experiments.alignment import pipeline
from experiments.prediction.base import write
from experiments.run.directory import Run
from models.errors import UserError


@torch.inference_mode()
def image_text(run: Run, images: Sequence[str] = (), texts: Sequence[str] = ()) -> dict[str, Any]:
    """Cosines of ``images`` (files) with ``texts``, as a table and ``predictions.json``."""
    files, texts = list(images), list(texts)
    if not files or not texts:
        raise UserError('predict needs files and texts: predict.images=[a.jpg,b.png] predict.texts=["a dog","a cat"]')
    encoders = pipeline.trained_dual_encoder(run)
    image = F.normalize(encoders.embed_images(open_required(file, f"predict.images: {file}") for file in files), dim=-1)
    text = F.normalize(encoders.embed_texts(texts), dim=-1)
    cosines = image @ text.T
    table = Table(Column("image", overflow="fold"), *texts, title="cosine")  # a cut path would look like its neighbours
    predictions = []
    for file, row in zip(files, cosines, strict=True):
        table.add_row(file, *(f"{value:.3f}" for value in row.tolist()))
        predictions.append(
            {"image": file, "best": texts[int(row.argmax())], "cosine": dict(zip(texts, row.tolist(), strict=True))}
        )
    write(run, predictions, table)
    return {"images": len(files), "texts": len(texts)}
