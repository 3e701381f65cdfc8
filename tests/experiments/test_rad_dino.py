"""A recipe from radiographs to an encoder that other recipes name."""

import pytest
import torch

from experiments.run.checkpoint_io import read_weights
from models.encoders.vision import HFVisionEncoder
from models.rad_dino.backbone import DinoViT
from models.rad_dino.checkpoint import load_backbone
from tests.experiments.launch import launch, result, runs


@pytest.mark.slow
def test_the_exported_encoder_is_the_trained_teacher(tmp_path):
    done = launch(tmp_path, "experiment=rad_dino_small", "debug=tiny/rad_dino/default")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "rad_dino_small")
    encoder = HFVisionEncoder("rad_dino", weights=str(run / "export"), pooling="cls")
    weights = read_weights(run / "checkpoints" / "last")
    prefix = "model.teacher.backbone."
    teacher = DinoViT(32, 8, 24, 2, 2).eval()
    load_backbone(teacher, {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images).pooled, teacher(images).cls.detach())
    metrics = result(run)["metrics"]
    assert {"test/linear/auroc", "test/knn/auprc", "test/linear/auroc_95_low"} <= metrics.keys()
