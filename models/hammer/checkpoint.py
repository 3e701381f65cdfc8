"""Official checkpoints: HAMMER's own (``checkpoint_best.pth``) and ALBEF's pretrained one (``ALBEF_4M.pth``)."""

from __future__ import annotations

import re

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from models.hammer.model import TOWERS, Hammer
from models.io import CheckpointError, load_strictly

QUEUES = ("image_queue", "text_queue", "queue_ptr")
NEW_IN_HAMMER = (  # absent from ALBEF: these keep their initial values
    "text_encoder.classifier.",
    "text_encoder_m.classifier.",
    "itm_head.",
    "cls_head.",
    "bbox_head.",
    "cls_token_local",
    "norm_layer_aggr.",
    "norm_layer_it_cross_atten.",
    "aggregator.",
    "it_cross_attn.",
)


def load_official(model: Hammer, weights: dict[str, Tensor]) -> list[str]:
    """Load a HAMMER or ALBEF checkpoint into ``model``; returns what was not in it and therefore stays as it was.

    Positions are resized to the model's image size, also those of the momentum tower (the official code forgets it).
    Queues of another length are left as they are. Of an ALBEF checkpoint the masked-language head and its
    single-layer matching head are dropped. A HAMMER file without momentum towers and queues (cut down for inference) is
    fine: the towers are then copies of the online ones. Raises CheckpointError for anything else that differs.
    """
    if model.modality != "both":
        raise CheckpointError(f"official checkpoints are of the complete model, not of modality={model.modality}.")
    named, state = named_tensors(weights), model.state_dict()
    albef = "bbox_head.0.weight" not in named
    if albef:
        named = {k: v for k, v in named.items() if not re.match(r"text_encoder(_m)?\.cls\.|itm_head\.", k)}
    for tower in ("visual_encoder", "visual_encoder_m"):
        if (key := f"{tower}.pos_embed") in named and named[key].shape != state[key].shape:
            grid = model.visual_encoder.patch_embed.grid_size
            named[key] = resample_abs_pos_embed(named[key].float(), list(grid), antialias=False)
    if "image_queue" in named and named["image_queue"].shape != state["image_queue"].shape:
        named = {key: value for key, value in named.items() if key not in QUEUES}
    optional = tuple(f"{tower}_m." for tower in TOWERS) + QUEUES + (NEW_IN_HAMMER if albef else ())
    missing = load_strictly(model, named, optional)
    if not any(key.startswith("visual_encoder_m.") for key in named):
        with torch.no_grad():
            for average, online in model.momentum_pairs():
                average.copy_(online)
        missing = [key for key in missing if "_m." not in key]
    return missing


def named_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return {key: value for key, value in weights.items() if not key.endswith("embeddings.position_ids")}
