"""What does a trained video-language model say about your clips? The stage ``predict`` of All-in-One."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor

from datamodules.readers.base import BadSample
from datamodules.readers.clip import ClipSource, read_clip
from datamodules.transforms.frame_sampling import sample_frames
from experiments.prediction.base import write
from experiments.run import parts
from experiments.run.directory import Run
from models.all_in_one import objectives
from models.all_in_one.text import trim
from models.batch import TOKEN_IDS, TOKEN_MASK, VIDEO
from models.errors import UserError


@torch.inference_mode()
def video_text(run: Run, videos: Sequence[str] = (), texts: Sequence[str] = ()) -> dict[str, Any]:
    """Answers every question about every clip, or scores every text for it, as a table and ``predictions.json``.

    A model of open-ended questions answers by name; one with a dual encoder gives cosines; one that ranks or matches gives the
    probability of each text among those given.
    """
    if not videos or not texts:
        raise UserError('predict needs clips and texts: predict.videos=[a.mp4,b.webm] predict.texts=["what is shown?"]')
    data = parts.datamodule(run)
    module = parts.trained_module(run, data.facts())
    ids, mask = trim(*(part.to(module.device) for part in data.words(list(texts))))
    tokens = {TOKEN_IDS: ids, TOKEN_MASK: mask}
    table = Table(Column("clip", overflow="fold"), *texts)
    predictions = []
    for name in videos:
        clip = {VIDEO: _open(name, data)[None].to(module.device)}
        patches = module.embed(clip)
        if "answer" in module.tasks:
            cells = _answers(module, data, ids, mask, patches)
        elif "contrastive" in module.tasks:
            cosines = objectives.similarity(module.embed_texts(tokens), module.embed_media(clip))[:, 0]
            cells = [round(value, 4) for value in cosines.tolist()]
        else:
            scores = _scores(module, ids, mask, patches)
            cells = [round(value, 4) for value in scores.softmax(dim=0).tolist()]
        table.add_row(name, *map(str, cells))
        predictions.append({"video": name, "texts": dict(zip(texts, cells, strict=True))})
    write(run, predictions, table)
    return {"videos": len(videos), "texts": len(texts)}


def _answers(module: Any, data: Any, ids: Tensor, mask: Tensor, patches: Any) -> list[str]:
    encoded = module.model.encode_pair(ids[None], mask[None], patches, read="first")
    best = module.model.vqa_classifier(encoded.pooled).argmax(dim=-1).tolist()
    names = next(iter(data.splits.values())).answers
    return [names[i] if i < len(names) else f"class {i}" for i in best]


def _scores(module: Any, ids: Tensor, mask: Tensor, patches: Any) -> Tensor:
    """(n,) logits: of the head that ranks, or how far the match logit exceeds the other one."""
    for task, head in (("rank", "rank_output"), ("choice", "rank_output"), ("option", "mc_vqa_classifier")):
        if task in module.tasks:
            return objectives.candidate_scores(module.model, head, ids[None], mask[None], patches)[0]
    if "match" in module.tasks:
        pooled = module.model.encode_pair(ids[None], mask[None], patches, read="first").pooled
        logits = module.model.itm_score.fc(pooled)
        return logits[:, 1] - logits[:, 0]
    raise UserError(f"predict has no use for a model of the tasks {list(module.tasks)}.")


def _open(name: str, data: Any) -> Tensor:
    path = Path(name)
    if not path.exists():
        raise UserError(f"predict.videos: there is no {path}.")
    source = ClipSource(str(path), "frames" if path.is_dir() else "video")
    try:
        return data.transform(read_clip(source, lambda count: sample_frames(data.frames, count)).frames, None)
    except BadSample as error:
        raise UserError(f"predict.videos: {path} cannot be used ({error}).") from error
