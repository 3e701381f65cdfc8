"""Captioned scenes: one to three coloured shapes on a patterned ground, each described in one short and two long
captions.

A scene is a pure function of (seed, index). The short caption names little, as captions from the web do; the long
ones tell size, place, relation and ground, so that a model that learns from both does better than from the short ones
alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from datamodules.simulated.shapes import COLOURS, SHAPES, draw_shape

GROUNDS = {
    "white": (244, 244, 240), "grey": (128, 130, 134), "black": (22, 22, 26), "beige": (222, 200, 165),
    "mint": (178, 232, 205), "navy": (18, 32, 84),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked")
CLASS_NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]  # of the main shape: 80
OVERSAMPLING = 3  # the canvas is drawn this much larger and averaged: antialiasing


class Thing(NamedTuple):
    """One shape. ``x``, ``y`` and ``radius`` in units of the image's side, ``angle`` in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """``things[0]`` is the main one, the largest, and gives the class. ``tint`` shifts all colours a little."""

    things: tuple[Thing, ...]
    ground: str
    pattern: str
    tint: tuple[int, ...]
    phrasing: int

    @property
    def label(self) -> int:
        return CLASS_NAMES.index(self.things[0].name)


def make_scene(seed: int, index: int) -> Scene:
    """Scene number ``index`` of the world ``seed``."""
    rng = np.random.default_rng((seed, index))
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    main_x, main_y = rng.uniform(0.3, 0.7, 2)
    main = _thing(rng, main_x, main_y, rng.uniform(0.17, 0.3))
    things = [main]
    for _ in range(count - 1):
        for _attempt in range(20):
            radius = rng.uniform(0.07, 0.12)
            x, y = rng.uniform(radius, 1 - radius, 2)
            if all((x - t.x) ** 2 + (y - t.y) ** 2 > (radius + t.radius + 0.01) ** 2 for t in things):
                things.append(_thing(rng, x, y, radius))
                break
    ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    tint = tuple(int(value) for value in rng.integers(-14, 15, 3))
    return Scene(tuple(things), ground, pattern, tint, int(rng.integers(2**31)))


def _thing(rng: np.random.Generator, x: float, y: float, radius: float) -> Thing:
    colour, shape = list(COLOURS)[rng.integers(len(COLOURS))], list(SHAPES)[rng.integers(len(SHAPES))]
    return Thing(shape, colour, float(x), float(y), float(radius), float(rng.uniform(-0.35, 0.35)))


def render(scene: Scene, size: int) -> Image.Image:
    """RGB image of ``size`` x ``size`` pixels."""
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _tinted(GROUNDS[scene.ground], scene.tint))
    draw = ImageDraw.Draw(canvas)
    _draw_pattern(draw, scene, side)
    for thing in scene.things:
        colour = _tinted(COLOURS[thing.colour], scene.tint)
        draw_shape(draw, thing.shape, colour, (thing.x * side, thing.y * side), thing.radius * side, thing.angle)
    return canvas.reduce(OVERSAMPLING)


def captions(scene: Scene) -> list[str]:
    """Three captions: a short raw one, then two long ones in different words."""
    main, others = scene.things[0], scene.things[1:]
    ground = f"{scene.pattern} {scene.ground}"
    short = [f"a {main.name}", f"{main.name}", f"a picture of a {main.name}", f"{_article(main.name)} drawn"]
    if others:
        short += [f"{main.name} and {others[0].name}", f"a {main.name} with a {others[0].name}"]
    raw = short[scene.phrasing % len(short)]
    first = f"{_article(_sized(main))} {_place(main)}"
    second = f"on a {ground} background there is {_article(main.name)}"
    if others:
        first = _article(_sized(main)) + " " + " and ".join(f"{_relation(main, o)} a small {o.name}" for o in others)
        second += ", together with " + " and ".join(f"{_article(o.name)} {_place(o)}" for o in others)
    else:
        second += f" {_place(main)}, and nothing else"
    return [raw, f"{first} on a {ground} background", second]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sized(thing: Thing) -> str:
    return f"{'large' if thing.radius > 0.235 else 'medium'} {thing.name}"


def _place(thing: Thing) -> str:
    column = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else ""
    row = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else ""
    return f"at the {row} {column}".replace("  ", " ").rstrip() if row or column else "in the middle"


def _relation(main: Thing, other: Thing) -> str:
    """Where the main thing is, seen from the other."""
    dx, dy = main.x - other.x, main.y - other.y
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "below" if dy > 0 else "above"


def _tinted(colour: tuple[int, ...], tint: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + shift)) for value, shift in zip(colour, tint, strict=True))


def _draw_pattern(draw: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    """Stripes, dots or checks a little lighter or darker than the ground."""
    ground = GROUNDS[scene.ground]
    shift = 38 if sum(ground) < 380 else -38
    colour = _tinted(tuple(value + shift for value in ground), scene.tint)
    step = side / 8
    if scene.pattern == "striped":
        for i in range(-8, 8, 1):
            draw.line([(i * step * 2, 0), (i * step * 2 + side, side)], fill=colour, width=round(step * 0.6))
    elif scene.pattern == "dotted":
        for i in range(8):
            for j in range(8):
                x, y = (i + 0.5) * step, (j + 0.5) * step
                draw.ellipse([x - step * 0.22, y - step * 0.22, x + step * 0.22, y + step * 0.22], fill=colour)
    elif scene.pattern == "checked":
        for i in range(8):
            for j in range(i % 2, 8, 2):
                draw.rectangle([i * step, j * step, (i + 1) * step - 1, (j + 1) * step - 1], fill=colour)
