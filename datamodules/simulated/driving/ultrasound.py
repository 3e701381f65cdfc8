"""Echoes of a scene at an ultrasonic array: time of flight, opening angles, attenuation, occlusion, cross echoes, noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.simulated.driving.scene import Scene
from models.bev_fusion.echoes import UltrasonicRig, directivity, speed_of_sound

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Acoustics:
    """Constants of the simulated air and sensors.

    el_half: elevation at which the amplitude halves, radians. occlusion: factor of a leg that crosses another object.
    r_min: nearest range in the spreading law, metres. edge: factor of a box's vertical edge. attenuation: per metre of path.
    pulse_sigma: seconds. ring, ring_tau: amplitude and decay (s) of the emitter's ringing.
    gain: what the receiver multiplies by. clutter: Rayleigh scale of the ground's echoes after ``clutter_from`` seconds.
    noise: of each quadrature. multiple: share of an echo nearer than 1 m that comes back a second time. burst: how often a
    foreign sensor is heard.
    """

    el_half: float = math.radians(25)
    occlusion: float = 0.1
    r_min: float = 0.1
    edge: float = 0.3
    attenuation: float = 0.16
    pulse_sigma: float = 0.12e-3
    ring: float = 1.0
    ring_tau: float = 0.25e-3
    gain: float = 2.5
    clutter: float = 0.006
    clutter_from: float = 6e-3
    noise: float = 0.004
    multiple: float = 0.15
    burst: float = 0.02


def make_rig(sensors: int = 4, x_bumper: float = -0.95, cross_echoes: bool = True) -> UltrasonicRig:
    """The default bumper: sensors from left to right, the outer ones turned outwards; with or without neighbours' echoes."""
    y = np.linspace(0.7, -0.7, sensors)
    positions = tuple((float(x_bumper + 0.08 * (v / 0.7) ** 2), float(v), 0.5) for v in y)
    yaw = tuple(float(math.pi - math.radians(30) * v / 0.7) for v in y)
    pairs = [(i, i) for i in range(sensors)]
    if cross_echoes:
        pairs += [(i, j) for i in range(sensors) for j in (i - 1, i + 1) if 0 <= j < sensors]
    return UltrasonicRig(positions, yaw, tuple(pairs))


def echoes(scene: Scene, rig: UltrasonicRig, celsius: float, air: Acoustics) -> tuple[Array, Array]:
    """Time of flight (P, objects) in seconds and amplitude (P, objects) of every object for every pair."""
    sensors = np.asarray(rig.positions)
    i, j = np.asarray(rig.pairs).T
    middle = (sensors[i] + sensors[j]) / 2
    objects = len(scene.boxes) + len(scene.cylinders)
    time, amplitude = np.zeros((len(i), objects)), np.zeros((len(i), objects))
    speed = float(speed_of_sound(celsius))
    for number in range(objects):
        point, on_edge, radius = _reflection(scene, number, middle)
        legs = [_leg(sensors[s], np.asarray(rig.yaw)[s], point, rig, air) for s in (i, j)]
        path = legs[0][0] + legs[1][0]
        reach = np.maximum(path / 2, air.r_min)
        if radius is None:
            spread = np.where(on_edge, air.edge, 1.0) / (2 * reach)
        else:
            spread = np.sqrt(radius / (radius + reach)) / (2 * reach)
        shadow = [np.where(_occluded(scene, number, sensors[s], point), air.occlusion, 1.0) for s in (i, j)]
        time[:, number] = path / speed
        amplitude[:, number] = (
            scene.reflectivity[number] * legs[0][1] * legs[1][1] * shadow[0] * shadow[1] * spread
            * np.exp(-air.attenuation * path)
        )  # fmt: skip
    return time, amplitude


def clean_traces(time: Array, amplitude: Array, rig: UltrasonicRig, samples: int, air: Acoustics) -> Array:
    """(P, samples) envelopes of the echoes, and the ringing of sensors that hear themselves."""
    at = (np.arange(samples) + rig.first_sample) / rig.sample_rate
    traces = _pulses(at, time, amplitude, air.pulse_sigma)
    direct = np.array([i == j for i, j in rig.pairs])
    traces[direct] += air.ring * np.exp(-at / air.ring_tau)
    return traces


def measured_traces(
    rng: np.random.Generator, scene: Scene, rig: UltrasonicRig, celsius: float, samples: int, air: Acoustics
) -> NDArray[np.float32]:
    """(P, samples) in [0, 1]: what the receiver makes of the echoes, with clutter, multiples, foreign bursts and noise."""
    time, amplitude = echoes(scene, rig, celsius, air)
    at = (np.arange(samples) + rig.first_sample) / rig.sample_rate
    near = time * float(speed_of_sound(celsius)) / 2 < 1
    envelope = clean_traces(time, amplitude, rig, samples, air)
    envelope += _pulses(at, 2 * time, np.where(near, air.multiple * amplitude, 0.0), air.pulse_sigma)
    envelope *= air.gain
    envelope += np.where(at > air.clutter_from, rng.rayleigh(air.clutter, envelope.shape), 0.0)
    foreign = rng.random(len(envelope)) < air.burst
    when, loud = rng.uniform(at[0], at[-1], len(envelope)), rng.uniform(0.1, 0.8, len(envelope))
    envelope += _pulses(at, when[:, None], np.where(foreign, loud, 0.0)[:, None], air.pulse_sigma)
    noise = rng.normal(0, air.noise, (2, *envelope.shape))
    return np.hypot(envelope + noise[0], noise[1]).clip(0, 1).astype(np.float32)


def _pulses(at: NDArray, time: Array, amplitude: Array, sigma: float) -> Array:
    """(P, samples) sums of Gaussian pulses at ``time`` (P, E)."""
    return (amplitude[..., None] * np.exp(-((at - time[..., None]) ** 2) / (2 * sigma**2))).sum(1)


def _reflection(scene: Scene, number: int, middle: Array) -> tuple[Array, NDArray[np.bool_], float | None]:
    """The object's points (P, 3) nearest to ``middle``, whether they lie on a box's vertical edge, a cylinder's radius."""
    if number < len(scene.boxes):
        cx, cy, yaw, lx, ly, z0, h = scene.boxes[number]
        cos, sin = np.cos(yaw), np.sin(yaw)
        dx, dy = middle[:, 0] - cx, middle[:, 1] - cy
        along, across = dx * cos + dy * sin, dy * cos - dx * sin
        a, b = along.clip(-lx / 2, lx / 2), across.clip(-ly / 2, ly / 2)
        point = np.stack([cx + a * cos - b * sin, cy + a * sin + b * cos, middle[:, 2].clip(z0, z0 + h)], axis=1)
        return point, (np.abs(along) > lx / 2) & (np.abs(across) > ly / 2), None
    cx, cy, r, z0, h = scene.cylinders[number - len(scene.boxes)]
    away = middle[:, :2] - (cx, cy)
    distance = np.hypot(away[:, 0], away[:, 1])
    point = (cx, cy) + away * np.minimum(1.0, r / np.maximum(distance, 1e-12))[:, None]
    return np.concatenate([point, middle[:, 2:].clip(z0, z0 + h)], axis=1), np.zeros(len(middle), dtype=bool), float(r)


def _leg(sensor: Array, yaw: Array, point: Array, rig: UltrasonicRig, air: Acoustics) -> tuple[Array, Array]:
    """Length (P,) of the way between sensors and points, and the sensor's sensitivity in that direction."""
    way = point - sensor
    flat = np.hypot(way[:, 0], way[:, 1])
    azimuth = np.arctan2(way[:, 1], way[:, 0]) - yaw
    elevation = np.arctan2(way[:, 2], flat)
    gain = directivity(azimuth, rig.az_half, rig.az_max) * 2.0 ** -((elevation / air.el_half) ** 2)
    return np.linalg.norm(way, axis=1), gain


def _occluded(scene: Scene, source: int, sensor: Array, point: Array) -> NDArray[np.bool_]:
    """Whether another object that is not lower than both ends stands on the horizontal line from sensor to point (P, 3)."""
    start, way = sensor[:, :2], (point - sensor)[:, :2]
    length = np.hypot(way[:, 0], way[:, 1])
    end = np.maximum(1 - 1e-6 / np.maximum(length, 1e-6), 0)  # stop short of the reflecting surface itself
    low = np.minimum(sensor[:, 2], point[:, 2])
    hit = np.zeros(len(start), dtype=bool)
    for number, (cx, cy, yaw, lx, ly, z0, h) in enumerate(scene.boxes):
        if number == source:
            continue
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        o, d, half = (start - (cx, cy)) @ turn, way @ turn, np.array([lx, ly]) / 2
        d = np.where(d == 0, 1e-300, d)
        a, b = (-half - o) / d, (half - o) / d
        near, far = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
        hit |= (np.maximum(near, 0) <= np.minimum(far, end)) & (z0 + h >= low)
    for number, (cx, cy, r, z0, h) in enumerate(scene.cylinders, start=len(scene.boxes)):
        if number == source:
            continue
        o = start - (cx, cy)
        along = np.clip(-(o * way).sum(1) / np.maximum((way * way).sum(1), 1e-300), 0, end)
        nearest = o + along[:, None] * way
        hit |= ((nearest * nearest).sum(1) <= r * r) & (z0 + h >= low)
    return hit
