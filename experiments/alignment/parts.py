"""The parts of a run that several stages need, built once and shared with the variants it is compared with."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from datamodules.features.pairs import PairedFeatures
from datamodules.features.store import FeatureStore
from experiments.config.instantiation import build
from experiments.run.directory import Run
from models.errors import UserError
from models.io import read_tensors, stable_hash

if TYPE_CHECKING:
    from lightning_modules.base import BaseModule

log = logging.getLogger("run")
_SHARED: dict[str, Any] = {}


def _shared(kind: str, node: DictConfig, make) -> Any:
    key = f"{kind}:{stable_hash(OmegaConf.to_container(node, resolve=True))}"
    if key not in _SHARED:
        _SHARED[key] = make()
    return _SHARED[key]


def datamodule(run: Run) -> pl.LightningDataModule:
    """The configured datamodule, prepared and set up."""

    def make():
        data = build(run.cfg.datamodule)
        data.prepare_data()
        data.setup()
        return data

    return _shared("datamodule", run.cfg.datamodule, make)


def encoder(run: Run, modality: str) -> torch.nn.Module:
    """The frozen encoder of 'vision' or 'text', or its declared fallback when the weights cannot be had.

    A fallback is never silent: it becomes a note of the run and, through the feature stores, part of its identity.
    """
    node = run.cfg.encoder[modality]
    built, note, _ = _shared(f"encoder.{modality}", node, lambda: _build_encoder(node, modality))
    if note:
        run.note(note)
    return built


def encoder_arguments(run: Run, modality: str) -> dict[str, Any]:
    """What the constructor of :func:`encoder` was called with, the fallback's where that was taken."""
    encoder(run, modality)
    _, _, used = _shared(f"encoder.{modality}", run.cfg.encoder[modality], lambda: None)
    return {key: value for key, value in used.items() if not key.startswith("_")}


def _build_encoder(node: DictConfig, modality: str) -> tuple[torch.nn.Module, str | None, dict[str, Any]]:
    """The encoder, a note about a fallback, and the configuration that was used."""
    from models.encoders.weights import WeightsUnavailable

    wanted = {key: value for key, value in OmegaConf.to_container(node, resolve=True).items() if key != "fallback"}
    used, note = wanted, None
    try:
        built = build(wanted)
    except WeightsUnavailable as error:
        if not node.get("fallback"):
            raise
        used = OmegaConf.to_container(node.fallback, resolve=True)
        built = build(used)
        note = (
            f"FALLBACK ENCODER: the weights of {wanted.get('name')} are not here and cannot be fetched, so "
            f"encoder.{modality} is {built.identity['name']}. Figures are those of the fallback. ({_first_line(error)})"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return built.to(device).eval(), note, used


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def join_children(run: Run) -> None:
    """DDP starts its other ranks by repeating the command line: make it this one job, in this directory."""
    sys.argv = [sys.argv[0], *run.overrides, f"resume={run.dir}"]


def is_first_process() -> bool:
    """False in the other ranks of DDP, which end when their share of the work is done."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("SLURM_PROCID", 0)) == 0


def note_skipped(run: Run) -> None:
    """Keep the report on unreadable samples with the run, and name their number in its notes."""
    report = datamodule(run).skip_report()
    if report["total"]:
        run.record["skipped"] = report
    for split, lost in report["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in lost["reasons"].items())
        run.note(f"SKIPPED SAMPLES: {lost['total']} of the split {split} ({kinds}); result.json lists the first of them.")


def store_path(run: Run, split: str, manifest: dict) -> Path:
    """Feature stores are shared by all runs: their name is what they hold."""
    return Path(run.cfg.paths.features) / f"{split}-{manifest['of']}-{manifest['kind']}-{stable_hash(manifest)}"


def manifests_of(run: Run, split: str, modality: str) -> dict[str, dict]:
    """What makes cached features these features, for each kind of them that the recipe keeps of 'vision' or 'text': the
    data's content, the encoder with its weights and preprocessing, and how they are kept.
    """
    keep, dataset = run.cfg.encoder.keep, datamodule(run).splits[split]
    shared = {"of": "image" if modality == "vision" else "text", "dtype": keep.dtype, "dataset": dataset.fingerprint}
    if is_encoded(dataset):
        shared["encoder"] = dataset.encoder_identity(modality)
        return {"pooled": {"kind": "pooled", **shared}}
    shared["encoder"] = encoder(run, modality).identity
    return {kind: {"kind": kind, **shared} for kind in keep[modality]}


def is_online(cfg: Mapping[str, Any]) -> bool:
    """Whether training pairs are encoded at every step anew, and so have no features in stores."""
    return bool(cfg.get("features")) and getattr(get_object(cfg["features"]["_target_"]), "online", False)


def is_encoded(dataset: Any) -> bool:
    """Whether a dataset holds features that someone else has computed, in place of images and captions."""
    return dataset.pre_encoded


def features(run: Run, split: str) -> PairedFeatures:
    """The encoded image and text features of a split, at the layers that the recipe chooses."""
    stored, layers = stored_features(run, split), layer_pair(run)
    return stored if layers is None else stored.at_layers(*layers)


def stored_features(run: Run, split: str) -> PairedFeatures:
    """The same with all layers; of the training split only the pairs that ``subset`` chooses."""
    stored = all_features(run, split)
    if split == "train" and run.cfg.get("subset"):
        if "subset" not in run.memory:
            run.memory["subset"] = build(run.cfg.subset)(run, stored)
        return stored.subset(run.memory["subset"])
    return stored


def all_features(run: Run, split: str) -> PairedFeatures:
    """The encoded features of every sample of a split, with all layers."""
    if split == "train" and is_online(run.cfg):
        raise UserError(
            "features=online keeps no features of the training split, and something asks for them (k-NN, subset, layers): take "
            "features=pairs, or do without."
        )
    sides = []
    for modality in ("vision", "text"):
        stores = {}
        for kind, manifest in manifests_of(run, split, modality).items():
            stores[kind] = FeatureStore.open(store_path(run, split, manifest), expect=manifest)
        sides.append(stores)
    return PairedFeatures(*sides)


def layer_pair(run: Run) -> tuple[int, int] | None:
    """The layers of the vision and the text encoder that the group ``layers`` chooses; None without it.

    The choice is made once, on training pairs, and kept in the run's record.
    """
    if not run.cfg.get("layers"):
        return None
    if "layers" not in run.record:
        run.record["layers"] = build(run.cfg.layers)(stored_features(run, "train"))
        run.save()
    chosen = run.record["layers"]
    return chosen["vision"], chosen["text"]


def training_data(run: Run) -> pl.LightningDataModule:
    """What is trained on: the frozen features where the recipe has them, stored or made at every step, else the datamodule
    itself."""
    if not run.cfg.get("features"):
        return datamodule(run)
    splits = datamodule(run).splits
    val = features(run, "val") if "val" in splits else None
    if is_online(run.cfg):
        encoders = {modality: encoder(run, modality) for modality in ("vision", "text")}
        keep = OmegaConf.to_container(run.cfg.encoder.keep, resolve=True)
        return build(run.cfg.features)(source=datamodule(run), **encoders, keep=keep, val=val)
    beside = {"unpaired": build(run.cfg.unpaired)(run)} if run.cfg.get("unpaired") else {}
    return build(run.cfg.features)(train=features(run, "train"), val=val, **beside)


def module(run: Run, facts: dict[str, Any]) -> BaseModule:
    """The configured method. What the data decides (``facts``: feature widths, number of classes) fills arguments left null."""
    node = run.cfg.module
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    given = {k: v for k, v in facts.items() if k in parameters and node.get(k) is None}
    return build(node, **given)


def load_weights(built: BaseModule, checkpoint: Path, fine_tune: bool = False) -> None:
    """Load a checkpoint: a run, a checkpoint directory of ours, or an official file.

    To ``fine_tune``, a run of another task of the same family will do, where the method knows how to take from it.
    """
    checkpoint = Path(checkpoint)
    for inner in ("checkpoints/best", "checkpoints/last"):
        if (checkpoint / inner).is_dir():
            checkpoint = checkpoint / inner
            break
    if not checkpoint.is_dir():
        built.load_official(read_tensors(checkpoint))
        return
    weights = read_tensors(checkpoint / "weights.safetensors")
    expected = built.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if missing or unexpected or wrong:
        if fine_tune and built.load_pretrained(weights):
            return
        raise UserError(
            f"{checkpoint} is of another architecture than this configuration: missing {missing[:4]}, unexpected "
            f"{unexpected[:4]}, shapes {wrong[:4]}. Use the module, projector and encoders it was trained with "
            "(config.yaml of its run)."
        )
    built.load_state_dict(weights)


def trained_module(run: Run, facts: dict[str, Any]) -> BaseModule:
    """The module with the weights that evaluation and prediction use: what this run has trained, else ``checkpoint``."""
    built = module(run, facts)
    if run.cfg.checkpoint and "fit" not in run.cfg.stages:
        load_weights(built, Path(run.cfg.checkpoint))
    else:
        own = [run.dir / "checkpoints" / name for name in (run.cfg.select, "last")]
        found = next((path for path in own if path.is_dir()), None)
        if found is None:
            raise UserError(f"{run.dir} has no checkpoint yet: run the stage fit first, or give checkpoint=<path>.")
        load_weights(built, found)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return built.to(device).eval()
