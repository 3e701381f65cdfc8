"""``micro_batch_size`` (ours) against the whole batch at once (plain): one step, whose loss and gradients must be the same.

Two towers of a third of the base size's width and half of its layers with bridges, on 64 pairs in pieces of 4; SAIL's gated
projectors on 2048 pairs of features of 512 numbers in pieces of 128; All-in-One-Ti on 16 clips of three frames of 224 in pieces
of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.measure import optimizer_step
from experiments.benchmarks.two_tower import THIRD
from experiments.run.micro_batches import MicroBatches
from lightning_modules.alignment import AlignmentModule
from lightning_modules.all_in_one import AllInOneModule
from lightning_modules.base import BaseModule
from lightning_modules.two_tower import TwoTowerModule
from models import batch as keys
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector
from models.all_in_one.model import AllInOne
from models.losses.contrastive import SigmoidLoss
from models.two_tower.batch import MEDIUM
from models.two_tower.connectors import Bridge
from models.two_tower.model import TwoTower

LENGTH = 40  # tokens


def _texts(count: int) -> dict[str, Tensor]:
    mask = (torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (count, 1))).long()
    ids = torch.where(mask == 1, torch.randint(5, 30000, (count, LENGTH)), 1)
    return {keys.INDEX: torch.arange(count), keys.TOKEN_IDS: ids, keys.TOKEN_MASK: mask}


def _two_tower(tasks: tuple[str, ...], pairs: int) -> tuple[BaseModule, dict[str, Tensor]]:
    module = TwoTowerModule(partial(TwoTower, Bridge, dropout=0.0, **THIRD), tasks)
    images = torch.randn(pairs, 3, THIRD["image_size"], THIRD["image_size"])
    return module, {**_texts(pairs), keys.IMAGE: images, MEDIUM: torch.arange(pairs)}


def _all_in_one(clips: int) -> tuple[BaseModule, dict[str, Tensor]]:
    model = partial(AllInOne, width=192, heads=3, drop_rate=0.0, drop_path_rate=0.0)
    return AllInOneModule(model, ("contrastive",)), {**_texts(clips), keys.VIDEO: torch.randn(clips, 3, 3, 224, 224)}


def _sail(pairs: int, width: int) -> tuple[BaseModule, dict[str, Tensor]]:
    head = partial(AlignmentHead, embed_dim=width, projector=GatedProjector)
    module = AlignmentModule(head, SigmoidLoss(), vision_dim=width, text_dim=width)
    features = {name: torch.randn(pairs, width) for name in (IMAGE_FEATURES, TEXT_FEATURES)}
    return module, {keys.INDEX: torch.arange(pairs), **features}


def _step(side: str, make: Callable[[], tuple[BaseModule, dict]], size: int) -> Callable[[], Tensor]:
    module, batch = make()
    optimizer = torch.optim.SGD([p for p in module.train().parameters() if p.requires_grad], lr=1e-4)
    if side == "ours":
        MicroBatches(size).install(module)
    return lambda: optimizer_step(optimizer, module.batch_loss(batch))


CASES = {
    "two_tower_contrastive": partial(_step, make=partial(_two_tower, ("contrastive",), 64), size=4),
    "two_tower_contrastive_and_match": partial(_step, make=partial(_two_tower, ("contrastive", "match"), 64), size=4),
    "sail_gated": partial(_step, make=partial(_sail, 2048, 512), size=128),
    "all_in_one_contrastive": partial(_step, make=partial(_all_in_one, 16), size=2),
}
