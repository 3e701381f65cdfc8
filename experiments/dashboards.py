"""Builds W&B workspaces: ``python -m experiments.dashboards entity=<name> [project=<name>] [family=<name>] [sweep=<name>]``.

Without ``family`` and ``sweep`` it builds one view over all runs and one for each family of ``conf/module``. ``show=true``
prints the definitions and sends nothing.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF
from models.errors import UserError

HINT = "dashboards need wandb-workspaces: pip install wandb-workspaces==0.4.13"


def families() -> list[str]:
    """The families: folders of ``conf/module``."""
    return sorted(folder.name for folder in (CONF / "module").iterdir() if folder.is_dir())


def workspace(entity: str, project: str = "multimodal", family: str | None = None, sweep: str | None = None) -> Any:
    """The view of all runs, of a family's, or of the jobs of a sweep, ready to be saved.

    Args:
        entity: user or team.
        project: W&B project that the runs log to.
        family: one of :func:`families`; its runs carry it as a tag.
        sweep: name of a sweep, which is the group of its jobs.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(HINT) from error
    if family and family not in families():
        raise UserError(f"family={family} is none of {', '.join(families())}.")
    monitors, objectives, swept = _metrics(family)

    def lines(title: str, pattern: str) -> Any:
        return panels.LinePlot(title=title, x="Step", metric_regex=pattern)

    sections = {
        "Held-out metrics": [*(panels.LinePlot(title=name, x="Step", y=[name]) for name in monitors), lines("all", "^val/.*")],
        "Results": [panels.BarPlot(title=name, metrics=[name]) for name in objectives],
        "Losses": [lines("training", "^train/loss.*"), lines("held out", "^val/loss.*")],
        "Speed": [lines("learning rate", "^lr-.*")],
    }
    if sweep:
        metric = next(iter([*objectives, *monitors]), "val/loss")
        columns = [panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key)) for key in swept]
        columns.append(panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric(metric)))
        plots = [panels.ParallelCoordinatesPlot(columns=columns), panels.ParameterImportancePlot(with_respect_to=metric)]
        sections = {"Sweep": [*plots, panels.RunComparer(diff_only="split")]} | sections
    conditions = [f"Tags in ['{family}']"] * bool(family) + [f"Group == '{sweep}'"] * bool(sweep)
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=" ".join(filter(None, [family, sweep])) or "all runs",
        sections=[workspaces.Section(name=name, panels=plots, is_open=True) for name, plots in sections.items() if plots],
        auto_generate_panels=True,  # of everything else that the runs log, the figures among it
        runset_settings=workspaces.RunsetSettings(filters=" and ".join(conditions)),
    )


def _metrics(family: str | None) -> tuple[list[str], list[str], list[str]]:
    """What decides on the best checkpoint in the recipes of a family, what its sweeps optimise, and the keys that they vary."""
    monitors = {monitor for of_recipe, monitor in _monitors() if family in (None, of_recipe)}
    objectives, keys = set(), {"seed", "optimizer.lr"}
    for sweep in sorted((CONF / "sweep").glob(f"{family or '*'}/*.yaml")):
        content = OmegaConf.load(sweep)
        objectives.add(OmegaConf.select(content, "optimize"))
        objectives.update(OmegaConf.select(content, "hydra.callbacks.sweep_table.metrics") or [])
        keys.update(OmegaConf.select(content, "hydra.sweeper.params") or {})
    return sorted(monitors - {None}), sorted(objectives - {None}), sorted(keys)


@cache
def _monitors() -> list[tuple[str, str | None]]:
    """Family of each recipe that has no paper's data, and the metric that decides on its best checkpoint."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [
            compose("config", [f"experiment={recipe.stem}"], return_hydra_config=True)
            for recipe in sorted((CONF / "experiment").glob("*.yaml"))
        ]
    families_of = [str(config.hydra.runtime.choices.module).split("/")[0] for config in configs]
    return list(zip(families_of, (OmegaConf.select(each, "callbacks.checkpoints.monitor") for each in configs), strict=True))


def main(arguments: list[str]) -> None:
    """Save the views and print their addresses, or print their definitions with ``show=true``."""
    settings = dict(argument.partition("=")[::2] for argument in arguments)
    show = settings.pop("show", "false") == "true"
    if unknown := settings.keys() - {"entity", "project", "family", "sweep"}:
        raise UserError(f"unknown settings {', '.join(sorted(unknown))}; there are entity, project, family, sweep and show.")
    if "entity" not in settings:
        raise UserError("give the user or team that owns the project: entity=<name>.")
    chosen = (
        [settings] if {"family", "sweep"} & settings.keys() else [settings, *({**settings, "family": f} for f in families())]
    )
    for each in chosen:
        view = workspace(**each)
        if show:
            print(view._to_model().model_dump_json(indent=1, exclude_none=True))
        else:
            view.save()
            print(view.url)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"Error: {error}")
