"""What recordings of one's own may get wrong, and what the reader says to it."""

import json
import shutil

import numpy as np
import pytest

from datamodules.driving import BevDataModule
from datamodules.order import BatchRequest
from datamodules.simulated.driving.recordings import write_recordings
from models.errors import UserError

LAYOUT = {"rows": 16, "cols": 16, "cell": 0.25, "x_bumper": -0.95}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("driving")
    return write_recordings(str(root), LAYOUT, train=2, val=1, test=0, width=64, height=48, samples=64)


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "own")


def opened(root) -> BevDataModule:
    data = BevDataModule(str(root), LAYOUT, 64, 48, samples=64, num_workers=0)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("intrinsic",), [1], "not as WoodScape"),
        (("intrinsic", "k1"), "abc", "could not convert"),
        (("intrinsic", "k1"), None, "NoneType"),
        (("intrinsic", "k2"), float("nan"), "not finite"),
        (("intrinsic", "width"), 0, "above 0"),
        (("intrinsic", "fx"), 0, "above 0"),
        (("intrinsic", "fov_deg"), -3, "above 0"),
        (("intrinsic", "model"), "pinhole", "unknown camera model"),
        (("extrinsic", "quaternion"), [1, 0, 0], "needs 4 numbers"),
        (("extrinsic", "quaternion"), 3, "not iterable"),
        (("grid",), {"rows": 16}, "'grid' needs"),
        (("ultrasonic", "yaw"), ["a"] * 4, "'ultrasonic' needs"),
        (("ultrasonic", "positions"), [[0, 0]] * 4, "for every sensor"),
        (("ultrasonic", "full_scale"), 0, "above 0"),
    ],
)
def test_a_calibration_that_is_wrong_is_named(root, keys, value, said):
    path = root / "calibration" / "simulated.json"
    record = json.loads(path.read_text())
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=said) as error:
        opened(root)
    assert "simulated.json" in str(error.value)


def test_a_calibration_that_is_no_object(root):
    (root / "calibration" / "simulated.json").write_text("[1]")
    with pytest.raises(UserError, match=r"simulated\.json.*this is a list"):
        opened(root)


def test_woodscape_counts_its_first_coefficient_in_pixels_and_it_must_grow(root):
    path = root / "calibration" / "simulated.json"
    record = json.loads(path.read_text())
    inner = {"width": 64, "height": 48, "aspect_ratio": 1.0, "cx_offset": 0.0, "cy_offset": 0.0, "k1": -20.0}
    record["intrinsic"] = inner | {"k2": 0, "k3": 0, "k4": 0, "model": "radial_poly", "poly_order": 4}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="must grow with the angle"):
        opened(root)
    record["intrinsic"]["k1"] = 20.0
    path.write_text(json.dumps(record))
    assert opened(root).splits["train"].sample(0).camera.model == "radial_poly"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("temperature_c", "temperature"), "columns"),
        (lambda text: text.replace("clear,", "clear,warm", 1), "no number"),
        (lambda text: text.splitlines()[0] + "\n0000000000,simulated,a,0,day,clear,nan", "temperature_c must be between"),
        (lambda text: text + text.splitlines()[1], "a row already"),
        (lambda text: "\n".join(text.splitlines()[:2]), "no row for 2"),
    ],
)
def test_a_table_that_is_wrong_is_named(root, change, said):
    path = root / "meta.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=said):
        opened(root)


def test_splits_that_are_empty_or_missing(root):
    train = root / "splits" / "train.txt"
    train.write_text(train.read_text() + train.read_text())
    with pytest.raises(UserError, match="twice"):
        opened(root)
    train.write_text("")
    with pytest.raises(UserError, match="names no recording"):
        opened(root)
    train.unlink()
    with pytest.raises(UserError, match=r"no train\.txt"):
        opened(root).train_dataloader()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"traces": np.float32(3)}, "traces ()"),
        ({"traces": np.zeros((10, 0))}, "traces (10, 0)"),
        ({"traces": np.array([["a"]] * 10)}, "no number"),
        ({"traces": np.full((10, 64), np.nan)}, "not finite"),
        ({"pairs": None}, "no 'pairs'"),
        ({"pairs": np.array([["a", "b"]] * 10)}, "no number"),
        ({"pairs": np.full((10, 2), 4)}, "beyond the rig's 4 sensors"),
        ({"sample_rate": 0}, "sample_rate 0"),
        ({"sample_rate": np.ones(4)}, "no number"),
        ({"traces": None}, "neither"),
        ({"traces": None, "echo_times": np.zeros((10, 3)), "echo_amplitudes": np.zeros((10, 2))}, "(10, 3) and (10, 2)"),
    ],
)
def test_echoes_that_are_wrong_are_skipped_with_the_reason(root, arrays, said):
    keys = (root / "splits" / "train.txt").read_text().split()
    path = root / "ultrasonic" / f"{keys[0]}.npz"
    stored = {name: value for name, value in (dict(np.load(path)) | arrays).items() if value is not None}
    np.savez(path, **stored)
    batch = opened(root).splits["train"][BatchRequest(np.array([0, 1]), 0, 0)]
    (skipped,) = batch["skipped"]
    assert said in skipped.reason and keys[0] in skipped.reason
    assert batch["index"].tolist() == [1]


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_an_archive_that_is_none(root, content):
    key = (root / "splits" / "train.txt").read_text().split()[0]
    path = root / "ultrasonic" / f"{key}.npz"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    (skipped,) = opened(root).splits["train"][BatchRequest(np.array([0]), 0, 0)]["skipped"]
    assert "cannot be read" in skipped.reason
