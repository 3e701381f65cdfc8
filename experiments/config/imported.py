"""Is the configuration sound? What needs the libraries imported, before any data is touched."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.config import validation
from experiments.config.instantiation import build
from experiments.config.signatures import is_ours


def check_imported(cfg: DictConfig) -> None:
    """What needs the libraries imported: third-party arguments, types of parts, and rules across parts. Before any data.

    A target may have a static method ``conflicts(config) -> list of problems`` for what it cannot be combined with.
    """
    sources = validation.Sources()
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    problems: list[str] = []
    for path, node in _target_nodes(OmegaConf.to_container(cfg, resolve=False), ""):
        if not is_ours(node["_target_"]):
            problems += _third_party(node, path, sources)
        elif hasattr(target := get_object(node["_target_"]), "conflicts"):
            problems += target.conflicts(config)
    for path, node in _target_nodes(config, ""):
        problems += _unfitting_parts(node, path, sources)
    problems += _unbuildable(cfg)
    stages = {name: get_object(config["pipeline"][name]["_target_"]) for name in config["stages"]}
    trained = config["checkpoint"] or config["resume"] or any(getattr(s, "gives_weights", False) for s in stages.values())
    for name, stage in stages.items():
        if getattr(stage, "needs_weights", False) and not trained:
            problems.append(f"stages: {name} without fit needs checkpoint=<run dir or file> or resume=<run dir>")
    if problems:
        raise validation.ConfigError("\n".join(["The configuration cannot run:", *(f"  - {p}" for p in problems)]))


def _unfitting_parts(node: dict, path: str, sources: validation.Sources) -> list[str]:
    """Parts of one of our classes that are of another class than its constructor takes, such as another family's loss."""
    if not is_ours(node["_target_"]):
        return []
    try:
        parameters = inspect.signature(get_object(node["_target_"]), eval_str=True).parameters
    except (TypeError, ValueError, NameError):
        return []
    problems = []
    for key, part in node.items():
        if not isinstance(part, dict) or "_target_" not in part or part.get("_partial_") or key not in parameters:
            continue
        annotation = parameters[key].annotation
        classes = tuple(option for option in typing.get_args(annotation) or (annotation,) if inspect.isclass(option))
        target = get_object(part["_target_"])
        ours = [option for option in classes if is_ours(option.__module__) and not getattr(option, "_is_protocol", False)]
        if ours and inspect.isclass(target) and not issubclass(target, tuple(ours)):
            names = " or ".join(option.__name__ for option in ours)
            problems.append(
                f"{path}.{key}: {node['_target_'].rpartition('.')[2]} takes a {names}, and {target.__name__} is none "
                f"[{sources.of(f'{path}.{key}')}]"
            )
    return problems


def _third_party(node: dict, path: str, sources: validation.Sources) -> list[str]:
    try:
        target = get_object(node["_target_"])
        parameters = inspect.signature(target, eval_str=True).parameters
    except (ImportError, AttributeError) as error:
        return [f"{path}._target_: {error} [{sources.of(f'{path}._target_')}]"]
    except (TypeError, ValueError, NameError):
        return []  # a builtin without a signature
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    problems = []
    for key, value in node.items():
        where = f"[{sources.of(f'{path}.{key}')}]"
        if key in validation.HYDRA_KEYS:
            continue
        if key not in parameters:
            if not open_ended:
                hint = validation.nearest(key, parameters)
                problems.append(f"{path}.{key}: {node['_target_']} takes no argument '{key}'.{hint} {where}")
        elif not _fits(parameters[key].annotation, value):
            problems.append(f"{path}.{key}: expected {_type_name(parameters[key].annotation)}, got {value!r} {where}")
    return problems


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a plain value may be passed for an annotation; anything that is not plain is not judged."""
    options = typing.get_args(annotation) or (annotation,)
    plain = {int, float, str, bool, type(None)}
    if not isinstance(value, (int, float, str, bool)) or str(value).startswith("${") or not set(options) <= plain:
        return True
    return isinstance(value, options) or (isinstance(value, int) and not isinstance(value, bool) and float in options)


def _type_name(annotation: Any) -> str:
    return " or ".join(option.__name__ for option in typing.get_args(annotation) or (annotation,)).replace("NoneType", "null")


def _target_nodes(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _target_nodes(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _target_nodes(value, f"{path}[{position}]")


def _unbuildable(cfg: DictConfig) -> list[str]:
    """Problems of the values of the optimizer, the schedule and the trainer, found by building them without data."""
    problems = []
    try:
        build(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    except (InstantiationException, pl.utilities.exceptions.MisconfigurationException, ValueError, TypeError) as error:
        problems.append(f"trainer: {_root_cause(error)}")
    if cfg.optimizer and "fit" in cfg.stages:
        try:
            optimizer = build(cfg.optimizer)([torch.zeros(1, requires_grad=True)])
            for group in optimizer.param_groups:
                if not 0 < group["lr"] < float("inf"):
                    raise ValueError(f"lr={group['lr']} is not a positive number")
                if cfg.scheduler:
                    build(cfg.scheduler)(total_steps=100, steps_per_epoch=10, base_lr=group["lr"])(0)
        except (InstantiationException, AssertionError, ArithmeticError, ValueError, TypeError) as error:
            settings = {key: value for key, value in cfg.optimizer.items() if not str(key).startswith("_")}
            problems.append(f"optimizer or scheduler: {_root_cause(error) or 'a value is refused'} (optimizer: {settings})")
    return problems


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).split("\n")[0]
