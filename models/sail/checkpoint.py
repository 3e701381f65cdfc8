"""Import and export of SAIL's official heads (``le723z/sail`` and the training code's ``epoch_<n>.pt``).

Official names: ``{vision,text}_layer_norm``, ``{vision,text}_mapping_network`` with ``f1, f2, g`` (star), ``proj.0,
proj.2`` (mlp), ``weight, bias`` (linear) or ``layers.{0..12}`` (ShareLock), ``logit_scale`` (log) and ``logit_bias``.
Widths and the kind of projector follow from the shapes; released files carry no configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector, LinearProjector, MLPProjector
from models.io import CheckpointError, load_strictly
from models.sail.sharelock import ShareLockHead

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|model\.(?=vlhead\.|_orig_mod\.)|vlhead\.)+")
_LAYERS = {"g": "down", "proj.0": "up", "proj.2": "down"}  # official layer of a mapping network -> ours
_SHARELOCK_NAMES = {"text_projector.": "text_mapping_network.layers.", "text_norm.": "text_layer_norm."}  # ours -> official


def head_from_official(weights: dict[str, Tensor]) -> AlignmentHead | ShareLockHead:
    """Build the head that ``weights`` (official names, optionally prefixed) belong to and load it strictly.

    Raises CheckpointError naming missing and unexpected keys when the file is of another architecture. A file of the
    full model may carry the encoders too: everything outside ``vlhead.`` is then left aside.
    """
    if any(".vlhead." in f".{key}" for key in weights):
        weights = {key: value for key, value in weights.items() if ".vlhead." in f".{key}"}
    weights = {_PREFIX.sub("", key): value.float() if value.is_floating_point() else value for key, value in weights.items()}
    try:
        head: AlignmentHead | ShareLockHead
        if "text_mapping_network.layers.0.weight" in weights:
            state = {_rename(k, _SHARELOCK_NAMES, back=True): v for k, v in weights.items()}
            hidden, text_dim = weights["text_mapping_network.layers.0.weight"].shape
            head = ShareLockHead(weights["text_mapping_network.layers.12.weight"].shape[0], text_dim, hidden)
        else:
            state, head = _from_official(weights), _aligned(weights)
    except KeyError as error:
        raise CheckpointError(
            f"these are not the weights of a SAIL head: {error} is missing. There are {len(weights)} tensors, "
            f"e.g. {sorted(weights)[:4]}."
        ) from None
    load_strictly(head, state)
    return head


def import_head(weights: dict[str, Tensor], head: AlignmentHead) -> AlignmentHead | ShareLockHead:
    """The importer of ``module=sail``; what ``head`` is built like follows from the weights alone."""
    return head_from_official(weights)


def _aligned(weights: dict[str, Tensor]) -> AlignmentHead:
    vision_dim = weights["vision_layer_norm.weight"].numel()
    has_text = any(key.startswith("text_") for key in weights)  # a head for a vision tower alone (LLaVA) has none
    projector, embed_dim = _projector(weights, "vision")
    return AlignmentHead(
        vision_dim=vision_dim,
        text_dim=weights["text_layer_norm.weight"].numel() if has_text else None,
        embed_dim=embed_dim,
        projector=projector,
        text_projector=_projector(weights, "text")[0] if has_text else None,
    )


def to_official(head: AlignmentHead | ShareLockHead) -> dict[str, Tensor]:
    """The head's weights under the official names, ready for the official code.

    Raises CheckpointError for a projector the official code does not know.
    """
    if isinstance(head, ShareLockHead):
        return {_rename(key, _SHARELOCK_NAMES): value.clone() for key, value in head.state_dict().items()}
    out = {"logit_scale": head.logit_scale.detach(), "logit_bias": head.logit_bias.detach()}
    for modality in ("vision", "text") if hasattr(head, "text_norm") else ("vision",):
        norm, projector = getattr(head, f"{modality}_norm"), getattr(head, f"{modality}_projector")
        out |= {f"{modality}_layer_norm.{k}": v for k, v in norm.state_dict().items()}
        prefix = f"{modality}_mapping_network."
        if isinstance(projector, GatedProjector):
            for kind in ("weight", "bias"):
                gate, value = getattr(projector.gate_and_value, kind).detach().chunk(2)
                out |= {f"{prefix}f1.{kind}": gate, f"{prefix}f2.{kind}": value}
                out[f"{prefix}g.{kind}"] = getattr(projector.down, kind).detach()
        elif isinstance(projector, MLPProjector):
            out |= {f"{prefix}proj.0.{k}": v for k, v in projector.up.state_dict().items()}
            out |= {f"{prefix}proj.2.{k}": v for k, v in projector.down.state_dict().items()}
        elif isinstance(projector, LinearProjector):
            out |= {f"{prefix}{k}": v for k, v in projector.state_dict().items()}
        else:
            raise CheckpointError(f"SAIL's code has no counterpart of {type(projector).__name__}.")
    return {key: value.clone() for key, value in out.items()}


def _projector(weights: dict[str, Tensor], modality: str) -> tuple[Callable[..., nn.Module], int]:
    """The kind of projector with its factor, and the width of its output."""
    prefix = f"{modality}_mapping_network."
    if prefix + "g.weight" in weights:
        embed_dim, hidden = weights[prefix + "g.weight"].shape
        return partial(GatedProjector, width_factor=hidden // weights[f"{modality}_layer_norm.weight"].numel()), embed_dim
    if prefix + "proj.2.weight" in weights:
        embed_dim, _ = weights[prefix + "proj.2.weight"].shape
        hidden, width = weights[prefix + "proj.0.weight"].shape
        return partial(MLPProjector, hidden_factor=hidden // width), embed_dim
    if prefix + "weight" in weights:
        return LinearProjector, weights[prefix + "weight"].shape[0]
    names = sorted(key for key in weights if key.startswith(prefix))
    raise CheckpointError(f"unknown {modality} projector in this SAIL head; it has {names or 'no such keys'}.")


def _from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in weights.items():
        match = re.fullmatch(r"(vision|text)_mapping_network\.(.+)", key)
        if not match:
            out[key.replace("_layer_norm.", "_norm.")] = value
            continue
        modality, rest = match.groups()
        layer, _, kind = rest.rpartition(".")
        name = f"{_LAYERS[layer]}.{kind}" if layer in _LAYERS else rest
        if rest.startswith("f2.") and f"{modality}_mapping_network.f1.{rest[3:]}" in weights:
            continue  # joined with f1 below
        if rest.startswith("f1.") and f"{modality}_mapping_network.f2.{rest[3:]}" in weights:
            pair = (value, weights[f"{modality}_mapping_network.f2.{rest[3:]}"])
            name, value = f"gate_and_value.{rest[3:]}", torch.cat(pair)
        out[f"{modality}_projector.{name}"] = value
    return out


def _rename(key: str, names: dict[str, str], back: bool = False) -> str:
    for ours, official in names.items():
        key = key.replace(official, ours) if back else key.replace(ours, official)
    return key
