"""LLaVA-OV-Manager from the front door: stages that follow each other, answers to own images, a folder of released weights."""

import json

import torch
from safetensors.torch import load_file, save_file

from models.two_tower.llava_checkpoint import OFFICIAL
from tests.experiments.launch import launch, result, runs

TINY = "debug=tiny/llava_manager/default"
STAGE_1, STAGE_2 = ("paper/two_tower/llava_ov_manager_stage1", "paper/two_tower/llava_ov_manager_stage2")


def official_name(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("managers."):
        return "model." + name.removeprefix("managers.")
    name = name.removeprefix("llava.")
    theirs, ours = next(pair for pair in OFFICIAL if name.startswith(pair[1]))
    return theirs + name.removeprefix(ours).removeprefix("vision_model.")


def test_stages_follow_each_other_and_a_released_folder_is_judged_alike(tmp_path):
    first = launch(tmp_path, f"experiment={STAGE_1}", TINY)
    assert first.returncode == 0, first.stderr
    (start,) = runs(tmp_path, STAGE_1)
    second = launch(tmp_path, f"experiment={STAGE_2}", TINY, f"checkpoint={start}")
    assert second.returncode == 0, second.stderr
    (run,) = runs(tmp_path, STAGE_2)
    before, weights = (load_file(path / "checkpoints" / "last" / "weights.safetensors") for path in (start, run))
    steps = {name: float((weights[name] - before[name]).abs().max()) for name in before}
    managed, seen, rest = (steps[f"model.{name}"] for name in (
        "managers.manager_layer_embedding", "llava.model.vision_tower.encoder.layers.0.mlp.fc1.weight", "llava.lm_head.weight",
    ))  # fmt: skip
    assert managed > 4 * rest > 8 * seen > 0  # 5e-5, 1e-5 and 2e-6, the last of two steps at a falling rate

    folder = tmp_path / "released"
    folder.mkdir()
    named = {official_name(name): value.contiguous() for name, value in weights.items()}
    save_file(named, folder / "model-00001-of-00001.safetensors")
    (folder / "config.json").write_text("{}")
    judged = launch(tmp_path, f"experiment={STAGE_2}", TINY, f"checkpoint={folder}", "stages=[prepare,evaluate,report]")
    assert judged.returncode == 0, judged.stderr
    evaluated = launch(
        tmp_path,
        f"experiment={STAGE_2}",
        TINY,
        f"checkpoint={run / 'checkpoints' / 'last'}",
        "stages=[prepare,evaluate,report]",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    released, trained = (result(path)["metrics"] for path in runs(tmp_path, STAGE_2)[-2:])
    torch.testing.assert_close(torch.tensor(list(released.values())), torch.tensor(list(trained.values())))
    assert {"test/answer/exact", "test/answer/perplexity", "test/answer/colour_exact"} <= released.keys()

    image = next((tmp_path / "data").rglob("test/*.jpg"))
    asked = (f"predict.images=[{image}]", "predict.questions=['how many shapes are there?']", "predict.longest=4")
    told = launch(tmp_path, f"experiment={STAGE_2}", TINY, "stages=[predict]", f"checkpoint={run}", *asked)
    assert told.returncode == 0, told.stderr
    last = runs(tmp_path, STAGE_2)[-1]
    (prediction,) = json.loads((last / "predictions.json").read_text())
    assert list(prediction["answers"]) == ["how many shapes are there?"] and (last / "answers.png").is_file()
    missing = launch(
        tmp_path, f"experiment={STAGE_2}", TINY, "stages=[predict]", f"checkpoint={run}", "predict.images=[no.jpg]", asked[1]
    )
    assert missing.returncode == 2 and "missing image" in missing.stderr
