"""The parts of a run that several stages need: its data, its module, its device. Built once, shared with compared variants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.config.instantiation import build
from experiments.evaluation.base import TrainedSplit
from experiments.run.checkpoint_io import read_weights
from experiments.run.directory import Run
from experiments.run.origin import check_fact, check_hashes, origin_facts
from models.errors import UserError
from models.io import CheckpointError, hub_files, load_strictly, read_tensors, stable_hash

if TYPE_CHECKING:
    from lightning_modules.base import BaseModule


def shared(run: Run, kind: str, node: DictConfig, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, made once for each configuration ``node`` and kept for the run and its variants."""
    key = f"{kind}:{stable_hash(OmegaConf.to_container(node, resolve=True))}"
    if key not in run.shared:
        run.shared[key] = make()
    return run.shared[key]


def device(run: Run) -> torch.device:
    """The device of the run, as ``trainer.accelerator`` chooses it: what works outside a Trainer uses the same one."""
    gpu = run.cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def datamodule(run: Run) -> Any:
    """The configured datamodule, prepared and set up. What the reader of a result must know of it becomes notes."""

    def make() -> pl.LightningDataModule:
        data = build(run.cfg.datamodule)
        data.prepare_data()
        data.setup()
        return data

    data = shared(run, "datamodule", run.cfg.datamodule, make)
    if data.simulated:
        run.note("SIMULATED DATA: written by this code, not measured on anything real.")
    for note in data.notes:
        run.note(note)
    return data


def description_of_data(run: Run) -> dict[str, Any]:
    """What identifies the data of a run, for its record and for the card of an exported model."""
    data, node = datamodule(run), run.cfg.datamodule
    splits = {
        name: {"samples": len(dataset), "fingerprint": getattr(dataset, "fingerprint", None)}
        for name, dataset in data.splits.items()
    }
    return {"datamodule": node["_target_"], "root": node.get("root"), "simulated": data.simulated, "splits": splits}


def note_skipped(run: Run) -> None:
    """Record the unreadable samples of the data, and name their number in the run's notes."""
    report = datamodule(run).skip_report()
    if report["total"]:
        run.record["skipped"] = report
    for split, lost in report["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in lost["reasons"].items())
        run.note(f"SKIPPED SAMPLES: {lost['total']} of the split {split} ({kinds}); result.json lists the first of them.")


def module(run: Run, facts: dict[str, Any]) -> BaseModule:
    """The configured method. ``facts`` of the data (feature widths, number of classes) fill arguments that are not set."""
    node = run.cfg.module
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    return build(node, **{key: value for key, value in facts.items() if key in parameters and node.get(key) is None})


def load_weights(module: BaseModule, checkpoint: Path, fine_tune: bool = False) -> None:
    """Load a checkpoint: a run, a checkpoint directory, or an official file or folder of shards.

    Args:
        module: takes the weights.
        checkpoint: path of any of these.
        fine_tune: a run of another task of the same family will do, where the method can start from it.

    Raises:
        UserError: the weights are of another architecture.
    """
    checkpoint = Path(checkpoint)
    for inner in ("checkpoints/best", "checkpoints/last"):
        if (checkpoint / inner).is_dir():
            checkpoint = checkpoint / inner
            break
    files = hub_files(checkpoint) if checkpoint.is_dir() else [checkpoint]
    if files:
        module.load_official({name: value for file in files for name, value in read_tensors(file).items()})
        return
    weights = read_weights(checkpoint)
    try:
        load_strictly(module, weights, source=checkpoint)
    except CheckpointError as error:
        if not (fine_tune and module.load_pretrained(weights)):
            raise UserError(
                f"{checkpoint} is of another architecture than this configuration: {error} Its run's config.yaml names the "
                "module, projector and encoders."
            ) from error


def trained_module(run: Run, facts: dict[str, Any]) -> BaseModule:
    """The module with the weights that evaluation and prediction use: what this run has trained, else ``checkpoint``."""
    built = module(run, facts)
    if "fit" not in run.cfg.stages:
        check_hashes(run, getattr(datamodule(run), "hashes", {}))
    if names := origin_facts(run, "fit").get("label_names"):
        check_fact(run, "classes", names, list(datamodule(run).label_names))
    if run.cfg.checkpoint and "fit" not in run.cfg.stages:
        load_weights(built, Path(run.cfg.checkpoint))
    else:
        candidates = [run.dir / "checkpoints" / name for name in (run.cfg.select, "last")]
        checkpoint = next((path for path in candidates if path.is_dir()), None)
        if checkpoint is None:
            raise UserError(f"{run.dir} has no checkpoint yet: run the stage fit first, or give checkpoint=<path>.")
        load_weights(built, checkpoint)
    return built.to(device(run)).eval()


def trained_split(run: Run, split: str) -> TrainedSplit:
    """The trained module and a split of the data: what the suites of methods that train on raw data take."""
    data = datamodule(run)
    return TrainedSplit(trained_module(run, data.facts()), data, split)
