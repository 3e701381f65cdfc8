"""Phantoms of chest radiographs in ChestX-ray14's files: anatomy that varies with the patient, and findings at random places.

A phantom is grey: a body, two lungs with ribs and a noisy texture, spine, heart, diaphragm. Sex and age change it without
being findings: broader shoulders, the density of bones. Each finding has a size and a place.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.simulated.worlds import SPLIT_STARTS
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other images
FINDINGS = ("Cardiomegaly", "Consolidation", "Effusion", "Nodule", "Pneumothorax")
COLUMNS = (
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
    "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
)  # fmt: skip
IMAGES_PER_PATIENT = 2


def phantom(
    size: int, findings: set[str], male: bool, age: int, patient: np.random.Generator, rng: np.random.Generator
) -> np.ndarray:
    """(size, size) uint8.

    Args:
        size: side in pixels.
        findings: of :data:`FINDINGS`.
        male, age: of the patient.
        patient: decides on the anatomy: the same for all images of a patient.
        rng: decides on the pose, the findings' places and the noise of one image.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    x = (x - 0.5 - rng.uniform(-0.03, 0.03)) / rng.uniform(0.94, 1.06)
    y = (y - 0.5 - rng.uniform(-0.03, 0.03)) / rng.uniform(0.94, 1.06)
    broad = (0.44 if male else 0.40) + patient.uniform(-0.02, 0.02)
    body = _soft((x / broad) ** 4 + ((y - 0.25) / 0.75) ** 4, 0.06)
    values = 0.45 * body
    half_width, half_height = 0.125 + patient.uniform(-0.012, 0.012), 0.27 + patient.uniform(-0.02, 0.02)
    dome = 0.24 + patient.uniform(-0.02, 0.02)
    lungs = {}
    for side in (-1, 1):
        centre = side * (0.185 + patient.uniform(-0.008, 0.008))
        oval = _soft(((x - centre) / half_width) ** 2 + ((y + 0.02) / half_height) ** 2, 0.08)
        lungs[side] = oval * _step(dome + 0.35 * np.abs(x - centre) - y, 0.01)
        values = values - 0.30 * lungs[side]
    both = np.maximum(lungs[-1], lungs[1])
    texture = rng.normal(size=(size, size)).astype(np.float32)
    values += 0.035 * both * _smoothed(texture)
    bone = 0.10 * (1.1 - age / 110)
    slope, phase = patient.uniform(0.25, 0.4), patient.uniform(0, 1)
    ribs = np.clip(np.cos(2 * np.pi * ((y + slope * np.abs(x)) * 9 + phase)), 0, 1) ** 3
    values += bone * ribs * body * (np.abs(x) < 0.36)
    values += (0.12 + bone) * _soft((x / 0.035) ** 2, 0.2) * body
    heart = (0.115 if "Cardiomegaly" not in findings else 0.185) + rng.uniform(-0.012, 0.012)
    values += 0.26 * _soft(((x - 0.045) / heart) ** 2 + ((y - 0.10) / (0.85 * heart)) ** 2, 0.10)
    side = int(rng.choice((-1, 1)))
    if "Nodule" in findings:
        cx, cy, radius = side * rng.uniform(0.12, 0.25), rng.uniform(-0.2, 0.1), rng.uniform(0.022, 0.038)
        values += 0.28 * _soft(((x - cx) / radius) ** 2 + ((y - cy) / radius) ** 2, 0.3)
    side = int(rng.choice((-1, 1)))
    if "Consolidation" in findings:
        cx, cy, radius = side * rng.uniform(0.15, 0.22), rng.uniform(-0.18, 0.12), rng.uniform(0.07, 0.11)
        cloud = _soft(((x - cx) / radius) ** 2 + ((y - cy) / (0.8 * radius)) ** 2, 0.5)
        values += lungs[side] * cloud * (0.17 + 0.10 * _smoothed(texture[::-1]))
    side = int(rng.choice((-1, 1)))
    if "Effusion" in findings:
        level = 0.24 - rng.uniform(0.06, 0.16)
        values += 0.30 * lungs[side] * _step(y - level + 0.6 * np.abs(np.abs(x) - 0.16) - 0.05, 0.015)
    side = int(rng.choice((-1, 1)))
    if "Pneumothorax" in findings:
        rim = ((x - side * 0.185) / (0.72 * half_width)) ** 2 + ((y + 0.0) / (0.80 * half_height)) ** 2
        outside = lungs[side] * (1 - _soft(rim, 0.05))
        values -= 0.13 * outside
        values += 0.20 * lungs[side] * np.exp(-(((rim - 1) / 0.10) ** 2))
    values = values * rng.uniform(0.85, 1.15) + rng.uniform(-0.03, 0.03) + 0.02 * rng.normal(size=(size, size))
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def nih_phantoms(
    root: str,
    train: int = 2000,
    val: int = 300,
    test: int = 600,
    image_size: int = 64,
    prevalence: float = 0.25,
    seed: int = 0,
) -> Path:
    """Write phantoms as ChestX-ray14 is laid out; returns their folder. Nothing is written twice.

    Args:
        root: the folder is made in it.
        train, val, test: number of images; the files know train and val as one list, as the official ones do.
        image_size: side in pixels.
        prevalence: of each finding, independent of the others.
        seed: of everything.
    """
    counts = {"train": train + val, "test": test}
    folder = Path(root, f"nih_phantoms_{stable_hash([WORLD, counts, image_size, prevalence, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder, sync=False) as scratch:
        (scratch / "images").mkdir()
        entries = []
        for split, count in counts.items():
            names = []
            for number in range(count):
                identity = SPLIT_STARTS[split] + number // IMAGES_PER_PATIENT
                rng = np.random.default_rng((seed, SPLIT_STARTS[split] + number, 1))
                person = np.random.default_rng((seed, identity, 2))
                male, age = bool(person.random() < 0.5), int(person.integers(20, 90))
                present = {finding for finding in FINDINGS if rng.random() < prevalence}
                name = f"{identity:08d}_{number % IMAGES_PER_PATIENT:03d}.png"
                Image.fromarray(phantom(image_size, present, male, age, person, rng)).save(scratch / "images" / name)
                labels = "|".join(sorted(present)) or "No Finding"
                place = number % IMAGES_PER_PATIENT
                entries.append((name, labels, place, identity, age, "MF"[not male], "PA", image_size, image_size, 0.14, 0.14))
                names.append(name)
            (scratch / {"train": "train_val_list.txt", "test": "test_list.txt"}[split]).write_text("\n".join(names) + "\n")
        with open(scratch / "Data_Entry_2017.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(entries)
    return folder


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 inside ``distance < 1``, 0 outside, with an edge of ``width``."""
    return _step(1 - distance, width)


def _step(value: np.ndarray, width: float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(value / width, -30, 30)))


def _smoothed(noise: np.ndarray) -> np.ndarray:
    """Mean of 3 x 3 neighbours, scaled to the deviation of ``noise``."""
    moved = [np.roll(noise, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.sum(moved, axis=0) / 3
