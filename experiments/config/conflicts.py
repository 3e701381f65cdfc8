"""What cannot work together, found before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datamodules.base import BaseDataModule
    from lightning_modules.base import BaseModule


def batch_key_conflicts(module: BaseModule, datamodule: BaseDataModule) -> list[str]:
    """The problems of training ``module`` on the batches of ``datamodule``; empty where every needed key is provided.

    A datamodule whose ``provides`` is empty does not say what its batches hold, and is not checked.
    """
    missing = [key for key in module.needs if key not in datamodule.provides]
    if not missing or not datamodule.provides:
        return []
    return [
        f"{type(module).__name__} needs {missing} in every batch, and {type(datamodule).__name__} provides "
        f"{sorted(datamodule.provides)}. Choose a datamodule of the kind that the module is for, or other tasks."
    ]
