"""BridgeTower and ManagerTower in the official order of operations, on the parameters of our model.

Both towers run for each objective, on texts padded to full length; attention is written out; every manager norms all of its
experts and stacks the products; all layers compute all tokens, and the vocabulary projection all positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import IGNORE_INDEX
from models.layers.bert import BertAttention, BertLayer
from models.two_tower.connectors import SIDES, Bridge
from models.two_tower.managers import AdaptiveManager, Managers
from models.two_tower.model import TwoTower


def infer(model: TwoTower, ids: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Text and image features of all tokens, and the pooled features (B, 2D)."""
    additive = {"text": (1.0 - mask[:, None, None].float()) * -10000.0, "image": None}
    additive["image"] = torch.zeros(len(image), 1, 1, 1 + model.vit_model.visual.grid**2, device=image.device)
    states = {"text": text_states(model, ids, additive["text"]), "image": image_states(model, image)}
    experts = {}
    for kind, side in enumerate(SIDES):
        transform = getattr(model, f"cross_modal_{side}_transform")
        layers = [states[side][i] for i in model.connector.read[side]]
        experts[side] = [transform(x) + model.token_type_embeddings.weight[kind] for x in layers]
        if isinstance(model.connector, Managers):
            table = getattr(model.connector, f"layer_embeddings_{side}").weight
            embedded = [x + table[i] for i, x in zip(model.connector.read[side], experts[side], strict=True)]
            experts[side] = [torch.stack(embedded, dim=1)]
    x: dict[str, Tensor] = {}
    for level in range(model.levels):
        entered = {side: _enter(model, side, level, experts[side], x, mask) for side in SIDES}
        for side, other in zip(SIDES, SIDES[::-1], strict=True):
            layer = getattr(model, f"cross_modal_{side}_layers")[level]
            x[side] = layer_output(layer, entered[side], additive[side], entered[other], additive[other])
    return x["text"], x["image"], model.pool(x["text"], x["image"])


def training_losses(model: TwoTower, batch: dict[str, Tensor]) -> Tensor:
    """MLM and ITM, each by passes of its own through both towers."""
    text, _, _ = infer(model, batch["masked_ids"], batch["token_mask"], batch["image"])
    logits, labels = model.mlm_score(text), batch["masked_labels"]
    mlm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    images = batch["image"].clone()
    images[batch["matched"] == 0] = batch["false_image"]
    _, _, pooled = infer(model, batch["token_ids"], batch["token_mask"], images)
    return mlm + F.cross_entropy(model.itm_score.fc(pooled), batch["matched"])


@torch.no_grad()
def rerank(model: TwoTower, ids: Tensor, mask: Tensor, images: Tensor, count: int) -> Tensor:
    """(images, texts) match logits of the candidates of each image, then of each text, -100 elsewhere: one image with its texts
    at a time, both towers cached, all tokens of all cross-modal layers."""
    text, image = model.encode_text(ids, mask, trim=False), model.encode_image(images)
    similarity = model.embed_image(image) @ model.embed_text(text).T
    scores = torch.full_like(similarity, -100.0)
    for i, row in enumerate(similarity):
        chosen = row.topk(count).indices
        pooled = model.fuse(text.rows(chosen), image.rows(torch.full_like(chosen, i))).pooled
        scores[i, chosen] = model.itm_score.fc(pooled)[:, 1]
    for j, column in enumerate(similarity.T):
        chosen = column.topk(count).indices
        pooled = model.fuse(text.rows(torch.full_like(chosen, j)), image.rows(chosen)).pooled
        scores[chosen, j] = model.itm_score.fc(pooled)[:, 1]
    return scores


def text_states(model: TwoTower, ids: Tensor, additive: Tensor) -> list[Tensor]:
    text = model.text_transformer
    real = ids != text.padding_id
    x, states = text.embeddings(ids, real.cumsum(1) * real + text.padding_id), []
    for layer in text.encoder.layer:
        x = layer_output(layer, x, additive, None, None)
        states.append(x)
    return states


def image_states(model: TwoTower, image: Tensor, left: Tensor | None = None) -> list[Tensor]:
    visual = model.vit_model.visual
    x = visual.conv1(image).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    if left is not None:
        x = torch.cat([x[:, :1], x.take_along_dim(1 + left[..., None], dim=1)], dim=1)
    x = visual.ln_pre(x)
    states = []
    for block in visual.transformer.resblocks:
        packed = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = packed.unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + block.attn.out_proj((weights @ value).transpose(1, 2).flatten(2))
        hidden = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
        states.append(visual.ln_post(x))
    return states


def _enter(model: TwoTower, side: str, level: int, experts: list[Tensor], x: dict[str, Tensor], mask: Tensor) -> Tensor:
    connector = model.connector
    if isinstance(connector, Bridge):
        if level == 0:
            return getattr(connector, f"cross_modal_{side}_layernorm")(experts[0])
        return getattr(connector, f"cross_modal_{side}_link_tower")[level - 1].LayerNorm(experts[level] + x[side])
    assert isinstance(connector, Managers)
    manager, stacked = connector.managers(side)[level], experts[0]  # type: ignore[arg-type]  # (B, N, L, D)
    normed = torch.stack(
        [norm(stacked[:, i]) for i, norm in zip(range(stacked.shape[1]), manager.LayerNorm, strict=False)], dim=1
    )
    if not isinstance(manager, AdaptiveManager):
        weights = (manager.layer_scores[:, : manager.experts] / manager.softmax_temperature).softmax(dim=1)
        return (weights * normed).sum(dim=1)
    cross = manager.LayerNorm[-1](x[side])
    other = manager.extra_query_LayerNorm(x["image" if side == "text" else "text"])
    attention = manager.fusion_attention
    scores = attention.q_proj(cross) @ attention.k_proj(other).transpose(1, 2) / cross.shape[-1] ** 0.5
    if side == "image":
        scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
    query = torch.cat([scores.softmax(dim=-1) @ other, cross], dim=-1)
    scores = manager.linear_controller(query).transpose(1, 2)[..., None].expand(-1, -1, -1, cross.shape[-1])
    return ((scores / manager.softmax_temperature).softmax(dim=1) * normed).sum(dim=1) + manager.layer_scores_cross[0] * cross


def layer_output(layer: BertLayer, x: Tensor, additive: Tensor, context: Tensor | None, of_context: Tensor | None) -> Tensor:
    x = attended(layer.attention, x, x, additive)
    if layer.crossattention is not None:
        x = attended(layer.crossattention, x, context, of_context)
    return layer.output(F.gelu(layer.intermediate.dense(x)), x)


def attended(attention: nn.Module, x: Tensor, context: Tensor, additive: Tensor) -> Tensor:
    assert isinstance(attention, BertAttention)
    query, key, value = (
        part.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for part in (attention.self.query(x), attention.self.key(context), attention.self.value(context))
    )
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + additive).softmax(dim=-1)
    return attention.output((weights @ value).transpose(1, 2).flatten(2), x)
