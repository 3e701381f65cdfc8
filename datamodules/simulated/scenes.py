"""Captioned scenes of coloured shapes: deterministic by (seed, index), compositional, quick to draw."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (245, 205, 40),
    "purple": (136, 58, 190), "orange": (245, 130, 32), "cyan": (40, 190, 210), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow", "hexagon")
SIZES = {"small": 0.16, "medium": 0.24, "large": 0.34}  # radius in units of the image's side
BACKGROUNDS = {"grey": (120, 120, 120), "black": (18, 18, 18), "brown": (110, 74, 46), "pink": (238, 178, 196)}
PLACES = {"left": (0.3, 0.5), "right": (0.7, 0.5), "top": (0.5, 0.3), "bottom": (0.5, 0.7), "centre": (0.5, 0.5)}
CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


class Thing(NamedTuple):
    """One shape of a scene; ``x, y, radius`` in units of the image's side, ``turn`` in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    turn: float


class Scene(NamedTuple):
    """``things[0]`` is the main object: it gives the class and the short caption."""

    things: tuple[Thing, ...]
    background: str
    captions: tuple[str, ...]
    label: int


def scene(seed: int, index: int) -> Scene:
    """The scene number ``index`` of the world ``seed``."""
    rng = np.random.default_rng([seed, index])
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    background = str(rng.choice(list(BACKGROUNDS)))
    size, place = str(rng.choice(list(SIZES))), str(rng.choice(list(PLACES)))
    things = [_thing(rng, shape, colour, size, place)]
    relation = None
    if rng.random() < 0.5:
        place, other_place, relation = _PAIRS[rng.integers(len(_PAIRS))]
        other_colour = str(rng.choice([c for c in COLOURS if c != colour]))
        things = [
            _thing(rng, shape, colour, "medium", place),
            _thing(rng, str(rng.choice(SHAPES)), other_colour, "small", other_place),
        ]
    captions = _captions(rng, things, background, place, relation)
    return Scene(tuple(things), background, captions, CLASS_NAMES.index(f"{colour} {shape}"))


_PAIRS = (
    ("left", "right", "to the left of"), ("right", "left", "to the right of"),
    ("top", "bottom", "above"), ("bottom", "top", "below"),
)  # fmt: skip


def _thing(rng: np.random.Generator, shape: str, colour: str, size: str, place: str) -> Thing:
    x, y = PLACES[place]
    jitter = rng.uniform(-0.05, 0.05, 2)
    radius = SIZES[size] * rng.uniform(0.9, 1.1)
    return Thing(shape, colour, size, x + jitter[0], y + jitter[1], radius, rng.uniform(-0.3, 0.3))


def _captions(rng, things: list[Thing], background: str, place: str, relation: str | None) -> tuple[str, ...]:
    """A short raw caption, then three longer ones, as recaptioned web data has them."""
    main = things[0]
    named = f"{main.colour} {main.shape}"
    if relation is None:
        where = "in the centre" if place == "centre" else f"at the {place}"
        long = f"a {main.size} {named} {where} on a {background} background"
        scene_like = f"the picture shows one {named}, {main.size} in size, {where}; behind it everything is {background}"
        plain = f"a {background} image with a {main.size} {named} {where}"
    else:
        other = f"{things[1].colour} {things[1].shape}"
        long = f"a {named} {relation} a small {other} on a {background} background"
        scene_like = f"the picture shows two objects: a {named} {relation} a {other}, both before a {background} background"
        plain = f"a {background} image in which a {named} is {relation} a {other}"
    longer = [long, scene_like, plain]
    rng.shuffle(longer)
    return (f"a {named}", *longer)


def draw(content: Scene, size: int = 128) -> Image.Image:
    """The scene as an RGB image of ``size`` pixels, drawn at double size for smooth edges, with a little texture."""
    canvas = Image.new("RGB", (2 * size, 2 * size), BACKGROUNDS[content.background])
    pen = ImageDraw.Draw(canvas)
    for thing in content.things[::-1]:
        _draw_thing(pen, thing, 2 * size, BACKGROUNDS[content.background])
    small = np.asarray(canvas.reduce(2), dtype=np.int16)
    noise = np.random.default_rng(content.label).integers(-10, 11, (size, size, 1), dtype=np.int16)
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int, background: tuple[int, int, int]) -> None:
    x, y, r, colour = thing.x * side, thing.y * side, thing.radius * side, COLOURS[thing.colour]

    def polygon(points: list[tuple[float, float]]) -> None:
        cos, sin = math.cos(thing.turn), math.sin(thing.turn)
        pen.polygon([(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in points], fill=colour)

    def disc(cx: float, cy: float, radius: float, fill: tuple[int, int, int]) -> None:
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=fill)

    if thing.shape in ("circle", "ring", "crescent"):
        disc(x, y, r, colour)
        if thing.shape == "ring":
            disc(x, y, 0.55 * r, background)
        elif thing.shape == "crescent":
            disc(x + 0.45 * r * math.cos(thing.turn), y + 0.45 * r * math.sin(thing.turn), 0.8 * r, background)
    elif thing.shape == "heart":
        for side_of in (-1, 1):
            disc(x + side_of * 0.42 * r, y - 0.3 * r, 0.5 * r, colour)
        pen.polygon([(x - 0.88 * r, y - 0.08 * r), (x + 0.88 * r, y - 0.08 * r), (x, y + 0.95 * r)], fill=colour)
    else:
        polygon(_OUTLINES[thing.shape])


def _regular(corners: int, inner: float | None = None, start: float = -math.pi / 2) -> list[tuple[float, float]]:
    steps = corners * (2 if inner else 1)
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(steps)]
    angles = [start + 2 * math.pi * i / steps for i in range(steps)]
    return [(radius * math.cos(a), radius * math.sin(a)) for radius, a in zip(radii, angles, strict=True)]


_OUTLINES = {
    "square": _regular(4, start=math.pi / 4),
    "triangle": _regular(3),
    "hexagon": _regular(6),
    "star": _regular(5, inner=0.42),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "arrow": [(-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)],
}  # fmt: skip
