"""``hydra/sweeper=optuna``: a search over overrides that persists, with any launcher.

The official plugin for Hydra pins Optuna 2 and keeps nothing where a search is interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from experiments.config.overrides import creating
from experiments.sweeps.jobs import Job, job_of
from experiments.sweeps.search import HINT, distribution_of, enqueue_grid, make_pruner, make_sampler, open_storage
from models.errors import UserError

STUDY = "search"


class OptunaSearch(Sweeper):
    """Searches over the overrides that have several values or an interval, and optimises metrics of ``result.json``.

    ``optimizer.lr=interval(1e-5,1e-2)``, with ``tag(log, interval(...))`` on a logarithmic scale, ``a,b,c`` or ``range(1,9)``.
    The search lives in a journal in the sweep's folder. The same command continues it, also in several processes or on several
    machines that share the folder; interrupted trials go on first.

    Args:
        trials: number of trials in all, over all workers and starts.
        direction: whether the metric that ``optimize`` names should be large or small.
        objectives: several metrics with their directions, in place of ``optimize``; the best trials are then those that no
            other trial beats in all of them.
        sampler: "tpe", "random" or "grid".
        pruner: null, "median", "halving" (successive halving) or "hyperband", by the metric that decides on the best
            checkpoint, at each validation.
        seed: of the sampler.
        parallel: trials at once with a launcher that takes a batch; ``local_pool`` asks for a trial whenever a place is free.
        params: what is searched, in place of or beside the command line.
    """

    def __init__(
        self,
        trials: int = 20,
        direction: Literal["maximize", "minimize"] = "maximize",
        objectives: Mapping[str, Literal["maximize", "minimize"]] | None = None,
        sampler: Literal["tpe", "random", "grid"] = "tpe",
        pruner: Literal["median", "halving", "hyperband"] | None = None,
        seed: int = 0,
        parallel: int = 1,
        params: Mapping[str, str] | None = None,
    ):
        self.trials, self.direction, self.objectives = trials, direction, dict(objectives or {})
        self.sampler, self.pruner, self.seed, self.parallel, self.params = sampler, pruner, seed, parallel, dict(params or {})
        if pruner and len(self.objectives) > 1:
            raise UserError("hydra.sweeper.pruner works with one objective; Optuna cannot prune by several.")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are as many as asked for, then print the best with its command."""
        try:
            import optuna
        except ImportError as error:
            raise UserError(HINT) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.fixed, self.space = self._parse(arguments)
        if not self.space:
            raise UserError("hydra/sweeper=optuna: no override has several values, so there is nothing to search.")
        if not self.objectives:
            if not self.config.optimize:
                raise UserError("hydra/sweeper=optuna needs optimize=<metric of result.json>.")
            self.objectives = {self.config.optimize: self.direction}
        folder = Path(str(self.config.hydra.sweep.dir)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = str(folder / "search.journal")
        storage = open_storage(self.journal)
        self.study = optuna.create_study(
            storage=storage, study_name=STUDY, directions=list(self.objectives.values()), load_if_exists=True,
            pruner=make_pruner(self.pruner),
        )  # fmt: skip
        if self.study.user_attrs.get("objectives", self.objectives) != self.objectives:
            raise UserError(f"{folder} holds a search for {self.study.user_attrs['objectives']}. Choose another sweep_name.")
        self.study.set_user_attr("objectives", self.objectives)
        self.study.set_user_attr("pruner", self.pruner)
        # Workers and later starts draw other trials than those that are there.
        self.study.sampler = make_sampler(self.sampler, self.seed + len(self.study.trials))
        if self.sampler == "grid":
            enqueue_grid(self.study, self.space)
        self.going: dict[int, Any] = {}  # number of a job -> its trial
        trials = self._next_trials()
        if hasattr(self.launcher, "stream"):
            self.launcher.stream(lambda: next(trials, None), self._tell, self.trials)
        else:
            while batch := [trial for _, trial in zip(range(self.parallel), trials, strict=False)]:
                returns = self.launcher.launch([overrides for _, overrides in batch], initial_job_idx=batch[0][0])
                for (index, _), result in zip(batch, returns, strict=True):
                    self._tell(index, result)
        self._report(folder)

    def _parse(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The overrides that every trial has, and the distributions of those that are searched."""
        texts = [*creating(f"{key}={value}" for key, value in self.params.items()), *arguments]
        fixed, space = [], {}
        for text, override in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
            if override.is_sweep_override():
                space[override.get_key_element()] = distribution_of(override)
            else:
                fixed.append(text)
        return fixed, space

    def _next_trials(self) -> Iterator[tuple[int, list[str]]]:
        """Numbers and overrides of the trials of this worker: interrupted ones first, then new ones."""
        import optuna

        from experiments.run.directory import holder_of

        state = optuna.trial.TrialState
        for frozen in self.study.get_trials(states=(state.RUNNING,)):
            overrides = frozen.user_attrs.get("overrides")
            if overrides and holder_of(self._job(frozen.number, overrides).folder) is None:
                yield self._begin(optuna.trial.Trial(self.study, frozen._trial_id), overrides)
        while True:
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            waiting = states.count(state.WAITING)
            if len(states) - waiting >= self.trials or (self.sampler == "grid" and not waiting):
                return
            trial = self.study.ask(self.space)
            if (equal := self._equal_to(trial)) is not None:  # two jobs of one directory; samplers leave failed trials out
                trial.set_user_attr("repeats", equal)
                self.study.tell(trial, state=state.FAIL)
                continue
            overrides = [*self.fixed, *(f"{key}={value}" for key, value in trial.params.items())]
            trial.set_user_attr("overrides", overrides)
            yield self._begin(trial, overrides)

    def _equal_to(self, trial: Any) -> int | None:
        """The number of an earlier trial with the same values that is still running, in this worker or another."""
        import optuna

        running = self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        return next((t.number for t in running if t.number < trial.number and t.params == trial.params), None)

    def _begin(self, trial: Any, overrides: list[str]) -> tuple[int, list[str]]:
        from experiments.sweeps.pruning import TrialFile

        folder = self._job(trial.number, overrides).folder
        TrialFile(self.journal, STUDY, trial._trial_id, self.pruner is not None).write(folder)
        self.going[trial.number] = trial
        return trial.number, overrides

    def _job(self, number: int, overrides: list[str]) -> Job:
        return job_of(self.context, self.config, overrides, number)

    def _tell(self, index: int, result: JobReturn) -> None:
        """What became of a trial: its values, pruned, or failed (also where a value is not a number)."""
        import optuna

        trial = self.going.pop(index)
        job = self._job(index, trial.user_attrs["overrides"])
        status = job.record().get("status")
        if status == "pruned":
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
        file = job.folder / "result.json"
        metrics = json.loads(file.read_text())["metrics"] if result.status == JobStatus.COMPLETED and file.is_file() else {}
        values = [metrics.get(name, math.nan) for name in self.objectives]
        if any(value is None or math.isnan(value) for value in values):
            trial.set_user_attr("failed", str(result._return_value) if not metrics else f"no number: {values}")
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def _report(self, folder: Path) -> None:
        import optuna

        trials = [trial for trial in self.study.trials if trial.state.name != "WAITING"]
        states = ["repeated" if "repeats" in trial.user_attrs else trial.state.name.lower() for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        print(f"search: {len(states)} trials ({counts}) in {folder}")
        complete = self.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        if not complete:
            return
        for trial in self.study.best_trials:
            values = ", ".join(f"{name}={value:.4g}" for name, value in zip(self.objectives, trial.values, strict=True))
            print(f"best: trial {trial.number}, {values}: {' '.join(f'{k}={v}' for k, v in trial.params.items())}")
        from experiments.sweeps.search_figures import draw

        draw(self.study, list(self.objectives), folder)
