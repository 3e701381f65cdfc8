"""Simulated patients with five modalities and survival times, written as TCGA is laid out.

Every modality shows a noisy view of its own signal. The signals share a part (``redundancy``), and the hazard is their
weighted sum (``imbalance``), so that it is known how much each modality can tell alone and together.
"""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError
from models.io import atomic_directory, stable_hash

WORLD = 1  # changes with what is drawn
SITE = "simulated"
MODALITIES = ("clinical", "cnv", "rnaseq", "mut", "slides")
SHAPE = 1.5  # of the Weibull distribution of survival times
MONTHS = 40.0  # its scale
SECOND_SLIDE = 0.1  # share of patients with two slides


def tcga_patients(
    root: str,
    patients: int = 400,
    redundancy: float = 0.2,
    imbalance: float = 0.9,
    missing: float = 0.0,
    effect: float = 2.0,
    noise: float = 0.7,
    genes: int = 30,
    patches: int = 24,
    width: int = 16,
    seed: int = 0,
) -> Path:
    """Write a cohort; returns its folder. Nothing is written twice.

    Args:
        root: the folder is made in it.
        patients: number of patients; a tenth have two slides.
        redundancy: share of the variance of each modality's signal that is common to all; 1: every modality tells the same.
        imbalance: the weight of each modality's signal in the hazard, relative to the one before it (clinical, cnv, rnaseq,
            mut, slides); 1: all weigh the same.
        missing: chance that a patient lacks a modality; the clinical one is always there.
        effect: log hazard ratio for one standard deviation of the weighted sum.
        noise: of each gene and patch, in standard deviations of the signal.
        genes: columns of each kind of omics.
        patches: mean number of each slide.
        width: of a patch.
        seed: of everything.

    Raises UserError for shares outside [0, 1].
    """
    for name, share in (("redundancy", redundancy), ("missing", missing)):
        if not 0 <= share <= 1:
            raise UserError(f"datamodule.simulate.{name}={share} is a share, between 0 and 1.")
    settings = [WORLD, patients, redundancy, imbalance, missing, effect, noise, genes, patches, width, seed]
    folder = Path(root, f"tcga_patients_{stable_hash(settings)}")
    if folder.is_dir():
        return folder
    rng = np.random.default_rng((seed, WORLD))
    signals = np.sqrt(redundancy) * rng.normal(size=(patients, 1)) + np.sqrt(1 - redundancy) * rng.normal(size=(patients, 5))
    weights = imbalance ** np.arange(len(MODALITIES))
    hazard = signals @ weights
    log_ratio = effect * (hazard - hazard.mean()) / hazard.std()
    months = MONTHS * (rng.exponential(size=patients) / np.exp(log_ratio)) ** (1 / SHAPE)
    last_visit = rng.uniform(0.2, 2.0, patients) * MONTHS
    has = rng.random((patients, len(MODALITIES))) >= missing
    columns, values = _omics(signals, has, noise, genes, rng)
    slide_of = np.concatenate([np.arange(patients), np.flatnonzero(rng.random(patients) < SECOND_SLIDE)])
    direction = rng.normal(size=width) / np.sqrt(width)
    with atomic_directory(folder, sync=False) as scratch:
        bags = scratch / "tcga" / "wsi" / f"{SITE}_preprocessed_level2" / "patch_features_kather"
        bags.mkdir(parents=True)
        (scratch / "tcga" / "omic").mkdir()
        rows = []
        for number, patient in enumerate(slide_of):
            case, slide = f"SIM-{patient:05d}", f"SIM-{patient:05d}-{number:05d}"
            censored = last_visit[patient] < months[patient]
            truth = (f"{min(months[patient], last_visit[patient]):.3f}", int(censored))
            rows.append([number, case, f"{slide}.svs", SITE, "SIM", 1.0, *truth, *values[patient]])
            if has[patient, -1]:
                torch.save(_bag(signals[patient, -1], direction, patches, noise, rng), bags / f"{slide}.pt")
        text = io.StringIO()
        writer = csv.writer(text)
        head = ["", "case_id", "slide_id", "site", "oncotree_code", "train", "survival_months", "censorship"]
        writer.writerows([[*head, *columns], *rows])
        with zipfile.ZipFile(
            scratch / "tcga" / "omic" / f"tcga_{SITE}_all_clean.csv.zip", "w", zipfile.ZIP_DEFLATED
        ) as archive:
            archive.writestr(f"tcga_{SITE}_all_clean.csv", text.getvalue())
    return folder


def _omics(
    signals: np.ndarray, has: np.ndarray, noise: float, genes: int, rng: np.random.Generator
) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and their text for each patient; empty where the patient lacks the modality."""
    count = len(signals)
    age = 62 + 9 * (signals[:, 0] + noise * rng.normal(size=count))
    parts = {"age": age.round(), "is_female": (rng.random(count) < 0.5).astype(float)}
    for column, kind in enumerate(("cnv", "rnaseq", "mut"), 1):
        loadings = rng.normal(size=genes) / np.sqrt(genes)
        seen = np.outer(signals[:, column], 2 * loadings) + noise * rng.normal(size=(count, genes)) / np.sqrt(2)
        if kind == "cnv":
            seen = np.clip(np.round(1.5 * seen), -2, 2)
        elif kind == "mut":
            seen = (seen > 0.3).astype(float)
        seen[~has[:, column]] = np.nan
        parts |= {f"GENE{gene}_{kind}": seen[:, gene] for gene in range(genes)}
    table = np.stack([*parts.values()], axis=1)
    return [*parts], [["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in table]


def _bag(signal: float, direction: np.ndarray, patches: int, noise: float, rng: np.random.Generator) -> torch.Tensor:
    """Features of the patches of a slide; the larger the signal, the more of them are shifted."""
    count = int(rng.integers(patches // 2, patches + patches // 2 + 1))
    shifted = rng.random(count) < 1 / (1 + np.exp(-1.5 * signal))
    bag = noise * rng.normal(size=(count, len(direction))) * 0.5 + np.outer(3 * shifted, direction)
    return torch.from_numpy(bag.astype(np.float32))
