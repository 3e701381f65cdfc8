"""Two-tower models from the front door: a demo, official files, predictions, a submission, another task, what is refused."""

import json

import torch
from safetensors.torch import load_file

from tests.experiments.launch import launch, result, runs

DEMO = ("experiment=manager_tower_tiny", "debug=tiny/two_tower/default")


def test_demo_predictions_and_official_files(tmp_path):
    done = launch(tmp_path, *DEMO)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "manager_tower_tiny")
    figures = {path.stem for path in (run / "figures").glob("*.png")}
    assert figures == {"loss", "answers", "attention", "manager_weights", "retrieved_images"}
    found = result(run)["metrics"]
    assert {"test/answer/colour_accuracy", "test/reranked/t2i_recall@1", "test/cost/gflops_per_pair"} <= found.keys()

    weights = load_file(run / "checkpoints" / "last" / "weights.safetensors")
    official = {name.removeprefix("model.").removeprefix("connector."): value for name, value in weights.items()}
    torch.save({"state_dict": official, "hyper_parameters": {}}, tmp_path / "official.ckpt")
    again = launch(tmp_path, *DEMO, "stages=[prepare,evaluate,report]", f"checkpoint={tmp_path / 'official.ckpt'}")
    assert again.returncode == 0, again.stderr
    own = launch(tmp_path, *DEMO, "stages=[prepare,evaluate,report]", f"checkpoint={run / 'checkpoints' / 'last'}")
    assert own.returncode == 0, own.stderr
    assert (
        result(runs(tmp_path, "manager_tower_tiny")[-1])["metrics"]
        == result(runs(tmp_path, "manager_tower_tiny")[-2])["metrics"]
    )

    image = next((tmp_path / "data").rglob("test2015/*.jpg"))
    asked = (f"predict.images=[{image}]", "predict.texts=['what colour is the circle?','how many shapes are there?']")
    told = launch(tmp_path, *DEMO, "predict=two_tower/images", "stages=[predict]", f"checkpoint={run}", *asked)
    assert told.returncode == 0, told.stderr
    last = runs(tmp_path, "manager_tower_tiny")[-1]
    (prediction,) = json.loads((last / "predictions.json").read_text())
    assert len(prediction["texts"]) == 2 and (last / "attention.png").is_file()
    missing = launch(
        tmp_path,
        *DEMO,
        "predict=two_tower/images",
        "stages=[predict]",
        f"checkpoint={run}",
        "predict.images=[no.jpg]",
        asked[1],
    )
    assert missing.returncode == 2 and "missing image" in missing.stderr

    sent = launch(tmp_path, *DEMO, "predict=two_tower/submission", "stages=[predict]", f"checkpoint={run}")
    assert sent.returncode == 0, sent.stderr
    answers = json.loads((runs(tmp_path, "manager_tower_tiny")[-1] / "vqa_submission.json").read_text())
    assert len(answers) > 12 and set(answers[0]) == {"question_id", "answer"}

    tuned = launch(
        tmp_path, "experiment=paper/two_tower/manager_tower_vqa", "debug=tiny/two_tower/default", f"checkpoint={run}"
    )
    assert tuned.returncode == 0, tuned.stderr
    assert "test/answer/score" in result(runs(tmp_path, "paper/two_tower/manager_tower_vqa")[-1])["metrics"]


def test_recipes_want_their_data_and_weights(tmp_path):
    done = launch(tmp_path, "experiment=paper/two_tower/bridge_tower_vqa", "datamodule.root=.", "datamodule.vocabulary=.")
    assert done.returncode == 2 and "checkpoint" in done.stderr
    weights = launch(tmp_path, *DEMO, "module.tasks=[answer,match]", "module.negatives=hard")
    assert weights.returncode == 2 and "add contrastive" in weights.stderr


def test_drawn_negatives_have_a_figure(tmp_path):
    done = launch(tmp_path, "experiment=paper/two_tower/bridge_tower_flickr30k", "debug=tiny/two_tower/default")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "paper/two_tower/bridge_tower_flickr30k")
    assert (run / "figures" / "hard_negatives.png").is_file()
