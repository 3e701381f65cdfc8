"""VQA's answers and the parameter groups."""

import pytest
import torch

from models.two_tower.answers import answer_vocabulary, normalise_answer, score_of, soft_scores
from models.two_tower.parameter_groups import two_tower_groups
from tests.models.two_tower.stand_in import small_model


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The Cat.", "cat"),
        ("10,000", "10000"),
        ("1, 2 and 3", "1 2 and 3"),
        ("3.5", "3.5"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("None", "0"),
        ("ten an", "10"),
        ("left/right", "left right"),
        ("left/ right", "left right"),
    ],
)
def test_normal_form(answer, normal):
    assert normalise_answer(answer) == normal


def test_vocabulary_counts_normal_forms_in_order_of_appearance():
    answers = ["Yes"] * 5 + ["no"] * 9 + ["yes."] * 4 + ["rare"] * 8
    assert answer_vocabulary(answers) == ["yes", "no"]


def test_soft_scores():
    assert [score_of(count) for count in range(6)] == [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]
    given = ["two"] * 3 + ["2"] + ["blue"] * 2 + ["unknown"] * 4
    assert soft_scores(given, {"2": 7, "blue": 1}) == {7: 1.0, 1: 0.6}
    assert soft_scores(given, {"2": 7, "blue": 1}, normalise=False) == {7: 0.3, 1: 0.6}


@pytest.mark.parametrize("heads", ["head", "cross"])
def test_groups_hold_every_parameter_once(heads):
    model = small_model("adaptive_manager")
    groups = two_tower_groups(model.named_parameters(), 50, 5, heads)
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
    rate = {id(p): (group["lr_scale"], group.get("weight_decay")) for group in groups for p in group["params"]}
    assert rate[id(model.itc_text_head.fc.weight)] == (50 if heads == "head" else 5, None)
    manager = model.connector.managers("text")[1]
    assert rate[id(manager.LayerNorm[0].weight)] == (5, None) and rate[id(manager.extra_query_LayerNorm.weight)] == (5, 0.0)
    assert rate[id(model.connector.layer_embeddings_text.weight)] == (1.0, None)
    assert rate[id(model.temperature)] == (1.0, None)
    model.temperature.requires_grad_(False)
    assert id(model.temperature) not in {id(p) for g in two_tower_groups(model.named_parameters(), 1, 1) for p in g["params"]}
    assert isinstance(groups[0]["params"][0], torch.nn.Parameter)
