"""What stands behind the car? The stage ``predict`` on recordings, and the film of a simulated drive-in."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.order import BatchRequest
from datamodules.readers.video import write_mp4
from datamodules.simulated.driving.camera import LIGHTS, make_lens, make_weather, render
from datamodules.simulated.driving.scene import Scene, make_scene, occupancy
from datamodules.simulated.driving.ultrasound import Acoustics, measured_traces
from datamodules.transforms.driving import Sample
from experiments.figures import bev_fusion
from experiments.prediction.base import write
from experiments.run import parts
from experiments.run.directory import Run
from models.batch import IMAGE, KEY, SKIPPED
from models.errors import UserError

log = logging.getLogger("run")


@torch.inference_mode()
def bev(run: Run, split: str = "test", count: int = 8) -> dict[str, Any]:
    """Maps of ``count`` recordings spread over a split: an image each, and ``predictions.json`` with the nearest obstacle."""
    data = parts.datamodule(run)
    if split not in data.splits:
        raise UserError(f"predict.split: there is no split '{split}' in {data.root}; there are {', '.join(data.splits)}.")
    dataset, module = data.splits[split], parts.trained_module(run, data.facts())
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64))
    batch = dataset[BatchRequest(rows, 0, 0)]
    data.report_skipped(split, batch.pop(SKIPPED))
    if KEY not in batch:
        raise UserError(f"predict: none of the {len(rows)} recordings of {split} could be read.")
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    predicted, echoes = module(batch).classes.argmax(1).cpu().numpy(), module.echoes(batch)
    folder = run.dir / "predictions"
    folder.mkdir(exist_ok=True)
    centres = data.grid.centres()
    ranges = np.hypot(centres[..., 0] - data.grid.x_bumper, centres[..., 1])
    nearest = []
    for number, key in enumerate(batch[KEY]):
        heard = None if echoes is None else echoes[number, 0].cpu().numpy()
        image = batch[IMAGE][number].permute(1, 2, 0).cpu().numpy()
        panels = bev_fusion.panels(image, heard, predicted[number], batch["bev_label"][number].cpu().numpy())
        Image.fromarray(panels).save(folder / f"{key}.png")
        occupied = ranges[predicted[number] > 0]
        nearest.append({"id": key, "nearest_m": float(occupied.min()) if len(occupied) else None})
    write(run, nearest)
    return {"recordings": len(nearest)}


@torch.inference_mode()
def drive_in(
    run: Run, light: str = "night", frames: int = 60, fps: int = 10, seed: int = 0, start: float = 3.0, turn: float = 12.0
) -> dict[str, Any]:
    """Reverse towards a simulated scene with the rig of the data and write ``drive_in_<light>.mp4``: camera view, echoes,
    prediction and truth side by side.

    Args:
        light: day, dusk, night or glare. frames, fps: of the video.
        start: metres the car has yet to go at the first frame. turn: degrees it turns on the way.
    """
    if light not in LIGHTS:
        raise UserError(f"predict.light: there is no '{light}'; there are {', '.join(LIGHTS)}.")
    if frames < 1 or fps < 1:
        raise UserError(f"predict: frames={frames} and fps={fps} must be at least 1.")
    data = parts.datamodule(run)
    module = parts.trained_module(run, data.facts())
    any_split = next(iter(data.splits.values()))
    first = any_split.sample(0)
    lens = make_lens(first.camera)
    rng = np.random.default_rng((seed, 1))
    target = make_scene(rng, data.grid.x_bumper)
    weather = make_weather(rng, light)
    panels = []
    for left in np.linspace(1, 0, frames):
        scene = _seen_from(target, start * left, np.radians(turn) * left)
        image = render(scene, weather, lens, data.grid.x_bumper)
        if first.rig.pairs:
            traces = measured_traces(rng, scene, first.rig, 15.0, data.samples, Acoustics())
        else:  # images alone, for modality=camera_only
            traces = first.traces
        label = np.minimum(occupancy(scene, data.grid), data.num_classes - 1 if data.num_classes == 2 else 3)
        batch = data.batch_of([Sample(image, first.camera, traces, first.rig, 15.0, label)])
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        predicted, echoes = module(batch).classes[0].argmax(0).cpu().numpy(), module.echoes(batch)
        heard = None if echoes is None else echoes[0, 0].cpu().numpy()
        panels.append(bev_fusion.panels(image / 255, heard, predicted, label))
    path = run.dir / f"drive_in_{light}.mp4"
    write_mp4(path, np.stack(panels), fps)
    log.info("the drive-in is in %s", path)
    return {"video": path.name, "frames": frames}


def _seen_from(scene: Scene, distance: float, angle: float) -> Scene:
    """The scene as the car sees it ``distance`` metres before it arrives, still turned by ``angle``."""
    cos, sin = np.cos(angle), np.sin(angle)
    boxes, cylinders = scene.boxes.copy(), scene.cylinders.copy()
    for objects in (boxes, cylinders):
        x, y = objects[:, 0].copy(), objects[:, 1].copy()
        objects[:, 0], objects[:, 1] = x * cos - y * sin - distance, x * sin + y * cos
    boxes[:, 2] += angle
    return scene._replace(boxes=boxes, cylinders=cylinders)
