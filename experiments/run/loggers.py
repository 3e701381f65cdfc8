"""Where numbers go: ``metrics.csv`` in the run directory, always; Weights & Biases when configured."""

from __future__ import annotations

import csv
import logging
import netrc
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from experiments.config.instantiation import build
from experiments.run.ranks import is_main_process
from models.io import explained

if TYPE_CHECKING:
    from experiments.run.directory import Run

log = logging.getLogger("run")
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
    project: str = "multimodal",
    entity: str | None = None,
    group: str | None = None,
    mode: Literal["auto", "online", "offline"] = "auto",
) -> Logger | None:
    """A W&B run of this job; offline without key or network, and None (with a warning) when W&B fails: a run never does.

    Args:
        run_id: of the W&B run; a run of ours that is resumed goes on with it.
        folder: run directory; offline data lies in ``<folder>/wandb`` for ``wandb sync``.
        mode: 'auto' is online where a key and the network are at hand, offline elsewhere.
    """
    if not is_main_process():
        return None
    if mode == "auto":
        mode = "online" if _wandb_reachable() else "offline"
    try:
        import wandb

        run = wandb.init(
            project=project, entity=entity, group=group, name=name, id=run_id, resume="allow", dir=str(folder), config=config,
            mode=mode, reinit="create_new", settings=wandb.Settings(init_timeout=30),
        )  # fmt: skip
        _WANDB_RUNS[run_id] = run
        return WandbLogger(experiment=run)
    except Exception as error:  # W&B is a convenience; its failures must not cost a run
        log.warning("W&B logging is off: %s", error)
        return None


def finish_wandb(succeeded: bool) -> None:
    """Close the W&B runs of this job and its variants with the right exit state, so that each job of a sweep has its own."""
    for run in _WANDB_RUNS.values():
        try:
            run.finish(exit_code=0 if succeeded else 1)
        except Exception as error:
            log.warning("W&B did not close its run: %s", error)
    _WANDB_RUNS.clear()


def log_wandb_figures(run: Run, figures: dict[str, Path], metrics: dict[str, float]) -> None:
    """Final metrics into the summary and figures as images of this run's W&B run; nothing where it logs to none."""
    if run.record["id"] not in _WANDB_RUNS:
        configured(run)  # training was done in an earlier process
    wandb_run = _WANDB_RUNS.get(run.record["id"])
    if wandb_run is None:
        return
    try:
        wandb_run.summary.update(metrics)
        wandb_run.log({f"figures/{name}": sys.modules["wandb"].Image(str(path)) for name, path in figures.items()})
    except Exception as error:
        log.warning("W&B did not take the figures: %s", error)


def configured(run: Run) -> list[Logger]:
    """The loggers that the group ``logger`` names, each a factory ``(folder, name, config, run_id) -> logger or None``."""
    name, config = f"{run.record['experiment']}/{run.dir.name}", OmegaConf.to_container(run.cfg, resolve=True)
    factories = [build(node) for node in (run.cfg.logger or {}).values() if node]
    made = (factory(folder=run.dir, name=name, config=config, run_id=run.record["id"]) for factory in factories)
    return [logger for logger in made if logger is not None]


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
