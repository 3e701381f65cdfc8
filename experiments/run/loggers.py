"""Where numbers go: ``metrics.csv`` in the run directory, always; Weights & Biases when configured."""

from __future__ import annotations

import csv
import logging
import netrc
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from experiments.config.instantiation import build
from experiments.evaluation.errors import read_table
from experiments.run.ranks import is_main_process
from models.io import explained

if TYPE_CHECKING:
    from experiments.run.directory import Run

log = logging.getLogger("run")
_WANDB_ARTIFACTS: dict[str, Path | None] = {}  # the checkpoint that is to be stored, by run_id
_WANDB_RUNS: dict[str, Any] = {}  # that are open, by run_id: one for this job and one for each variant it is compared with


class MetricsFile(Logger):
    """Appends ``step,metric,value`` rows, one for each metric of a step, so that a run that dies keeps all it logged.

    Args:
        folder: run directory.
        size: bytes of the file that belong to the checkpoint the run goes on from (0: it starts afresh); rows after them are
            cut off, since their steps are trained again.
    """

    def __init__(self, folder: Path, size: int = 0):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.last: tuple[int, set[str]] = (-1, set())  # step and metrics of the newest rows
        if is_main_process():
            with explained(self.path), self.path.open("a+b") as file:
                file.seek(0)
                whole = file.read(size).rpartition(b"\n")
                file.truncate(len(whole[0] + whole[1]))  # one step for the file system: a crash leaves all rows or these
                if not whole[1]:
                    file.write(b"step,metric,value\n")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is in the run directory already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = step or 0
        written = self.last[1] if step == self.last[0] else set()
        rows = [(step, name, repr(float(value))) for name, value in metrics.items() if name not in written | {"epoch"}]
        with explained(self.path), self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.last = step, written | metrics.keys()

    @rank_zero_only
    def sync(self) -> int:
        """Bring all rows to the disk; returns the size of the file in bytes, for the checkpoint that is about to be written."""
        with explained(self.path), self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """``metrics.csv`` as {metric: (steps, values)}. A torn last row is left out, and damaged ones with a warning."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    damaged = 0
    with Path(path).open(errors="replace") as file:
        next(file, None)  # the heading
        for line in file:
            try:
                step, name, value = line.split(",")
                row = int(step), float(value)
            except ValueError:
                damaged += 1
                continue
            if line.endswith("\n"):  # else the writer has been cut off, perhaps within the number
                steps, values = series.setdefault(name, ([], []))
                steps.append(row[0])
                values.append(row[1])
    if damaged:
        log.warning("%s: %d rows are damaged and left out", path, damaged)
    return series


def wandb_logger(
    folder: Path,
    name: str,
    config: dict,
    run_id: str,
    tags: Sequence[str] = (),
    project: str = "multimodal",
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    monitor: str | None = None,
    monitor_mode: Literal["min", "max"] = "max",
    checkpoints: bool = False,
    mode: Literal["auto", "online", "offline"] = "auto",
) -> Logger | None:
    """A W&B run of this job; offline without key or network, and None (with a warning) when W&B fails: a run never does.

    Args:
        run_id: of the W&B run; a run of ours that is resumed goes on with it.
        folder: run directory; offline data lies in ``<folder>/wandb`` for ``wandb sync``.
        tags: of the run: its recipe, family and kind of data.
        group: joins the jobs of a sweep; null: the run and the variants that it is compared with.
        job_type: the first stage that the run was asked for.
        monitor: the held-out metric whose best value the summary shows.
        monitor_mode: whether that is the largest or the smallest one.
        checkpoints: whether the best checkpoint becomes an artifact at the end.
        mode: 'auto' is online where a key and the network are at hand, offline elsewhere.
    """
    if not is_main_process():
        return None
    if mode == "auto":
        mode = "online" if _wandb_reachable() else "offline"
    group = group or (folder.parents[1] if folder.parent.name == "compare" else folder).name
    try:
        import wandb

        run = wandb.init(
            project=project, entity=entity, group=group, name=name, id=run_id, resume="allow", dir=str(folder), config=config,
            tags=list(tags), job_type=job_type, mode=mode, reinit="create_new", settings=wandb.Settings(init_timeout=30),
        )  # fmt: skip
        if monitor:
            run.define_metric(monitor, summary=monitor_mode, step_metric="trainer/global_step")
        if mode == "offline":
            log.info("W&B is offline; send this run later with: wandb sync %s", Path(run.dir).parent)
        _WANDB_RUNS[run_id] = run
        _WANDB_ARTIFACTS[run_id] = Path(folder) / "checkpoints" / "best" if checkpoints else None
        return WandbLogger(experiment=run)
    except Exception as error:  # W&B is a convenience; its failures must not cost a run
        log.warning("W&B logging is off: %s", error)
        return None


def tensorboard_logger(folder: Path, **facts: Any) -> Logger | None:
    """Event files in ``<folder>/tensorboard`` for TensorBoard; None (with a warning) where its package is missing.

    Args:
        folder: run directory.
        facts: what other loggers are told; the directory says it here.
    """
    if not is_main_process():
        return None
    try:
        return TensorBoardLogger(save_dir=folder, name="tensorboard", version="", log_graph=False)
    except ImportError as error:
        log.warning("TensorBoard logging is off: pip install tensorboard==2.21.0 (%s)", str(error).splitlines()[0])
        return None


def finish_wandb(succeeded: bool) -> None:
    """Close the W&B runs of this job and its variants with the right exit state, so that each job of a sweep has its own."""
    for run_id, run in _WANDB_RUNS.items():
        try:
            best = _WANDB_ARTIFACTS.get(run_id)
            if not succeeded:
                run.alert(title="run did not finish", text=f"{run.name}: see run.log and error.log in its directory.")
            elif best and best.is_dir():
                run.log_artifact(str(best), name=f"checkpoint-{run_id}", type="model")
            run.finish(exit_code=0 if succeeded else 1)
        except Exception as error:
            log.warning("W&B did not close its run: %s", error)
    _WANDB_RUNS.clear()


def log_wandb_results(run: Run, metrics: dict[str, float], figures: dict[str, Path], errors: dict[str, Path]) -> None:
    """Into this run's W&B run, where it logs to one: final metrics as its summary, figures as images, tables of errors.

    Args:
        errors: name to the file of a table; see :mod:`experiments.evaluation.errors`.
    """
    if run.record["id"] not in _WANDB_RUNS:
        configured(run)  # training was done in an earlier process
    wandb_run = _WANDB_RUNS.get(run.record["id"])
    if wandb_run is None:
        return
    wandb = sys.modules["wandb"]
    try:
        wandb_run.summary.update(metrics)
        wandb_run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})
        for name, path in errors.items():
            columns, rows = read_table(path)
            cells = [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row] for row in rows]
            wandb_run.log({f"errors/{name}": wandb.Table(columns=columns, data=cells)})
    except Exception as error:
        log.warning("W&B did not take the results: %s", error)


def configured(run: Run) -> list[Logger]:
    """What the group ``logger`` names, each a factory ``(folder, name, config, run_id, tags) -> logger or None``."""
    name, config = f"{run.record['experiment']}/{run.dir.name}", OmegaConf.to_container(run.cfg, resolve=True)
    factories = [build(node) for node in (run.cfg.logger or {}).values() if node]
    made = (factory(folder=run.dir, name=name, config=config, run_id=run.record["id"], tags=_tags()) for factory in factories)
    return [logger for logger in made if logger is not None]


def _tags() -> list[str]:
    """The recipe, the family and the kind of data of the command, for filters of a dashboard."""
    if not HydraConfig.initialized():
        return []
    choices = HydraConfig.get().runtime.choices
    names = [choices.get("experiment"), *(str(choices.get(group)).split("/")[0] for group in ("module", "datamodule"))]
    return list(dict.fromkeys(str(name) for name in names if name not in (None, "None")))


def _wandb_reachable() -> bool:
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc("api.wandb.ai")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or not has_key:
        return False
    try:
        socket.create_connection(("api.wandb.ai", 443), timeout=3).close()
        return True
    except OSError:
        return False


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
