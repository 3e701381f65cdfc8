"""Near-field scenes behind a rear bumper: boxes and cylinders on the ground, rays into them, and their occupancy.

Everything is in the vehicle frame, metres. Objects are numbered boxes first, then cylinders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bev_fusion.geometry import BevGrid

Array = NDArray[np.float64]
OBSTACLE, PEDESTRIAN, KERB = 1, 2, 3
RAY_EPSILON = 1e-6  # metres: hits nearer than this are the surface the ray starts on
PRIORITY = {KERB: 1, OBSTACLE: 2, PEDESTRIAN: 3}  # of classes that share a cell
# name: (share, class, lowest and highest reflectivity)
KINDS = {
    "car": (0.15, OBSTACLE, 0.8, 1.0),
    "wall": (0.15, OBSTACLE, 0.8, 1.0),
    "kerb": (0.15, KERB, 0.8, 1.0),
    "crate": (0.2, OBSTACLE, 0.8, 1.0),
    "pole": (0.2, OBSTACLE, 0.6, 0.9),
    "bollard": (0.05, OBSTACLE, 0.8, 1.0),
    "pedestrian": (0.1, PEDESTRIAN, 0.25, 0.45),
}
CLEARANCE = 0.25  # metres that stay free behind the bumper
MOST = 6  # objects in a scene
LEG_SHARE = 0.5  # of the pedestrians stand on two legs instead of one cylinder down to the ground


class Scene(NamedTuple):
    """``boxes`` (N, 7): cx, cy, yaw, lx, ly, z0, h; ``cylinders`` (M, 5): cx, cy, r, z0, h; then one entry an object:
    ``classes`` (N + M,), ``reflectivity`` for sound, ``colours`` (N + M, 3) linear albedo."""

    boxes: Array
    cylinders: Array
    classes: NDArray[np.int64]
    reflectivity: Array
    colours: Array


class Hits(NamedTuple):
    """Of R rays: distance ``t`` (R,), -1 for the sky; ``id`` (R,): -1 sky, 0 ground, from 1 on objects; outward ``normal``
    (R, 3), zero for the sky."""

    t: Array
    id: NDArray[np.int64]
    normal: Array


def make_scene(rng: np.random.Generator, x_bumper: float = -0.95) -> Scene:
    """1 to 6 objects that touch neither one another nor the quarter metre behind the bumper."""
    boxes, cylinders, facts = [], [], []
    names, shares = list(KINDS), [kind[0] for kind in KINDS.values()]
    taken: list[tuple[float, float, float, float, float]] = []  # oriented footprints: cx, cy, yaw, lx, ly
    for _ in range(int(rng.integers(1, MOST + 1))):
        name = names[int(rng.choice(len(names), p=shares))]
        for _attempt in range(10):
            x, y = rng.uniform(x_bumper - 6, x_bumper - 0.3), rng.uniform(-3.2, 3.2)
            yaw, shape = float(rng.uniform(-np.pi, np.pi)), _shape(name, rng)
            footprint = (x, y, yaw, *(shape[:2] if len(shape) == 3 else (2 * shape[0], 2 * shape[0])))
            if _corners(footprint)[:, 0].max() > x_bumper - CLEARANCE or any(_overlap(footprint, t) for t in taken):
                continue
            taken.append(footprint)
            _, kind, low, high = KINDS[name]
            fact = (kind, float(rng.uniform(low, high)), rng.uniform(0.1, 0.8, 3))
            if len(shape) == 3:
                boxes.append(((x, y, yaw, shape[0], shape[1], 0.0, shape[2]), fact))
            else:
                cylinders += [
                    ((x + dx, y + dy, r, z0, h), fact) for dx, dy, r, z0, h in _upright(name, shape[0], shape[1], yaw, rng)
                ]
            break
    facts = [fact for _, fact in (*boxes, *cylinders)]
    return Scene(
        np.array([box for box, _ in boxes]).reshape(-1, 7),
        np.array([cylinder for cylinder, _ in cylinders]).reshape(-1, 5),
        np.array([fact[0] for fact in facts], dtype=np.int64),
        np.array([fact[1] for fact in facts]),
        np.array([fact[2] for fact in facts]).reshape(-1, 3),
    )


def _shape(name: str, rng: np.random.Generator) -> tuple[float, ...]:
    """(lx, ly, h) of a box or (r, h) of a cylinder."""
    match name:
        case "car":
            return 4.3, 1.8, 1.5
        case "wall":
            return rng.uniform(1, 6), 0.15, rng.uniform(0.8, 2.5)
        case "kerb":
            return rng.uniform(1.5, 6), 0.15, rng.uniform(0.08, 0.18)
        case "crate":
            return rng.uniform(0.2, 1.0), rng.uniform(0.2, 1.0), rng.uniform(0.2, 1.2)
        case "pole":
            return rng.uniform(0.03, 0.1), rng.uniform(0.8, 2)
        case "bollard":
            return 0.1, rng.uniform(0.4, 0.9)
        case _:
            return 0.22, rng.uniform(1.1, 1.85)


def _upright(name: str, radius: float, height: float, yaw: float, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Cylinders (dx, dy, r, z0, h) of an upright thing: a pedestrian may stand on two legs."""
    if name != "pedestrian" or rng.random() >= LEG_SHARE:
        return [(0.0, 0.0, radius, 0.0, height)]
    dx, dy = 0.12 * np.cos(yaw), 0.12 * np.sin(yaw)
    return [(0.0, 0.0, radius, 0.8, height - 0.8), (dx, dy, 0.08, 0.0, 0.8), (-dx, -dy, 0.08, 0.0, 0.8)]


def _corners(footprint: tuple) -> Array:
    cx, cy, yaw, lx, ly = footprint
    local = np.array([(lx, ly), (-lx, ly), (-lx, -ly), (lx, -ly)]) / 2
    cos, sin = np.cos(yaw), np.sin(yaw)
    return local @ np.array([[cos, sin], [-sin, cos]]) + (cx, cy)


def _overlap(a: tuple, b: tuple) -> bool:
    """Whether two oriented rectangles meet (separating axes)."""
    one, other = _corners(a), _corners(b)
    for yaw in (a[2], a[2] + np.pi / 2, b[2], b[2] + np.pi / 2):
        axis = np.array([np.cos(yaw), np.sin(yaw)])
        p, q = one @ axis, other @ axis
        if p.max() < q.min() or q.max() < p.min():
            return False
    return True


# ---- rays ---------------------------------------------------------------------------------------------------------------


def cast(scene: Scene, origin: Array, directions: Array) -> Hits:
    """First hits of rays from ``origin`` (3,) or origins (R, 3) along ``directions`` (R, 3)."""
    origins = np.broadcast_to(origin, directions.shape)
    down = directions[:, 2] < -1e-12
    t = np.where(down, -origins[:, 2] / np.where(down, directions[:, 2], -1.0), np.inf)
    ids = np.where(down, 0, -1)
    normal = np.zeros_like(directions)
    normal[down, 2] = 1.0
    for number, (solid, hit) in enumerate(_solids(scene), start=1):
        rays = _towards(solid, origins, directions)
        distance, axis = hit(solid, origins[rays], directions[rays])
        nearer = distance < t[rays]
        rows = rays[nearer]
        t[rows], ids[rows], normal[rows] = distance[nearer], number, axis[nearer]
    return Hits(np.where(ids < 0, -1.0, t), ids, normal)


def blocked(scene: Scene, origins: Array, directions: Array, reach: Array | float = np.inf) -> NDArray[np.bool_]:
    """Whether an object lies within ``reach`` along rays from ``origins`` (R, 3): shadows."""
    hidden = np.zeros(len(origins), dtype=bool)
    directions = np.broadcast_to(directions, origins.shape)
    reach = np.broadcast_to(reach, hidden.shape)
    for solid, hit in _solids(scene):
        rays = _towards(solid, origins, directions)
        hidden[rays] |= hit(solid, origins[rays], directions[rays])[0] < reach[rays]
    return hidden


def _solids(scene: Scene) -> Iterator[tuple[Any, Callable[..., tuple[Array, Array]]]]:
    yield from ((box, _hit_box) for box in scene.boxes)
    yield from ((cylinder, _hit_cylinder) for cylinder in scene.cylinders)


def _towards(solid: Array, origins: Array, directions: Array) -> NDArray[np.int64]:
    """The rays that may meet an object: those that meet the sphere around it. Most do not, and need no closer look."""
    half = solid[3:5] / 2 if len(solid) == 7 else (solid[2], 0.0)
    z0, h = solid[-2:]
    radius2 = half[0] ** 2 + half[1] ** 2 + (h / 2) ** 2 + 1e-9
    way = np.array([solid[0], solid[1], z0 + h / 2]) - origins
    along = np.einsum("ij,ij->i", way, directions)
    length2 = np.einsum("ij,ij->i", directions, directions)
    away2 = np.einsum("ij,ij->i", way, way)
    near = away2 * length2 - along * along <= radius2 * length2
    return np.flatnonzero(near & ((along > 0) | (away2 <= radius2)))


def _hit_box(box: Array, origins: Array, directions: Array) -> tuple[Array, Array]:
    """Entry distance (R,), inf without one, and outward normals (R, 3): slabs in the frame of the box."""
    cx, cy, yaw, lx, ly, z0, h = box
    cos, sin = np.cos(yaw), np.sin(yaw)
    x, y, z = origins[:, 0] - cx, origins[:, 1] - cy, origins[:, 2] - (z0 + h / 2)
    dx, dy, dz = directions.T
    near, far = np.full(len(x), -np.inf), np.full(len(x), np.inf)
    normal = np.zeros((len(x), 3))
    slabs = (
        (x * cos + y * sin, dx * cos + dy * sin, lx / 2, (cos, sin, 0.0)),
        (y * cos - x * sin, dy * cos - dx * sin, ly / 2, (-sin, cos, 0.0)),
        (z, dz, h / 2, (0.0, 0.0, 1.0)),
    )
    for o, d, half, axis in slabs:
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (-half - o) / d, (half - o) / d
        flat = d == 0  # along the slab: inside it everywhere or never
        if flat.any():
            a, b = np.where(flat, np.where(np.abs(o) <= half, -np.inf, np.inf), a), np.where(flat, np.inf, b)
        entry = np.minimum(a, b)
        later = entry > near
        near[later] = entry[later]
        normal[later] = -np.sign(d[later])[:, None] * axis
        far = np.minimum(far, np.maximum(a, b))
    return np.where((near <= far) & (near > RAY_EPSILON), near, np.inf), normal


def _hit_cylinder(cylinder: Array, origins: Array, directions: Array) -> tuple[Array, Array]:
    """Entry through the side or the top cap, and outward normals."""
    cx, cy, r, z0, h = cylinder
    x, y, z = origins[:, 0] - cx, origins[:, 1] - cy, origins[:, 2]
    dx, dy, dz = directions.T
    a, b, c = dx * dx + dy * dy, x * dx + y * dy, x * x + y * y - r * r
    root = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        side = (-b - np.sqrt(np.maximum(root, 0))) / a
        top = (z0 + h - z) / dz
        level = z + side * dz
        side = np.where((root >= 0) & (a > 0) & (side > RAY_EPSILON) & (level >= z0) & (level <= z0 + h), side, np.inf)
        inside = (x + top * dx) ** 2 + (y + top * dy) ** 2 <= r * r
        top = np.where((dz < 0) & (top > RAY_EPSILON) & inside, top, np.inf)
    caps = top < side
    with np.errstate(invalid="ignore"):
        normal = np.stack([(x + side * dx) / r, (y + side * dy) / r, np.zeros(len(x))], axis=1)
    normal[caps] = (0.0, 0.0, 1.0)
    return np.minimum(side, top), normal


# ---- occupancy ----------------------------------------------------------------------------------------------------------


def occupancy(scene: Scene, grid: BevGrid) -> NDArray[np.int64]:
    """(rows, cols) class of each cell: that of the footprint over its centre; a cylinder always marks its centre's cell."""
    xy = grid.centres()
    label = np.zeros((grid.rows, grid.cols), dtype=np.int64)
    rank = np.zeros_like(label)
    for number, box in enumerate(scene.boxes):
        cx, cy, yaw, lx, ly = box[:5]
        dx, dy = xy[..., 0] - cx, xy[..., 1] - cy
        along, across = dx * np.cos(yaw) + dy * np.sin(yaw), dy * np.cos(yaw) - dx * np.sin(yaw)
        _mark(label, rank, (np.abs(along) <= lx / 2) & (np.abs(across) <= ly / 2), int(scene.classes[number]))
    for number, (cx, cy, r, *_) in enumerate(scene.cylinders, start=len(scene.boxes)):
        cells = (xy[..., 0] - cx) ** 2 + (xy[..., 1] - cy) ** 2 <= r * r
        row = int(np.floor((grid.x_bumper - cx) / grid.cell))
        col = int(np.floor((grid.cols * grid.cell / 2 - cy) / grid.cell))
        if 0 <= row < grid.rows and 0 <= col < grid.cols:
            cells[row, col] = True
        _mark(label, rank, cells, int(scene.classes[number]))
    return label


def _mark(label: NDArray, rank: NDArray, cells: NDArray, kind: int) -> None:
    mine = cells & (rank < PRIORITY[kind])
    label[mine], rank[mine] = kind, PRIORITY[kind]


def visible_only(label: NDArray[np.int64], grid: BevGrid, viewpoint: tuple[float, ...], depth: float = 0.3) -> NDArray:
    """The label with 255 where a cell lies more than ``depth`` metres behind the first occupied one as seen from
    ``viewpoint`` (x, y)."""
    xy = grid.centres()
    away = xy - np.asarray(viewpoint)
    reach = np.hypot(away[..., 0], away[..., 1])
    bins = np.floor(np.arctan2(away[..., 1], -away[..., 0]) / (grid.cell / reach.max())).astype(np.int64)
    bins -= bins.min()
    first = np.full(int(bins.max()) + 1, np.inf)
    occupied = label > 0
    # A near cell covers more than one bin of directions: spread it over its own width.
    spread = np.ceil(reach.max() / np.maximum(reach, grid.cell) / 2).astype(np.int64)
    for b, s, d in zip(bins[occupied], spread[occupied], reach[occupied], strict=True):
        part = first[max(b - s, 0) : b + s + 1]
        np.minimum(part, d, out=part)
    return np.where(reach > first[bins] + depth, 255, label)
