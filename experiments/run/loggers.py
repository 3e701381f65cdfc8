"""Where numbers go: ``metrics.csv`` in the run directory, always; Weights & Biases when configured."""

from __future__ import annotations

import csv
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger("run")


class MetricsFile(Logger):
    """Appends ``step,metric,value`` rows, so that a run that dies keeps all it logged and a resumed one goes on."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        rows = []
        if self.path.exists() and resume_step is not None:
            with self.path.open(newline="") as file:  # steps after the checkpoint will be trained again
                rows = [row for row in csv.reader(file) if row and row[0] != "step" and int(row[0]) <= resume_step]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([["step", "metric", "value"], *rows])

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
        with self.path.open("a", newline="") as file:
            rows = ((step or 0, name, repr(float(value))) for name, value in metrics.items() if name != "epoch")
            csv.writer(file).writerows(rows)


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """``metrics.csv`` as {metric: (steps, values)}."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            steps, values = series.setdefault(row["metric"], ([], []))
            steps.append(int(row["step"]))
            values.append(float(row["value"]))
    return series


def wandb_logger(
    folder: Path,
    name: str,
    config: dict,
    project: str = "multimodal",
    entity: str | None = None,
    group: str | None = None,
    mode: Literal["auto", "online", "offline"] = "auto",
) -> Logger | None:
    """A W&B run of this job; offline without key or network, and None (with a warning) when W&B fails: a run never does.

    Args:
        folder: run directory; offline data lies in ``<folder>/wandb`` for ``wandb sync``.
        mode: 'auto' is online where a key and the network are at hand, offline elsewhere.
    """
    if mode == "auto":
        mode = "online" if _wandb_reachable() else "offline"
    try:
        import wandb

        run = wandb.init(
            project=project, entity=entity, group=group, name=name, dir=str(folder), config=config, mode=mode,
            reinit="finish_previous", settings=wandb.Settings(init_timeout=30),
        )  # fmt: skip
        return WandbLogger(experiment=run)
    except Exception as error:  # W&B is a convenience; its failures must not cost a run
        log.warning("W&B logging is off: %s", error)
        return None


def finish_wandb(succeeded: bool) -> None:
    """Close the job's W&B run with the right exit state, so that each job of a sweep is a run of its own."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        try:
            sys.modules["wandb"].finish(exit_code=0 if succeeded else 1)
        except Exception as error:
            log.warning("W&B did not close its run: %s", error)


def log_wandb_pictures(pictures: dict[str, Path], metrics: dict[str, float]) -> None:
    """Final metrics into the summary and pictures as images, when a W&B run is open."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    try:
        wandb.run.summary.update(metrics)
        wandb.log({f"pictures/{name}": wandb.Image(str(path)) for name, path in pictures.items()})
    except Exception as error:
        log.warning("W&B did not take the pictures: %s", error)


def _wandb_reachable() -> bool:
    has_key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or not has_key:
        return False
    try:
        socket.create_connection(("api.wandb.ai", 443), timeout=3).close()
        return True
    except OSError:
        return False


def _netrc() -> str:
    path = Path.home() / ".netrc"
    return path.read_text() if path.is_file() else ""
