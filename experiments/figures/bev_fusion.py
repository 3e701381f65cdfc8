"""Figures of bird's-eye occupancy: what camera and ultrasonic sensors give, what was predicted, what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from experiments.figures.canvas import figure, save

COLOURS = np.full((256, 3), 150, np.uint8)  # of classes; unknown is grey
COLOURS[:4] = [(24, 26, 34), (235, 110, 40), (240, 220, 70), (90, 160, 240)]
PANEL = 240  # pixels
GAP, HEADING = 8, 22
TITLES = ("camera", "echoes", "predicted", "there")


def panels(image: np.ndarray, echoes: np.ndarray | None, predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """One sample side by side, (height, width, 3) uint8 with even sides: camera view, echo map, prediction, truth; in the maps
    the bumper is on top and the car's left is left.

    Args:
        image: (H, W, 3) in [0, 1]. echoes: (rows, cols) in [0, 1] or None. predicted, label: (rows, cols) classes.
    """
    canvas = Image.new("RGB", (4 * PANEL + 5 * GAP, PANEL + HEADING + GAP), (250, 250, 250))
    draw = ImageDraw.Draw(canvas)
    heard = np.zeros_like(label, np.float32) if echoes is None else echoes
    views = ((np.asarray(image) * 255).astype(np.uint8), _heat(heard), COLOURS[predicted], COLOURS[label])
    for number, (title, view) in enumerate(zip(TITLES, views, strict=True)):
        panel = Image.fromarray(np.ascontiguousarray(view))
        scale = PANEL / max(panel.size)
        panel = panel.resize((round(panel.width * scale), round(panel.height * scale)), Image.Resampling.NEAREST)
        left = GAP + number * (PANEL + GAP)
        canvas.paste(panel, (left, HEADING + (PANEL - panel.height) // 2))
        draw.text((left, 5), title, fill=(60, 60, 60))
    return np.asarray(canvas)


def samples(examples: Sequence[Mapping], path: Path) -> Path:
    """One row for each example: 'title', 'image', 'echoes', 'predicted', 'label' as :func:`panels` takes them."""
    rows = []
    for example in examples:
        row = Image.fromarray(panels(example["image"], example["echoes"], example["predicted"], example["label"]))
        ImageDraw.Draw(row).text((row.width - 70, 5), example["title"], fill=(180, 60, 30))
        rows.append(np.asarray(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
    return path


def bars(values: Mapping[str, float], path: Path) -> Path:
    """IoU by light, distance and fault."""
    drawing, ((axis,),) = figure(figsize=(7, 0.28 * len(values) + 1))
    names = list(values)[::-1]
    axis.barh(names, [values[name] for name in names], color=["#c06030" if "robust" in name else "#4070a0" for name in names])
    for place, name in enumerate(names):
        axis.text(values[name] + 0.5, place, f"{values[name]:.1f}", va="center", fontsize=7)
    axis.set(xlabel="IoU of what is not free, percent", xlim=(0, max(100 * 0.2, 1.15 * max(values.values()))))
    return save(drawing, path)


def grid_of_scores(lights: Sequence[str], bands: Sequence[str], scores: Mapping[str, np.ndarray], path: Path) -> Path:
    """Each score as a table of light and distance, percent; empty where there was nothing to find.

    Args:
        scores: by name (lights, bands), NaN for none.
    """
    drawing, axes = figure(1, len(scores), figsize=(2.7 * len(scores), 0.5 * len(lights) + 1.2))
    for axis, (name, values) in zip(axes[0], scores.items(), strict=True):
        axis.imshow(np.nan_to_num(values), vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else "black")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(bands)), [band.replace("_", " ") for band in bands], fontsize=7, rotation=20)
        axis.set_yticks(range(len(lights)), lights if axis is axes[0, 0] else [""] * len(lights), fontsize=8)
    return save(drawing, path)


def robustness(sound: float, faults: Mapping[str, float], path: Path) -> Path:
    """IoU over how wrong something is, a curve from ``sound`` (nothing wrong) on for each ``<what>_<how much>_<unit>``, a panel
    for each unit; what has no strength (a black image, a dead sensor) as level lines."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    levels: dict[str, float] = {}
    for name, value in faults.items():
        match name.split("_"):
            case [fault, amount, unit] if amount.replace(".", "", 1).isdigit():
                unit = f"{unit} Celsius" if fault == "thermometer" else unit
                curves.setdefault(unit, {}).setdefault(fault, [(0.0, sound)]).append((float(amount), value))
            case _:
                levels[name.replace("_", " ")] = value
    panels_ = max(len(curves), 1)
    drawing, axes = figure(1, panels_, figsize=(3.2 * panels_, 2.8), sharey=True)
    for axis, (unit, by_what) in zip(axes[0], curves.items(), strict=False):
        for fault, points in by_what.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=fault)
        axis.set_xlabel(f"wrong by, {unit}")
    for axis in axes[0]:
        for (name, value), colour in zip(levels.items(), ("#444444", "#aa3377"), strict=False):
            axis.axhline(value, linestyle="--", linewidth=1, color=colour, label=name)
        axis.legend(fontsize=6)
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("IoU of what is not free, percent")
    return save(drawing, path)


def _heat(values: np.ndarray) -> np.ndarray:
    """Black over red to white."""
    v = np.sqrt(np.clip(values, 0, 1))[..., None] * 3
    return (np.clip(np.concatenate([v, v - 1, v - 2], axis=-1), 0, 1) * 255).astype(np.uint8)
