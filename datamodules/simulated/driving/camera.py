"""What a rear fisheye camera sees of a scene: rays through its lens, light and shadow, exposure, noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from datamodules.simulated.driving.scene import Scene, blocked, cast
from models.bev_fusion.geometry import Camera

Array = NDArray[np.float64]
LIGHTS = ("day", "dusk", "night", "glare")
AMBIENT = {"day": 0.35, "dusk": 0.12, "night": 0.01, "glare": 0.35, "indoor": 0.25}
SUN = {"day": 1.0, "dusk": 0.25, "night": 0.0, "glare": 1.0, "indoor": 0.0}
REVERSING = 0.6  # intensity of each reversing lamp, at night
CEILING = 0.8  # of each ceiling lamp
LAMP_CONE = 0.5  # cosine of the half angle that a reversing lamp lights
TARGET, LOWEST, HIGHEST = 0.35, 0.5, 60.0  # exposure: what the median becomes, and the limits of the factor
FULL_WELL = 400.0  # photons at white: shot noise
READ_NOISE = 0.004
GAMMA = ((np.arange(2**16) / (2**16 - 1)) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)  # linear light to 8 bits


class Weather(NamedTuple):
    """The light of one image. ``name`` as in meta.csv; ``sun`` unit direction towards it; ``glare`` its strength, 0 for
    none; ``dirt`` (N, 3) discs (x, y, radius) in units of the image's width."""

    name: str
    indoor: bool
    sun: Array
    glare: float
    asphalt: float
    lines: bool
    dirt: Array
    seed: int


def make_camera(width: int, height: int, pitch: float = math.radians(32), fov: float = math.radians(190)) -> Camera:
    """The default rear camera: 0.9 m up, looking back and down by ``pitch``; its circle fills the image's width."""
    b = pitch
    axes = np.array([[0, 1, 0], [math.sin(b), 0, -math.cos(b)], [-math.cos(b), 0, -math.sin(b)]])  # rows: X, Y, Z in vehicle
    # Equidistant-like Kannala-Brandt lens with the mild terms of common automotive lenses.
    k = (0.02, -0.004, 0.0006, -0.0001)
    edge = fov / 2
    rho = edge + k[0] * edge**3 + k[1] * edge**5 + k[2] * edge**7 + k[3] * edge**9
    f = width / 2 / rho
    return Camera(
        model="kannala_brandt",
        k=k,
        scale=(f, f),
        centre=((width - 1) / 2, (height - 1) / 2),
        width=width,
        height=height,
        quaternion=tuple(Rotation.from_matrix(axes.T).as_quat().tolist()),
        translation=(-0.85, 0.0, 0.9),
        fov=fov,
    )


def make_weather(rng: np.random.Generator, name: str) -> Weather:
    """Draw what a light condition leaves open."""
    indoor = name in ("day", "dusk") and rng.random() < 0.1
    azimuth = rng.uniform(-np.pi, np.pi)
    elevation = rng.uniform(0.35, 1.2) if name == "day" else rng.uniform(0.08, 0.35)
    glare = 0.0
    if name == "glare":  # a low sun, or an opposing headlight, behind the car and in the image
        azimuth, elevation = np.pi + rng.uniform(-0.6, 0.6), rng.uniform(0.02, 0.3)
        glare = rng.uniform(2, 10)
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    spots = int(rng.integers(0, 4)) if rng.random() < 0.15 else 0
    dirt = np.stack([rng.random(spots), rng.random(spots), rng.uniform(0.02, 0.08, spots)], axis=1)
    return Weather(name, indoor, sun, glare, rng.uniform(0.15, 0.3), bool(rng.random() < 0.5), dirt, int(rng.integers(2**31)))


class Lens(NamedTuple):
    """The rays of a camera's pixels, cached by who renders: ``rays`` (R, 3) in the vehicle frame of the ``seen`` pixels
    (H, W), ``theta`` (R,) their angles to the axis."""

    rays: Array
    seen: NDArray[np.bool_]
    theta: Array
    origin: Array


def make_lens(camera: Camera) -> Lens:
    """Unproject every pixel once."""
    v, u = np.meshgrid(np.arange(camera.height), np.arange(camera.width), indexing="ij")
    rays, seen = camera.unproject(np.stack([u, v], axis=-1).astype(np.float64))
    theta = np.arccos(rays[..., 2].clip(-1, 1))
    return Lens(camera.to_vehicle(rays)[seen], seen, theta[seen], np.asarray(camera.translation))


def render(scene: Scene, weather: Weather, lens: Lens, x_bumper: float = -0.95) -> NDArray[np.uint8]:
    """(H, W, 3) 8-bit image."""
    rng = np.random.default_rng(weather.seed)
    light = radiance(scene, weather, lens, x_bumper).astype(np.float32)
    exposure = float(np.clip(TARGET / max(float(np.median(light)), 1e-9), LOWEST, HIGHEST))
    light *= (exposure * np.cos(0.45 * lens.theta) ** 2)[:, None].astype(np.float32)
    light += np.sqrt(light / np.float32(FULL_WELL)) * rng.standard_normal(light.shape, dtype=np.float32)
    if weather.name == "night":
        light += np.float32(READ_NOISE * exposure) * rng.standard_normal(light.shape, dtype=np.float32)
    image = np.zeros((*lens.seen.shape, 3), dtype=np.float32)
    image[lens.seen] = light
    _soil(image, weather.dirt)
    return GAMMA[(image.clip(0, 1) * (len(GAMMA) - 1) + 0.5).astype(np.int32)]


def radiance(scene: Scene, weather: Weather, lens: Lens, x_bumper: float) -> Array:
    """(R, 3) linear light along the lens's rays."""
    name = "indoor" if weather.indoor else weather.name
    ambient, sun = AMBIENT[name], SUN[name]
    hits = cast(scene, lens.origin, lens.rays)
    out = np.empty((len(hits.t), 3))
    sky = hits.id < 0
    up = lens.rays[sky, 2:].clip(0, 1)
    out[sky] = ambient * ((1 - up) * (0.9, 0.95, 1.0) + up * (0.5, 0.65, 0.95))
    solid = ~sky
    points = lens.origin + hits.t[solid, None] * lens.rays[solid]
    normal, ids = hits.normal[solid], hits.id[solid]
    lit = np.full(len(points), ambient)
    start = points + 1e-4 * normal
    if sun:
        facing = np.maximum(normal @ weather.sun, 0)
        some = facing > 0
        facing[some] *= ~blocked(scene, start[some], weather.sun)
        lit += sun * facing
    for place, strength, axis in _lamps(name, x_bumper):
        lit += _lamp(scene, start, normal, place, strength, axis)
    out[solid] = _albedo(scene, weather, points, normal, ids) * lit[:, None]
    if weather.glare:
        angle = np.degrees(np.arccos((lens.rays @ weather.sun).clip(-1, 1)))
        flare = np.exp(-(angle**2) / (2 * 3.0**2)) + 0.15 * np.exp(-(angle**2) / (2 * 20.0**2))
        out += weather.glare * flare[:, None]
    return out


def _lamps(name: str, x_bumper: float) -> list[tuple[Array, float, Array | None]]:
    """(place, intensity, axis of the cone or None)."""
    if name == "night":
        axis = np.array([-math.cos(0.35), 0.0, -math.sin(0.35)])
        return [(np.array([x_bumper, y, 0.7]), REVERSING, axis) for y in (0.6, -0.6)]
    if name == "indoor":
        return [(np.array([x_bumper + x, y, 2.8]), CEILING, None) for x in (-1.5, -4.5) for y in (-2.0, 2.0)]
    return []


def _lamp(scene: Scene, points: Array, normal: Array, place: Array, strength: float, axis: Array | None) -> Array:
    way = place - points
    distance = np.linalg.norm(way, axis=1)
    way /= distance[:, None]
    lit = strength * np.maximum((normal * way).sum(1), 0) / (distance**2 + 0.01)
    if axis is not None:
        lit[-(way @ axis) < LAMP_CONE] = 0
    some = lit > 1e-4
    lit[some] *= ~blocked(scene, points[some], way[some], distance[some])
    return lit


def _albedo(scene: Scene, weather: Weather, points: Array, normal: Array, ids: NDArray) -> Array:
    """(R, 3): asphalt with grain and parking lines, objects in their colour, boxes with stripes."""
    out = np.empty((len(points), 3))
    ground = ids == 0
    x, y = points[ground, 0], points[ground, 1]
    grain = sum(_hash(x, y, 0.05 * 2**octave, weather.seed) / 2**octave for octave in range(3)) / 1.75
    tone = weather.asphalt * (0.7 + 0.6 * grain)
    if weather.lines:
        phase = weather.seed % 250 / 100
        tone = np.where(np.abs((y + phase) % 2.5 - 1.25) < 0.05, 0.6, tone)
    out[ground] = tone[:, None]
    things = ~ground
    if things.any():
        number = ids[things] - 1
        p, n = points[things], normal[things]
        stripes = 0.75 + 0.25 * np.sign(np.sin(2 * np.pi * (p[:, 2] + 0.5 * (p[:, 0] * n[:, 1] - p[:, 1] * n[:, 0])) / 0.3))
        stripes = np.where(number < len(scene.boxes), stripes, 1.0)
        out[things] = scene.colours[number] * stripes[:, None]
    return out


def _hash(x: Array, y: Array, cell: float, seed: int) -> Array:
    """Value noise in [0, 1]: the same number for a whole square of side ``cell``."""
    a = np.floor(x / cell).astype(np.int64).astype(np.uint32)
    b = np.floor(y / cell).astype(np.int64).astype(np.uint32)
    h = a * np.uint32(0x9E3779B1) ^ b * np.uint32(0x85EBCA77) ^ np.uint32(seed)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (h ^ (h >> np.uint32(15))).astype(np.float64) / 2**32


def _soil(image: NDArray[np.float32], dirt: Array) -> None:
    """Blurred dark discs on the lens, in place."""
    height, width = image.shape[:2]
    v, u = np.mgrid[:height, :width]
    for x, y, r in dirt:
        away = np.hypot(u - x * width, v - y * height) / (r * width)
        image *= (1 - 0.8 / (1 + np.exp(np.minimum(8 * (away - 1), 50))))[..., None]
