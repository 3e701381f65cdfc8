"""Frames, the bird's-eye grid and fisheye cameras.

Vehicle frame (ISO 8855): origin on the ground below the rear axle's middle, x forward, y left, z up, metres. Camera frame:
x right, y down, z along the optical axis. Pixel (0, 0) is the centre of the top-left pixel. Everything here depends on the
calibration alone, is computed once in float64 and cached by its users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from models.errors import UserError

Array = NDArray[np.float64]
NEWTON_STEPS = 10
BISECTIONS = 60  # halvings that bring an interval of pi below float64's resolution; only for what Newton left open
TOLERANCE = 1e-10


@dataclass(frozen=True)
class BevGrid:
    """Cells behind the bumper: row 0 touches it, column 0 is the vehicle's left.

    Args:
        rows: number of cells along x.
        cols: number of cells along y.
        cell: their side in metres.
        x_bumper: x of the bumper in the vehicle frame.
    """

    rows: int
    cols: int
    cell: float
    x_bumper: float = -0.95

    def centres(self) -> Array:
        """(rows, cols, 2) x and y of every cell's centre."""
        x = self.x_bumper - (np.arange(self.rows) + 0.5) * self.cell
        y = self.cols * self.cell / 2 - (np.arange(self.cols) + 0.5) * self.cell
        return np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1)

    def scaled(self, factor: float) -> BevGrid:
        """The same extent in ``factor`` times as many rows and columns. Raises UserError where that is no whole number."""
        rows, cols = self.rows * factor, self.cols * factor
        if rows % 1 or cols % 1:
            raise UserError(f"a grid of {self.rows} x {self.cols} cells cannot be scaled by {factor:g}: choose even sides.")
        return BevGrid(int(rows), int(cols), self.cell / factor, self.x_bumper)


@dataclass(frozen=True)
class Camera:
    """A fisheye camera: how the angle to the optical axis becomes a distance from the principal point.

    ``k`` are the coefficients of the radius: ``radial_poly`` (WoodScape) k1 t + k2 t^2 + k3 t^3 + k4 t^4 in pixels,
    ``kannala_brandt`` t + k1 t^3 + k2 t^5 + k3 t^7 + k4 t^9. Hashable, so that what depends on it can be cached.

    Args:
        scale: (1, aspect ratio) or (fx, fy).
        centre: principal point in pixels.
        width: of the image, pixels.
        height: of the image, pixels.
        quaternion: rotation camera to vehicle, scalar last, any length.
        translation: of the camera, metres.
        fov: full field of view in radians; beyond half of it, or where the radius stops growing, nothing is seen.
    """

    model: str
    k: tuple[float, ...]
    scale: tuple[float, float]
    centre: tuple[float, float]
    width: int
    height: int
    quaternion: tuple[float, ...]
    translation: tuple[float, ...]
    fov: float = math.radians(190)

    # ---- the angle's polynomial -----------------------------------------------------------------------------------

    def _powers(self) -> tuple[list[int], list[float]]:
        if self.model == "radial_poly":
            return [1, 2, 3, 4], list(self.k)
        return [1, 3, 5, 7, 9], [1.0, *self.k]

    def radius(self, theta: Array) -> NDArray:
        """Distance from the principal point (pixels, or focal lengths for ``kannala_brandt``) of rays at ``theta``."""
        return np.polyval(self._coefficients[::-1], theta)

    def slope(self, theta: Array) -> NDArray:
        """Derivative of :meth:`radius`."""
        return np.polyval(self._slope_coefficients[::-1], theta)

    @cached_property
    def _coefficients(self) -> Array:
        """By ascending power, from 0."""
        powers, values = self._powers()
        dense = np.zeros(powers[-1] + 1)
        dense[powers] = values
        return dense

    @cached_property
    def _slope_coefficients(self) -> Array:
        return self._coefficients[1:] * np.arange(1, len(self._coefficients))

    @cached_property
    def theta_max(self) -> float:
        """Half the field of view, or the first angle at which the radius stops growing: beyond, pixels would repeat."""
        roots = np.roots(np.trim_zeros(self._slope_coefficients[::-1], "f"))
        turning = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
        return float(min([self.fov / 2, *turning]))

    @cached_property
    def rotation(self) -> Array:
        """(3, 3) camera to vehicle."""
        return Rotation.from_quat(self.quaternion).as_matrix()

    # ---- projection -----------------------------------------------------------------------------------------------

    def project(self, points: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Points (..., 3) of the vehicle frame to pixels (..., 2), angles (...,) and whether the image shows them."""
        camera = (points - np.asarray(self.translation)) @ self.rotation
        chi = np.hypot(camera[..., 0], camera[..., 1])
        theta = np.arctan2(chi, camera[..., 2])
        ratio = self.radius(theta) / np.where(chi > 0, chi, 1.0)  # on the axis: the principal point
        uv = camera[..., :2] * ratio[..., None] * np.asarray(self.scale) + np.asarray(self.centre)
        inside = (uv >= -0.5).all(-1) & (uv[..., 0] <= self.width - 0.5) & (uv[..., 1] <= self.height - 0.5)
        return uv, theta, inside & (theta <= self.theta_max)

    def unproject(self, pixels: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Pixels (..., 2) to unit rays (..., 3) in the camera frame, and whether the lens sees there."""
        m = (pixels - np.asarray(self.centre)) / np.asarray(self.scale)
        target = np.hypot(m[..., 0], m[..., 1])
        valid = target <= self.radius(np.array(self.theta_max))
        theta = self._invert(np.where(valid, target, 0.0))
        direction = m / np.where(target > 0, target, 1.0)[..., None]
        return np.concatenate([np.sin(theta)[..., None] * direction, np.cos(theta)[..., None]], axis=-1), valid

    def _invert(self, target: Array) -> Array:
        """Angles in [0, theta_max] whose radius is ``target``: Newton on all at once, bisection for what stays open."""
        theta = np.clip(target / self.slope(np.array(0.0)), 0.0, self.theta_max)
        for _ in range(NEWTON_STEPS):
            slope = self.slope(theta)
            step = (self.radius(theta) - target) / np.where(np.abs(slope) > 1e-12, slope, 1e-12)
            theta = np.clip(theta - step, 0.0, self.theta_max)
        left = np.abs(self.radius(theta) - target) > TOLERANCE * np.maximum(1.0, target)
        if left.any():
            low: Array = np.zeros(int(left.sum()))
            high: Array = np.full_like(low, self.theta_max)
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = self.radius(middle) < target[left]
                low, high = np.where(below, middle, low), np.where(below, high, middle)
            theta[left] = (low + high) / 2
        return theta

    def to_vehicle(self, rays: Array) -> Array:
        """Directions (..., 3) of the camera frame in the vehicle frame."""
        return rays @ self.rotation.T

    def ground(self, rays: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Where rays (..., 3) of the vehicle frame meet the ground z = 0, and whether they do."""
        down = rays[..., 2] < -1e-12
        distance = -self.translation[2] / np.where(down, rays[..., 2], -1.0)
        return np.asarray(self.translation) + distance[..., None] * rays, down

    # ---- other cameras from this one ------------------------------------------------------------------------------

    def resized(self, width: int, height: int) -> Camera:
        """The camera of the image resized with half-pixel centres."""
        sx, sy = width / self.width, height / self.height
        centre = ((self.centre[0] + 0.5) * sx - 0.5, (self.centre[1] + 0.5) * sy - 0.5)
        if self.model == "radial_poly":  # its radius is in pixels: keep the horizontal one in the coefficients
            k = tuple(value * sx for value in self.k)
            scale = (self.scale[0], self.scale[1] * sy / sx)
        else:
            k, scale = self.k, (self.scale[0] * sx, self.scale[1] * sy)
        return replace(self, k=k, scale=scale, centre=centre, width=width, height=height)

    def mirrored(self) -> Camera:
        """The camera that would see the mirrored world (y to -y) as this one's image flipped left to right."""
        x, y, z, w = self.quaternion
        # R' = M R M' with M = diag(1, -1, 1), M' = diag(-1, 1, 1): -M' = diag(1, -1, -1) turns half around x and -M half around
        # y, so that R' is the product of the quaternions of the y axis, of R and of the x axis.
        turned = (-y, -x, -w, -z)
        centre = (self.width - 1 - self.centre[0], self.centre[1])
        tx, ty, tz = self.translation
        return replace(self, quaternion=turned, centre=centre, translation=(tx, -ty, tz))

    def shifted(self, rotation_vector: Array, offset: Array) -> Camera:
        """The camera turned by a rotation vector (3,) in radians about vehicle axes and moved by ``offset`` (3,) metres."""
        turned = Rotation.from_rotvec(rotation_vector) * Rotation.from_quat(self.quaternion)
        moved = tuple(float(a + b) for a, b in zip(self.translation, offset, strict=True))
        return replace(self, quaternion=tuple(turned.as_quat().tolist()), translation=moved)


def camera_from_json(record: Mapping[str, Any], where: str = "the calibration") -> Camera:
    """A camera from WoodScape's calibration JSON, or its ``kannala_brandt`` variant with fx, fy, cx, cy (ours).

    ``fov_deg`` (ours) may be missing: 190 degrees. Raises UserError naming ``where`` and what is missing or unknown.
    """
    try:
        inner, outer = record["intrinsic"], record["extrinsic"]
        width, height, model = int(inner["width"]), int(inner["height"]), inner.get("model", "radial_poly")
        k = tuple(float(inner[f"k{i}"]) for i in (1, 2, 3, 4))
        if model == "radial_poly":
            scale = (1.0, float(inner["aspect_ratio"]))
            centre = (float(inner["cx_offset"]) + width / 2 - 0.5, float(inner["cy_offset"]) + height / 2 - 0.5)
        elif model == "kannala_brandt":
            scale, centre = (float(inner["fx"]), float(inner["fy"])), (float(inner["cx"]), float(inner["cy"]))
        else:
            raise UserError(f"{where}: unknown camera model '{model}'; there are radial_poly and kannala_brandt.")
        quaternion, translation = (tuple(map(float, outer[name])) for name in ("quaternion", "translation"))
        fov = math.radians(float(inner.get("fov_deg", 190.0)))
    except KeyError as error:
        raise UserError(f"{where}: the camera lacks {error}; WoodScape's calibration files show the layout.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: the camera's part is not as WoodScape's calibration files have it: {error}.") from None
    if not np.isfinite([*k, *scale, *centre, *quaternion, *translation, fov]).all():
        raise UserError(f"{where}: a number of the camera is not finite.")
    if len(quaternion) != 4 or not any(quaternion) or len(translation) != 3:
        raise UserError(f"{where}: the quaternion needs 4 numbers (x, y, z, w; not all 0), the translation 3.")
    if min(width, height, *scale, fov) <= 0:
        raise UserError(f"{where}: width, height, aspect_ratio or fx and fy, and fov_deg must be above 0.")
    camera = Camera(model, k, scale, centre, width, height, quaternion, translation, fov)
    if camera.slope(np.array(0.0)) <= 0:
        raise UserError(f"{where}: k1={k[0]:g}: the distance from the principal point must grow with the angle.")
    return camera


def camera_to_json(camera: Camera, name: str = "RV") -> dict[str, Any]:
    """The inverse of :func:`camera_from_json`."""
    inner: dict[str, Any] = {f"k{i + 1}": value for i, value in enumerate(camera.k)}
    inner |= {"width": camera.width, "height": camera.height, "model": camera.model, "fov_deg": math.degrees(camera.fov)}
    if camera.model == "radial_poly":
        inner |= {"poly_order": 4, "aspect_ratio": camera.scale[1] / camera.scale[0]}
        inner |= {"cx_offset": camera.centre[0] - camera.width / 2 + 0.5}
        inner |= {"cy_offset": camera.centre[1] - camera.height / 2 + 0.5}
    else:
        inner |= {"fx": camera.scale[0], "fy": camera.scale[1], "cx": camera.centre[0], "cy": camera.centre[1]}
    extrinsic = {"quaternion": list(camera.quaternion), "translation": list(camera.translation)}
    return {"extrinsic": extrinsic, "intrinsic": inner, "name": name}


def sampling_grid(camera: Camera, grid: BevGrid, heights: tuple[float, ...]) -> tuple[NDArray, NDArray]:
    """Where every cell, raised to each height, appears in the image.

    Returns:
        (Z, rows, cols, 2) float32 normalised (gx, gy) for bilinear sampling with align_corners=False, and (Z, rows, cols)
        bool, false where the image does not show the point; entries there are set outside the image.
    """
    xy = grid.centres()
    points = np.stack([np.concatenate([xy, np.full((*xy.shape[:2], 1), h)], axis=-1) for h in heights])
    uv, _, valid = camera.project(points)
    g = 2 * (uv + 0.5) / (camera.width, camera.height) - 1
    return np.where(valid[..., None], g, -2.0).astype(np.float32), valid
