"""Phantoms of chest radiographs in ChestX-ray14's files: anatomy that varies with the patient, and findings at random places.

A phantom is grey: a body, two lungs with ribs and a noisy texture, spine, heart, diaphragm. Sex, age and the view change it
without being findings: shoulders and breasts, the density of bones, the size of lungs and heart. Each finding has a size and a
place; a tube is no finding of the table. The report names the findings that are there and those that are not.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datamodules.simulated.worlds import SPLIT_STARTS
from models.io import atomic_directory, stable_hash

WORLD = 2  # raise it when the same arguments would give other images
FINDINGS = ("Cardiomegaly", "Consolidation", "Effusion", "Nodule", "Pneumothorax")
STRUCTURES = ("lungs", "heart", "effusion", "pneumothorax", "tube")
COLUMNS = (
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
    "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
)  # fmt: skip
IMAGES_PER_PATIENT = 2
SUPINE = 0.3  # share of the images taken in front
AREA = 0.5  # opacity from which a pixel belongs to a structure
SIDES = {-1: "right", 1: "left"}  # of the patient, who faces the reader


class Person(NamedTuple):
    """``male`` and ``age`` of the patient; ``anatomy`` decides on the rest, the same for all images of the patient."""

    male: bool
    age: int
    anatomy: np.random.Generator


class Phantom(NamedTuple):
    """``pixels`` (size, size) uint8, ``masks`` (size, size) bool of each of :data:`STRUCTURES`, and the ``report``."""

    pixels: np.ndarray
    masks: dict[str, np.ndarray]
    report: str


def phantom(size: int, findings: set[str], person: Person, supine: bool, rng: np.random.Generator) -> Phantom:
    """One image.

    Args:
        size: side in pixels.
        findings: of :data:`FINDINGS`.
        person: the patient.
        supine: taken in front (AP): a larger heart shadow, less air, more often a tube.
        rng: decides on the pose, the findings' places and the noise.
    """
    patient = person.anatomy
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    x = (x - 0.5 - rng.uniform(-0.03, 0.03)) / rng.uniform(0.94, 1.06)
    y = (y - 0.5 - rng.uniform(-0.03, 0.03)) / rng.uniform(0.94, 1.06)
    broad = (0.46 if person.male else 0.39) + patient.uniform(-0.02, 0.02)
    body = _soft((x / broad) ** 4 + ((y - 0.25) / 0.75) ** 4, 0.06)
    values = 0.45 * body
    half_width, half_height = 0.125 + patient.uniform(-0.012, 0.012), 0.27 + patient.uniform(-0.02, 0.02)
    dome = (0.21 if supine else 0.25) + patient.uniform(-0.02, 0.02)
    lungs = {}
    for side in SIDES:
        centre = side * (0.185 + patient.uniform(-0.008, 0.008))
        oval = _soft(((x - centre) / half_width) ** 2 + ((y + 0.02) / half_height) ** 2, 0.08)
        lungs[side] = oval * _step(dome + 0.35 * np.abs(x - centre) - y, 0.01)
        values = values - 0.30 * lungs[side]
        if not person.male:
            values += 0.05 * _soft(((x - 1.1 * centre) / 0.11) ** 2 + ((y - 0.16) / 0.10) ** 2, 0.2)
    both = np.maximum(lungs[-1], lungs[1])
    texture = _smoothed(rng.normal(size=(size, size)).astype(np.float32))
    values += 0.02 * both * texture
    bone = 0.16 * (1.1 - person.age / 100)
    slope, phase = patient.uniform(0.25, 0.4), patient.uniform(0, 1)
    ribs = np.clip(np.cos(2 * np.pi * ((y + slope * np.abs(x)) * 9 + phase)), 0, 1) ** 3
    values += bone * ribs * body * (np.abs(x) < 0.36)
    values += (0.12 + bone) * _soft((x / 0.035) ** 2, 0.2) * body
    radius = (0.115 if "Cardiomegaly" not in findings else 0.18) * (1.08 if supine else 1) + rng.uniform(-0.01, 0.01)
    heart = _soft(((x - 0.045) / radius) ** 2 + ((y - 0.10) / (0.85 * radius)) ** 2, 0.10)
    values += 0.26 * heart
    masks = {"lungs": both, "heart": heart}
    said = ["the heart is enlarged" if "Cardiomegaly" in findings else "the heart is not enlarged"]
    side = int(rng.choice(list(SIDES)))
    if "Consolidation" in findings:
        cx, cy, radius = side * rng.uniform(0.15, 0.22), rng.uniform(-0.18, 0.12), rng.uniform(0.09, 0.13)
        cloud = _soft(((x - cx) / radius) ** 2 + ((y - cy) / (0.8 * radius)) ** 2, 0.5)
        values += lungs[side] * cloud * (0.26 + 0.06 * texture)
        said.append(f"there is a consolidation in the {SIDES[side]} {_height(cy)} lung")
    else:
        said.append("there is no consolidation")
    side, effusion = int(rng.choice(list(SIDES))), np.zeros_like(values)
    if "Effusion" in findings:
        level = 0.22 - rng.uniform(0.06, 0.16)
        effusion = lungs[side] * _step(y - level + 0.6 * np.abs(np.abs(x) - 0.16) - 0.05, 0.015)
        values += 0.34 * effusion
        said.append(f"there is a {'large' if level < 0.11 else 'small'} {SIDES[side]} effusion")
    else:
        said.append("there is no effusion")
    side = int(rng.choice(list(SIDES)))
    if "Nodule" in findings:
        cx, cy, radius = side * rng.uniform(0.12, 0.25), rng.uniform(-0.2, 0.1), rng.uniform(0.035, 0.055)
        values += 0.36 * _soft(((x - cx) / radius) ** 2 + ((y - cy) / radius) ** 2, 0.3)
        said.append(f"there is a nodule in the {SIDES[side]} {_height(cy)} lung")
    else:
        said.append("there is no nodule")
    side, air = int(rng.choice(list(SIDES))), np.zeros_like(values)
    if "Pneumothorax" in findings:
        rim = ((x - side * 0.185) / (0.68 * half_width)) ** 2 + ((y + 0.02) / (0.72 * half_height)) ** 2
        air = lungs[side] * (1 - _soft(rim, 0.05))
        values -= 0.20 * air
        values += 0.22 * lungs[side] * np.exp(-(((rim - 1) / 0.12) ** 2))
        said.append(f"there is a {SIDES[side]} pneumothorax")
    else:
        said.append("there is no pneumothorax")
    tube = np.zeros_like(values)
    if rng.random() < (0.5 if supine else 0.1):
        bend, end = rng.uniform(-0.06, 0.06), rng.uniform(0.0, 0.25)
        tube = _soft(((x - bend * (y + 0.5)) / 0.012) ** 2, 0.4) * (y < end)
        values += 0.4 * tube
        said.append("a tube is seen")
    masks |= {"effusion": effusion, "pneumothorax": air, "tube": tube}
    values = values * rng.uniform(0.85, 1.15) + rng.uniform(-0.03, 0.03) + 0.012 * rng.normal(size=(size, size))
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Phantom(pixels, {name: mask > AREA for name, mask in masks.items()}, ". ".join(said) + ".")


def _height(y: float) -> str:
    return "upper" if y < -0.03 else "lower"


def nih_phantoms(
    root: str,
    train: int = 2000,
    val: int = 300,
    test: int = 600,
    image_size: int = 64,
    prevalence: float = 0.25,
    seed: int = 0,
) -> Path:
    """Write phantoms as ChestX-ray14 is laid out, with masks and reports; returns their folder. Nothing is written twice.

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
        entries, reports = [], []
        for folder_of_file in ("images", *(f"masks/{structure}/images" for structure in STRUCTURES)):
            (scratch / folder_of_file).mkdir(parents=True)
        for split, count in counts.items():
            names = []
            for number in range(count):
                identity, place = SPLIT_STARTS[split] + number // IMAGES_PER_PATIENT, number % IMAGES_PER_PATIENT
                rng = np.random.default_rng((seed, SPLIT_STARTS[split] + number, 1))
                anatomy = np.random.default_rng((seed, identity, 2))
                person = Person(bool(anatomy.random() < 0.5), int(anatomy.integers(20, 90)), anatomy)
                present = {finding for finding in FINDINGS if rng.random() < prevalence}
                supine = bool(rng.random() < SUPINE)
                drawn, name = phantom(image_size, present, person, supine, rng), f"{identity:08d}_{place:03d}.png"
                Image.fromarray(drawn.pixels).save(scratch / "images" / name)
                for structure, mask in drawn.masks.items():
                    Image.fromarray(mask).save(scratch / "masks" / structure / "images" / name)
                labels, sex, view = "|".join(sorted(present)) or "No Finding", "FM"[person.male], "AP" if supine else "PA"
                entries.append((name, labels, place, identity, person.age, sex, view, image_size, image_size, 0.14, 0.14))
                reports.append((f"images/{name}", drawn.report))
                names.append(name)
            (scratch / {"train": "train_val_list.txt", "test": "test_list.txt"}[split]).write_text("\n".join(names) + "\n")
        for table, rows in (("Data_Entry_2017", [COLUMNS, *entries]), ("reports", [("path", "report"), *reports])):
            with open(scratch / f"{table}.csv", "w", newline="") as file:
                csv.writer(file).writerows(rows)
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
