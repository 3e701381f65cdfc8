"""HAMMER from the front door: official files, the verdict on one pair, two processes, the sweep of ablations."""

import json

import torch
from safetensors.torch import load_file

from tests.experiments.launch import launch, launch_cold, result, runs

DEMO = ("experiment=hammer_dgm4", "debug=tiny/hammer/default")


def test_trained_model_judges_a_pair_and_official_files_load(tmp_path):
    done = launch(tmp_path, *DEMO)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "hammer_dgm4")
    assert {path.stem for path in (run / "figures").glob("*.png")} == {"loss", "examples", "kinds"}
    weights = load_file(run / "checkpoints" / "last" / "weights.safetensors")
    official = {name.removeprefix("model."): value for name, value in weights.items()}
    official["text_encoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save({"model": official, "epoch": 3}, tmp_path / "checkpoint_best.pth")
    file = f"checkpoint={tmp_path / 'checkpoint_best.pth'}"
    again = launch(tmp_path, *DEMO, "stages=[evaluate,report]", file)
    assert again.returncode == 0, again.stderr
    found = result(runs(tmp_path, "hammer_dgm4")[-1])["metrics"]
    own = launch(tmp_path, *DEMO, "stages=[evaluate,report]", f"checkpoint={run / 'checkpoints' / 'last'}")
    assert own.returncode == 0, own.stderr
    assert result(runs(tmp_path, "hammer_dgm4")[-1])["metrics"] == found

    picture = next((tmp_path / "data").rglob("DGM4/**/*.jpg"))
    pair = (f"predict.image={picture}", "predict.text='a large red star, on white'")
    told = launch(tmp_path, *DEMO, "stages=[predict]", file, *pair)
    assert told.returncode == 0, told.stderr
    (verdict,) = json.loads((runs(tmp_path, "hammer_dgm4")[-1] / "predictions.json").read_text())
    assert 0 <= verdict["manipulated"] <= 1 and len(verdict["kinds"]) == 4
    assert [word for word, _ in verdict["words"]] == ["a", "large", "red", "star,", "on", "white"]
    assert (runs(tmp_path, "hammer_dgm4")[-1] / "prediction.png").is_file()
    nothing = launch(tmp_path, *DEMO, "stages=[predict]", file, "predict.image=no.jpg", "predict.text=x")
    assert nothing.returncode == 2 and "missing image" in nothing.stderr


def test_two_processes_equal_two_accumulated_pieces(tmp_path):
    """8 devices x 32 pairs and one device with 8 accumulated pieces of 32 are the same training."""
    options = ("datamodule.batch_size=8", "stages=[prepare,fit]", "trainer.accelerator=cpu")
    processes, pieces = ("trainer=ddp", "trainer.devices=2"), ("trainer.accumulate_grad_batches=2",)
    weights = []
    for name, how in (("processes", processes), ("pieces", pieces)):
        folder = tmp_path / name
        folder.mkdir()
        done = launch_cold(folder, *DEMO, *options, *how)
        assert done.returncode == 0, done.stderr
        (run,) = runs(folder, "hammer_dgm4")
        weights.append(load_file(run / "checkpoints" / "last" / "weights.safetensors"))
    assert weights[0]["model.queue_ptr"].item() == 32  # two steps of 16 pairs
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_paper_recipe_wants_its_data_and_its_weights(tmp_path):
    done = launch(tmp_path, "experiment=paper/hammer/dgm4")
    assert done.returncode == 2
    assert "datamodule.root: a value is required" in done.stderr
    done = launch(tmp_path, "experiment=paper/hammer/dgm4", "debug=tiny/hammer/default", "checkpoint=ALBEF_4M.pth")
    assert done.returncode == 2
    assert "ALBEF_4M.pth" in done.stderr  # never from scratch in silence


def test_ablations_run_from_one_sweep(tmp_path):
    done = launch(tmp_path, *DEMO, "sweep=hammer/ablation")
    assert done.returncode == 0, done.stderr
    jobs = {job.name: result(job)["metrics"] for job in (tmp_path / "outputs/sweeps/hammer_dgm4/hammer_ablation").glob("*/")}
    assert len(jobs) == 4
    with_boxes = {name for name, metrics in jobs.items() if "test/box/iou_mean" in metrics}
    with_tokens = {name for name, metrics in jobs.items() if "test/token/acc" in metrics}
    assert len(with_boxes) == len(with_tokens) == 3 and len(with_boxes & with_tokens) == 2
