"""The stages of a run: plain functions ``(run) -> facts``, named in ``conf/pipeline/*.yaml`` with their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]


def stage(
    every_rank: bool = False, repeat: bool = False, needs_weights: bool = False, gives_weights: bool = False
) -> Callable[[Callable], Callable]:
    """Marks a stage function.

    Args:
        every_rank: all processes of a distributed run take part; without it the main process works alone.
        repeat: runs again after a stage that was not done, and where it is asked for alone.
        needs_weights: works with trained weights, from an earlier stage or from ``checkpoint``.
        gives_weights: leaves trained weights in the run directory.
    """

    def mark(function: Any) -> Callable:
        function.every_rank, function.repeat = every_rank, repeat
        function.needs_weights, function.gives_weights = needs_weights, gives_weights
        return function

    return mark
