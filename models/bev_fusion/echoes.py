"""Ultrasonic echoes as bird's-eye maps (our definition; the paper's is not established).

An echo tells a range, not a direction: each trace is laid out as arcs (ellipses for cross echoes) and the overlap of
several pairs narrows the place down.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from models.bev_fusion.geometry import BevGrid
from models.errors import UserError


class UltrasonicRig(NamedTuple):
    """The sensors of a bumper; hashable, so that what depends on it can be cached.

    positions: (x, y, z) of each sensor, metres. yaw: where each looks, radians. pairs: (emitter, receiver) of each trace.
    az_half: angle at which a sensor's amplitude halves. az_max: beyond it a sensor is deaf. sample_rate in Hz;
    first_sample: the number of the first stored sample after emission; full_scale: the ADC's largest value.
    """

    positions: tuple[tuple[float, ...], ...]
    yaw: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]
    az_half: float = math.radians(35)
    az_max: float = math.radians(75)
    sample_rate: float = 16000.0
    first_sample: float = 0.0
    full_scale: float = 1.0

    def mirrored(self) -> UltrasonicRig:
        """The rig of the mirrored world (y to -y), its sensors and pairs in reversed order."""
        last = len(self.positions) - 1
        return self._replace(
            positions=tuple((x, -y, z) for x, y, z in reversed(self.positions)),
            yaw=tuple(-yaw for yaw in reversed(self.yaw)),
            pairs=tuple((last - i, last - j) for i, j in reversed(self.pairs)),
        )

    def shifted(self, degrees: float, offset: tuple[float, float]) -> UltrasonicRig:
        """The rig as it is when every sensor is turned by ``degrees`` and moved by ``offset`` (x, y) metres."""
        return self._replace(
            positions=tuple((x + offset[0], y + offset[1], z) for x, y, z in self.positions),
            yaw=tuple(yaw + math.radians(degrees) for yaw in self.yaw),
        )

    def heard_by(self, sensor: int) -> np.ndarray:
        """(P,) bool: the pairs that are silent when this sensor neither sends nor receives."""
        return np.array([sensor in pair for pair in self.pairs], dtype=bool)


Number = TypeVar("Number", float, Tensor)


def speed_of_sound(celsius: Number) -> Number:
    """Metres per second in air."""
    return 331.3 * (1 + celsius / 273.15) ** 0.5


def pair_geometry(rig: UltrasonicRig, grid: BevGrid) -> tuple[Tensor, Tensor]:
    """Path length D (P, rows, cols) in metres of the echo of each cell, and the pair's sensitivity w there in [0, 1]."""
    centres = grid.centres()
    positions = np.asarray(rig.positions)[:, :2]
    offsets = centres - positions[:, None, None]  # (S, rows, cols, 2)
    reach = np.hypot(offsets[..., 0], offsets[..., 1])
    angle = np.arctan2(offsets[..., 1], offsets[..., 0]) - np.asarray(rig.yaw)[:, None, None]
    gain = directivity(angle, rig.az_half, rig.az_max)
    i, j = np.asarray(rig.pairs).T
    return torch.from_numpy(reach[i] + reach[j]), torch.from_numpy(gain[i] * gain[j])


def directivity(angle: np.ndarray, az_half: float, az_max: float) -> np.ndarray:
    """Amplitude factor of one sensor at an angle (radians, any turn) from its axis: 1/2 at az_half, 0 beyond az_max."""
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    return np.where(np.abs(angle) <= az_max, 2.0 ** -((angle / az_half) ** 2), 0.0)


def read_traces(
    traces: Tensor, distance: Tensor, speed: Tensor, sample_rate: float, first_sample: float, range_gain: float = 0.0
) -> Tensor:
    """The amplitude each pair heard from each cell: linear interpolation of its trace at the echo's arrival.

    Args:
        traces: (B, P, N).
        distance: (P, rows, cols) path lengths in metres.
        speed: (B,) of sound.
        range_gain: gamma of the factor (D/2)^gamma; 0 for none.

    Returns (B, P, rows, cols); 0 where the arrival is not among the samples.
    """
    batch, pairs, samples = traces.shape
    flat = distance.flatten(1)
    # float64 only for the sample's number: in float32 half a micrometre per metre would be lost, nothing in the gather.
    arrival = flat[None] * (sample_rate / speed.to(flat))[:, None, None] - first_sample
    inside = (arrival >= 0) & (arrival <= samples - 1)
    arrival = arrival.clamp(0, samples - 1)
    before = arrival.floor().clamp(max=max(samples - 2, 0))
    part = (arrival - before).to(traces)
    index = before.long()
    left = traces.gather(2, index)
    right = traces.gather(2, (index + 1).clamp(max=samples - 1))
    value = torch.where(inside, torch.lerp(left, right, part), traces.new_zeros(()))
    if range_gain:
        value = value * ((flat / 2) ** range_gain).to(traces)
    return value.view(batch, pairs, *distance.shape[1:])


def combine_pairs(amplitude: Tensor, weight: Tensor) -> Tensor:
    """(B, P, rows, cols) amplitudes and (P, rows, cols) sensitivities to (B, 3, rows, cols): weighted maximum, weighted
    mean, coverage."""
    weighted = amplitude * weight
    mean = weighted.sum(1) / (weight.sum(0) + 1e-6)
    coverage = 1 - (1 - weight).prod(0)
    return torch.stack([weighted.amax(1), mean, coverage.expand_as(mean)], dim=1)


def pulse_traces(
    times: Tensor, amplitudes: Tensor, samples: int, sample_rate: float, first_sample: float, sigma: float = 0.25e-3
) -> Tensor:
    """Traces (P, samples) of sensors that report distances only: a Gaussian pulse for each echo.

    ``times`` (P, E) in seconds and ``amplitudes`` (P, E), padded with NaN.
    """
    at = (torch.arange(samples, dtype=torch.float64) + first_sample) / sample_rate
    pulses = amplitudes[..., None] * torch.exp(-((at - times[..., None]) ** 2) / (2 * sigma**2))
    return torch.where(torch.isfinite(times)[..., None], pulses, 0.0).sum(1)


class EchoMap(nn.Module):
    """Traces to maps on the device of the traces; path lengths and sensitivities are kept for each rig.

    Args:
        grid: of the map.
        range_gain: see :func:`read_traces`.
    """

    KEPT = 64  # rigs

    def __init__(self, grid: BevGrid, range_gain: float = 0.0):
        super().__init__()
        self.grid, self.range_gain = grid, range_gain
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def geometry(self, rig: UltrasonicRig, device: torch.device) -> tuple[Tensor, Tensor]:
        """Path lengths (float64) and sensitivities (float32) of a rig, computed once."""
        if not rig.pairs:
            raise UserError(
                "there is nothing to hear: the calibration has no 'ultrasonic' part, or the recording no pairs. "
                "To use the camera alone, set module.model.modality=camera_only."
            )
        key = (rig, str(device))
        if key not in self._kept:
            if len(self._kept) >= self.KEPT:
                self._kept.pop(next(iter(self._kept)))
            distance, weight = pair_geometry(rig, self.grid)
            self._kept[key] = (distance.to(device), weight.float().to(device))
        return self._kept[key]

    def forward(self, traces: Tensor, rigs: list[UltrasonicRig], celsius: Tensor) -> Tensor:
        """Traces (B, P, N), divided by the ADC's full scale, with the rig and air temperature (B,) of each sample:
        (B, 3, rows, cols). A rig of fewer than P pairs leaves the last traces unread."""
        out = traces.new_empty(len(rigs), 3, self.grid.rows, self.grid.cols)
        for rig in dict.fromkeys(rigs):
            rows = [row for row, other in enumerate(rigs) if other == rig]
            distance, weight = self.geometry(rig, traces.device)
            speed = speed_of_sound(celsius[rows].double())
            heard = read_traces(
                traces[rows, : len(rig.pairs)], distance, speed, rig.sample_rate, rig.first_sample, self.range_gain
            )
            out[rows] = combine_pairs(heard, weight)
        return out
