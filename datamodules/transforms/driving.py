"""Random changes to a recording that leave its label true (this project's, not the paper's)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from models.bev_fusion.echoes import UltrasonicRig
from models.bev_fusion.geometry import Camera


class Sample(NamedTuple):
    """A recording: image (H, W, 3) uint8 or float in [0, 1], traces (P, N) in [0, 1], label (rows, cols)."""

    image: np.ndarray
    camera: Camera
    traces: np.ndarray
    rig: UltrasonicRig
    celsius: float
    label: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """Strengths; 0 turns a change off. All draws come from the generator it is called with.

    Args:
        contrast: relative range of brightness and contrast.
        gamma: (low, high) exponent.
        blur: probability of a blurred image.
        camera_dropout: probability of a black image.
        sensor_dropout: probability of one dead ultrasonic sensor: every pair it sends or receives for is silent.
        pair_dropout: probability of each pair being silent by itself.
        gain: (low, high) factor of the traces.
        noise: standard deviation of what is added to the traces.
        time_jitter: samples by which the traces are shifted at most.
        degrees: by which the camera's calibration may be turned.
        metres: by which it may be moved.
        mirror: probability of exchanging left and right.
    """

    contrast: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    blur: float = 0.1
    camera_dropout: float = 0.1
    sensor_dropout: float = 0.0
    pair_dropout: float = 0.1
    gain: tuple[float, float] = (0.7, 1.3)
    noise: float = 0.01
    time_jitter: int = 1
    degrees: float = 0.5
    metres: float = 0.01
    mirror: float = 0.5

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = self._image(sample.image, rng)
        traces = self._traces(sample.traces, sample.rig, rng)
        turn = np.radians(rng.uniform(-self.degrees, self.degrees, 3))
        camera = sample.camera.shifted(turn, rng.uniform(-self.metres, self.metres, 3))
        changed = sample._replace(image=image, traces=traces, camera=camera)
        return mirrored(changed) if rng.random() < self.mirror else changed

    def _image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.camera_dropout:
            return np.zeros(image.shape, np.float32)
        contrast, brightness = 1 + rng.uniform(-self.contrast, self.contrast, 2)
        exponent = math.exp(rng.uniform(math.log(self.gamma[0]), math.log(self.gamma[1])))
        levels = (np.arange(256, dtype=np.float32) / 255) ** exponent * brightness
        levels = ((levels - 0.5) * contrast + 0.5).clip(0, 1).astype(np.float32)
        image = levels[image]
        if rng.random() < self.blur:
            image = ndimage.gaussian_filter(image, (1, 1, 0))
        return image

    def _traces(self, traces: np.ndarray, rig: UltrasonicRig, rng: np.random.Generator) -> np.ndarray:
        loud = rng.uniform(*self.gain, (len(traces), 1)) * (rng.random((len(traces), 1)) >= self.pair_dropout)
        if self.sensor_dropout and rig.pairs and rng.random() < self.sensor_dropout:
            loud[rig.heard_by(int(rng.integers(len(rig.yaw))))] = 0
        moved = int(rng.integers(-self.time_jitter, self.time_jitter + 1))
        traces = np.roll(traces, moved, axis=1)
        if moved > 0:
            traces[:, :moved] = 0
        elif moved < 0:
            traces[:, moved:] = 0
        noise = self.noise * rng.standard_normal(traces.shape, dtype=np.float32)
        return (traces * loud + noise).clip(0, 1).astype(np.float32)


def mirrored(sample: Sample) -> Sample:
    """The recording of the world with left and right exchanged; exact, for image, echoes and label belong together."""
    return sample._replace(
        image=sample.image[:, ::-1],
        camera=sample.camera.mirrored(),
        traces=np.ascontiguousarray(sample.traces[::-1]),
        rig=sample.rig.mirrored(),
        label=sample.label[:, ::-1],
    )
