"""``stages=[...,export]``: a run becomes a directory that embeds as the run did, with its measured numbers on the card."""

import pytest
import torch
from PIL import Image

from models.alignment.dual_encoder import load_dual_encoder
from models.io import read_tensors
from tests.experiments.launch import launch, result, runs


def test_a_run_is_exported_and_evaluated_by_every_suite(tmp_path):
    stages = "stages=[prepare,encode,fit,evaluate,report,export]"
    done = launch(tmp_path, "experiment=sail_dinov2", "evaluation=alignment/full", "debug=tiny/alignment/default", stages)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "sail_dinov2")
    found = result(run)
    assert {"test/knn/top1@10", "test/zeroshot/top1", "test/retrieval/i2t_recall@1"} <= found["metrics"].keys()
    assert all({"split", "prompts", "preprocessing"} <= found["hashes"][s].keys() for s in ("zero_shot",))
    for left_out in ("winoground", "mmvp", "ade20k", "coco_stuff", "voc20"):
        assert any(f"evaluation.{left_out}.root" in note for note in found["notes"])
    model = load_dual_encoder(run / "export")
    trained = read_tensors(run / "checkpoints" / "best" / "weights.safetensors")
    torch.testing.assert_close(model.head.vision_norm.weight.data, trained["head.vision_norm.weight"])
    assert model.embed_images([Image.new("RGB", (40, 30))]).shape == model.embed_texts(["a red circle"]).shape
    card = (run / "export" / "README.md").read_text()
    assert f"| test/zeroshot/top1 | {found['metrics']['test/zeroshot/top1']:.2f} |" in card
    assert all(note in card for note in found["notes"])
    assert "Trained on SIMULATED DATA: 48 samples of ImageTextDataModule" in card
    assert any("SIMULATED DATA" in note for note in found["notes"])
    assert "SIMULATED DATA" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["structure_dinov2", "freeze_align_dinov2"])
def test_other_heads_are_exported_from_a_checkpoint(tmp_path, recipe):
    debug = {"structure_dinov2": "structure_dinov2", "freeze_align_dinov2": "freeze_align"}[recipe]
    tiny = (f"experiment={recipe}", f"debug=tiny/alignment/{debug}", "compare=null")
    done = launch(tmp_path, *tiny, "stages=[prepare,encode,fit]")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, recipe)
    for name in ("own", "official"):
        done = launch(tmp_path, *tiny, "stages=[export]", f"checkpoint={run}", f"pipeline.export.format={name}")
        assert done.returncode == 0, done.stderr
    own, official = (load_dual_encoder(folder / "export") for folder in runs(tmp_path, recipe)[1:])
    torch.testing.assert_close(own.embed_texts(["a red circle"]), official.embed_texts(["a red circle"]))
    assert (own.vision_layer is not None) == (recipe == "structure_dinov2")
