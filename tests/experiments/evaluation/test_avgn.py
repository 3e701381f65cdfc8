"""The budget suite on a small network and simulated videos: rows, costs that follow the settings, exits and figures."""

from functools import partial

import pytest
import torch

from datamodules.audio_visual import AudioVisualDataModule
from datamodules.simulated.audio_visual import write_audio_visual
from experiments.benchmarks.measure import seconds
from experiments.evaluation import avgn
from experiments.evaluation.avgn import RIVALS, glance_budgets
from experiments.evaluation.base import TrainedSplit
from lightning_modules.avgn import AVGNModule
from tests.models.avgn.conftest import small_network


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    data = AudioVisualDataModule(
        str(root), simulate=partial(write_audio_visual, train=10, val=4, test=10, silent=0.3), snippets=6, image_size=32,
        resize=32,
        sample_rate=8000, clip_seconds=0.16, num_workers=0, eval_batch_size=5,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    module = AVGNModule(small_network, num_classes=6, snippets=6).eval()
    return TrainedSplit(module, data, "test")


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """Times are not looked at here."""
    monkeypatch.setattr(avgn, "fastest", seconds)


@torch.inference_mode()
def test_rows_of_every_budget_rival_and_exit(split, tmp_path):
    result = glance_budgets(
        split, budgets=[1, 3, 99], patch_sizes=[8, 16], exit_p=[0.5, 2.0], metric="top1", timed_videos=4, examples=2
    )
    found = result.metrics
    for budget in (1, 3):
        for column in (found, *(result.baselines[rival] for rival in RIVALS)):
            assert {f"top1@K{budget}", f"gflops@K{budget}", f"videos_per_s@K{budget}"} <= column.keys()
    assert "top1@K99" not in found and "top1@P8" in found and "top1@P16" not in found  # its own patch size is the run itself
    assert found["top1"] == found["top1@K3"] and found["gflops"] == pytest.approx(found["gflops@K3"])
    assert found["gflops@K1"] < found["gflops@K3"] and found["gflops@P8"] < found["gflops"]
    assert sum(v for k, v in found.items() if k.startswith("gflops_of/")) == pytest.approx(found["gflops"])
    random = result.baselines["random frames and patches"]
    assert random["gflops"] < found["gflops"]  # neither AV-TeST nor the policy runs
    for p in ("0.5", "2"):
        assert 1 <= found[f"steps@exit_p{p}"] <= 3 and found[f"gflops@exit_p{p}"] <= found["gflops"] * 1.0001
    assert found["gflops@exit_p0.5"] <= found["gflops@exit_p2"]
    assert 0 < found["videos_without_sound"] < 100 and any("NO SOUND" in note for note in result.notes)
    for name, draw in result.figures.items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    again = glance_budgets(split, budgets=[1], exit_p=[], metric="top1", timed_videos=4, examples=1)
    assert again.baselines["random frames and patches"]["top1@K1"] == random["top1@K1"]  # chance is the same every time


@torch.inference_mode()
def test_temporal_order_has_no_exit_and_says_so(split):
    with split.module.model.using(order="temporal"):
        result = glance_budgets(split, budgets=[2], metric="mAP", timed_videos=2, examples=1)
    assert not any("exit" in name for name in result.metrics)
    assert any("early exit left out" in note for note in result.notes)
    absent = {"mAP_official", "mAP_all_classes"} <= result.metrics.keys()
    labels = split.data.splits["test"].labels
    assert absent is (len(set(labels[labels >= 0])) < 6)
