"""The steps of the two-tower module beyond what every module does."""

from functools import partial

import pytest
import torch

from lightning_modules.two_tower import TwoTowerModule, contrastive_recalls
from models.batch import IMAGE
from models.errors import UserError
from models.two_tower.checkpoint import official_names
from models.two_tower.connectors import Bridge
from models.two_tower.model import TwoTower
from tests.lightning_modules.small import SGD, TWO_TOWER, _images_with_texts, trainer
from tests.models.two_tower.stand_in import small_model


def module(*tasks: str, **options) -> TwoTowerModule:
    torch.manual_seed(0)
    sizes = {**TWO_TOWER, **options.pop("sizes", {})}
    model = partial(TwoTower, Bridge, **sizes)
    return TwoTowerModule(model, tasks, SGD, vocab_size=40, padding_id=1, answers=5, **options)


@pytest.mark.parametrize(
    "tasks, message", [(("no_such_task",), "choose from"), ((), "none given"), (("match",), "add contrastive")]
)
def test_tasks_that_cannot_be_trained(tasks, message):
    with pytest.raises(UserError, match=message):
        module(*tasks)


def test_every_image_passes_its_tower_once():
    built, batch = module("mlm", "match", "contrastive", "answer", "entail"), _images_with_texts(6)
    passes = []
    built.model.vit_model.visual.register_forward_hook(lambda m, inputs, out: passes.append(len(inputs[0])))
    built.train().shared_step(batch, "train")
    assert passes == [6]


def test_false_images_alone_pass_the_tower_again():
    built, batch = module("mlm", "match", negatives="given"), _images_with_texts(6)
    batch |= {"matched": torch.tensor([1, 1, 1, 0, 0, 0]), "false_image": batch[IMAGE][:3]}
    passes = []
    built.model.vit_model.visual.register_forward_hook(lambda m, inputs, out: passes.append(len(inputs[0])))
    built.train().shared_step(batch, "train")
    assert passes == [6, 3]


def test_towers_are_loaded_only_where_no_checkpoint_gave_the_weights(tmp_path):
    loaded = []
    settings = {"default_root_dir": tmp_path, "max_steps": 0}
    first = module("contrastive", towers=loaded.append)
    trainer(**settings).fit(first, [_images_with_texts(2)])
    assert loaded == [first.model]
    second = module("contrastive", towers=loaded.append)
    second.load_state_dict(first.state_dict())
    trainer(**settings).fit(second, [_images_with_texts(2)])
    assert loaded == [first.model]


def test_questions_that_are_not_asked_have_no_loss():
    losses = module("contrastive").eval().shared_step(_images_with_texts(6), "val").losses
    assert set(losses) == {"contrastive"}


def test_recalls_count_each_image_once():
    vectors = torch.eye(3)
    rows = {"text": vectors[[0, 0, 1, 2]], "media": vectors[[0, 0, 1, 2]], "medium": torch.tensor([4, 4, 7, 9])}
    assert set(contrastive_recalls(rows).values()) == {100.0}
    rows["text"] = vectors[[1, 1, 2, 0]]
    assert contrastive_recalls(rows)["t2i_recall@1"] == 0.0


def test_a_head_that_no_checkpoint_filled_is_not_judged():
    built = module("answer", "contrastive")
    built.load_official(official_names(small_model("bridge", tasks=("contrastive",))))
    with pytest.raises(UserError, match="no trained head for 'answer'"):
        built.predict_step(_images_with_texts(4))


def test_the_ranking_head_starts_from_the_matching_one():
    built, source = module("rank"), small_model("bridge", tasks=("match",))
    built.load_official(official_names(source))
    torch.testing.assert_close(built.model.rank_output.weight, source.itm_score.fc.weight[1:])
    assert not built.model.itm_score.fc.weight.requires_grad and built.fresh_heads == []


def test_own_runs_start_other_tasks():
    source, target = module("contrastive", "match"), module("answer", sizes={"image_size": 32})
    weights = {name: value for name, value in source.state_dict().items()}
    assert target.load_pretrained(weights) and target.fresh_heads == ["vqa_classifier"]
    ours, theirs = target.model.cross_modal_text_transform, source.model.cross_modal_text_transform
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_temperature_has_a_rate_of_its_own():
    built = module("contrastive", temperature_lr_scale=0.1)
    groups = built.parameter_groups()
    assert groups[-1]["lr_scale"] == 0.1 and groups[-1]["params"][0] is built.model.temperature
    with torch.no_grad():
        built.model.temperature.fill_(1e-6)
    built.before_forward()
    assert built.model.temperature.item() == pytest.approx(0.001)
