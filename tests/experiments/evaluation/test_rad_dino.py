"""The suites of a self-supervised image encoder, on phantoms and on scikit-learn's digits."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from datamodules.radiology import RadiologyDataModule
from datamodules.readers.radiograph_own import own_table
from datamodules.simulated.radiographs import FINDINGS, STRUCTURES, nih_phantoms
from datamodules.transforms.multi_crop import MultiCrop
from experiments.evaluation.base import TrainedSplit
from experiments.evaluation.rad_dino import probes
from experiments.evaluation.rad_dino_figures import figures
from experiments.evaluation.rad_dino_reports import reports
from experiments.evaluation.rad_dino_segmentation import segmentation
from experiments.figures.rad_dino import principal_colours
from lightning_modules.rad_dino_baselines import SupervisedRadiographs
from models.rad_dino.backbone import DinoViT
from models.rad_dino.reports import small_writer

CROPS = MultiCrop(global_size=16, local_size=8, local_count=1)


def encoder(image_size: int, findings: int = 14) -> SupervisedRadiographs:
    torch.manual_seed(0)
    return SupervisedRadiographs(lambda: DinoViT(image_size, 4, 16, 2, 2, init_values=1.0), num_findings=findings).eval()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = nih_phantoms(str(tmp_path_factory.mktemp("set")), train=60, val=20, test=30, image_size=16, prevalence=0.5)
    data = RadiologyDataModule(str(root), CROPS, patch_size=4, image_size=16, num_workers=0)
    data.setup()
    return TrainedSplit(encoder(16), data, "test")


@torch.inference_mode()
def test_probes_of_findings_and_metadata(split, tmp_path):
    result = probes(split, steps=60, rates=(1.0,), blocks=(1,), label_counts=(20,), bootstrap=5)
    metadata = {"metadata/auroc/sex", "metadata/auroc/view", "metadata/age_error_years"}
    assert {"linear/auroc", "linear/auroc@20", "knn/auprc", "linear/auprc_95_low", *metadata} <= result.metrics.keys()
    assert {f"linear/auroc/{finding}" for finding in FINDINGS} <= result.metrics.keys()
    assert result.baselines["random encoder"].keys() == result.metrics.keys()
    age = torch.tensor([row[2] for row in split.dataset.metadata.tolist()])
    median = split.data.splits["train"].metadata[:, 2].median()
    assert result.baselines["chance"]["metadata/age_error_years"] == pytest.approx(float((age - median).abs().mean()), abs=2)
    assert result.baselines["chance"]["metadata/auroc/sex"] == 50 and "linear/auprc_95_low" not in result.baselines["chance"]
    result.figures["labels"](tmp_path / "labels.png")
    assert Image.open(tmp_path / "labels.png").width > 300


@torch.inference_mode()
def test_segmentation_and_its_figure(split, tmp_path):
    result = segmentation(split, steps=30, lr=0.05, images=30)
    per_structure = [result.metrics[f"segmentation/linear/dice/{name}"] for name in ("heart", "lungs")]
    assert min(per_structure) > 10 and 0 < result.metrics["segmentation/linear/dice"] < 100
    assert {f"segmentation/linear/dice/{name}" for name in STRUCTURES} >= result.metrics.keys() - {"segmentation/linear/dice"}
    assert result.baselines["random encoder"].keys() == result.metrics.keys()
    result.figures["segmentation_linear"](tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 300


@torch.inference_mode()
def test_reports_beside_the_commonest(split):
    def writer(known):
        return small_writer(known, width=16, layers=1, heads=2)

    result = reports(split, writer, steps=5, images=20, longest=8, untrained=False)
    assert result.metrics.keys() == {
        f"reports/{name}" for name in ("bleu4", "rouge_l", "findings_f1_macro", "findings_f1_micro")
    }
    assert result.baselines["commonest report"]["reports/rouge_l"] > 50


@torch.inference_mode()
def test_reports_are_left_out_where_there_are_none(split, monkeypatch):
    monkeypatch.setattr(split.data.splits["train"], "reports", [""] * len(split.data.splits["train"]))
    assert "left out" in reports(split).notes[0]


@torch.inference_mode()
def test_figures(split, tmp_path):
    for name, draw in figures(split, images=3, neighbours=2, searched=20).figures.items():
        draw(tmp_path / f"{name}.png")
        assert Image.open(tmp_path / f"{name}.png").height > 300


def test_patches_that_differ_have_other_colours():
    maps = torch.zeros(1, 4, 2, 2)
    maps[0, 0, 0, 0], maps[0, 1, 1, 1] = 5.0, 3.0
    colours = principal_colours(maps)
    assert colours.shape == (1, 2, 2, 3) and 0 <= colours.min() and colours.max() <= 1
    assert (colours[0, 0, 0] - colours[0, 0, 1]).abs().max() > 0.5 and torch.equal(colours[0, 0, 1], colours[0, 1, 0])


@torch.inference_mode()
def test_real_digits_go_through_reader_and_probes(tmp_path):
    """Handwritten digits that scikit-learn ships: ten "findings" that even random features tell apart."""
    digits = load_digits()
    lines = ["path,split," + ",".join(f"digit {n}" for n in range(10))]
    for number, (image, digit) in enumerate(zip(digits.images[:400], digits.target[:400], strict=True)):
        Image.fromarray((image * 15.9).astype(np.uint8)).save(tmp_path / f"{number}.png")
        labels = ",".join(str(int(digit == n)) for n in range(10))
        lines.append(f"{number}.png,{('train', 'train', 'val', 'test')[number % 4]},{labels}")
    (tmp_path / "images.csv").write_text("\n".join(lines))
    data = RadiologyDataModule(str(tmp_path), CROPS, own_table, patch_size=4, image_size=16, eval_batch_size=100, num_workers=0)
    data.setup()
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 200, "val": 100, "test": 100}
    split = TrainedSplit(encoder(16, findings=10), data, "test")
    metrics = probes(split, steps=100, rates=(8.0,), blocks=(1,), bootstrap=0, untrained=False).metrics
    assert metrics["linear/auroc"] > 60 and metrics["knn/auroc"] > 60
