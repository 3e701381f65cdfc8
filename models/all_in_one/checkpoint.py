"""Import of official All-in-One checkpoints (``showlab/all-in-one``, released ``.ckpt`` files) and of timm's ViT and DeiT.

Parameter names are the same on both sides; what remains are the official code's renamings, tables of other sizes, and heads
that a file has and a model has not, or the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from models.all_in_one.model import AllInOne
from models.encoders.weights import find_weights, tensor_file
from models.io import load_strictly, read_tensors

HEADS = {  # first part of a parameter's name -> the task it belongs to; None: nothing of ours
    "itm_score": "match", "mlm_score": "mlm", "txt_proj": "contrastive", "vid_proj": "contrastive", "rank_output": "rank",
    "rank_output_2": "rank_reason", "vqa_classifier": "answer", "mc_vqa_classifier": "option",
    "vcop_classifier": None, "nlvr2_classifier": None, "mpp_score": None,
}  # fmt: skip


class Loaded(NamedTuple):
    """What :func:`load_official` did: heads that kept their initial weights, and tensors of the file that were not used."""

    fresh: list[str]
    unused: list[str]


def load_official(model: AllInOne, weights: Mapping[str, Tensor], rank_from_match: bool = True) -> Loaded:
    """Load the backbone strictly and each head that both sides have.

    Temporal rows that the file lacks are zero, surplus ones are cut; positions of longer texts keep their initial values
    beyond what the file has (the official code then draws the whole table anew).

    Args:
        rank_from_match: a model that ranks, from a file that only matches, starts with the matching head's row for
            "match". The official fine-tuning re-creates that head after loading and so starts at random: False.

    Raises CheckpointError naming what is missing or of another shape.
    """
    named = named_tensors(weights)
    state = model.state_dict()
    _fit_tables(named, state, model)
    tasks = {HEADS[part] for name in named if (part := name.split(".")[0]) in HEADS}
    used = {name: value for name, value in named.items() if name in state or name.split(".")[0] not in HEADS}
    absent_heads = tuple(f"{part}." for part, task in HEADS.items() if task == "match" or task not in tasks)
    load_strictly(model, used, absent_heads)
    if rank_from_match and "match" in tasks and "rank" not in tasks:
        model.rank_like_match()
    return Loaded(sorted(state.keys() - used.keys()), sorted(named.keys() - used.keys()))


def load_backbone(model: AllInOne, weights: Mapping[str, Tensor]) -> None:
    """Initialise the visual half from timm's ViT or DeiT weights (DeiT files nest under ``model``); the rest stays.

    The position table is resized to the model's grid (bilinear, corners not aligned). Raises CheckpointError.
    """
    dropped = re.compile(r"head|pre_logits|fc_norm")
    named = {f"transformer.{name}": value for name, value in weights.items() if not dropped.match(name)}
    state = model.state_dict()
    key = "transformer.pos_embed"
    if key in named and named[key].shape != state[key].shape:
        visual = model.transformer
        named[key] = resample_abs_pos_embed(
            named[key], [visual.side] * 2, num_prefix_tokens=visual.specials, interpolation="bilinear", antialias=False
        )
    others = tuple({f"{name.split('.')[0]}." for name in state} - {"transformer."})
    load_strictly(model, named, (*others, "transformer.temporal_embed"))


def timm_weights(name: str, weights: str | None = None) -> dict[str, Tensor]:
    """The tensors of timm's model ``name``: from ``weights`` (a file or folder), else the local cache, else the hub.

    Raises WeightsUnavailable with the remedy.
    """
    path = find_weights(name, f"timm/{name}", weights, "module.backbone.weights")
    return read_tensors(tensor_file(path))


def named_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the released code; co-training's names and wrappers are translated."""
    named = {}
    for name, value in weights.items():
        name = re.sub(r"^(module\.|model\.)+", "", name)
        if name.startswith("teacher.") or name.endswith("position_ids"):
            continue
        name = re.sub(r"^student\.", "transformer.", name)
        name = re.sub(r"^vtm_score\.", "itm_score.", name)
        named[name] = value.float() if value.is_floating_point() else value
    return named


def _fit_tables(named: dict[str, Tensor], state: Mapping[str, Tensor], model: AllInOne) -> None:
    key = "transformer.temporal_embed"
    frames = state[key].shape[1]
    stored = named.get(key, state[key].new_zeros(1, 0, model.width))
    named[key] = F.pad(stored[:, :frames], (0, 0, 0, max(frames - stored.shape[1], 0)))
    key = "text_embeddings.position_embeddings.weight"
    if key in named and len(named[key]) != len(state[key]):
        overlap = min(len(named[key]), len(state[key]))
        named[key] = torch.cat([named[key][:overlap], state[key][overlap:]])
