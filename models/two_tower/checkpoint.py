"""Official checkpoints (Lightning files of BridgeTower and ManagerTower) and the initial weights of the towers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.encoders.weights import find_weights, tensor_file
from models.io import CheckpointError, load_strictly, read_tensors
from models.two_tower.connectors import SIDES, Bridge, LinkType, NoConnector
from models.two_tower.managers import Managers
from models.two_tower.model import TwoTower

HEADS = {  # first part of a parameter's name -> the task it belongs to
    "mlm_score": "mlm", "itm_score": "match", "itc_text_head": "contrastive", "itc_image_head": "contrastive",
    "temperature": "contrastive", "itc_cross_modal_head": "contrastive_cross", "rank_output": "rank",
    "vqa_classifier": "answer", "snli_classifier": "entail", "nlvr2_classifier": "reason",
}  # fmt: skip
HEAD_WIDTH = 64  # of every released size: the numbers of attention heads cannot be read from the weights
POSITIONS = "vit_model.visual.positional_embedding"
TYPES = "token_type_embeddings.weight"
# RoBERTa's pooler and CLIP's text half, which no loss reaches.
_UNUSED = re.compile(r"text_transformer\.pooler\.|.*\.position_ids$|vit_model\.(positional_embedding|ln_final\.)")
_CONNECTOR = re.compile(
    r"layer_embeddings_(text|image)\.|cross_modal_(text|image)_(layernorm|link_tower|manager_tower)\.|connector\."
)


class Loaded(NamedTuple):
    """What :func:`load_official` did: heads that kept their initial weights, and tensors of the file that were not used."""

    fresh: list[str]
    unused: list[str]


def own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an official file under this model's names, without what no loss reaches."""
    named = {}
    for name, value in weights.items():
        name = re.sub(r"^(module\.|model\.)+", "", name)
        if _UNUSED.match(name):
            continue
        name = name.replace("cross_modal_itc_", "itc_").replace(".manager_layer.", ".")
        if _CONNECTOR.match(name):
            name = f"connector.{name.removeprefix('connector.')}"
        named[name] = value.float() if value.is_floating_point() else value
    return named


def official_names(model: TwoTower) -> dict[str, Tensor]:
    """The weights of ``model`` under the names of the official repositories (heads of ManagerTower's retrieval included)."""
    managed = isinstance(model.connector, Managers)
    named = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("connector.")
        name = re.sub(r"(manager_tower\.\d+)\.", r"\1.manager_layer.", name)
        if managed:
            name = re.sub(r"^itc_(text|image)_head", r"cross_modal_itc_\1_head", name)
        named[name] = value
    return named


def model_from_official(weights: Mapping[str, Tensor], connector: Mapping[str, Any] | None = None, **settings: Any) -> TwoTower:
    """The model that ``weights`` (official names) belong to, loaded.

    Args:
        weights: of the file.
        connector: arguments of the connector that weights do not tell: ``mask_padding``, ``eps``, ``temperature`` ...
        settings: arguments of :class:`TwoTower` that weights do not tell (numbers of heads, LayerNorm eps), or to change.

    Raises CheckpointError when the weights are of another architecture.
    """
    named = own_names(weights)
    make = partial(_connector(named), **(connector or {}))
    model = TwoTower(make, **{**sizes_from_official(named), **settings})
    load_official(model, named)
    return model


def sizes_from_official(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of :class:`TwoTower` that shapes tell; heads have 64 channels, as in all released sizes."""
    try:
        image_width, _, patch, _ = named["vit_model.visual.conv1.weight"].shape
        vocab, text_width = named["text_transformer.embeddings.word_embeddings.weight"].shape
        transform = "cross_modal_text_transform"
        shared = f"{transform}.weight" in named
        width = len(named[f"{transform}.weight" if shared else f"{transform}.0.weight"])
        tasks = {HEADS[part] for name in named if (part := name.split(".")[0]) in HEADS and HEADS[part] != "contrastive"}
        if "itc_text_head.fc.weight" in named and "contrastive_cross" not in tasks:
            tasks.add("contrastive")
        sizes: dict[str, Any] = {
            "tasks": sorted(tasks), "patch_size": patch, "image_size": round((len(named[POSITIONS]) - 1) ** 0.5) * patch,
            "image_width": image_width, "image_layers": _count(named, "vit_model.visual.transformer.resblocks."),
            "image_heads": max(image_width // HEAD_WIDTH, 1), "text_width": text_width, "vocab_size": vocab,
            "text_layers": _count(named, "text_transformer.encoder.layer."), "text_heads": max(text_width // HEAD_WIDTH, 1),
            "text_intermediate": len(named["text_transformer.encoder.layer.0.intermediate.dense.weight"]),
            "max_positions": len(named["text_transformer.embeddings.position_embeddings.weight"]),
            "width": width, "levels": _count(named, "cross_modal_text_layers."), "heads": max(width // HEAD_WIDTH, 1),
            "mlp_ratio": len(named["cross_modal_text_layers.0.intermediate.dense.weight"]) / width,
            "image_types": len(named[TYPES]) - 1, "shared_projections": shared,
        }  # fmt: skip
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"these are not the weights of a two-tower model ({error}); first: {sorted(named)[:5]}") from None
    if "itc_text_head.fc.weight" in named:
        sizes["embed_dim"] = len(named["itc_text_head.fc.weight"])
        if "contrastive_cross" in tasks:
            sizes["contrastive_source"] = "projected"
    for head, task in (("vqa_classifier", "answer"), ("snli_classifier", "entail"), ("nlvr2_classifier", "reason")):
        layers = sorted({int(name.split(".")[1]) for name in named if name.startswith(f"{head}.")})
        if layers:
            sizes["head_layers"] = 2 if len(layers) > 1 else 1
            sizes["head_scale"] = len(named[f"{head}.0.weight"]) / (2 * width) if len(layers) > 1 else 1.0
        if task == "answer" and layers:
            sizes["answers"] = len(named[f"{head}.{layers[-1]}.weight"])
    return sizes


def _connector(named: Mapping[str, Tensor]) -> Any:
    """The factory of the connector that the weights show."""
    if "connector.cross_modal_text_layernorm.weight" in named:
        link: LinkType = "add"
        first = "connector.cross_modal_text_link_tower.0."
        if f"{first}scaled_factor" in named:
            link = "scaled_add"
        elif f"{first}beta" in named:
            link = "interpolate"
        return partial(Bridge, link=link)
    tower = "connector.cross_modal_{}_manager_tower.{}."
    if tower.format("text", 0) + "layer_scores" not in named:
        return NoConnector
    text_experts, image_experts = (named[tower.format(side, 0) + "layer_scores"].shape[1] for side in SIDES)
    channels = named[tower.format("text", 0) + "layer_scores"].shape[-1]
    adaptive = tower.format("text", 1) + "linear_controller.weight" in named
    fused = tower.format("text", 1) + "fusion_attention.q_proj.weight" in named
    return partial(
        Managers,
        kind="adaptive" if adaptive else "static",
        query="fused" if fused or not adaptive else "own",
        weight_type="vector" if channels > 1 else "scalar",
        mask_padding=False,
        text_experts=text_experts,
        image_experts=image_experts,
    )


def load_official(model: TwoTower, weights: Mapping[str, Tensor]) -> Loaded:
    """Load towers, connector and cross-modal layers strictly, and each head that both sides have.

    Positions are resized to the model's image size. The type vector of a second image starts as a copy of the first one's.

    Raises CheckpointError naming what is missing or of another shape.
    """
    named, state = own_names(weights), model.state_dict()
    if POSITIONS in named:
        named[POSITIONS] = resize_positions(named[POSITIONS], model.vit_model.visual.grid)
    if TYPES in named:
        rows = named[TYPES]
        named[TYPES] = torch.cat([rows, *[rows[1:2]] * (len(state[TYPES]) - len(rows))])[: len(state[TYPES])]
    for name in state:
        if name.endswith("softmax_temperature_cross") and name not in named:
            named[name] = state[name]
    used = {name: value for name, value in named.items() if name in state or name.split(".")[0] not in HEADS}
    absent = tuple(part for part in HEADS if not any(name.split(".")[0] == part for name in named))
    other_answers = _other_vocabulary(used, state)
    load_strictly(model, used, (*absent, *other_answers))
    return Loaded(sorted(state.keys() - used.keys()), sorted(named.keys() - used.keys()))


def _other_vocabulary(used: dict[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Drop classifiers of another number of classes or hidden width from ``used``; the beginnings of their names."""
    heads = ("vqa_classifier.", "snli_classifier.", "nlvr2_classifier.")
    different = tuple(h for h in heads if any(n.startswith(h) and used[n].shape != state[n].shape for n in used if n in state))
    for name in [name for name in used if name.startswith(different)]:
        del used[name]
    return different


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """(1 + n², D) positions, the class token's first, for ``grid`` x ``grid`` patches: bicubic, without antialiasing."""
    side = round((len(table) - 1) ** 0.5)
    if side == grid:
        return table
    image = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], image[0].flatten(1).T])


def load_towers(model: TwoTower, text: Mapping[str, Tensor] | None, image: Mapping[str, Tensor] | None) -> None:
    """Start the towers from RoBERTa (Hugging Face names, with or without ``roberta.``) and from OpenAI's CLIP.

    Args:
        model: keeps everything else.
        text: None leaves the text tower as it is.
        image: ``visual.*`` of an OpenAI archive, or such names without the prefix; None leaves the image tower as it is.

    Raises CheckpointError.
    """
    if text is not None:
        named = {name.removeprefix("roberta."): value.float() for name, value in text.items()}
        wanted = {n: v for n, v in named.items() if n.startswith(("embeddings.", "encoder.")) and "position_ids" not in n}
        load_strictly(model.text_transformer, wanted, source="RoBERTa")
    if image is not None:
        prefixed = any(name.startswith("visual.") for name in image)
        named = {n.removeprefix("visual."): v.float() for n, v in image.items() if n.startswith("visual.") or not prefixed}
        named.pop("proj", None)
        if "positional_embedding" in named:
            named["positional_embedding"] = resize_positions(named["positional_embedding"], model.vit_model.visual.grid)
        load_strictly(model.vit_model.visual, named, source="CLIP")


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))


def clip_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of a Hugging Face CLIP checkpoint under OpenAI's names; such names are left as they are."""
    tower = {n.removeprefix("vision_model."): v for n, v in weights.items() if n.startswith("vision_model.")}
    if not tower:
        return dict(weights)
    renamed = {
        "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }  # fmt: skip
    named: dict[str, Tensor] = {}
    for name, value in tower.items():
        if name.endswith("position_ids") or ".self_attn.k_proj" in name or ".self_attn.v_proj" in name:
            continue
        if ".self_attn.q_proj." in name:
            value = torch.cat([tower[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, new in (
            ("encoder.layers.", "transformer.resblocks."), ("self_attn.", "attn."), ("layer_norm", "ln_"),
            ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
        ):  # fmt: skip
            name = name.replace(old, new)
        named[renamed.get(name, name)] = value
    return named


def pretrained_towers(
    model: TwoTower,
    text: str | None = None,
    image: str | None = None,
    text_name: str = "FacebookAI/roberta-base",
    image_name: str = "openai/clip-vit-base-patch16",
) -> None:
    """Start the towers from pretrained RoBERTa and CLIP weights.

    Args:
        model: keeps everything else.
        text: file or folder of RoBERTa; None: the cache of ``text_name``, then the hub.
        image: file or folder of CLIP, by OpenAI's or by Hugging Face's names; None: the cache of ``image_name``, then the hub.
        text_name: repository of the text tower.
        image_name: repository of the image tower.

    Raises WeightsUnavailable with the remedy, or CheckpointError.
    """
    places = [
        find_weights(name, name, weights, f"module.towers.{option}")
        for name, weights, option in ((text_name, text, "text"), (image_name, image, "image"))
    ]
    of_text, of_image = (read_tensors(tensor_file(place)) for place in places)
    load_towers(model, of_text, clip_names(of_image))
