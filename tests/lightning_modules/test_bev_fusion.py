"""Bird's-eye fusion: rows of maps, unknown cells, and modalities that need fewer keys."""

from functools import partial

import torch

from lightning_modules.bev_fusion import BevFusionModule
from models.bev_fusion.batch import BEV_LABEL, TRACES
from models.bev_fusion.losses import OccupancyLoss
from models.bev_fusion.network import BEVFusion, image_backbone
from tests.lightning_modules.small import GRID, MODULES, built


@torch.inference_mode()
def test_unknown_cells_stay_unknown_and_do_not_count():
    module, batch = built("bev_fusion").eval(), MODULES["bev_fusion"].rows(3)
    batch[BEV_LABEL][:, :, :8] = 255
    rows = module.predict_step(batch)
    assert rows["label"].dtype == torch.uint8 and (rows["label"][:, :, :8] == 255).all()
    known = {name: value[:, :, 8:] if value.dim() == 3 else value for name, value in rows.items()}
    assert module.validation_metrics(rows) == module.validation_metrics(known)


def test_a_camera_alone_needs_no_echoes():
    backbone = partial(image_backbone, name="test_resnet", pretrained=False)
    model = partial(BEVFusion, backbone, backbone, channels=8, camera_stride=4, modality="camera_only")
    module = BevFusionModule(model, OccupancyLoss(), num_classes=2, heights=1, grid=GRID)
    assert TRACES not in module.needs and TRACES in built("bev_fusion").needs
    batch = {key: value for key, value in MODULES["bev_fusion"].rows(2).items() if key != TRACES}
    assert module.echoes(batch) is None
    assert torch.isfinite(module.batch_loss({**batch}))
