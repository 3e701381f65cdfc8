"""What do your videos show, and where did the network look to find out? The stage ``predict`` of AVGN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Column, Table

from datamodules.audio_visual import Snippets
from datamodules.order import BatchRequest
from datamodules.readers.video_lists import LAYOUTS, VideoRow
from experiments.evaluation.avgn import examples_of
from experiments.figures import avgn
from experiments.prediction.base import write
from experiments.run import parts
from experiments.run.directory import Run
from models.batch import AUDIO, AUDIO_VALID, SKIPPED, TIMES, VIDEO
from models.errors import UserError


@torch.inference_mode()
def audio_visual(run: Run, videos: Sequence[str] = ()) -> dict[str, Any]:
    """The most probable classes of ``videos`` (files) with the moments looked at: a table, ``predictions.json``, a figure."""
    if not videos:
        raise UserError("predict needs videos: predict.videos=[a.mp4,b.webm]")
    data = parts.datamodule(run)
    module = parts.trained_module(run, data.facts())
    rows = [VideoRow(str(Path(name).expanduser().resolve()), 1, 3, (0,)) for name in videos]
    snippets = Snippets(rows, Path("/"), LAYOUTS[data.layout], data.class_names, **data.reading)
    batch = snippets[BatchRequest(np.arange(len(rows)), 0, 0)]
    if batch[SKIPPED]:
        raise UserError("\n".join(f"predict.videos: {skipped.key}: {skipped.reason}" for skipped in batch[SKIPPED]))
    batch = {key: value.to(module.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    output = module.model(batch[VIDEO], batch[AUDIO], batch[AUDIO_VALID])
    table, predictions = Table(Column("video", overflow="fold"), "class", "probability", "looked at (s)"), []
    for number, name in enumerate(videos):
        probability, best = output.logits[number, -1].softmax(dim=0).topk(min(3, len(data.class_names)))
        times = [round(time, 2) for time in batch[TIMES][number, output.indices[number]].tolist()]
        table.add_row(name, data.class_names[int(best[0])], f"{float(probability[0]):.3f}", ", ".join(map(str, times)))
        classes = {data.class_names[label]: float(p) for label, p in zip(best.tolist(), probability, strict=True)}
        predictions.append(
            {"video": name, "classes": classes, "seconds": times, "places": output.actions[number].tolist(),
             "has_sound": bool(batch[AUDIO_VALID][number])}
        )  # fmt: skip
    avgn.glances(examples_of(module.model, batch, list(videos), data.class_names), run.dir / "figures" / "glances.png")
    write(run, predictions, table)
    return {"videos": len(videos)}
