"""Long simulated videos with sound: what they show is seen for a moment, in a small place, and is announced by a chirp.

Written as ActivityNet is laid out: comma-separated lists, class names, and one mp4 with an AAC track for each video. A video is
a row of equal slots. In a few of them a shape with the stripes of its class is seen while a chirp sounds; in more of them a
shape with any stripes is seen in silence, in some the chirp sounds and nothing is seen, and the rest is empty. So seeing alone
does not tell which moment matters, nor does hearing alone, and only a close look tells the stripes: in halved frames they are
gone.
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datamodules.readers.video import write_mp4
from datamodules.simulated.shapes import COLOURS, draw_shape
from datamodules.simulated.worlds import SPLIT_STARTS
from models.io import atomic_directory, stable_hash

WORLD = 2  # raise it when the same arguments would give other videos
PERIOD = 4  # of the stripes, pixels: gone when frames are halved


def _wave(distance: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.sin(2 * np.pi * (distance + 0.5) / PERIOD)


PATTERNS = {  # brightness between -1 and 1 at (row, column)
    "horizontal": lambda row, column: _wave(row),
    "vertical": lambda row, column: _wave(column),
    "rising": lambda row, column: _wave(row + column),
    "falling": lambda row, column: _wave(row - column),
    "checked": lambda row, column: _wave(row) * _wave(column) * 2,
    "plain": lambda row, column: 0.0 * row,
}
CLASSES = tuple(PATTERNS)
OUTLINES = ("circle", "square", "triangle", "star", "flower", "heart", "cross", "arrow")  # tell nothing of the class
RATE = 8000  # Hz, of the sound
SUPERSAMPLE = 3
RADIUS = 0.16  # of a shape, in frame sides
SHADES = [colour for name, colour in COLOURS.items() if name != "brown"]


class Slot(NamedTuple):
    """One slot of a video: the class of the stripes that are seen (-1: none), whether it chirps, where (row, column, in frame
    sides)."""

    shape: int
    chirps: bool
    place: tuple[float, float]


class Video(NamedTuple):
    label: int
    slots: list[Slot]


def make_video(seed: int, index: int, slots: int = 12, events: int = 2, decoys: int = 4, alarms: int = 2) -> Video:
    """What happens in video ``index``: a pure function of the arguments. Decoys are of any class, so they tell nothing."""
    rng = np.random.default_rng((seed, index))
    label = int(rng.integers(len(CLASSES)))
    kinds = rng.permutation([0] * events + [1] * decoys + [2] * alarms + [3] * (slots - events - decoys - alarms))
    timeline = []
    for kind in kinds:
        shape = label if kind == 0 else int(rng.integers(len(CLASSES))) if kind == 1 else -1
        row, column = rng.uniform(0.16, 0.84, 2)
        timeline.append(Slot(shape, bool(kind in (0, 2)), (float(row), float(column))))
    return Video(label, timeline)


def render(seed: int, index: int, video: Video, side: int, frames_per_slot: int) -> NDArray[np.uint8]:
    """(slots * frames_per_slot, side, side, 3) RGB."""
    rng = np.random.default_rng((seed, index, 1))
    low, high = rng.uniform(20, 110, (2, 3))
    ramp = np.linspace(0, 1, side)[:, None, None] * (high - low) + low
    turn = int(rng.integers(4))
    ground = np.rot90(np.broadcast_to(ramp, (side, side, 3)), turn).astype(np.uint8)
    frames = np.empty((len(video.slots) * frames_per_slot, side, side, 3), np.uint8)
    for number, slot in enumerate(video.slots):
        span = slice(number * frames_per_slot, (number + 1) * frames_per_slot)
        frames[span] = ground
        if slot.shape < 0:
            continue
        colour, outline = SHADES[int(rng.integers(len(SHADES)))], OUTLINES[int(rng.integers(len(OUTLINES)))]
        angle = float(rng.uniform(-0.3, 0.3))
        drift = rng.uniform(-0.02, 0.02, 2)
        for step in range(frames_per_slot):
            row, column = np.array(slot.place) + step * drift
            frames[span][step] = _with_shape(ground, outline, CLASSES[slot.shape], colour, (column, row), angle)
    return frames


def _with_shape(
    ground: NDArray[np.uint8], outline: str, pattern: str, colour: tuple, centre: tuple[float, float], angle: float
) -> NDArray[np.uint8]:
    """The ground with a shape on it, filled with light and dark stripes of its pattern; smooth outline, sharp stripes."""
    side = len(ground)
    mask = Image.new("L", (side * SUPERSAMPLE,) * 2)
    place = (centre[0] * side * SUPERSAMPLE, centre[1] * side * SUPERSAMPLE)
    draw_shape(ImageDraw.Draw(mask), outline, 255, place, RADIUS * side * SUPERSAMPLE, angle)
    opaque = np.asarray(mask.resize((side, side), Image.Resampling.BOX), np.float32)[..., None] / 255
    row, column = np.mgrid[:side, :side]
    light = (0.65 + 0.45 * PATTERNS[pattern](row, column)[..., None]) * np.array(colour)
    return (ground * (1 - opaque) + light.clip(0, 255) * opaque).astype(np.uint8)


def sound(seed: int, index: int, video: Video) -> NDArray[np.float32]:
    """(slots * RATE,) mono in [-1, 1]: noise and a hum of the video's own, and a rising chirp in the slots that have one."""
    rng = np.random.default_rng((seed, index, 2))
    time = np.arange(len(video.slots) * RATE) / RATE
    wave = 0.02 * rng.standard_normal(len(time)) + 0.08 * np.sin(2 * np.pi * rng.uniform(90, 220) * time)
    within = time[:RATE]
    for number, slot in enumerate(video.slots):
        if slot.chirps:
            start = rng.uniform(700, 900)
            chirp = np.sin(2 * np.pi * (start * within + 500 * within**2)) * np.sin(np.pi * within) ** 0.5
            wave[number * RATE : (number + 1) * RATE] += rng.uniform(0.2, 0.4) * chirp
    return wave.clip(-1, 1).astype(np.float32)


def write_audio_visual(
    root: str,
    train: int = 480,
    val: int = 48,
    test: int = 300,
    side: int = 48,
    slots: int = 12,
    fps: int = 3,
    silent: float = 0.0,
    seed: int = 0,
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already, whole or not at all.

    Args:
        train, val, test: number of videos.
        side: of the square frames, in pixels, even.
        slots: length in seconds.
        fps: frames per second.
        silent: share of videos without a sound track.
        seed: of the world.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"audio_visual_{stable_hash([WORLD, sizes, side, slots, fps, silent, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        (temporary / "videos").mkdir()
        (temporary / "classInd.txt").write_text("\n".join(CLASSES) + "\n")
        for split, count in sizes.items():
            numbers = range(SPLIT_STARTS[split], SPLIT_STARTS[split] + count)
            with ThreadPoolExecutor(2) as pool:  # the codecs work outside the interpreter's lock
                rows = list(pool.map(lambda n: _write_one(temporary, seed, n, side, slots, fps, silent), numbers))
            with (temporary / f"actnet_{split}_split.txt").open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
    return folder


def _write_one(folder: Path, seed: int, index: int, side: int, slots: int, fps: int, silent: float) -> list:
    video = make_video(seed, index, slots)
    frames = render(seed, index, video, side, fps)
    mute = np.random.default_rng((seed, index, 3)).random() < silent
    write_mp4(folder / "videos" / f"v_{index:010d}.mp4", frames, fps, None if mute else sound(seed, index, video), RATE)
    return [f"v_{index:010d}", len(frames), video.label]
