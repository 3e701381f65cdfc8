"""Reads recordings of a fisheye camera and ultrasonic sensors:

``calibration/<rig>.json``, ``images/<id>.png``, ``ultrasonic/<id>.npz``, ``labels/<id>.png``, ``splits/<split>.txt``,
``meta.csv``. The format is ours; the camera's part of the calibration is WoodScape's.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datamodules.readers.base import BadSample, inside
from datamodules.readers.images import open_image, open_rgb, read_file
from datamodules.readers.text import csv_rows, read_json, read_text
from models.bev_fusion.echoes import UltrasonicRig, pulse_traces
from models.bev_fusion.geometry import BevGrid, Camera, camera_from_json, camera_to_json
from models.errors import UserError

META_FIELDS = ("id", "rig", "scene", "indoor", "light", "weather", "temperature_c")
ECHO_LISTS = ("echo_times", "echo_amplitudes")
LARGEST_ARRAY = 2**26  # bytes of one array of an npz
MOST_ARRAYS = 16  # of an npz
COLDEST, HOTTEST = -90.0, 100.0  # degrees Celsius that are believed
LAYOUT = (
    "expected: calibration/<rig>.json  images/<id>.png  ultrasonic/<id>.npz  labels/<id>.png  splits/{train,val,test}.txt  "
    "meta.csv (see models/bev_fusion/README.md)"
)


class Meta(NamedTuple):
    """A row of meta.csv."""

    rig: str
    light: str
    celsius: float


class Rig(NamedTuple):
    """A calibration file. ``ultrasonic`` has no pairs yet: each recording names its own. ``grid`` and ``visible_only`` (ours)
    tell what the labels show, where the file says so."""

    camera: Camera
    ultrasonic: UltrasonicRig | None
    grid: BevGrid | None
    visible_only: bool


class Echoes(NamedTuple):
    """``traces`` (P, N) float32 in [0, 1] and the rig with the pairs and clock that belong to them."""

    traces: np.ndarray
    rig: UltrasonicRig


def read_meta(root: Path) -> dict[str, Meta]:
    """Rows of meta.csv by id. Raises UserError naming the line that is wrong."""
    path = root / "meta.csv"
    if not path.is_file():
        raise UserError(f"{root} holds no recordings: there is no {path.name}; {LAYOUT}.")
    meta: dict[str, Meta] = {}
    for where, row in csv_rows(path, ("id", "rig", "light", "temperature_c")):
        try:
            celsius = float(row["temperature_c"])
        except (TypeError, ValueError):
            raise UserError(f"{where}: temperature_c is no number in {row}.") from None
        if not COLDEST < celsius < HOTTEST:
            raise UserError(f"{where}: temperature_c must be between {COLDEST:g} and {HOTTEST:g}, this is {celsius:g}.")
        if row["id"] in meta:
            raise UserError(f"{where}: the recording {row['id']} has a row already.")
        try:
            inside("", row["id"], row["rig"])
        except BadSample as error:
            raise UserError(f"{where}: {error}.") from None
        meta[row["id"]] = Meta(row["rig"], row["light"] or "", celsius)
    return meta


def read_splits(root: Path) -> dict[str, list[str]]:
    """Ids of each split that has a file. Raises UserError without ``train`` and any other, or when splits share an id."""
    splits = {path.stem: read_text(path).split() for path in sorted((root / "splits").glob("*.txt"))}
    if not splits:
        raise UserError(f"{root} has no splits; {LAYOUT}.")
    if empty := [split for split, ids in splits.items() if not ids]:
        raise UserError(f"{root}/splits/{empty[0]}.txt names no recording.")
    owner: dict[str, str] = {}
    for split, ids in splits.items():
        for key in ids:
            if key in owner and owner[key] == split:
                raise UserError(f"{root}/splits/{split}.txt names the recording {key} twice.")
            if owner.setdefault(key, split) != split:
                raise UserError(f"{root}/splits: the recording {key} is in {owner[key]} and in {split}. Split by scene.")
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def read_rig(root: Path, name: str) -> Rig:
    """``calibration/<name>.json``. Raises UserError naming the file and what it lacks."""
    path = root / "calibration" / f"{name}.json"
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(
            f"{path}: a calibration is an object with 'intrinsic' and 'extrinsic', this is a {type(record).__name__}."
        )
    camera, ultrasonic = camera_from_json(record, str(path)), None
    if part := record.get("ultrasonic"):
        try:
            ultrasonic = UltrasonicRig(
                positions=tuple(tuple(map(float, position)) for position in part["positions"]),
                yaw=tuple(map(float, part["yaw"])),
                pairs=(),
                az_half=math.radians(part["az_half_deg"]),
                az_max=math.radians(part["az_max_deg"]),
                full_scale=float(part["full_scale"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: 'ultrasonic' needs positions, yaw, az_half_deg, az_max_deg, full_scale ({error})."
            ) from None
        if len(ultrasonic.positions) != len(ultrasonic.yaw) or any(len(p) != 3 for p in ultrasonic.positions):
            raise UserError(f"{path}: 'ultrasonic' needs a yaw and a position (x, y, z) for every sensor.")
        if not min(ultrasonic.az_half, ultrasonic.az_max, ultrasonic.full_scale) > 0:
            raise UserError(f"{path}: az_half_deg, az_max_deg and full_scale of 'ultrasonic' must be above 0.")
        if not np.isfinite([*ultrasonic.yaw, *(v for position in ultrasonic.positions for v in position)]).all():
            raise UserError(f"{path}: a position or yaw of 'ultrasonic' is not finite.")
    try:
        grid = BevGrid(**record["grid"]) if record.get("grid") else None
    except TypeError:
        raise UserError(f"{path}: 'grid' needs rows, cols, cell and x_bumper, this is {record['grid']}.") from None
    return Rig(camera, ultrasonic, grid, bool(record.get("visible_only", False)))


def rig_to_json(camera: Camera, rig: UltrasonicRig, grid: BevGrid, visible_only: bool) -> dict[str, Any]:
    """What :func:`read_rig` reads; traces are stored as 8 bits."""
    record = camera_to_json(camera)
    record["ultrasonic"] = {
        "positions": rig.positions,
        "yaw": rig.yaw,
        "az_half_deg": math.degrees(rig.az_half),
        "az_max_deg": math.degrees(rig.az_max),
        "full_scale": 255,
    }
    record["grid"] = {"rows": grid.rows, "cols": grid.cols, "cell": grid.cell, "x_bumper": grid.x_bumper}
    record["visible_only"] = visible_only
    return record


def read_image(root: Path, key: str) -> np.ndarray:
    """(H, W, 3) uint8. Raises BadSample."""
    path = next((p for p in (root / "images" / f"{key}{end}" for end in (".png", ".jpg")) if p.is_file()), None)
    if path is None:
        raise BadSample(f"missing image: there is no images/{key}.png")
    return np.asarray(open_rgb(path, official=True))  # the calibration is of the stored pixels


def read_label(root: Path, key: str, grid: BevGrid, num_classes: int) -> np.ndarray:
    """(rows, cols) uint8, classes beyond obstacle joined to it where ``num_classes`` is 2. Raises BadSample."""
    label = np.asarray(open_image(root / "labels" / f"{key}.png"))
    if label.shape != (grid.rows, grid.cols) or label.dtype != np.uint8:
        raise BadSample(f"label: labels/{key}.png is {label.shape} {label.dtype}, the grid {grid.rows} x {grid.cols} uint8")
    known = label != 255
    if num_classes == 2:
        label = np.where(known, np.minimum(label, 1), label)
    if known.any() and label[known].max() >= num_classes:
        raise BadSample(f"label: labels/{key}.png has the class {label[known].max()}, there are {num_classes}")
    return label


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an npz. Raises BadSample, also before more than LARGEST_ARRAY bytes are unpacked."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(read_file(path, "ultrasonic"))) as archive:  # np.load takes other files too
            for entry in archive.infolist()[:MOST_ARRAYS]:
                if entry.file_size > LARGEST_ARRAY:
                    raise BadSample(f"ultrasonic: {path.name} has {entry.file_size} bytes in {entry.filename}")
                data = io.BytesIO(archive.read(entry))
                version = np.lib.format.read_magic(data)
                shape, _, dtype = np.lib.format.read_array_header_1_0(data) if version == (1, 0) else (None, None, None)
                if shape is None or dtype.hasobject or math.prod(shape) * dtype.itemsize > LARGEST_ARRAY:
                    raise BadSample(f"ultrasonic: {path.name} has no plain array in {entry.filename}")
                data.seek(0)
                arrays[entry.filename.removesuffix(".npy")] = np.load(data)
    except BadSample:
        raise
    except Exception as error:  # zipfile and NumPy raise nearly anything on damaged bytes
        raise BadSample(f"ultrasonic: {path.name} cannot be read ({error})") from None
    return arrays


def read_echoes(root: Path, key: str, rig: UltrasonicRig, samples: int, pulse_sigma: float = 0.25e-3) -> Echoes:
    """``ultrasonic/<key>.npz``: traces, or lists of echoes (which become traces of ``samples``). Raises BadSample."""
    name = f"ultrasonic/{key}.npz"
    arrays = _read_arrays(root / name)
    if "pairs" not in arrays:
        raise BadSample(f"ultrasonic: {name} has no 'pairs'")
    if "traces" not in arrays and not set(ECHO_LISTS) <= arrays.keys():
        raise BadSample(f"ultrasonic: {name} has neither 'traces' nor 'echo_times' and 'echo_amplitudes'")
    try:
        rate, first = (float(arrays.get(clock, getattr(rig, clock))) for clock in ("sample_rate", "first_sample"))
        pairs: Any = arrays["pairs"].astype(np.int64, casting="same_kind")
        heard = [arrays[entry].astype(np.float64) for entry in (("traces",) if "traces" in arrays else ECHO_LISTS)]
    except (TypeError, ValueError) as error:
        raise BadSample(f"ultrasonic: {name} has something that is no number ({error})") from None
    if not (0 < rate < math.inf and math.isfinite(first)):
        raise BadSample(f"ultrasonic: {name} has the sample_rate {rate:g} and the first_sample {first:g}")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.min(initial=0) < 0 or pairs.max(initial=0) >= len(rig.yaw):
        raise BadSample(f"ultrasonic: {name} has pairs {pairs.shape} beyond the rig's {len(rig.yaw)} sensors")
    if any(part.ndim != 2 or len(part) != len(pairs) or part.shape != heard[0].shape or not part.size for part in heard):
        shapes = " and ".join(str(part.shape) for part in heard)
        raise BadSample(f"ultrasonic: {name} has {'traces' if len(heard) == 1 else 'echoes'} {shapes} for {len(pairs)} pairs")
    if len(heard) == 1:
        traces = (heard[0] / rig.full_scale).astype(np.float32)
    else:
        times, loud = map(torch.from_numpy, heard)
        traces = pulse_traces(times, loud / rig.full_scale, samples, rate, first, pulse_sigma).float().numpy()
    if not np.isfinite(traces).all():
        raise BadSample(f"ultrasonic: {name} has numbers that are not finite")
    rig = rig._replace(pairs=tuple(map(tuple, pairs.tolist())), sample_rate=rate, first_sample=first)
    return Echoes(np.maximum(traces, 0), rig)
