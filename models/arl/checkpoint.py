"""Official checkpoints (Lightning files of ARL) and METER's, with which ARL's pre-training starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.arl.graph import PREDICTORS
from models.arl.model import ARL
from models.io import CheckpointError
from models.two_tower.checkpoint import Loaded, load_named, sizes_from_official
from models.two_tower.checkpoint import own_names as two_tower_names

RENAMED = {  # official name -> name in TwoTower
    "vision_encoder": "vit_model", "language_encoder": "text_transformer",
    "multi_modal_language_proj": "cross_modal_text_transform", "multi_modal_vision_proj": "cross_modal_image_transform",
    "multi_modal_language_layers": "cross_modal_text_layers", "multi_modal_vision_layers": "cross_modal_image_layers",
    "multi_modal_language_pooler": "cross_modal_text_pooler", "multi_modal_vision_pooler": "cross_modal_image_pooler",
    "modality_type_embeddings": "token_type_embeddings", "mlm_head": "mlm_score", "itm_head": "itm_score",
    "vqa_head": "vqa_classifier", "cls_head": "cls_classifier", "irtr_head": "rank_output",
}  # fmt: skip
HEADS = {"mim_head": "mim", "cls_classifier": "classify"}  # beside those of the two-tower models
KNOWLEDGE = "align_head."
ALIGN = tuple(f"{KNOWLEDGE}{name}." for name in PREDICTORS)
_OF_LAYERS = ("knowledge_", "image2knowledge.", "knowledge2text.")
# CLIP's text half, the metrics' states, positions that are computed, and the second name of a shared weight.
_UNUSED = re.compile(
    r"vision_encoder\.(?!visual\.)|vit_model\.token_embedding|(train|val)_|mim_head\.decoder_pos_embed$|.*\.lin_dst\.weight$"
)


def own_name(name: str) -> str:
    """The name in :class:`ARL` of a parameter of the official code, or of METER's."""
    name = re.sub(r"^(module\.|model\.)+", "", name)
    part, dot, rest = name.partition(".")
    return f"{RENAMED.get(part, part)}{dot}{rest}".replace(".lin_src.", ".lin.")


def own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an official file under this model's names, without what no loss reaches."""
    plain = {re.sub(r"^(module\.|model\.)+", "", name): value for name, value in weights.items()}
    return two_tower_names({own_name(name): value for name, value in plain.items() if not _UNUSED.match(name)})


def official_names(model: ARL) -> dict[str, Tensor]:
    """The weights of ``model`` under the names of the official repository."""
    back = {own: official for official, own in RENAMED.items()}
    named = {}
    for name, value in model.state_dict().items():
        part, dot, rest = name.partition(".")
        name = f"{back.get(part, part)}{dot}{rest}"
        if ".lin." in name:
            named[name.replace(".lin.", ".lin_dst.")] = value
            name = name.replace(".lin.", ".lin_src.")
        named[name] = value
    if "mim" in model.tasks:
        named["mim_head.decoder_pos_embed"] = model.mim_head.decoder_pos_embed[None]
    return named


def model_from_official(weights: Mapping[str, Tensor], **settings: Any) -> ARL:
    """The model that ``weights`` belong to, loaded.

    Args:
        weights: of the file.
        settings: arguments of :class:`ARL` that weights do not tell (numbers of heads), or to change.

    Raises CheckpointError when the weights are of another architecture, METER's among them: they have no graph.
    """
    named = own_names(weights)
    model = ARL(**{**sizes_from_weights(named), **settings})
    load(model, named)
    return model


def sizes_from_weights(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of :class:`ARL` that shapes tell; heads have 64 channels, as in the released size."""
    sizes = sizes_from_official(named)
    del sizes["shared_projections"]  # the default
    tasks = {task for head, task in HEADS.items() if any(name.startswith(f"{head}.") for name in named)}
    aligned = ("align",) if any(name.startswith(ALIGN) for name in named) else ()
    try:
        entities, width = named["align_head.x"].shape
        layer = "cross_modal_text_layers.0.knowledge_intermediate.dense.weight"
        sizes |= {
            "tasks": (*sizes["tasks"], *sorted(tasks), *aligned), "entities": entities,
            "triples": named["align_head.edge_index"].shape[1], "knowledge_width": width,
            "knowledge_heads": max(width // 64, 1), "knowledge_intermediate": len(named[layer]),
            "graph_heads": named["align_head.conv1.att_src"].shape[1],
            "graph_channels": named["align_head.conv1.att_src"].shape[2],
        }  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"these weights have no knowledge graph ({error}): they are not ARL's.") from None
    if "mim" in tasks:
        decoder = named["mim_head.decoder_embed.weight"].shape[0]
        blocks = {name.split(".")[3] for name in named if name.startswith("mim_head.decoder.resblocks.")}
        sizes |= {"mim_width": decoder, "mim_layers": len(blocks), "mim_heads": max(decoder // 64, 1)}
    if "classify" in tasks:
        sizes["classes"] = len(named["cls_classifier.3.weight"])
    return sizes


def load_official(model: ARL, weights: Mapping[str, Tensor]) -> Loaded:
    """Load what ARL's or METER's file holds, see :func:`load_named`; METER's leaves the knowledge as it is.

    A head of ``rank`` that the file lacks starts from the matching head (official).

    Raises CheckpointError naming what is missing or of another shape.
    """
    return load(model, own_names(weights))


def load(model: ARL, named: dict[str, Tensor]) -> Loaded:
    """As :func:`load_official`, of weights under the model's own names."""
    state, optional = model.state_dict(), ALIGN
    named = {name: value for name, value in named.items() if name in state or not name.startswith(ALIGN)}
    if not any(name.startswith(KNOWLEDGE) for name in named):
        of_layers = tuple(
            name
            for name in state
            if name.startswith("cross_modal_text_layers.") and name.split(".", 2)[2].startswith(_OF_LAYERS)
        )
        optional = (KNOWLEDGE, *of_layers)
    loaded = load_named(model, named, tuple(HEADS), optional)
    heads = {name.split(".")[0] for name in loaded.fresh}
    if "rank_output" in heads and hasattr(model, "itm_score") and "itm_score" not in heads:
        model.rank_like_match()
        return loaded._replace(fresh=[name for name in loaded.fresh if not name.startswith("rank_output.")])
    return loaded
