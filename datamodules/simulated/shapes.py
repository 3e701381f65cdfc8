"""Coloured shapes: outlines, colours and the one routine that draws them. Shared by every simulated world."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import ImageDraw

COLOURS = {
    "red": (214, 40, 40), "orange": (244, 140, 6), "yellow": (250, 214, 30), "green": (40, 150, 70),
    "blue": (35, 95, 210), "purple": (125, 50, 170), "pink": (245, 130, 180), "brown": (120, 72, 35),
}  # fmt: skip


def _polar(radius: Callable[[np.ndarray], np.ndarray], points: int = 48) -> np.ndarray:
    angle = np.arange(points) * (2 * math.pi / points) - math.pi / 2
    return np.stack([radius(angle) * np.cos(angle), radius(angle) * np.sin(angle)], axis=1)


def _regular(corners: int, turn: float = 0.0) -> np.ndarray:
    angle = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2 + turn
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ring() -> np.ndarray:
    """Outer circle, then the inner one backwards: one polygon whose seam has no area."""
    circle = _regular(48)
    circle = np.concatenate([circle, circle[:1]])
    return np.concatenate([circle, 0.55 * circle[::-1]])


def _heart() -> np.ndarray:
    t = np.arange(48) * (2 * math.pi / 48)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16.5


def _moon() -> np.ndarray:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 36)
    inner = np.linspace(1.62 * math.pi, 0.38 * math.pi, 30)
    outside = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    inside = np.stack([0.45 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], axis=1)
    return np.concatenate([outside, inside])


def _cross() -> np.ndarray:
    a = 0.34  # half the width of an arm
    corner = np.array([(a, -1), (a, -a), (1, -a)])
    turn = np.array([(0, 1), (-1, 0)])  # a quarter turn: (x, y) -> (-y, x)
    return np.concatenate([corner @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Outlines in the unit circle, y downwards: (corners, 2).
SHAPES = {
    "circle": _regular(48),
    "square": _regular(4, math.pi / 4),
    "triangle": _regular(3),
    "star": _regular(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None],
    "ring": _ring(),
    "heart": _heart(),
    "moon": _moon(),
    "cross": _cross(),
    "arrow": np.array([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]),
    "flower": _polar(lambda angle: 0.72 + 0.28 * np.cos(6 * angle)),
}


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, ...] | int,
    centre: tuple[float, float],
    radius: float,
    angle: float = 0.0,
) -> None:
    """Fill ``shape`` around ``centre``. Lengths in pixels of the canvas, ``angle`` in radians, clockwise."""
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    outline = SHAPES[shape] @ np.array([[cos, sin], [-sin, cos]]) + centre
    draw.polygon(outline.ravel().tolist(), fill=colour)
