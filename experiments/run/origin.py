"""The run that ``checkpoint`` comes from, and whether its weights mean the same under the configuration of this run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.run.directory import Run, differences, read_record
from models.errors import UserError

OF_TRAINING = ("optimizer", "scheduler", "loss", "loss_weights", "regulariser", "importer")  # arguments of a module
REQUIRED = "required"  # value of ``checkpoint`` in recipes; a missing value (???) would not outlive the default null
PLAIN = (str, int, float, tuple, list, type(None))
PLACES = ("weights", "vocabulary", "fallback")  # files that may lie elsewhere; what is in them is checked by its content


def origin_of(run: Run) -> Path | None:
    """The directory of the run that trained the weights of ``checkpoint``; None for official files and runs that train."""
    return None if "fit" in run.cfg.stages else _source(run)


def _source(run: Run) -> Path | None:
    if not run.cfg.checkpoint:
        return None
    checkpoint = Path(run.cfg.checkpoint).resolve()
    folders = (checkpoint, *checkpoint.parents[:2])  # <run>, or <run>/checkpoints/best
    return next((folder for folder in folders if (folder / "run.json").is_file() and (folder / "config.yaml").is_file()), None)


def origin_record(run: Run) -> dict[str, Any]:
    """The record of the run that trained the weights: that of ``checkpoint``, or this one's."""
    origin = origin_of(run)
    return run.record if origin is None else read_record(origin)


def origin_facts(run: Run, stage: str) -> dict[str, Any]:
    """What a stage of the run that trained the weights left for later ones."""
    return origin_record(run)["stages"].get(stage, {}).get("facts", {})


def check_configuration(run: Run) -> None:
    """Compare the two configurations in all that decides what the weights mean: method, encoders, layers, preprocessing.

    Raises UserError with both values of every difference, and where the recipe starts from weights and there are none.
    """
    if run.cfg.checkpoint == REQUIRED:
        raise UserError(
            "this recipe starts from trained weights: give checkpoint=<run dir or file>. With checkpoint=null the model starts "
            "from random weights."
        )
    origin = origin_of(run)
    if origin is None:
        return
    there, now = (_deciding(config) for config in (OmegaConf.load(origin / "config.yaml"), run.cfg))
    _refuse(run, differences(there, now))


def check_held_out(run: Run) -> None:
    """Training on from weights must hold out the samples that their run held out: it has trained on the others.

    Data of another kind, reader or simulation is other data, and not compared. Raises UserError with every difference.
    """
    source = _source(run)
    if source is None:
        return
    there, now = (OmegaConf.to_container(config.datamodule) for config in (OmegaConf.load(source / "config.yaml"), run.cfg))
    there, now = (_with_defaults(node or {}) for node in (there, now))
    names = getattr(_target(run.cfg.datamodule or {}), "held_out", ())
    kind_and_readers = [
        {key: value for key, value in node.items() if key == "_target_" or (isinstance(value, dict) and "_target_" in value)}
        for node in (there, now)
    ]
    if kind_and_readers[0] != kind_and_readers[1]:
        return
    settings = ({f"datamodule.{name}": node.get(name) for name in names} for node in (there, now))
    if differing := differences(*settings):
        lines = "\n".join(f"  {line}" for line in differing)
        raise UserError(
            f"the weights of checkpoint={run.cfg.checkpoint} have been trained on samples that this run holds out:\n{lines}\n"
            "Repeat these settings of its run, or start from a run of the same part."
        )


def check_hashes(run: Run, hashes: Mapping[str, str]) -> None:
    """What numbers in the weights stand for, such as the entities of a graph, is as in the run of ``checkpoint``.

    Weights of a run that noted no hash get a note. Raises UserError with every difference.
    """
    source = _source(run)
    if source is None or not hashes:
        return
    there = read_record(source)["stages"].get("fit", {}).get("facts", {}).get("hashes", {})
    for name in hashes.keys() - there.keys():
        run.note(f"NOT COMPARED: {source} does not say of which {name} its weights are; make sure that it is this run's.")
    noted = hashes.keys() & there.keys()
    _refuse(run, differences(*({name: side[name] for name in noted} for side in (there, hashes))))


def check_fact(run: Run, name: str, there: Any, now: Any) -> None:
    """Compare what the trained run found out about its parts with what this run does."""
    if there is not None and origin_of(run) is not None:
        _refuse(run, differences({name: there}, json.loads(json.dumps({name: now}))))


def _refuse(run: Run, differing: Sequence[str]) -> None:
    if differing:
        lines = "\n".join(f"  {line}" for line in differing[:10])
        raise UserError(
            f"the weights of checkpoint={run.cfg.checkpoint} are for other settings, those of its run {_source(run)}:\n"
            f"{lines}\nRepeat the overrides of that run (see its run.json), or train anew."
        )


def _deciding(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    module = {key: value for key, value in (config["module"] or {}).items() if key not in OF_TRAINING}
    encoder = config.get("encoder") or {}
    keep = {side: kinds for side, kinds in (encoder.get("keep") or {}).items() if side != "dtype"}
    encoders = {"vision": encoder.get("vision"), "text": encoder.get("text"), "keep": keep}
    datamodule = config["datamodule"] or {}
    names = getattr(_target(datamodule), "preprocessing", ())
    preprocessing = {name: value for name, value in _with_defaults(datamodule).items() if name in names}
    deciding = {"module": module, "encoder": encoders, "layers": config.get("layers"), "datamodule": preprocessing}
    return _with_defaults(deciding)


def _with_defaults(node: Any) -> Any:
    """A node with the constructors' defaults filled in, so that naming a default changes nothing."""
    if isinstance(node, Mapping):
        if (target := _target(node)) is not None:
            parameters = inspect.signature(target).parameters.items()
            defaults = {name: parameter.default for name, parameter in parameters if isinstance(parameter.default, PLAIN)}
            node = {**defaults, **node, "_target_": node["_target_"].rpartition(".")[2]}
        return {key: _with_defaults(value) for key, value in node.items() if key not in PLACES}
    return [_with_defaults(item) for item in node] if isinstance(node, (list, tuple)) else node


def _target(node: Mapping[str, Any]) -> Any:
    try:
        return get_object(node["_target_"])
    except (KeyError, ImportError, AttributeError):  # no node of a part, or one of an older version
        return None
