"""Import and export of STRUCTURE's alignment maps (``checkpoint-epoch<n>.pth``: whole pickled modules, read as tensors).

Official names: ``alignment_image.*`` and ``alignment_text.*`` with ``linear_mapping`` (linear), ``mlp.0, mlp.2, ...`` or
``P, W1, W2, logit_alpha`` (ResLowRankHead). Widths and kind follow from names and shapes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector, LowRankProjector, ReLUProjector
from models.io import CheckpointError, load_strictly

_SIDES = {"vision_projector": "alignment_image", "text_projector": "alignment_text"}  # ours -> official
_LINEAR = {"": "linear_mapping."}
_LOW_RANK = {"direct.": "P.", "down.": "W1.", "up.": "W2.", "gate_logit": "logit_alpha"}
_RELU = {"": "mlp."}


def import_head(weights: dict[str, Tensor], head: AlignmentHead) -> AlignmentHead:
    """The importer of ``module=structure``; the fixed temperature is that of ``head``."""
    return head_from_official(weights, 1 / float(head.scale()))


def head_from_official(weights: dict[str, Tensor], temperature: float = 0.05, dropout: float = 0.1) -> AlignmentHead:
    """The head that ``weights`` belong to.

    Args:
        temperature: fixed, of the loss; not among the weights.
        dropout: of the low-rank branch, likewise.

    Raises CheckpointError for weights of something else.
    """
    sides = {
        ours: {k.removeprefix(f"{name}."): v.float() for k, v in weights.items() if k.startswith(f"{name}.")}
        for ours, name in _SIDES.items()
    }
    if not all(sides.values()):
        raise CheckpointError(
            f"these are not STRUCTURE's alignment maps: {' and '.join(_SIDES.values())} are needed, there are "
            f"{sorted(weights)[:4]} …"
        )
    image, text = (_describe(side) for side in sides.values())
    head = AlignmentHead(
        vision_dim=image[1],
        text_dim=text[1],
        embed_dim=image[2],
        projector=_factory(image[0], sides["vision_projector"], dropout),
        text_projector=_factory(text[0], sides["text_projector"], dropout),
        logit_scale_init=1 / temperature,
        norm=False,
        learn_scale=False,
    )
    for ours, side in sides.items():
        names = _names(getattr(head, ours))
        state = {_renamed(key, {official: mine for mine, official in names.items()}): value for key, value in side.items()}
        load_strictly(getattr(head, ours), state)
    return head


def to_official(head: AlignmentHead) -> dict[str, Tensor]:
    """The maps under the official names. Raises CheckpointError for a projector the official code lacks."""
    out: dict[str, Tensor] = {}
    for ours, official in _SIDES.items():
        projector = getattr(head, ours)
        names = _names(projector)
        out |= {f"{official}.{_renamed(key, names)}": value.clone() for key, value in projector.state_dict().items()}
    return out


def _describe(side: dict[str, Tensor]) -> tuple[type[nn.Module], int, int]:
    """Kind, input and output width."""
    for kind, first in (
        (LinearProjector, "linear_mapping.weight"),
        (LowRankProjector, "P.weight"),
        (ReLUProjector, "mlp.0.weight"),
    ):
        if first in side:
            return kind, side[first].shape[1], side[first].shape[0]
    raise CheckpointError(f"unknown alignment map with {sorted(side)}; known are linear, MLP and ResLowRankHead.")


def _factory(kind: type[nn.Module], side: dict[str, Tensor], dropout: float) -> partial:
    if kind is LowRankProjector:
        return partial(LowRankProjector, rank=len(side["W1.weight"]), dropout=dropout)
    if kind is ReLUProjector:
        return partial(ReLUProjector, layers=sum(key.endswith(".weight") for key in side))
    return partial(LinearProjector, init="torch")


def _names(projector: nn.Module) -> dict[str, str]:
    for kind, names in ((LinearProjector, _LINEAR), (LowRankProjector, _LOW_RANK), (ReLUProjector, _RELU)):
        if isinstance(projector, kind):
            return names
    raise CheckpointError(f"STRUCTURE's code has no counterpart of {type(projector).__name__}.")


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key[len(old) :]
    raise CheckpointError(f"unexpected entry '{key}' in an alignment map.")
