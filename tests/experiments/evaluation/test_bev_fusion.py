"""The occupancy suite with modules whose answers are known."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datamodules.driving import BevDataModule
from datamodules.simulated.driving.recordings import write_recordings
from experiments.evaluation.base import TrainedSplit
from experiments.evaluation.bev_fusion import LIGHTS, _by_light_and_band, _cells, _faults, occupancy
from lightning_modules.bev_fusion import BevFusionModule
from models.batch import IMAGE
from models.bev_fusion.batch import BEV_LABEL, CELSIUS, TRACES, VIEW_GRID
from models.bev_fusion.decoder import Occupancy
from models.bev_fusion.geometry import BevGrid
from models.bev_fusion.losses import OccupancyLoss
from models.bev_fusion.network import BEVFusion, image_backbone
from models.errors import UserError

GRID = {"rows": 16, "cols": 16, "cell": 0.25, "x_bumper": -0.95}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_recordings(str(tmp_path_factory.mktemp("bev")), GRID, train=0, val=4, test=24, width=64, height=48)
    built = BevDataModule(str(root), GRID, 64, 48, num_workers=0, eval_batch_size=9, heights=(0.0,))
    built.setup()
    return built


@pytest.fixture(scope="module")
def module(data):
    backbone = partial(image_backbone, name="test_resnet", pretrained=False)
    model = partial(BEVFusion, backbone, backbone, channels=8, camera_stride=4)
    return BevFusionModule(model, OccupancyLoss(), **data.facts()).eval()


def answering(module: BevFusionModule, answer) -> BevFusionModule:
    """The module with other answers: ``answer(batch)`` gives classes."""

    class Oracle(BevFusionModule):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, batch):
            logits = F.one_hot(answer(batch), 2).movedim(-1, 1).float()
            return Occupancy(logits[:, :1], logits)

    oracle = Oracle()
    oracle.__dict__ |= {key: value for key, value in module.__dict__.items() if not key.startswith("_forward")}
    return oracle


def test_the_right_answer_scores_full_marks_in_every_light(data, module):
    found = occupancy(TrainedSplit(answering(module, lambda batch: batch[BEV_LABEL].clamp(max=1)), data, "test"))
    scores = found.metrics
    whole = {"bev/iou", *(f"bev/{light}/iou" for light in LIGHTS), *(name for name in scores if "robust" in name)}
    assert len(whole) == 5 + 2 + 4 * 3 + 2  # lights; black, dead; two sensors' degrees and centimetres; thermometer
    assert [scores[name] for name in whole] == pytest.approx([100.0] * len(whole))
    assert scores["bev/object_recall"] == scores["bev/object_precision"] == 100
    assert scores["bev/euclidean_error_m"] < 0.1  # by definition a neighbour within the radius may stand nearer


def test_missing_everything_scores_nothing(data, module):
    nothing = answering(module, lambda batch: torch.zeros_like(batch[BEV_LABEL]))
    scores = occupancy(TrainedSplit(nothing, data, "test"), robustness=False).metrics
    assert scores["bev/iou"] == scores["bev/object_recall"] == 0
    assert not any("robust" in name for name in scores)


def test_baselines_and_figures(data, module, tmp_path):
    found = occupancy(TrainedSplit(module, data, "test"))
    share = found.baselines["all occupied"]["bev/iou"]
    label = torch.cat([batch[BEV_LABEL] for batch in TrainedSplit(module, data, "test").batches()])
    assert share == pytest.approx(100 * float((label > 0).float().mean()))
    assert "echo threshold" in found.baselines
    assert {"samples", "iou", "by_light_and_distance", "robustness"} == found.figures.keys()
    for name, draw in found.figures.items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_a_part_is_judged_by_its_own_cells_and_classes():
    grid, lights = BevGrid(16, 16, 0.25), np.array(["day", "night"])
    ranges = np.hypot(grid.centres()[..., 0] - grid.x_bumper, grid.centres()[..., 1])
    label = np.zeros((2, 16, 16), int)
    label[:, 2:6, 4:8], label[:, 8:12, 4:8] = 1, 3
    predicted = label.copy()
    predicted[1][ranges >= 2] = 0  # at night nothing is found beyond two metres
    scores = _cells(label, predicted, lights, grid, 4)
    assert scores["day/obstacle/iou"] == scores["1-2m/obstacle/recall"] == 100
    assert scores["2-4m/kerb/recall"] == pytest.approx(50) and scores["2-4m/kerb/precision"] == 100
    night = (label[0] == 3) & (ranges < 2)
    assert scores["night/kerb/recall"] == pytest.approx(100 * night.sum() / (label[0] == 3).sum())
    rows, columns, table = _by_light_and_band((label > 0).astype(int), (predicted > 0).astype(int), lights, grid, 2)
    assert rows == ["day", "night"] and columns[1:3] == ["1-2m", "2-4m"]
    assert table["recall"][:, 1:3].tolist() == [[100, 100], [100, 0]]
    assert np.isnan(table["iou"][0, 0]) == (not (label[0][ranges < 1] > 0).any())


def test_a_dead_sensor_that_is_not_there(data, module):
    with pytest.raises(UserError, match="sensors are 0 to 3"):
        occupancy(TrainedSplit(module, data, "test"), sensor=4)


def test_faults_change_what_they_name_and_nothing_else(data):
    batch = data.splits["test"][next(iter(data.evaluation_dataloader("test").sampler))]
    faults = _faults([3.0], [10.0], [10.0], 1)
    keys = {"black": IMAGE, "dead": TRACES, "camera": VIEW_GRID, "thermometer": CELSIUS}
    for name, change in faults.items():
        changed = change(batch, data)
        differ = {key for key in keys.values() if not torch.equal(changed[key], batch[key])}
        assert differ == {key for word, key in keys.items() if name.startswith(word)}, name
    moved = faults["sensors_10_cm"](batch, data)["calibrations"].rigs[0]
    assert moved.positions[0][0] == pytest.approx(batch["calibrations"].rigs[0].positions[0][0] + 0.1)
    dead = faults["dead_sensor"](batch, data)[TRACES]
    pairs = batch["calibrations"].rigs[0].pairs
    assert [bool(dead[0, n].any()) for n in range(len(pairs))] == [1 not in pair for pair in pairs]


def test_encoders_learn_more_slowly_and_norms_do_not_decay(module):
    groups = module.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))
    slow = {id(p) for group in groups if group.get("lr_scale") == 0.5 for p in group["params"]}
    assert slow == {id(p) for name, p in module.model.named_parameters() if "_encoder." in name}
    spared = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    assert spared == {id(p) for p in module.model.parameters() if p.ndim < 2}
