"""transformers' port of BridgeTower, both ways: its weights to this model, and this model's weights to the port."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BridgeTowerConfig

from models.errors import UserError
from models.two_tower.checkpoint import model_from_official, official_names
from models.two_tower.connectors import Bridge
from models.two_tower.model import TwoTower

_PREFIX = "bridgetower."
_VISION = "vision_model.visual."
_HEADS = ("mlm_score.", "itm_score.", "itc_text_head.", "itc_image_head.", "itc_cross_modal_head.", "logit_scale")
_RENAMED = {  # in the vision model: port -> official
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


class PortContrast(NamedTuple):
    """The port's three embeddings (B, E), unit length, and the mean of the three one-directional losses."""

    text: Tensor
    image: Tensor
    cross: Tensor
    loss: Tensor


def from_port(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The port's tensors under official names; its ``logit_scale`` becomes the temperature."""
    official = {}
    for name, value in weights.items():
        name = name.removeprefix(_PREFIX)
        if name == "logit_scale":
            name, value = "temperature", torch.exp(-value.float())
        elif name.startswith(f"{_VISION}ln_separate.") or name.endswith("position_ids"):
            continue  # the port makes them and never reads them
        elif name.startswith(_VISION):
            name = name.removeprefix(_VISION)
            name = f"vit_model.visual.{_RENAMED.get(name, name)}"
        official[re.sub(r"^text_model\.", "text_transformer.", name)] = value
    if "mlm_score.bias" in official and "mlm_score.decoder.weight" not in official:  # tied to the word table
        official["mlm_score.decoder.weight"] = official["text_transformer.embeddings.word_embeddings.weight"]
    return official


def model_from_port(weights: Mapping[str, Tensor], config: BridgeTowerConfig, **settings: Any) -> TwoTower:
    """The model of a port's checkpoint, loaded.

    Args:
        weights: of ``BridgeTowerModel`` or of one of its classes with heads.
        config: of the checkpoint.
        settings: arguments of :class:`TwoTower` to change.
    """
    if config.share_link_tower_layers:
        raise UserError("share_link_tower_layers is set, which transformers' own BridgeTower cannot run either.")
    text, vision = config.text_config, config.vision_config
    sizes = {
        "heads": text.num_attention_heads, "text_heads": text.num_attention_heads, "image_heads": vision.hidden_size // 64,
        "image_eps": vision.layer_norm_eps, "text_eps": text.layer_norm_eps, "cross_eps": text.layer_norm_eps,
        "mlm_eps": config.layer_norm_eps, "dropout": text.hidden_dropout_prob, "padding_id": text.pad_token_id,
    }  # fmt: skip
    connector = {"eps": config.layer_norm_eps, "link": config.link_tower_type}
    return model_from_official(from_port(weights), connector, **{**sizes, **settings})


def to_port(model: TwoTower) -> tuple[BridgeTowerConfig, dict[str, Tensor]]:
    """Configuration and weights with which ``BridgeTowerModel`` (and its classes with heads) compute what ``model`` does.

    Names begin with ``bridgetower.`` but for those of heads. The port adds a pooler to the text model that nothing reads.

    Raises:
        UserError: the port has no such connector, or only one LayerNorm eps where the model has several.
    """
    if not isinstance(model.connector, Bridge):
        raise UserError(f"transformers has no port of a model with {type(model.connector).__name__}: bridges alone.")
    visual, text = model.vit_model.visual, model.text_transformer
    layer = text.encoder.layer[0]
    blocks = visual.transformer.resblocks
    cross = model.cross_modal_text_layers[0]
    if cross.attention.heads != layer.attention.heads or blocks[0].heads * 64 != len(visual.class_embedding):
        raise UserError("the port takes one number of heads for text and fusion, and one vision head per 64 channels.")
    if layer.output.dense.in_features != cross.output.dense.in_features:
        raise UserError("the port takes one hidden width for the MLPs of text and fusion.")
    eps = cross.output.LayerNorm.eps
    if text.embeddings.LayerNorm.eps != eps:
        raise UserError(
            f"the port takes one LayerNorm eps for text ({text.embeddings.LayerNorm.eps:g}) and fusion ({eps:g}). Load the "
            "weights into a model with cross_eps and mlm_eps of the text tower first: outputs differ by about 1e-5."
        )
    config = BridgeTowerConfig(
        hidden_size=model.width,
        num_attention_heads=layer.attention.heads,
        num_hidden_layers=model.levels,
        layer_norm_eps=model.connector.cross_modal_text_layernorm.eps,
        link_tower_type=model.connector.cross_modal_text_link_tower[0].kind if model.levels > 1 else "add",
        share_cross_modal_transformer_layers=isinstance(model.cross_modal_text_transform, torch.nn.Linear),
        tie_word_embeddings=False,
        text_config={
            "hidden_size": text.embeddings.LayerNorm.normalized_shape[0],
            "vocab_size": text.embeddings.word_embeddings.num_embeddings,
            "num_hidden_layers": len(text.encoder.layer),
            "num_attention_heads": layer.attention.heads,
            "intermediate_size": layer.intermediate.dense.out_features,
            "max_position_embeddings": text.embeddings.position_embeddings.num_embeddings,
            "layer_norm_eps": eps,
            "hidden_dropout_prob": layer.output.dropout.p,
            "attention_probs_dropout_prob": layer.attention.dropout,
            "pad_token_id": text.padding_id,
        },
        vision_config={
            "hidden_size": len(visual.class_embedding),
            "num_hidden_layers": len(blocks),
            "patch_size": visual.conv1.kernel_size[0],
            "image_size": visual.grid * visual.conv1.kernel_size[0],
            "layer_norm_eps": visual.ln_post.eps,
        },
    )
    return config, _port_names(official_names(model))


def _port_names(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    back = {of: port for port, of in _RENAMED.items()}
    named = {}
    for name, value in official.items():
        if name == "temperature":
            name, value = "logit_scale", -value.log()
        elif name.startswith("vit_model.visual."):
            name = name.removeprefix("vit_model.visual.")
            name = _VISION + back.get(name, name)
        name = re.sub(r"^text_transformer\.", "text_model.", name)
        named[name if name.startswith(_HEADS) else _PREFIX + name] = value
    return named


def port_contrast(model: TwoTower, ids: Tensor, mask: Tensor, image: Tensor) -> PortContrast:
    """The port's contrastive model: texts, images and pairs (B) in one space."""
    text, images = model.encode_text(ids, mask), model.encode_image(image)
    cross = F.normalize(model.itc_cross_modal_head.fc(model.fuse(text, images, read="first").pooled), dim=-1)
    vectors = model.embed_text(text), model.embed_image(images), cross
    own = torch.arange(len(cross), device=cross.device)
    pairs = ((vectors[0], vectors[1]), (vectors[0], cross), (vectors[1], cross))
    losses = [F.cross_entropy(a @ b.T / model.temperature, own) for a, b in pairs]
    return PortContrast(*vectors, torch.stack(losses).mean())
