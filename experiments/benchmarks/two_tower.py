"""The two-tower models against the official order of operations, transformers' port, and re-ranking image by image.

Unless a case says otherwise the models have a third of the base size's width, half of its layers and a quarter of its image
tokens, and its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BridgeTowerModel

from experiments.benchmarks.measure import optimizer_step
from experiments.benchmarks.reference import two_tower as plain
from models.two_tower import objectives
from models.two_tower.connectors import Bridge, Connector
from models.two_tower.managers import Managers
from models.two_tower.model import TwoTower
from models.two_tower.port import to_port
from models.two_tower.retrieval import rerank

TEXT_LENGTH, RETRIEVAL_LENGTH = 50, 40  # tokens to which texts are officially padded
BASE: dict[str, Any] = {"image_size": 288}  # all else are the model's defaults
THIRD: dict[str, Any] = {
    "image_size": 144, "image_width": 256, "image_layers": 6, "image_heads": 4, "text_width": 256, "text_layers": 6,
    "text_heads": 4, "text_intermediate": 1024, "width": 256, "levels": 3, "heads": 4,
}  # fmt: skip
SMALLEST = THIRD | {  # of the demos
    "image_size": 32, "patch_size": 8, "image_width": 64, "image_layers": 4, "text_width": 64, "text_layers": 3,
    "text_intermediate": 128, "width": 64, "mlp_ratio": 2,
}  # fmt: skip


def _managers(**sizes: Any) -> Connector:
    return Managers(**sizes, noise=False)  # both sides must compute the same


def _model(connector: Callable[..., Connector], tasks: tuple, sizes: dict[str, Any] = THIRD, **changes) -> TwoTower:
    return TwoTower(connector, tasks, **sizes, **changes, dropout=0.0)


def _texts(count: int, most: int = 24) -> tuple[Tensor, Tensor]:
    """Ids and mask of captions of 8 to ``most`` tokens, padded as officially."""
    mask = (torch.arange(TEXT_LENGTH) < torch.randint(8, most + 1, (count, 1))).long()
    return torch.where(mask == 1, torch.randint(5, 50000, (count, TEXT_LENGTH)), 1), mask


def _batch(size: int, side: int) -> dict[str, Tensor]:
    ids, mask = _texts(size)
    chosen = (torch.rand(size, TEXT_LENGTH) < 0.15) & (mask == 1)
    chosen[:, 1] = True
    return {
        "image": torch.randn(size, 3, side, side),
        "false_image": torch.randn(size // 2, 3, side, side),
        "token_ids": ids,
        "token_mask": mask,
        "masked_ids": torch.where(chosen, 50264, ids),
        "masked_labels": torch.where(chosen, ids, -100),
        "matched": (torch.arange(size) < size // 2).long(),
    }


def _training_step(
    side: str, connector: Callable[..., Connector], sizes: dict[str, Any] = THIRD, size: int = 16
) -> Callable[[], Tensor]:
    model, batch = _model(connector, ("mlm", "match"), sizes).train(), _batch(size, sizes["image_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=side == "ours")

    def step() -> Tensor:
        if side == "ours":
            image = model.encode_image(batch["image"])
            masked = model.encode_text(batch["masked_ids"], batch["token_mask"])
            mlm, _ = objectives.masked_language(model, masked, image, batch["masked_labels"])
            false, text = model.encode_image(batch["false_image"]), model.encode_text(batch["token_ids"], batch["token_mask"])
            mixed = objectives.with_false_images(image, false, batch["matched"])
            total = mlm + objectives.matching(model, text, mixed, batch["matched"])[0]
        else:
            total = plain.training_losses(model, batch)
        return optimizer_step(optimizer, total)

    return step


def _port_forward(side: str, sizes: dict[str, Any] = THIRD, size: int = 16) -> Callable[[], Tensor]:
    """Pooled features of texts with images, as a classifier reads them."""
    model = _model(Bridge, ("match",), sizes, cross_eps=1e-5).eval()
    config, weights = to_port(model)
    port = BridgeTowerModel(config).eval()
    port.load_state_dict(
        {k.removeprefix("bridgetower."): v for k, v in weights.items() if k.startswith("bridgetower.")}, strict=False
    )
    image_size = sizes["image_size"]
    (ids, mask), image = _texts(size), torch.randn(size, 3, image_size, image_size)

    @torch.no_grad()
    def step() -> Tensor:
        if side == "ours":
            return model.fuse(model.encode_text(ids, mask), model.encode_image(image), read="first").pooled
        return port(input_ids=ids, attention_mask=mask, pixel_values=image).pooler_output

    return step


def _rerank(side: str, sizes: dict[str, Any], images: int, texts: int, count: int) -> Callable[[], Tensor]:
    """Both towers are run once for each image and text on both sides, as officially."""
    model, image_size = _model(Bridge, ("contrastive", "match"), sizes).eval(), sizes["image_size"]
    ids, mask = (part[:, :RETRIEVAL_LENGTH] for part in _texts(texts))
    pixels = torch.randn(images, 3, image_size, image_size)

    def step() -> Tensor:
        if side == "ours":
            with torch.no_grad():
                encoded = model.encode_text(ids, mask), model.encode_image(pixels)
            return rerank(model, *encoded, count=count).scores
        return plain.rerank(model, ids, mask, pixels, count)

    return step


CASES = {
    "bridge_training_step": partial(_training_step, connector=Bridge),
    "manager_training_step": partial(_training_step, connector=_managers),
    "port_forward": _port_forward,
    "rerank": partial(_rerank, sizes=THIRD, images=40, texts=80, count=8),
    "bridge_training_step_base": partial(_training_step, connector=Bridge, sizes=BASE, size=4),
    "manager_training_step_base": partial(_training_step, connector=_managers, sizes=BASE, size=4),
    "port_forward_base": partial(_port_forward, sizes=BASE, size=4),
    "rerank_base": partial(_rerank, sizes=BASE, images=3, texts=8, count=3),
    "rerank_1000_images_5000_texts": partial(_rerank, sizes=SMALLEST, images=1000, texts=5000, count=32),
}
