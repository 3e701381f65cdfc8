"""ARL from the front door: linking alone, a demo, an official file, questions of a user, fine-tuning from a run."""

import json

import torch
from safetensors.torch import load_file

from models.arl.checkpoint import RENAMED
from tests.experiments.launch import launch, result, runs

DEMO = ("experiment=arl_small", "debug=tiny/arl/default")
BACK = {own: official for official, own in RENAMED.items()}


def official(name: str) -> str:
    part, dot, rest = name.removeprefix("model.").partition(".")
    return f"{BACK.get(part, part)}{dot}{rest}".replace(".lin.", ".lin_src.")


def test_linking_training_official_files_and_questions(tmp_path):
    done = launch(tmp_path, *DEMO)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "arl_small")
    figures = {path.stem for path in (run / "figures").glob("*.png")}
    assert {"linked_texts", "entity_attention", "masked_words", "answers", "attention"} <= figures
    linked = [json.loads(line) for line in (run / "links.jsonl").read_text().splitlines()]
    named = [entity for line in linked for entity in line["entities"]]
    assert {"F000", "F002"} <= {entity["id"] for entity in named} and all(
        set(line) == {"split", "text", "entities"} for line in linked
    )
    words = dict(line.split("\t") for line in (run / "unlinked.tsv").read_text().splitlines())
    assert int(words["could"]) > 10 and "pneumothorax" not in words
    metrics = result(run)["metrics"]
    assert {"test/answer/open_accuracy", "test/answer/closed_accuracy", "test/answer/new_entity_accuracy"} <= metrics.keys()

    weights = load_file(run / "checkpoints" / "last" / "weights.safetensors")
    torch.save({"state_dict": {official(name): value for name, value in weights.items()}}, tmp_path / "official.ckpt")
    again = launch(tmp_path, *DEMO, "stages=[prepare,evaluate,report]", f"checkpoint={tmp_path / 'official.ckpt'}")
    own = launch(tmp_path, *DEMO, "stages=[prepare,evaluate,report]", f"checkpoint={run / 'checkpoints' / 'last'}")
    assert again.returncode == own.returncode == 0, again.stderr + own.stderr
    of_file, of_run = (result(path)["metrics"] for path in runs(tmp_path, "arl_small")[-2:])
    assert of_file == of_run

    image = next((tmp_path / "data").rglob("imgs/*.png"))
    asked = (f"predict.images=[{image}]", "predict.texts=['is there a collapsed lung?','and a sunset?']")
    told = launch(tmp_path, *DEMO, "stages=[predict]", f"checkpoint={run}", *asked)
    assert told.returncode == 0, told.stderr
    (prediction,) = json.loads((runs(tmp_path, "arl_small")[-1] / "predictions.json").read_text())
    assert len(prediction["texts"]) == 2

    tuned = launch(tmp_path, "experiment=paper/arl/roco_retrieval", DEMO[1], f"checkpoint={run}")
    assert tuned.returncode == 0, tuned.stderr
    assert "test/fused/t2i_recall@1" in result(runs(tmp_path, "paper/arl/roco_retrieval")[-1])["metrics"]


def test_unknown_arguments_of_both_models_are_refused(tmp_path):
    done = launch(tmp_path, *DEMO, "module.model.levls=3", "module.model.image_layers=two")
    assert done.returncode == 2
    assert "takes no argument 'levls'" in done.stderr and "module.model.image_layers: expected int" in done.stderr
