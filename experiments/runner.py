"""Runs the stages of one run in order, then hands the number that ``optimize`` names back to the sweeper."""

from __future__ import annotations

import inspect
import json
import logging
import sys
import traceback
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.config import validation
from experiments.config.signatures import is_ours
from experiments.run import interruption, loggers
from experiments.run.directory import Run, open_run
from experiments.stages import run_stages
from models.errors import UserError

log = logging.getLogger("run")


def run(cfg: DictConfig) -> float | None:
    """One run, front to back. Returns the metric named by ``optimize`` (None without one)."""
    check_imported(cfg)
    log.handlers.clear()
    _log_to(logging.StreamHandler(sys.stderr))
    current = open_run(cfg)
    _log_to(logging.FileHandler(current.dir / "run.log"))
    log.info("%s in %s", current.record["experiment"], current.dir)
    with interruption.listening():
        try:
            if not run_stages(current):
                return None  # the main process goes on alone
        except interruption.Interrupted:
            current.set_status("interrupted")
            loggers.finish_wandb(succeeded=False)
            raise
        except BaseException as error:
            current.set_status("failed")
            (current.dir / "error.log").write_text("".join(traceback.format_exception(error)))
            loggers.finish_wandb(succeeded=False)
            if isinstance(error, UserError):
                raise
            log.error("failed; the traceback is in %s", current.dir / "error.log")
            raise
    current.set_status("finished")
    loggers.finish_wandb(succeeded=True)
    return _objective(current)


def check_imported(cfg: DictConfig) -> None:
    """What needs the libraries imported: third-party arguments, types of parts, and rules across parts. Before any data.

    A target may have a static method ``conflicts(config) -> list of problems`` for what it cannot be combined with.
    """
    sources = validation.Sources()
    config = OmegaConf.to_container(cfg, resolve=True)
    problems: list[str] = []
    for path, node in _target_nodes(OmegaConf.to_container(cfg, resolve=False), ""):
        if not is_ours(node["_target_"]):
            problems += _third_party(node, path, sources)
        elif hasattr(target := get_object(node["_target_"]), "conflicts"):
            problems += target.conflicts(config)
    trains = "fit" in config["stages"] or config["checkpoint"] or config["resume"]
    for name in config["stages"]:
        if getattr(get_object(config["pipeline"][name]["_target_"]), "needs_weights", False) and not trains:
            problems.append(f"stages: {name} without fit needs checkpoint=<run dir or file> or resume=<run dir>")
    if problems:
        raise validation.ConfigError("\n".join(["The configuration cannot run:", *(f"  - {p}" for p in problems)]))


def _third_party(node: dict, path: str, sources: validation.Sources) -> list[str]:
    try:
        target = get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
    except (ImportError, AttributeError) as error:
        return [f"{path}._target_: {error} [{sources.of(f'{path}._target_')}]"]
    except (TypeError, ValueError):
        return []  # a builtin without a signature
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        f"{path}.{key}: {node['_target_']} takes no argument '{key}'.{validation.nearest(key, parameters)} "
        f"[{sources.of(f'{path}.{key}')}]"
        for key in node
        if key not in validation.HYDRA_KEYS and key not in parameters
    ]


def _target_nodes(node: Any, path: str):
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _target_nodes(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _target_nodes(value, f"{path}[{position}]")


def _objective(current: Run) -> float | None:
    name, result = current.cfg.optimize, current.dir / "result.json"
    if name is None or not result.is_file():
        return None
    metrics = json.loads(result.read_text())["metrics"]
    if name not in metrics:
        raise UserError(f"optimize: the run has no metric '{name}'.{validation.nearest(name, metrics)}")
    return metrics[name]


def _log_to(handler: logging.Handler) -> None:
    """Plain lines of our own; Lightning's and the libraries' chatter stays out of sight."""
    root = logging.getLogger("run")
    root.propagate = False
    root.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "httpx", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
