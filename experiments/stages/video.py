"""Stage ``video``: a film of the trained method at work, by the function that the group ``video`` names."""

from __future__ import annotations

from typing import Any

from experiments.config.instantiation import build
from experiments.run.directory import Run
from models.errors import UserError


def video(run: Run) -> dict[str, Any]:
    """Call the recipe's ``video`` function with the run. Raises UserError for a recipe that has none."""
    if not run.cfg.get("video"):
        raise UserError("stages: this recipe has nothing to film. Choose what to with video=<name> (conf/video).")
    return build(run.cfg.video)(run)
