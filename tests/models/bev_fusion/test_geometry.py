import math

import numpy as np
import pytest

from datamodules.simulated.driving.camera import make_camera
from models.bev_fusion.geometry import BevGrid, Camera, camera_from_json, camera_to_json, sampling_grid
from models.errors import UserError

WOODSCAPE = {
    "extrinsic": {"quaternion": [0.59418, -0.58788, 0.38732, -0.38901], "translation": [3.7484, 0, 0.66017]},
    "intrinsic": {
        "aspect_ratio": 1.0, "cx_offset": 3.942, "cy_offset": -3.093, "width": 1280, "height": 966,
        "k1": 339.749, "k2": -31.988, "k3": 48.275, "k4": -7.201, "model": "radial_poly", "poly_order": 4,
    },
    "name": "FV",
}  # fmt: skip


@pytest.fixture(params=["radial_poly", "kannala_brandt"])
def camera(request) -> Camera:
    return camera_from_json(WOODSCAPE) if request.param == "radial_poly" else make_camera(640, 480)


def test_unprojecting_inverts_projecting(camera):
    rng = np.random.default_rng(0)
    pixels = rng.uniform((0, 0), (camera.width - 1, camera.height - 1), (500, 2))
    rays, valid = camera.unproject(pixels)
    assert valid.sum() > 300
    np.testing.assert_allclose(np.linalg.norm(rays, axis=1), 1, atol=1e-12)
    points = camera.to_vehicle(rays) * rng.uniform(0.5, 5, (500, 1)) + camera.translation
    uv, theta, seen = camera.project(points)
    assert seen[valid].all()
    np.testing.assert_allclose(uv[valid], pixels[valid], atol=1e-7)
    np.testing.assert_allclose(np.cos(theta[valid]), rays[valid][:, 2], atol=1e-9)


def test_front_camera_looks_ahead_and_right_is_right():
    camera = camera_from_json(WOODSCAPE)
    ahead, right = camera.project(np.array([[10.0, 0, 0.66], [10.0, -3, 0.66]]))[0]
    assert ahead[0] == pytest.approx(camera.centre[0], abs=15)
    assert right[0] > ahead[0] + 50


def test_rear_camera_sees_the_left_on_its_right():
    camera = make_camera(640, 480)
    left, right = camera.project(np.array([[-4.0, 1.0, 0], [-4.0, -1.0, 0]]))[0]
    assert left[0] > camera.centre[0] > right[0]


def test_points_behind_the_lens_are_masked_where_the_polynomial_folds_back():
    camera = camera_from_json(WOODSCAPE)
    around = np.array([[math.cos(a), 0, math.sin(a)] for a in np.linspace(0, math.pi, 50)])
    _, theta, valid = camera.project(around + camera.translation)
    assert not valid[theta > camera.theta_max].any()
    assert camera.theta_max <= math.radians(95) + 1e-12


def test_a_point_on_the_axis_is_the_principal_point(camera):
    point = np.asarray(camera.translation) + 2 * camera.rotation[:, 2]
    uv, _, valid = camera.project(point[None])
    np.testing.assert_allclose(uv[0], camera.centre, atol=1e-6)
    assert valid[0]


def test_resizing_keeps_where_a_point_is_in_the_picture(camera):
    point = np.asarray(camera.translation) + camera.rotation @ (0.3, 0.2, 1.0)
    small = camera.resized(camera.width // 2, camera.height // 3)
    (u, v), (su, sv) = camera.project(point[None])[0][0], small.project(point[None])[0][0]
    assert su == pytest.approx((u + 0.5) * small.width / camera.width - 0.5)
    assert sv == pytest.approx((v + 0.5) * small.height / camera.height - 0.5)


def test_mirrored_camera_sees_the_mirrored_world_flipped(camera):
    rng = np.random.default_rng(1)
    points = np.asarray(camera.translation) + (camera.rotation @ rng.normal((0, 0, 2), 1, (50, 3)).T).T
    uv, theta, valid = camera.project(points)
    flipped, again, seen = camera.mirrored().project(points * (1, -1, 1))
    np.testing.assert_allclose(flipped[:, 0], camera.width - 1 - uv[:, 0], atol=1e-8)
    np.testing.assert_allclose(flipped[:, 1], uv[:, 1], atol=1e-8)
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(again, theta)


def test_calibration_survives_its_file(camera):
    copy = camera_from_json(camera_to_json(camera))
    np.testing.assert_allclose(copy.project(np.ones((1, 3)))[0], camera.project(np.ones((1, 3)))[0])


def test_bad_calibrations_are_named():
    with pytest.raises(UserError, match="rig.json.*'k4'"):
        broken = {k: v for k, v in WOODSCAPE["intrinsic"].items() if k != "k4"}
        camera_from_json({**WOODSCAPE, "intrinsic": broken}, "rig.json")
    with pytest.raises(UserError, match="unknown camera model 'pinhole'"):
        camera_from_json({**WOODSCAPE, "intrinsic": {**WOODSCAPE["intrinsic"], "model": "pinhole"}})


def test_sampling_grid_marks_what_the_picture_shows():
    grid = BevGrid(16, 12, 0.4)
    camera = make_camera(160, 120)
    look, valid = sampling_grid(camera, grid, (0.0, 0.5))
    points = np.concatenate([grid.centres(), np.zeros((16, 12, 1))], axis=-1)
    uv, _, seen = camera.project(points)
    np.testing.assert_array_equal(valid[0], seen)
    inside = look[0][seen]
    np.testing.assert_allclose((inside[:, 0] + 1) * 160 / 2 - 0.5, uv[seen][:, 0], atol=1e-3)
    assert (np.abs(inside) <= 1).all()
