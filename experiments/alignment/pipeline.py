"""The parts of a run on frozen features: encoders, feature stores, the pairs that are trained on, and the embedded split."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from datamodules.features.pairs import PairedFeatures
from datamodules.features.store import FeatureStore
from experiments.config.instantiation import build
from experiments.evaluation.base import EmbeddedSplit
from experiments.run import parts
from experiments.run.directory import Run
from experiments.run.origin import check_fact, origin_facts, origin_record
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.dual_encoder import DualEncoder
from models.encoders.base import FrozenEncoder
from models.errors import UserError
from models.io import stable_hash

log = logging.getLogger("run")


# ---- encoders ----------------------------------------------------------------------------------------------------------


def encoder(run: Run, modality: str) -> FrozenEncoder:
    """The frozen encoder of 'vision' or 'text', or its declared fallback when the weights cannot be had.

    A fallback is never silent: it becomes a note of the run and, through the feature stores, part of its identity.
    """
    built, note, _ = _encoder(run, modality)
    if note:
        run.note(note)
    return built


def encoder_arguments(run: Run, modality: str) -> dict[str, Any]:
    """What the constructor of :func:`encoder` was called with, the fallback's where that was taken."""
    _, _, used = _encoder(run, modality)
    return {key: value for key, value in used.items() if not key.startswith("_")}


def _encoder(run: Run, modality: str) -> tuple[FrozenEncoder, str | None, dict[str, Any]]:
    """The encoder, a note about a fallback, and the configuration that was used."""
    from models.encoders.weights import WeightsUnavailable

    node = run.cfg.encoder[modality]
    if not node:
        raise UserError(f"the recipe has no {modality} encoder; choose one: encoder/{modality}=<name>.")

    def make() -> tuple[FrozenEncoder, str | None, dict[str, Any]]:
        config: Any = OmegaConf.to_container(node, resolve=True)
        fallback = config.pop("fallback", None)
        used, note = config, None
        try:
            built = build(config)
        except WeightsUnavailable as error:
            if not fallback:
                raise
            used = fallback
            built = build(used)
            note = (
                f"FALLBACK ENCODER: the weights of {config.get('name')} are not here and cannot be fetched, so "
                f"encoder.{modality} is {built.identity['name']}. The results are those of the fallback. "
                f"({str(error).splitlines()[0]})"
            )
        return built.to(parts.device(run)).eval(), note, used

    return parts.shared(run, f"encoder.{modality}", node, make)


# ---- feature stores ----------------------------------------------------------------------------------------------------


def store_path(run: Run, split: str, manifest: dict) -> Path:
    """Feature stores are shared by all runs: their name is what they hold."""
    return Path(run.cfg.paths.features) / f"{split}-{manifest['of']}-{manifest['kind']}-{stable_hash(manifest)}"


def manifests_of(run: Run, split: str, modality: str) -> dict[str, dict]:
    """What makes cached features these features, for each kind of them that the recipe keeps of 'vision' or 'text': the
    data's content, the encoder with its weights and preprocessing, and how they are kept.
    """
    keep, dataset = run.cfg.encoder.keep, parts.datamodule(run).splits[split]
    common = {"of": "image" if modality == "vision" else "text", "dtype": keep.dtype, "dataset": dataset.fingerprint}
    if is_encoded(dataset):
        common["encoder"] = dataset.encoder_identity(modality)
        return {"pooled": {"kind": "pooled", **common}}
    common["encoder"] = encoder(run, modality).identity
    return {kind: {"kind": kind, **common} for kind in keep[modality]}


def is_online(cfg: Mapping[str, Any]) -> bool:
    """Whether training pairs are encoded at every step anew, and so have no features in stores."""
    return getattr(get_object(cfg["features"]["_target_"]), "online", False)


def is_encoded(dataset: Any) -> bool:
    """Whether a dataset holds features that someone else has computed, in place of images and captions."""
    return dataset.pre_encoded


# ---- what is trained on ------------------------------------------------------------------------------------------------


def features(run: Run, split: str) -> PairedFeatures:
    """The encoded image and text features of a split, at the layers that the recipe chooses."""
    stored, layers = stored_features(run, split), layer_pair(run)
    return stored if layers is None else stored.at_layers(*layers)


def stored_features(run: Run, split: str) -> PairedFeatures:
    """The same with all layers; of the training split only the pairs that ``subset`` chooses."""
    stored = all_features(run, split)
    if split == "train" and run.cfg.subset:
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
    sides: list[Any] = []
    for modality in ("vision", "text"):
        stores = {}
        for kind, manifest in manifests_of(run, split, modality).items():
            stores[kind] = FeatureStore.open(store_path(run, split, manifest), expect=manifest)
            verify_once(run, stores[kind])
        sides.append(stores)
    return PairedFeatures(sides[0], sides[1])


def verify_once(run: Run, store: FeatureStore) -> None:
    """Compare a store with its checksums, the first time that the run or one of its variants opens it."""
    verified = run.shared.setdefault("verified stores", set())
    if store.path not in verified:
        store.verify()
        verified.add(store.path)


def layer_pair(run: Run) -> tuple[int, int] | None:
    """The layers of the vision and the text encoder that the group ``layers`` chooses; None without it.

    The choice is made once, on training pairs, and kept in the record of the run that trains on them.
    """
    if not run.cfg.layers:
        return None
    if "layers" not in run.record and "layers" in (record := origin_record(run)):
        run.record["layers"] = record["layers"]
    if "layers" not in run.record:
        run.record["layers"] = build(run.cfg.layers)(stored_features(run, "train"))
        run.save()
    chosen = run.record["layers"]
    return chosen["vision"], chosen["text"]


def training_data(run: Run) -> pl.LightningDataModule:
    """The datamodule that the head is trained on: stored features, or features made at every step."""
    data = parts.datamodule(run)
    val = features(run, "val") if "val" in data.splits else None
    if is_online(run.cfg):
        encoders = {modality: encoder(run, modality) for modality in ("vision", "text")}
        keep = OmegaConf.to_container(run.cfg.encoder.keep, resolve=True)
        return build(run.cfg.features)(source=data, **encoders, keep=keep, val=val)
    unpaired = {"unpaired": build(run.cfg.unpaired)(run)} if run.cfg.unpaired else {}
    return build(run.cfg.features)(train=features(run, "train"), val=val, **unpaired)


# ---- what is evaluated, predicted with and exported -------------------------------------------------------------------


def trained_dual_encoder(run: Run) -> DualEncoder:
    """The trained head behind its encoders."""
    encoders = {modality: encoder(run, modality) for modality in ("vision", "text")}
    _check_encoders(run, {modality: built.identity for modality, built in encoders.items()})
    module = parts.trained_module(run, head_widths(run, encoders))
    return DualEncoder(encoders["vision"], encoders["text"], module.head, layer_pair(run))


def head_widths(run: Run, encoders: Mapping[str, FrozenEncoder]) -> dict[str, int]:
    """The widths of the features that the head takes of the encoders 'vision' and 'text'."""
    keep = run.cfg.encoder.keep
    return {f"{name}_dim": each.token_dim if "tokens" in keep[name] else each.feature_dim for name, each in encoders.items()}


def _check_encoders(run: Run, identities: dict[str, dict]) -> None:
    """A fallback, other weights or another preprocessing than in training are refused."""
    check_fact(run, "encoder", origin_facts(run, "encode").get("result", {}).get("encoders"), identities)


@torch.inference_mode()
def embedded_split(run: Run, split: str) -> EmbeddedSplit:
    """All images and captions of a split through the trained head."""
    dataset, stored = parts.datamodule(run).splits[split], features(run, split)
    manifests = {modality: next(iter(manifests_of(run, split, modality).values())) for modality in ("vision", "text")}
    if not is_encoded(dataset):
        _check_encoders(run, {modality: manifest["encoder"] for modality, manifest in manifests.items()})
    module = parts.trained_module(run, stored.facts())
    rows = stored.rows
    image = _embed(module.embed_image, stored.read_images, rows, module.device)
    counts = stored.caption_counts(rows)
    owner = np.repeat(np.arange(len(rows)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    text_rows = np.repeat(stored.texts.offsets[rows], counts) + np.arange(len(owner)) - first
    text = _embed(module.embed_text, stored.read_texts, text_rows, module.device)
    labels = torch.from_numpy(np.asarray(dataset.labels[rows])) if dataset.class_names else None

    @functools.cache
    def encoders() -> DualEncoder:  # only when a suite has raw texts or images: data may come encoded, without an encoder
        layers = (stored.image_layer, stored.text_layer)
        return DualEncoder(encoder(run, "vision"), encoder(run, "text"), module.head, layers)

    def labelled_features(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        other, vectors = parts.datamodule(run).splits[name], features(run, name)
        return next(iter(vectors.read_images(vectors.rows).values())), torch.from_numpy(np.asarray(other.labels[vectors.rows]))

    def frozen() -> tuple[torch.Tensor, torch.Tensor]:
        return stored.read_images(rows)[IMAGE_FEATURES], stored.read_texts(text_rows)[TEXT_FEATURES]

    return EmbeddedSplit(
        image=image,
        text=text,
        owner=torch.from_numpy(owner),
        captions=[caption for row in rows for caption in dataset.captions(int(row))],
        encode_text=lambda texts: encoders().embed_texts(texts),
        load_image=lambda row: dataset.image(int(rows[row])),
        labels=labels,
        class_names=dataset.class_names,
        name=split,
        load_encoders=encoders,
        labelled_features=labelled_features if dataset.class_names else None,
        frozen=None if module.head.takes_tokens else frozen,
        simulated=parts.datamodule(run).simulated,
        hashes={
            "split": stable_hash([dataset.fingerprint, len(rows)]),
            "preprocessing": stable_hash(manifests["vision"]["encoder"].get("preprocessing")),
            "encoders": stable_hash([manifest["encoder"] for manifest in manifests.values()]),
        },
    )


def _embed(embed: Any, read: Any, rows: np.ndarray, device: torch.device, chunk: int = 2048) -> torch.Tensor:
    vectors = []
    for start in range(0, len(rows), chunk):
        batch = {key: value.to(device) for key, value in read(rows[start : start + chunk]).items()}
        vectors.append(embed(batch).vector.float().cpu())
    return torch.cat(vectors)
