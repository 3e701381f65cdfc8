"""ARL's pre-training step against the official order of operations, and how fast texts are linked.

The model has a third of the base size's width, two thirds of its cross-modal layers, half of those of the towers and a quarter
of its image tokens, and its vocabulary.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable

import torch
from torch import Tensor

from datamodules.entity_linking import EntityLinker
from experiments.benchmarks.measure import optimizer_step
from experiments.benchmarks.reference import arl as plain
from models.arl import objectives
from models.arl.graph import NO_ENTITY, entity_labels
from models.arl.model import ARL
from models.two_tower.objectives import masked_language, matching, with_false_images

TEXT_LENGTH, ENTITIES, TRIPLES, PLACES = 64, 2000, 10_000, 24
MIM_LEVELS = 2
NAMES, CAPTIONS = 100_000, 20_000


def _model() -> ARL:
    model = ARL(
        ENTITIES, TRIPLES, image_size=144, image_width=256, image_layers=6, image_heads=4, text_width=256, text_layers=6,
        text_heads=4, text_intermediate=1024, width=256, levels=4, heads=4, knowledge_width=128, knowledge_heads=2,
        knowledge_intermediate=512, graph_channels=32, mim_width=128, mim_heads=2, dropout=0.0, graph_dropout=0.0,
    )  # fmt: skip
    model.align_head.set_graph(torch.randint(0, ENTITIES, (TRIPLES, 2)))
    return model.train()


def _batch(size: int = 16) -> dict[str, Tensor]:
    """Captions of 12 to 40 tokens with three entities of two tokens each, one of which is masked."""
    mask = (torch.arange(TEXT_LENGTH) < torch.randint(12, 41, (size, 1))).long()
    ids = torch.where(mask == 1, torch.randint(5, 50000, (size, TEXT_LENGTH)), 1)
    entities, cover = torch.full((size, PLACES), NO_ENTITY), torch.zeros(size, PLACES, TEXT_LENGTH)
    entities[:, :3] = torch.randint(0, ENTITIES, (size, 3))
    for place in range(3):
        cover[:, place, 1 + 3 * place : 3 + 3 * place] = 1
    chosen = cover[:, 2] == 1
    shown, shown_cover = entities.clone(), cover.clone()
    shown[:, 2], shown_cover[:, 2] = NO_ENTITY, 0
    return {
        "image": torch.randn(size, 3, 144, 144), "false_image": torch.randn(size // 2, 3, 144, 144), "token_ids": ids,
        "token_mask": mask, "masked_ids": torch.where(chosen, 50264, ids), "masked_labels": torch.where(chosen, ids, -100),
        "entities": entities, "cover": cover, "masked_entities": shown, "masked_cover": shown_cover,
        "matched": (torch.arange(size) < size // 2).long(), "noise": torch.rand(size, 81),
    }  # fmt: skip


def _losses(model: ARL, batch: dict[str, Tensor]) -> Tensor:
    """Texts, images and the graph encoded once; as many places for entities as a text of the batch fills, as in the data."""
    graph, image = model.encode_entities(), model.encode_image(batch["image"])
    masked, text = (
        model.with_entities(model.encode_text(batch[ids], batch["token_mask"]), batch[names][:, :3], batch[cover][:, :3], graph)
        for ids, names, cover in (("masked_ids", "masked_entities", "masked_cover"), ("token_ids", "entities", "cover"))
    )
    mlm, _ = masked_language(model, masked, image, batch["masked_labels"])
    mim = objectives.masked_image(model, text, batch["image"], batch["noise"], levels=MIM_LEVELS).loss
    mixed = with_false_images(image, model.encode_image(batch["false_image"]), batch["matched"])
    match, _ = matching(model, text, mixed, batch["matched"])
    labels = entity_labels(batch["entities"][:, :3], ENTITIES)
    return mlm + mim + match + objectives.align(model, text, image, graph, labels, labels).loss


def _pretraining_step(side: str) -> Callable[[], Tensor]:
    model, batch = _model(), _batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=side == "ours")

    def step() -> Tensor:
        total = _losses(model, batch) if side == "ours" else plain.training_losses(model, batch, MIM_LEVELS)
        return optimizer_step(optimizer, total)

    return step


def _linking() -> dict[str, float]:
    """Captions of about 18 words with three names each, a vocabulary of 100,000 names of one to four words; one core."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 10))) for _ in range(30_000)]
    names = [" ".join(draw.choices(words, k=draw.choice((1, 1, 2, 2, 3, 4)))) for _ in range(NAMES)]
    others = ("the", "of", "with", "shows", "right", "left", "a", "chest", "image", "in")
    captions = []
    for _ in range(CAPTIONS):
        caption = draw.choices(others, k=12)
        for name in draw.sample(names, 3):
            caption.insert(draw.randint(0, len(caption)), name)
        captions.append(" ".join(caption) + ".")
    linker = EntityLinker([name] for name in names)
    began = time.process_time()
    num_entities = sum(len(linker(caption)) for caption in captions)
    seconds = time.process_time() - began
    return {"captions_per_cpu_second": CAPTIONS / seconds, "entities_per_caption": num_entities / CAPTIONS, "names": NAMES}


CASES = {"pretraining_step": _pretraining_step}
MEASURES = {"entity_linking": _linking}
