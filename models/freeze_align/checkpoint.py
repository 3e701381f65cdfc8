"""Import and export of freeze-align's training checkpoints (``checkpoint_<epoch>.pth``, entry ``model``).

Official names: ``local_vision_proj``, ``cls_vision_proj``, ``local_text_proj`` and ``text_proj`` (each ``patch``, ``mlp``,
``linear`` or absent, the identity) and ``temp``. Kinds and widths follow from the keys and shapes. The redundant copies of
the public encoders, ``visual_encoder.*`` and ``text_encoder.*``, are left aside.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from models.alignment.projectors import LinearProjector, ResidualMLPProjector, TokenProjector
from models.freeze_align.head import TokenAlignmentHead
from models.io import CheckpointError, load_strictly

_SLOTS = {
    "local_vision": "local_vision_proj.",
    "cls_vision": "cls_vision_proj.",
    "local_text": "local_text_proj.",
    "text": "text_proj.",
}
# ours -> official, within a slot
_TOKEN = {
    "norm.": "0.",
    "linear.": "2.linear_projection.0.",
    "up.": "2.non_linear_projection.0.",
    "down.": "2.non_linear_projection.2.",
}
_MLP = {"projection.": "projection.", "down.": "fc.", "norm.": "layer_norm."}
_KINDS: dict[type[nn.Module], dict[str, str]] = {TokenProjector: _TOKEN, ResidualMLPProjector: _MLP, LinearProjector: {"": ""}}


def import_head(weights: dict[str, Tensor], head: TokenAlignmentHead) -> TokenAlignmentHead:
    """The importer of ``module=freeze_align``; the poolings are those of ``head``."""
    return head_from_official(weights, head.vision_pooling, head.text_pooling)


def head_from_official(
    weights: dict[str, Tensor],
    vision_pooling: Literal["mean", "max"] = "mean",
    text_pooling: Literal["mean", "pooled"] = "mean",
) -> TokenAlignmentHead:
    """The head that ``weights`` belong to; the two poolings leave no trace in them and stand in the checkpoint's config.

    Raises CheckpointError for weights of something else.
    """
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    weights = {k: v.float() for k, v in weights.items() if not k.startswith(("visual_encoder.", "text_encoder."))}
    slots = {name: {k.removeprefix(p): v for k, v in weights.items() if k.startswith(p)} for name, p in _SLOTS.items()}
    known = 1 + sum(map(len, slots.values()))
    if "temp" not in weights or known != len(weights) or known == 1:
        raise CheckpointError(
            f"these are not the projectors of freeze-align: of {len(weights)} tensors {known - 1} belong to a projector, and "
            f"'temp' is {'there' if 'temp' in weights else 'missing'}. Tensors: {sorted(weights)[:4]} …"
        )
    kinds: dict[str, Any] = {name: _kind(slot, _SLOTS[name]) if slot else None for name, slot in slots.items()}
    shapes = {name: _widths(kinds[name], slot) if slot else (None, None) for name, slot in slots.items()}
    embed_dim = next(out for _, out in shapes.values() if out)
    head = TokenAlignmentHead(
        vision_dim=shapes["local_vision"][0] or shapes["cls_vision"][0] or embed_dim,
        text_dim=shapes["local_text"][0] or shapes["text"][0] or embed_dim,
        embed_dim=embed_dim,
        vision_pooling=vision_pooling,
        text_pooling=text_pooling,
        **kinds,
    )
    state = {"temperature": weights["temp"].reshape(())}
    for name, slot in slots.items():
        for ours, official in _KINDS[kinds[name]].items() if slot else ():
            state |= {f"{name}.{ours}{part}": slot[f"{official}{part}"] for part in ("weight", "bias")}
    load_strictly(head, state)
    return head


def to_official(head: TokenAlignmentHead) -> dict[str, Tensor]:
    """The head's weights under the official names. Raises CheckpointError for a projector the official code lacks."""
    out = {"temp": head.temperature.detach().clone()}
    for name, prefix in _SLOTS.items():
        projector = getattr(head, name)
        if projector is None:
            continue
        if type(projector) not in _KINDS:
            raise CheckpointError(f"freeze-align's code has no counterpart of {type(projector).__name__}.")
        state = projector.state_dict()
        for ours, official in _KINDS[type(projector)].items():
            out |= {f"{prefix}{official}{part}": state[f"{ours}{part}"].clone() for part in ("weight", "bias")}
    return out


def _kind(slot: dict[str, Tensor], prefix: str) -> type[nn.Module]:
    for kind, names in _KINDS.items():
        if slot.keys() == {f"{official}{part}" for official in names.values() for part in ("weight", "bias")}:
            return kind
    raise CheckpointError(f"unknown projector {prefix[:-1]} with {sorted(slot)}; known are patch, mlp and linear.")


def _widths(kind: type[nn.Module], slot: dict[str, Tensor]) -> tuple[int, int]:
    first = {TokenProjector: "2.linear_projection.0.weight", ResidualMLPProjector: "projection.weight"}.get(kind, "weight")
    out_dim, in_dim = slot[first].shape
    return in_dim, out_dim
