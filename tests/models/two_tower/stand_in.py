"""Two-tower models small enough for tests, and the plain forms that they must equal."""

from functools import partial

import torch
import torch.nn.functional as F

from models.two_tower.connectors import Bridge, NoConnector
from models.two_tower.managers import AdaptiveManager, Managers, StaticManager
from models.two_tower.model import TwoTower

SIZES = {
    "image_size": 16, "patch_size": 8, "image_width": 12, "image_layers": 4, "image_heads": 2, "text_width": 20,
    "text_layers": 4, "text_heads": 2, "text_intermediate": 24, "vocab_size": 40, "max_positions": 14, "width": 16,
    "levels": 3, "heads": 2, "mlp_ratio": 2.0, "embed_dim": 8, "answers": 5, "dropout": 0.0,
}  # fmt: skip
EXPERTS = {"text_experts": 3, "image_experts": 2}
CONNECTORS = {
    "none": NoConnector,
    "bridge": Bridge,
    "scaled_add": partial(Bridge, link="scaled_add"),
    "interpolate": partial(Bridge, link="interpolate"),
    "static_manager": partial(Managers, kind="static", **EXPERTS),
    "static_manager_all": partial(Managers, kind="static_all", **EXPERTS),
    "adaptive_manager": partial(Managers, **EXPERTS),
    "adaptive_manager_own": partial(Managers, query="own", **EXPERTS),
    "adaptive_manager_official": partial(Managers, mask_padding=False, **EXPERTS),
}
TASKS = ("mlm", "match", "contrastive", "rank", "answer", "entail", "reason")


def small_model(connector: str = "bridge", tasks: tuple[str, ...] = TASKS, **changes) -> TwoTower:
    """Every parameter is drawn, so that nothing is hidden by an initial 0 or 1."""
    torch.manual_seed(0)
    model = TwoTower(CONNECTORS[connector], tasks, **{**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def small_texts(lengths: tuple[int, ...] = (5, 3, 7, 2), padded: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, padded) of texts of these lengths; padding is 1."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 40, (len(lengths), 14), generator=generator)[:, :padded]
    return torch.where(mask == 1, ids, 1), mask


def small_images(count: int = 4, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def plain_static(manager: StaticManager, experts: list, own: list) -> torch.Tensor:
    """The formula as it is written: every LayerNorm on its own."""
    scores = manager.layer_scores[0, : manager.experts]
    weights = (scores / manager.softmax_temperature).softmax(dim=0) if manager.softmax else scores
    out = sum(w * norm(x) for w, norm, x in zip(weights, manager.LayerNorm, experts, strict=False))
    crosses = own[len(own) - manager.crosses :]
    for w, norm, x in zip(
        manager.layer_scores[0, manager.experts :], manager.LayerNorm[manager.experts :], crosses, strict=True
    ):
        out = out + w * norm(x)
    return out


def plain_adaptive(manager: AdaptiveManager, experts: list, own: list, other: torch.Tensor) -> torch.Tensor:
    cross = manager.LayerNorm[-1](own[-1])
    values = manager.extra_query_LayerNorm(other)
    attention = manager.fusion_attention
    scores = attention.q_proj(cross) @ attention.k_proj(values).transpose(1, 2) / cross.shape[-1] ** 0.5
    query = torch.cat([scores.softmax(dim=-1) @ values, cross], dim=-1)
    weights = F.softmax(manager.linear_controller(query) / manager.softmax_temperature, dim=-1)
    out = sum(weights[..., i, None] * norm(x) for i, (norm, x) in enumerate(zip(manager.LayerNorm, experts, strict=False)))
    return out + manager.layer_scores_cross[0] * cross
