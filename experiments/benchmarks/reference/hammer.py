"""HAMMER's official order of operations, plainly: separate passes per head, copied queues, whole matrices of logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou


class Similarities(NamedTuple):
    """(B, B+Q) logits over momentum features and queue, and the soft targets of the two cross-modal ones."""

    i2t: Tensor
    t2i: Tensor
    i2i: Tensor
    t2t: Tensor
    i2t_targets: Tensor
    t2i_targets: Tensor


def similarities(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    real: Tensor,
    alpha: float,
) -> Similarities:
    """Arguments as :func:`models.hammer.contrastive.manipulation_contrastive`."""
    with torch.no_grad():
        images = torch.cat([image_m.T, image_queue.clone()], dim=1)
        texts = torch.cat([text_m.T, text_queue.clone()], dim=1)
        own = torch.zeros(len(image), images.shape[1], device=image.device)
        own.fill_diagonal_(1)
        own[~real] = 0
        i2t_targets = alpha * F.softmax(image_m @ texts / temperature, dim=1) + (1 - alpha) * own
        t2i_targets = alpha * F.softmax(text_m @ images / temperature, dim=1) + (1 - alpha) * own
    i2t, t2i, i2i, t2t = (each / temperature for each in (image @ texts, text @ images, image @ images, text @ texts))
    return Similarities(i2t, t2i, i2i, t2t, i2t_targets, t2i_targets)


def contrastive_terms(sim: Similarities) -> list[Tensor]:
    """i2t, t2i, i2i and t2t, each the mean of a row's cross-entropy with its target."""
    own = torch.zeros_like(sim.i2i)
    own.fill_diagonal_(1)
    pairs = ((sim.i2t, sim.i2t_targets), (sim.t2i, sim.t2i_targets), (sim.i2i, own), (sim.t2t, own))
    return [-torch.sum(F.log_softmax(logits, dim=1) * targets, dim=1).mean() for logits, targets in pairs]


# ------------------------------------------------------------------------------------------------- the training step


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Whole matrices of attention probabilities; (B, h, T, D/h)."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def vit(tower: Any, image: Tensor) -> Tensor:
    x = tower.patch_embed.proj(image).flatten(2).transpose(1, 2)
    x = torch.cat([tower.cls_token.expand(len(image), -1, -1), x], dim=1) + tower.pos_embed
    for block in tower.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + block.attn.proj(attend(*qkv).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return tower.norm(x)


def _bert_attention(layer: Any, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (
        linear(source).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for linear, source in ((layer.self.query, x), (layer.self.key, context), (layer.self.value, context))
    )
    return layer.output(attend(query, key, value, mask).transpose(1, 2).flatten(2), x)


def bert(tower: Any, x: Tensor, mask: Tensor, image: Tensor | None, first: int, last: int) -> Tensor:
    """Layers ``first`` to ``last``; token ids where ``first`` is 0."""
    additive = (1.0 - mask[:, None, None, :].float()) * -10000.0
    if first == 0:
        x = tower.embeddings(x)
    for layer in tower.encoder.layer[first:last]:
        x = _bert_attention(layer.attention, x, x, additive)
        if layer.crossattention is not None:
            x = _bert_attention(layer.crossattention, x, image, None)
        x = layer.output(F.gelu(layer.intermediate.dense(x)), x)
    return x


def ground(model: Any, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    query, key = model.norm_layer_it_cross_atten(image), model.norm_layer_it_cross_atten(text)
    image = image + model.it_cross_attn(query, key, key, key_padding_mask=mask == 0)[0]
    token = model.norm_layer_aggr(model.cls_token_local.expand(len(image), -1, -1))
    patches = model.norm_layer_aggr(image[:, 1:])
    return model.bbox_head(model.aggregator(token, patches, patches)[0].squeeze(1)).sigmoid()


@torch.no_grad()
def update_momentum(model: Any) -> None:
    """A fresh tensor for every parameter."""
    for average, online in model.momentum_pairs():
        average.data = average.data * model.momentum + online.data * (1.0 - model.momentum)


def training_losses(model: Any, batch: dict, alpha: float) -> dict[str, Tensor]:
    """The six terms of a :class:`models.hammer.model.Hammer`, the token head and its teacher in passes of their own."""
    image, ids, mask, real = batch["image"], batch["token_ids"], batch["token_mask"], batch["fake"] == 0
    text_tower, text_m = model.text_encoder.bert, model.text_encoder_m.bert
    split, end = text_tower.fusion_layer, len(text_tower.encoder.layer)
    model.clamp_temperature()
    image_embeds = vit(model.visual_encoder, image)
    text_embeds = bert(text_tower, ids, mask, None, 0, split)
    features = [
        F.normalize(model.vision_proj(image_embeds[:, 0]), dim=-1),
        F.normalize(model.text_proj(text_embeds[:, 0]), dim=-1),
    ]
    with torch.no_grad():
        update_momentum(model)
        image_m = vit(model.visual_encoder_m, image)
        text_embeds_m = bert(text_m, ids, mask, None, 0, split)
        features_m = [
            F.normalize(model.vision_proj_m(image_m[:, 0]), dim=-1),
            F.normalize(model.text_proj_m(text_embeds_m[:, 0]), dim=-1),
        ]
    queues = model.image_queue.clone().detach(), model.text_queue.clone().detach()
    arguments: tuple[Any, ...] = (*features, *features_m, *queues, model.temp, real, alpha)
    sim = similarities(*arguments)
    out = {"contrastive": torch.stack(contrastive_terms(sim)).mean()}
    model.enqueue(*features_m)
    fused = bert(text_tower, text_embeds, mask, image_embeds, split, end)
    out["binary"] = F.cross_entropy(model.itm_head(fused[:, 0]), batch["fake"])
    out["multi_label"] = F.binary_cross_entropy_with_logits(model.cls_head(fused[:, 0]), batch["multi_label"].float())
    box = ground(model, image_embeds, text_embeds, mask)
    out["box_l1"] = F.l1_loss(box, batch["box"], reduction="none").sum() / len(box)
    giou = torch.diag(generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (box, batch["box"]))))
    out["box_giou"] = (1 - giou).sum() / len(box)
    joint = bert(text_tower, ids, mask, image_embeds, 0, end)
    logits = model.text_encoder.classifier(joint[:, 1:])
    with torch.no_grad():
        joint_m = bert(text_m, ids, mask, image_m, 0, end)
        teacher = F.softmax(model.text_encoder_m.classifier(joint_m[:, 1:]), dim=-1).flatten(0, 1)
    labels = batch["token_labels"].flatten()
    ce = F.cross_entropy(logits.flatten(0, 1), labels)
    kd = -torch.sum(F.log_softmax(logits.flatten(0, 1), dim=1) * teacher, dim=1)
    out["token"] = (1 - alpha) * ce + alpha * kd[labels != -100].mean()
    return out
