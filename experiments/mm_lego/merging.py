"""Stage ``merge``: the runs of blocks that were trained one by one become one model, without training."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from datamodules.patients import PatientsDataModule
from experiments.run import parts
from experiments.run.checkpoint_io import DirectoryCheckpointIO, read_weights
from experiments.run.directory import Run
from experiments.stages import Facts, stage
from models.errors import UserError
from models.io import CheckpointError, load_strictly
from models.mm_lego.merge import Modular

log = logging.getLogger("run")
OF_THE_BLOCK = "model.blocks.0."
# Block and merged model must agree in these, or the block has seen test patients or differently scaled tables.
SAME = [name for name in PatientsDataModule.preprocessing if name != "modalities"]


@stage(gives_weights=True)
def merge(run: Run) -> Facts:
    """Fill the blocks of the configured model with those of finished runs, merge their heads, and write a checkpoint.

    The runs are ``blocks.runs``, by modality, or are found in ``blocks.folder``, such as the folder of a sweep: those whose
    ``datamodule.modalities`` is one modality of this model, of the same fold.

    Raises:
        UserError: a modality has no such run, or several, or its block is of other sizes; or this run trains, too.
    """
    if "fit" in run.cfg.stages:
        raise UserError(
            "stages: merge and fit are two runs. Merge first (stages=[merge]), then fine-tune: "
            "stages=[prepare,fit,evaluate,report] checkpoint=<merged run>."
        )
    data = parts.datamodule(run)
    module = parts.module(run, data.facts())
    sources = block_runs(run, [*module.shapes])
    for block, (name, folder) in zip(module.model.blocks, sources.items(), strict=True):
        try:
            load_strictly(block, block_weights(folder), source=folder)
        except CheckpointError as error:
            raise UserError(
                f"the block of {name!r} in {folder} is of another architecture than module.block and module.encoders of this "
                f"run: {error}"
            ) from error
    if isinstance(module.model, Modular):
        module.model.merge_heads()
    checkpoint = {"state_dict": module.state_dict(), "global_step": 0, "epoch": 0}
    DirectoryCheckpointIO().save_checkpoint(checkpoint, run.dir / "checkpoints" / "last")
    log.info("merge: %s", ", ".join(f"{name} from {folder}" for name, folder in sources.items()))
    return {"blocks": {name: str(folder) for name, folder in sources.items()}, "label_names": list(data.label_names)}


def block_weights(folder: Path) -> dict[str, Any]:
    """The weights of the block that a run has trained. Raises UserError where there are none."""
    for name in ("best", "last"):
        if (folder / "checkpoints" / name).is_dir():
            weights = read_weights(folder / "checkpoints" / name)
            return {key.removeprefix(OF_THE_BLOCK): x for key, x in weights.items() if key.startswith(OF_THE_BLOCK)}
    raise UserError(f"{folder} has no checkpoint: train the block first (stages=[prepare,fit]).")


def block_runs(run: Run, names: Sequence[str]) -> dict[str, Path]:
    """The run of each modality's block. Raises UserError."""
    chosen = run.cfg.blocks
    if unknown := (chosen.runs or {}).keys() - set(names):
        raise UserError(f"blocks.runs names {sorted(unknown)}; the modalities of this model are {list(names)}.")
    sources = {name: Path(str(folder)) for name, folder in (chosen.runs or {}).items()}
    missing = [name for name in names if name not in sources]
    if missing and not chosen.folder:
        raise UserError(
            f"blocks of {missing} are needed: give blocks.folder=<folder of their runs>, such as that of a sweep, or "
            f"blocks.runs.{missing[0]}=<run>."
        )
    if missing and not Path(str(chosen.folder)).is_dir():
        raise UserError(f"blocks.folder={chosen.folder} is no folder: name that of the blocks' runs, such as a sweep's.")
    now, others = _folds(run.cfg.datamodule), []
    candidates: dict[str, list[Path]] = {name: [] for name in missing}
    for file in sorted(Path(str(chosen.folder or "")).glob("*/run.json")) if missing else ():
        config: Any = OmegaConf.load(file.parent / "config.yaml")
        modalities = list(config.datamodule.get("modalities") or ())
        if len(modalities) != 1 or modalities[0] not in candidates or not _is_trained(file):
            continue
        if _folds(config.datamodule) == now:
            candidates[modalities[0]].append(file.parent)
        else:
            others.append(file.parent.name)
    for name, folders in candidates.items():
        if len(folders) != 1:
            problem = f"has {len(folders)} blocks of {name!r} with {now}" if folders else f"has no block of {name!r} with {now}"
            hint = f" Of other folds or settings: {', '.join(others[:5])}." if others and not folders else ""
            raise UserError(f"blocks.folder={chosen.folder} {problem}: name it with blocks.runs.{name}=<run>.{hint}")
        sources[name] = folders[0]
    return {name: sources[name] for name in names}


def _is_trained(file: Path) -> bool:
    return json.loads(file.read_text())["stages"].get("fit", {}).get("status") == "done"


def _folds(node: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that must agree, those left out at their defaults."""
    parameters = inspect.signature(PatientsDataModule).parameters
    return {name: node.get(name, parameters[name].default) for name in SAME}
