"""Stage ``predict``: the trained method on your own inputs, by the function that the group ``predict`` names."""

from __future__ import annotations

from experiments.config.instantiation import build
from experiments.run.directory import Run
from experiments.stages import Facts, stage
from models.errors import UserError


@stage(repeat=True, needs_weights=True)
def predict(run: Run) -> Facts:
    """Call the recipe's ``predict`` function with the run; its facts are what it returns.

    Raises:
        UserError: the recipe names no such function.
    """
    if not run.cfg.predict:
        raise UserError("stages: this recipe predicts nothing. Choose what to predict with predict=<name> (conf/predict).")
    return build(run.cfg.predict)(run)
