"""``hydra/sweeper=grid``: every combination of the values, with keys that are created as those of the command line are."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from experiments.config.overrides import creating


class Grid(BasicSweeper):
    """Hydra's own sweeper, whose ``hydra.sweeper.params`` may name any argument of a constructor, without ``++``."""

    def _parse_config(self) -> list[str]:
        return creating(super()._parse_config())
