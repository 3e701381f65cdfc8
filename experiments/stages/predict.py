"""Stage ``predict``: the trained method on your own inputs, by the function that the group ``predict`` names."""

from __future__ import annotations

from typing import Any

from experiments.config.instantiation import build
from experiments.run.directory import Run


def predict(run: Run) -> dict[str, Any]:
    """Call the recipe's ``predict`` function with the run; its facts are what it returns."""
    return build(run.cfg.predict)(run)
