"""Writes simulated recordings in the on-disk format of real ones (the format is this project's, the
camera's calibration WoodScape's). ``models/bev_fusion/README.md`` describes it.

Recording ``index`` of a world depends on (seed, index) alone: whoever writes it, in whatever order.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.readers.driving import META_FIELDS, rig_to_json
from datamodules.simulated.driving.camera import LIGHTS, Lens, Weather, make_camera, make_lens, make_weather, render
from datamodules.simulated.driving.scene import Scene, make_scene, occupancy, visible_only
from datamodules.simulated.driving.ultrasound import Acoustics, make_rig, measured_traces
from datamodules.simulated.worlds import SPLIT_STARTS
from models.bev_fusion.echoes import UltrasonicRig
from models.bev_fusion.geometry import BevGrid, Camera
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other recordings
COLDEST, HOTTEST = -15.0, 40.0  # air, degrees Celsius
THERMOMETER = 2.0  # standard deviation of what the car takes the air for


@dataclass(frozen=True)
class World:
    """What the recordings of a set share. ``tilt`` (degrees) and ``offset`` (metres) are standard deviations of how far the
    ultrasonic sensors of a recording are from where the calibration says."""

    camera: Camera
    rig: UltrasonicRig
    grid: BevGrid
    samples: int = 512
    visible: bool = False
    tilt: float = 0.0
    offset: float = 0.0
    seed: int = 0
    air: Acoustics = Acoustics()


def write_recordings(
    root: str,
    grid: dict[str, Any],
    train: int = 20_000,
    val: int = 1000,
    test: int = 2000,
    width: int = 640,
    height: int = 480,
    sensors: int = 4,
    cross_echoes: bool = True,
    samples: int = 512,
    visible: bool = False,
    tilt: float = 0.0,
    offset: float = 0.0,
    seed: int = 0,
    processes: int = 1,
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already; whole or not at all.

    Args:
        grid: rows, cols, cell and x_bumper of the labels.
        train, val, test: number of recordings, a scene each; light conditions take turns.
        width: of the images in pixels.
        height: of the images in pixels.
        sensors: of the bumper.
        cross_echoes: whether a sensor also hears its neighbours' pulses.
        samples: of each trace, at 16 kHz.
        visible: label with 255 what lies behind the first surface the camera could see.
        tilt, offset: see :class:`World`.
        processes: that write side by side; they do not change what is written.
    """
    layout = BevGrid(**grid)
    world = World(
        make_camera(width, height),
        make_rig(sensors, layout.x_bumper, cross_echoes),
        layout,
        samples,
        visible,
        tilt,
        offset,
        seed,
    )
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"driving_{stable_hash([WORLD, sizes, repr(world)])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        for name in ("calibration", "images", "ultrasonic", "labels", "splits", "scenes"):
            (temporary / name).mkdir()
        record = rig_to_json(world.camera, world.rig, layout, visible)
        (temporary / "calibration" / "simulated.json").write_text(json.dumps(record, indent=1))
        jobs = [(world, SPLIT_STARTS[split] + n, str(temporary)) for split, size in sizes.items() for n in range(size)]
        if processes > 1:
            with multiprocessing.get_context("fork").Pool(processes) as pool:
                rows = pool.starmap(_write, jobs, chunksize=16)
        else:
            rows = [_write(*job) for job in jobs]
        with (temporary / "meta.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, META_FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        for split, size in sizes.items():
            names = [_key(SPLIT_STARTS[split] + n) for n in range(size)]
            if names:
                (temporary / "splits" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


@dataclass(frozen=True)
class Recording:
    """One simulated moment: what is there, and what the sensors make of it."""

    scene: Scene
    weather: Weather
    celsius: float  # true
    thermometer: float  # as measured
    rig: UltrasonicRig  # where the sensors really are

    def image(self, lens: Lens, world: World) -> np.ndarray:
        return render(self.scene, self.weather, lens, world.grid.x_bumper)

    def traces(self, world: World, rng: np.random.Generator) -> np.ndarray:
        return measured_traces(rng, self.scene, self.rig, self.celsius, world.samples, world.air)

    def label(self, world: World) -> np.ndarray:
        label = occupancy(self.scene, world.grid)
        return visible_only(label, world.grid, world.camera.translation[:2]) if world.visible else label


def record(world: World, index: int) -> tuple[Recording, np.random.Generator]:
    """Recording ``index``, and the generator that goes on to its ultrasonic noise."""
    rng = np.random.default_rng((world.seed, index))
    scene = make_scene(rng, world.grid.x_bumper)
    weather = make_weather(rng, LIGHTS[index % len(LIGHTS)])
    celsius = float(rng.uniform(COLDEST, HOTTEST))
    thermometer = celsius + float(rng.normal(0, THERMOMETER))
    tilt, dx, dy = rng.normal(0, 1, 3) * (world.tilt, world.offset, world.offset)
    return Recording(scene, weather, celsius, thermometer, world.rig.shifted(tilt, (dx, dy))), rng


def _write(world: World, index: int, folder: str) -> dict[str, Any]:
    """Write the files of one recording; its row of meta.csv."""
    recording, rng = record(world, index)
    root, key = Path(folder), _key(index)
    Image.fromarray(recording.image(_lens(world.camera), world)).save(root / "images" / f"{key}.png", compress_level=1)
    np.savez(
        root / "ultrasonic" / f"{key}.npz",
        traces=(recording.traces(world, rng) * 255 + 0.5).astype(np.uint8),
        pairs=np.array(world.rig.pairs),
        sample_rate=world.rig.sample_rate,
        first_sample=world.rig.first_sample,
    )
    Image.fromarray(recording.label(world).astype(np.uint8)).save(root / "labels" / f"{key}.png")
    scene = {
        "scene": _plain(recording.scene._asdict()),
        "weather": _plain(recording.weather._asdict()),
        "celsius": recording.celsius,
    }
    (root / "scenes" / f"{key}.json").write_text(json.dumps(scene))
    return {
        "id": key,
        "rig": "simulated",
        "scene": key,
        "indoor": int(recording.weather.indoor),
        "light": recording.weather.name,
        "weather": "clear",
        "temperature_c": f"{recording.thermometer:.2f}",
    }


@lru_cache(maxsize=2)
def _lens(camera: Camera) -> Lens:
    return make_lens(camera)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def _key(index: int) -> str:
    return f"{index:010d}"
