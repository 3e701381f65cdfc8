"""ARL in the official order of operations, on the parameters of our model.

Every objective runs the whole model: both towers on texts padded to full length, the graph, all cross-modal layers with all
tokens and all places for entities. Attention is written out; the vocabulary is projected on all positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.reference.two_tower import attended, image_states, text_states
from models.arl.graph import NO_ENTITY, entity_labels, pick
from models.arl.layers import KnowledgeLayer
from models.arl.masked_image import patch_pixels, remove_patches
from models.arl.model import ARL
from models.batch import IGNORE_INDEX


def infer(
    model: ARL, ids: Tensor, mask: Tensor, image: Tensor, entities: Tensor, cover: Tensor, left: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Text and image features that enter each layer and leave the last one, and the pooled features (B, 2D).

    Args:
        left: (B, n) patches that the image tower sees; None: all.
    """
    additive = (1.0 - mask[:, None, None].float()) * -10000.0
    text, of_image = text_states(model, ids, additive)[-1], image_states(model, image, left)[-1]
    x = model.cross_modal_text_transform(text) + model.token_type_embeddings.weight[0]
    y = model.cross_modal_image_transform(of_image) + model.token_type_embeddings.weight[1]
    of_entities = torch.where(entities == NO_ENTITY, -10000.0, 0.0)[:, None, None]
    z = pick(model.align_head(), entities)
    nothing = torch.zeros(len(image), 1, 1, y.shape[1], device=image.device)
    texts, images = [x], [y]
    for text_layer, image_layer in zip(model.cross_modal_text_layers, model.cross_modal_image_layers, strict=True):
        x, z = _text(text_layer, texts[-1], z, images[-1], (additive, of_entities, nothing), cover)
        y = attended(image_layer.attention, images[-1], images[-1], nothing)
        y = attended(image_layer.crossattention, y, texts[-1], additive)
        images.append(image_layer.output(F.gelu(image_layer.intermediate.dense(y)), y))
        texts.append(x)
    return texts, images, model.pool(texts[-1], images[-1])


def _text(
    layer: KnowledgeLayer, x: Tensor, z: Tensor, y: Tensor, masks: tuple[Tensor, Tensor, Tensor], cover: Tensor
) -> tuple[Tensor, Tensor]:
    additive, of_entities, nothing = masks
    x = attended(layer.attention, x, x, additive)
    z = attended(layer.knowledge_attention, z, z, of_entities)
    z = attended(layer.knowledge_crossattention, z, layer.image2knowledge(y), nothing)
    x = attended(layer.crossattention, x, y, nothing)
    x = layer.knowledge_fusion_output(x + cover.transpose(1, 2) @ layer.knowledge2text(z), x)
    return layer.output(F.gelu(layer.intermediate.dense(x)), x), layer.next_entities(z)


def training_losses(model: ARL, batch: dict[str, Tensor], levels: int) -> Tensor:
    """MLM, MIM, ITM and alignment, each by a pass of its own through the whole model."""
    mask, whole = batch["token_mask"], (batch["entities"], batch["cover"])
    texts, _, _ = infer(model, batch["masked_ids"], mask, batch["image"], batch["masked_entities"], batch["masked_cover"])
    logits, labels = model.mlm_score(texts[-1]), batch["masked_labels"]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)

    patches = remove_patches(batch["noise"])
    _, images, _ = infer(model, batch["token_ids"], mask, batch["image"], *whole, patches.left)
    restored = model.mim_head(images[levels], patches.restore)
    wrong = (restored - patch_pixels(batch["image"], model.vit_model.visual.conv1.kernel_size[0])).square().mean(dim=-1)
    total = total + (wrong * patches.removed).sum() / patches.removed.sum()

    mixed = batch["image"].clone()
    mixed[batch["matched"] == 0] = batch["false_image"]
    _, _, pooled = infer(model, batch["token_ids"], mask, mixed, *whole)
    total = total + F.cross_entropy(model.itm_score.fc(pooled), batch["matched"])

    texts, images, _ = infer(model, batch["token_ids"], mask, batch["image"], *whole)
    head, encoded = model.align_head, model.align_head()
    labels = entity_labels(batch["entities"], len(encoded))
    for side, feature in (("img", images[0][:, 0]), ("txt", texts[0][:, 0])):
        vector = F.relu(getattr(head, f"{side}_linear2")(F.relu(getattr(head, f"{side}_linear1")(feature))))
        repeated = encoded.T[None].expand(len(vector), -1, -1)
        total = total + F.binary_cross_entropy_with_logits(torch.bmm(vector[:, None], repeated)[:, 0], labels)
    return total
