"""All-in-One-B, three frames of 224, against the official order of operations (``reference/all_in_one.py``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.benchmarks.reference import all_in_one as plain
from models.all_in_one import objectives
from models.all_in_one.model import AllInOne
from models.all_in_one.text import trim

BATCH, FRAMES, LENGTH = 2, 3, 40
CAPTIONS = (11, 14)  # word pieces with [CLS] and [SEP]; MSR-VTT's captions have nine words on average


def _model(training: bool) -> AllInOne:
    """Without dropout, so that both sides compute the same."""
    model = AllInOne(tasks=["match", "mlm", "contrastive"], drop_rate=0.0, drop_path_rate=0.0)
    with torch.no_grad():
        model.transformer.temporal_embed.normal_(std=0.02)
    return model.train(training)


def _texts() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(LENGTH)[None] < torch.tensor(CAPTIONS)[:, None]).long()
    return torch.randint(1000, 30000, (BATCH, LENGTH)) * mask, mask


def _order(model: AllInOne) -> Tensor:
    return torch.rand(BATCH * FRAMES, model.transformer.side**2).argsort(dim=1)


def _forward(side: str) -> Callable[[], Tensor]:
    """The matching logits of a text and a clip: what fused retrieval, choices and answers need."""
    model, (ids, mask) = _model(training=False), _texts()
    video, order = torch.randn(BATCH, FRAMES, 3, 224, 224), _order(model)

    @torch.no_grad()
    def step() -> Tensor:
        if side == "ours":
            pooled = model.encode_pair(*trim(ids, mask), model.embed(video), order, read="first").pooled
        else:
            pooled = plain.encode_pair(model, ids, mask, video, order)[2]
        return model.itm_score.fc(pooled)

    return step


def _text(side: str) -> Callable[[], Tensor]:
    """Token 0 of 32 texts."""
    model = _model(training=False)
    mask = (torch.arange(LENGTH)[None] < torch.randint(10, 24, (32, 1))).long()
    ids = torch.randint(1000, 30000, (32, LENGTH)) * mask

    @torch.no_grad()
    def step() -> Tensor:
        if side == "ours":
            return model.encode_text(*trim(ids, mask), read="first").first
        return plain.encode_text(model, ids, mask, FRAMES)

    return step


def _training(side: str) -> Callable[[], Tensor]:
    """Forward and backward of VTM, word-patch alignment and MLM."""
    model, (ids, mask) = _model(training=True), _texts()
    video, false = torch.randn(2, BATCH, FRAMES, 3, 224, 224).unbind(0)
    orders = _order(model), _order(model)
    matched = torch.tensor([1, 0])
    masked, labels = ids.clone(), torch.full_like(ids, -100)
    masked[:, 3:9], labels[:, 3:9] = 103, ids[:, 3:9]
    batch = {
        "ids": ids, "mask": mask, "masked_ids": masked, "labels": labels, "matched": matched, "video": video,
        "false_video": false,
    }  # fmt: skip

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        if side == "ours":
            patches = model.embed(video)
            loss = objectives.masked_language(model, masked, mask, labels, patches, orders[0])[0]
            vtm = objectives.video_text_matching(
                model, ids, mask, matched, patches, model.embed(false[matched == 0]), orders[1]
            )
            loss = loss + vtm.match + vtm.align
        else:
            loss = plain.pretraining_loss(model, batch, *orders)
        loss.backward()
        gradient = torch.stack([p.grad.norm() for p in model.transformer.parameters() if p.grad is not None]).norm()
        return torch.stack([loss.detach(), gradient])

    return step


CASES = {"forward_base": _forward, "text_base": _text, "training_step_base": _training}
