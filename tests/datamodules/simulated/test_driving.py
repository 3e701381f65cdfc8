"""The simulated world behind the car: physics, orientation, determinism, and its files through the ordinary reader."""

import json

import numpy as np
import pytest
import torch

from datamodules.driving import BevDataModule
from datamodules.order import BatchRequest
from datamodules.simulated.driving.camera import make_camera, make_lens, make_weather, radiance, render
from datamodules.simulated.driving.recordings import World, record, write_recordings
from datamodules.simulated.driving.scene import Scene, cast, make_scene, occupancy, visible_only
from datamodules.simulated.driving.ultrasound import Acoustics, echoes, make_rig
from datamodules.transforms.driving import Augmentation, mirrored
from models.bev_fusion.echoes import EchoMap, speed_of_sound
from models.bev_fusion.geometry import BevGrid
from models.errors import UserError

GRID = BevGrid(32, 32, 0.125)
LAYOUT = {"rows": 32, "cols": 32, "cell": 0.125, "x_bumper": -0.95}


def one_box(x=-3.0, y=1.0) -> Scene:
    box = np.array([[x, y, 0.0, 0.5, 0.5, 0.0, 1.0]])
    return Scene(box, np.zeros((0, 5)), np.array([1]), np.array([0.9]), np.full((1, 3), 0.6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("driving")
    return write_recordings(str(root), LAYOUT, train=6, val=4, test=0, width=64, height=48, samples=256)


def datamodule(folder, **settings) -> BevDataModule:
    data = BevDataModule(str(folder), LAYOUT, **{"width": 64, "height": 48, "samples": 256, "num_workers": 0, **settings})
    data.setup()
    return data


def request(*rows) -> BatchRequest:
    return BatchRequest(np.array(rows), 0, 0)


def test_an_object_on_the_left_is_left_in_every_view():
    scene, camera = one_box(), make_camera(160, 120)
    label = occupancy(scene, GRID)
    rows, cols = np.nonzero(label)
    assert cols.mean() < 16 and abs((rows.mean() + 0.5) * GRID.cell - 2.05) < 0.1
    lens = make_lens(camera)
    ids = np.zeros(lens.seen.shape, int)
    ids[lens.seen] = cast(scene, lens.origin, lens.rays).id
    assert np.nonzero(ids == 1)[1].mean() > 80  # the rear image shows the left on its right
    rig = make_rig()
    time, amplitude = echoes(scene, rig, 20.0, Acoustics())
    assert amplitude[0, 0] > amplitude[3, 0]  # the leftmost sensor hears it best


def test_echoes_arrive_after_the_way_there_and_back():
    rig = make_rig()
    wall = Scene(np.array([[-3.0, 0, 0, 0.2, 6.0, 0, 2.0]]), np.zeros((0, 5)), np.array([1]), np.array([1.0]), np.ones((1, 3)))
    time, _ = echoes(wall, rig, 20.0, Acoustics())
    x = rig.positions[1][0]
    assert time[1, 0] == pytest.approx(2 * (x + 2.9) / speed_of_sound(20.0))


def test_the_echo_map_is_loud_where_the_object_is():
    world = World(make_camera(64, 48), make_rig(), GRID)
    found, rng = record(world, 0)
    found = found.__class__(one_box(), found.weather, 20.0, 20.0, world.rig)
    traces = torch.from_numpy(found.traces(world, rng))[None]
    heard = EchoMap(GRID)(traces, [world.rig], torch.tensor([20.0]))[0, 0].numpy()
    near = one_box().boxes[0, 0] + 0.25
    row = int((GRID.x_bumper - near) / GRID.cell)
    assert heard[row - 1 : row + 2, 4:12].max() > 3 * np.median(heard[4:])


def test_occlusion_weakens_what_stands_behind():
    back = one_box(-4.0, 0.0)
    front = Scene(np.concatenate([[[-2.5, 0, 0, 0.2, 3, 0, 1.5]], back.boxes]), back.cylinders, np.array([1, 1]),
                  np.array([0.9, 0.9]), np.ones((2, 3)))  # fmt: skip
    rig = make_rig()
    open_air, hidden = (echoes(scene, rig, 20.0, Acoustics())[1][1, -1] for scene in (back, front))
    assert hidden == pytest.approx(0.01 * open_air)


def test_scenes_keep_their_distance_and_repeat():
    for index in range(20):
        scene = make_scene(np.random.default_rng(index))
        assert 1 <= len(scene.classes) <= 18
        assert len(scene.classes) == len(scene.boxes) + len(scene.cylinders) == len(scene.colours)
        assert (occupancy(scene, GRID)[0] == 0).all()  # a quarter metre behind the bumper is free
    world = World(make_camera(64, 48), make_rig(), GRID, seed=3)
    (a, first), (b, second) = record(world, 5), record(world, 5)
    lens = make_lens(world.camera)
    np.testing.assert_array_equal(a.image(lens, world), b.image(lens, world))
    np.testing.assert_array_equal(a.traces(world, first), b.traces(world, second))
    assert (record(world, 6)[0].label(world) != a.label(world)).any()


def test_night_is_dark_beyond_the_lamps_and_glare_blinds():
    scene, lens = one_box(-3, 0), make_lens(make_camera(64, 48))
    light = {
        name: radiance(scene, make_weather(np.random.default_rng(0), name), lens, -0.95) for name in ("day", "night", "glare")
    }
    assert np.median(light["night"]) < 0.1 * np.median(light["day"])
    assert light["glare"].max() > 2 * light["day"].max()
    assert render(scene, make_weather(np.random.default_rng(0), "day"), lens).shape == (48, 64, 3)


def test_what_is_hidden_becomes_unknown():
    scene = one_box(-2.0, 0.0)
    label = visible_only(occupancy(scene, GRID), GRID, (-0.85, 0.0))
    assert (label[:5] != 255).all()
    assert (label[-1, 14:18] == 255).all()
    assert (label[-1, :4] == 0).all()


def scene_from_json(text: str) -> Scene:
    """The scene of a file of ``scenes/``, to render it again."""
    stored = json.loads(text)["scene"]
    boxes, cylinders = np.array(stored["boxes"]).reshape(-1, 7), np.array(stored["cylinders"]).reshape(-1, 5)
    colours = np.array(stored["colours"]).reshape(-1, 3)
    return Scene(boxes, cylinders, np.array(stored["classes"], np.int64), np.array(stored["reflectivity"]), colours)


def test_files_are_the_same_whoever_writes_them(folder, tmp_path):
    again = write_recordings(str(tmp_path), LAYOUT, train=6, val=4, test=0, width=64, height=48, samples=256, processes=2)
    for kind in ("images", "labels", "ultrasonic"):
        for path in sorted((folder / kind).iterdir()):
            assert path.read_bytes() == (again / kind / path.name).read_bytes()
    key = (folder / "splits" / "train.txt").read_text().split()[0]
    np.testing.assert_allclose(
        occupancy(scene_from_json((folder / "scenes" / f"{key}.json").read_text()), GRID),
        occupancy(record(World(make_camera(64, 48), make_rig(), GRID, 256), 0)[0].scene, GRID),
    )


def test_the_ordinary_reader_gives_batches(folder):
    data = datamodule(folder)
    batch = data.splits["train"][request(0, 3)]
    assert batch["image"].shape == (2, 3, 48, 64) and batch["traces"].shape == (2, 10, 256)
    assert batch["view_grid"].shape == (2, 4, 16, 16, 2) and batch["bev_label"].max() <= 1
    assert batch["condition"] == ["day", "glare"]
    assert datamodule(folder, num_classes=4).splits["train"][request(0)]["bev_label"].max() <= 3


def test_mirroring_a_recording_mirrors_its_echo_map(folder):
    sample = datamodule(folder).splits["train"].sample(1)
    other, celsius = mirrored(sample), torch.tensor([sample.celsius])
    ours, theirs = (EchoMap(GRID)(torch.from_numpy(s.traces)[None], [s.rig], celsius) for s in (sample, other))
    torch.testing.assert_close(theirs.flip(3), ours, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(other.label[:, ::-1], sample.label)


def test_augmentation_depends_on_seed_epoch_and_row_alone(folder):
    split = datamodule(folder, augmentation=Augmentation()).splits["train"]
    one, other = split[BatchRequest(np.array([1, 2]), 4, 7)], split[BatchRequest(np.array([2]), 4, 7)]
    for key in ("image", "traces", "view_grid", "bev_label"):
        torch.testing.assert_close(one[key][1:], other[key], rtol=0, atol=0)
    assert (split[BatchRequest(np.array([2]), 5, 7)]["traces"] != other["traces"]).any()


def test_a_sensor_that_drops_out_is_silent_in_each_of_its_pairs(folder):
    plain = datamodule(folder).splits["train"].sample(1)
    sound = {"pair_dropout": 0, "noise": 0, "time_jitter": 0, "mirror": 0}
    dead = set()
    for seed in range(30):
        changed = Augmentation(camera_dropout=0, sensor_dropout=1, **sound)(plain, np.random.default_rng(seed))
        silent = ~changed.traces.any(1)
        (sensor,) = [s for s in range(4) if (silent == plain.rig.heard_by(s)).all()]
        assert changed.image.any()
        dead.add(sensor)
    assert dead == {0, 1, 2, 3}
    blind = Augmentation(camera_dropout=1, sensor_dropout=0, **sound)(plain, np.random.default_rng(0))
    assert not blind.image.any() and blind.traces.any(1).all()


def test_bad_recordings_are_skipped_by_name(folder, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    keys = (root / "splits" / "train.txt").read_text().split()
    (root / "images" / f"{keys[0]}.png").write_bytes(b"nothing")
    (root / "ultrasonic" / f"{keys[1]}.npz").unlink()
    times = np.array([[0.01, np.nan]])
    np.savez(root / "ultrasonic" / f"{keys[2]}.npz", echo_times=times, echo_amplitudes=times * 255, pairs=[[0, 0]])
    batch = datamodule(root).splits["train"][request(0, 1, 2)]
    assert [skip.reason.split(":")[0] for skip in batch["skipped"]] == ["corrupt image", "missing ultrasonic"]
    assert batch["index"].tolist() == [3, 4, 2]  # training replaces them by the next ones
    assert batch["traces"][2].argmax() == 160  # 0.01 s at 16 kHz


def test_own_mistakes_are_explained(folder, tmp_path):
    import shutil

    with pytest.raises(UserError, match="holds no recordings"):
        datamodule(tmp_path)
    with pytest.raises(UserError, match="datamodule.grid"):
        BevDataModule(str(folder), {**LAYOUT, "cell": 0.1}, 64, 48).setup()
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    path = root / "calibration" / "simulated.json"
    rig = json.loads(path.read_text())
    del rig["ultrasonic"]["yaw"]
    path.write_text(json.dumps(rig))
    with pytest.raises(UserError, match="yaw"):
        datamodule(root)
    (root / "splits" / "val.txt").write_text((root / "splits" / "train.txt").read_text())
    with pytest.raises(UserError, match="Split by scene"):
        datamodule(root)
