"""The store of a search: Optuna's journal, one file that workers on several machines append to."""

from __future__ import annotations

from typing import Any

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


def make_sampler(name: str, seed: int, space: dict[str, Any]) -> Any:
    """The sampler of this name: "tpe", "random" or "grid" over the lists of values in ``space``."""
    import optuna.samplers

    if name == "grid":
        continuous = [key for key, distribution in space.items() if not hasattr(distribution, "choices")]
        if continuous:
            raise UserError(
                f"hydra.sweeper.sampler=grid needs a list of values for {', '.join(continuous)}, such as 1e-4,1e-3."
            )
        return optuna.samplers.GridSampler({key: list(each.choices) for key, each in space.items()}, seed=seed)
    return {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[name](seed=seed)
