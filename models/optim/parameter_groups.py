"""Which parameters decay: optimiser groups by name and shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


def split_by_decay(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    spare: Sequence[str] = ("bn", "ln", "bias", "logit_scale"),
    decay_anyway: Sequence[str] = (),
) -> list[dict]:
    """Two groups: the optimiser's weight decay, and none for vectors, scalars and names containing a word of ``spare``.

    The default words are those of open_clip and SAIL's AdamW option. Frozen parameters are left out.
    Names containing a word of ``decay_anyway`` decay whatever their shape (freeze-align's temperature).
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            spares = parameter.ndim < 2 or any(word in name for word in spare)
            forced = any(word in name for word in decay_anyway)
            (spared if spares and not forced else decayed).append(parameter)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
