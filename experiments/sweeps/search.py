"""The parts of a search: its store (Optuna's journal, one file that workers on several machines append to), its samplers,
pruners and distributions.
"""

from __future__ import annotations

import itertools
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from models.errors import UserError

HINT = "hydra/sweeper=optuna needs Optuna: pip install optuna==5.0.0"


def open_storage(journal: str) -> Any:
    """The journal at a path, made where it is missing."""
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(HINT) from error
    return JournalStorage(JournalFileBackend(journal))


def open_study(journal: str, name: str) -> Any:
    """A search that is there already, with the pruner that it was begun with."""
    import optuna

    study = optuna.load_study(study_name=name, storage=open_storage(journal))
    study.pruner = make_pruner(study.user_attrs.get("pruner"))
    return study


def make_pruner(name: str | None) -> Any:
    """The pruner of this name: null, "median", "halving" (successive halving) or "hyperband"."""
    import optuna.pruners

    makers = {
        None: optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    return makers[name]()


def make_sampler(name: str, seed: int) -> Any:
    """The sampler of this name: "tpe" or "random"; a "grid" is drawn from trials that :func:`enqueue_grid` has made."""
    import optuna.samplers

    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def enqueue_grid(study: Any, space: dict[str, Any]) -> None:
    """Add a waiting trial for every combination of values that the study does not have yet."""
    continuous = [key for key, distribution in space.items() if not hasattr(distribution, "choices")]
    if continuous:
        raise UserError(f"hydra.sweeper.sampler=grid needs values such as 1e-4,1e-3 for {', '.join(continuous)}.")
    for values in itertools.product(*(distribution.choices for distribution in space.values())):
        study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)


def distribution_of(override: Override) -> Any:
    """Optuna's distribution for the values of an override."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    logarithmic = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        if isinstance(value.start, int) and isinstance(value.end, int) and "float" not in value.tags:
            return IntDistribution(value.start, value.end, log=logarithmic)
        return FloatDistribution(float(value.start), float(value.end), log=logarithmic)
    if isinstance(value, (ChoiceSweep, RangeSweep)):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise UserError(f"hydra/sweeper=optuna cannot search {override.input_line}.")
